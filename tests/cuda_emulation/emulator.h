// One thread block on the CPU: every GPU thread is a fiber, and runs until it must wait for others.
//
// What is asynchronous on the GPU happens as late as the rules allow, and until then its destination holds NaN: a copy is made when someone
// waits for it (cp.async) or when nobody can go on (TMA), a wgmma is computed at its wait_group. A missing wait, a stage given back too early
// or a barrier too few therefore shows as NaN or as wrong numbers, and a barrier too many as a deadlock, which is reported.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulation {

struct Index {
  std::int64_t x = 0, y = 0, z = 0;
};

// A meeting of a fixed number of threads, in which the last to come acts for all.
struct Meeting {
  const void* kind = nullptr;
  std::size_t count = 0, generation = 0;
  std::vector<void*> arguments;
};

struct Copy {  // cp.async
  std::uint32_t to;
  const void* from;
};

struct Transaction {  // mbarrier
  int arrivals = 0, pending = 0, bytes = 0;
  std::size_t phase = 0;
};

struct NamedBarrier {
  int count = 0;
  std::size_t generation = 0;
};

struct Product {  // wgmma, of one warpgroup
  std::function<void()> run;
  std::vector<void*> accumulators;  // of each thread
};

struct Warpgroup {
  Meeting meeting;
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
  std::unordered_map<void*, std::vector<float>> shadow;  // accumulators in flight, by the address of the registers
};

struct Fiber {
  jmp_buf context;
  bool started = false, finished = false;
  bool waited = false;  // for the kernels before (ptx::begin_kernel)
  const std::size_t* watched = nullptr;  // a number that this fiber waits to see differ from seen: until then it is not resumed
  std::size_t seen = 0;
  std::vector<std::uint32_t> unfenced;  // words of shared memory that it wrote and the asynchronous proxy may not see yet
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

struct Block {
  Index block, grid;
  int threads = 0;
  unsigned char* shared = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<Warpgroup> warpgroups;
  Meeting everyone;
  std::map<int, NamedBarrier> named;
  std::map<std::uint32_t, Transaction> transactions;
  std::deque<std::function<void()>> in_flight;  // TMA
  std::vector<int> unfenced;                    // of each word of shared memory, who wrote it without a fence since, or -1
};

extern Block* block;
extern int thread;            // the one that runs
extern std::size_t progress;  // counts whatever a waiting thread could be waiting for

void yield();
[[noreturn]] void fail(const std::string& what);
void run_grid(Index grid, int threads, int shared_bytes, const std::function<void()>& kernel);

inline void wait_for_change(const std::size_t& number, std::size_t old) {
  Fiber& fiber = block->fibers[thread];
  while (number == old) {
    fiber.watched = &number;
    fiber.seen = old;
    yield();
  }
  fiber.watched = nullptr;
  ++progress;
}

template <class Arguments, class Act>
void meet(Meeting& meeting, std::size_t size, std::size_t place, const void* kind, Arguments& arguments, Act act) {
  if (meeting.count == 0) {
    meeting.kind = kind;
    meeting.arguments.assign(size, nullptr);
  }
  if (meeting.kind != kind) fail("threads of one warp or warpgroup are at different instructions");
  meeting.arguments[place] = &arguments;
  ++progress;
  const std::size_t generation = meeting.generation;
  if (++meeting.count == size) {
    act(meeting.arguments);
    meeting.count = 0;
    ++meeting.generation;
  } else {
    wait_for_change(meeting.generation, generation);
  }
}

// What tensor cores give: the products and the accumulator in one sum, exact here, rounded once and toward zero. GPUs also cut bits off the
// smaller terms as they align them, which differs between generations. Half the time of the tests goes here: emulator.cpp alone is compiled
// with all optimisation.

enum class Element { f16, bf16, tf32 };

struct MmaOperands {  // of one lane
  float* d;
  const std::uint32_t* a;
  std::uint32_t b[2];
};
void mma(const void* kind, Element element, MmaOperands mine);

struct WgmmaForm {
  int columns;
  bool is_bf16, from_registers, is_row_major;  // where a comes from; how b lies
};
struct WgmmaOperands {  // of one thread
  float* d;
  std::uint32_t a[4];
  std::uint64_t a_at, b_at;
  bool accumulate;
};
void issue_wgmma(const void* kind, WgmmaForm form, WgmmaOperands mine);
void wait_for_wgmma(const void* kind, int pending);

inline std::uint32_t swizzled(std::uint32_t address) { return address ^ ((address >> 3) & 0x70); }  // of 128 bytes: bits 4-6 by bits 7-9

}  // namespace emulation
