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
  int arrivals = 0, pending = 0, bytes = 0, phase = 0;
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
  std::map<void*, std::vector<float>> shadow;  // accumulators in flight, by the address of the registers
};

struct Fiber {
  jmp_buf context;
  bool started = false, finished = false;
  bool waited = false;  // for the kernels before (ptx::begin_kernel)
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
  std::map<std::uint32_t, int> unfenced;        // words of shared memory that the asynchronous proxy may not see yet, and who wrote them
};

extern Block* block;
extern int thread;            // the one that runs
extern std::size_t progress;  // counts whatever a waiting thread could be waiting for

void yield();
[[noreturn]] void fail(const std::string& what);
void run_grid(Index grid, int threads, int shared_bytes, const std::function<void()>& kernel);

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
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
    wait_until([&] { return meeting.generation != generation; });
  }
}

}  // namespace emulation
