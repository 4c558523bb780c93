# The CPU kernels. Each unit_*.cpp is one template compiled for one instruction set; dispatch.cpp chooses at run time.
target_sources(_C PRIVATE csrc/cpu/pairs.cpp csrc/cpu/line.cpp csrc/cpu/team.cpp csrc/cpu/dispatch.cpp)

set(FASTSUPCON_CPU_OPTIMIZE -O3 CACHE STRING "How far the CPU kernels are optimised: sanitizers' checks make -O3 take half an hour")

function(fastsupcon_cpu_unit source)
  target_sources(_C PRIVATE ${source})
  # no vector crosses a function that is not inlined, so its calling convention does not matter
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
                              "${FASTSUPCON_CPU_OPTIMIZE};-ffp-contract=fast;-fno-math-errno;-fno-trapping-math;-Wno-psabi;\
-Wno-ignored-attributes;${ARGN}")
endfunction()

set(avx2 -mavx2 -mfma -mf16c)
set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)

fastsupcon_cpu_unit(csrc/cpu/unit_generic.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  fastsupcon_cpu_unit(csrc/cpu/unit_avx2.cpp ${avx2})
  fastsupcon_cpu_unit(csrc/cpu/unit_avx512.cpp ${avx512})
  set_property(SOURCE csrc/cpu/dispatch.cpp APPEND PROPERTY COMPILE_DEFINITIONS FASTSUPCON_X86)
endif()
