#!/usr/bin/env bash
# The extension's CPU half under AddressSanitizer and UndefinedBehaviorSanitizer, and tests/test_cpu.py and the contract on it, in every
# instruction set this processor has, two at a time. Builds into a temporary directory. Needs GCC and what `pip install .` needs; PYTHON names
# the interpreter; arguments go to pytest (-k for fewer tests).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/fastsupcon"
cp -r "$root/fastsupcon/." "$work/fastsupcon"
rm -f "$work"/fastsupcon/_C*.so
# -O1, for the checks make -O3 take half an hour; null and size AddressSanitizer sees itself.
cmake -S "$root" -B "$work/build" -GNinja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTSUPCON_NO_CUDA=ON \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DFASTSUPCON_OUTPUT_DIRECTORY="$work/fastsupcon" \
  -DFASTSUPCON_CPU_OPTIMIZE=-O1 -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all -fno-omit-frame-pointer -Wno-psabi" \
  > "$work/configure.log"
cmake --build "$work/build" > "$work/build.log" || { tail -40 "$work/build.log"; exit 1; }

mkdir "$work/tests"
cp "$root"/tests/{__init__,conftest,contract,interpreter,processes,test_contract,test_cpu}.py "$work/tests"
cd "$work"
# The interpreter is not instrumented: the runtime is loaded first, with libstdc++ or it finds no exceptions to intercept; and what Python itself
# leaks at exit is not counted.
export ASAN_OPTIONS=detect_leaks=0:handle_segv=0 OMP_NUM_THREADS=1 PYTHONPATH=$work:$work/tests
preload="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
sanitized=(env LD_PRELOAD="$preload" "$python")
"${sanitized[@]}" -c 'from fastsupcon import _C; print(*_C.cpu.instruction_sets(), sep="\n")' |
  xargs -P 2 -I{} env FASTSUPCON_CPU={} "${sanitized[@]}" -m pytest -q -p no:cacheprovider --rootdir="$work" tests/test_cpu.py tests/test_contract.py -k cpu "$@"
