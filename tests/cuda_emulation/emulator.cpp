#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>

namespace emulation {

Block* block = nullptr;
int thread = 0;
std::size_t progress = 0;

namespace {
constexpr std::size_t kStackBytes = 256 * 1024;
jmp_buf scheduler;
std::string failure;
const std::function<void()>* entry = nullptr;

void fiber_main() {
  (*entry)();
  block->fibers[thread].finished = true;
  ++progress;
  _longjmp(scheduler, 1);
}

// setjmp and longjmp, as swapcontext costs two system calls; makecontext only starts a fiber on its own stack.
void resume(int which, std::vector<ucontext_t>& contexts, std::vector<std::unique_ptr<char[]>>& stacks) {
  thread = which;
  Fiber& fiber = block->fibers[which];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&contexts[which]);
  contexts[which].uc_stack.ss_sp = stacks[which].get();
  contexts[which].uc_stack.ss_size = kStackBytes;
  contexts[which].uc_link = nullptr;
  makecontext(&contexts[which], fiber_main, 0);
  setcontext(&contexts[which]);
}

void run_block() {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) < block->threads) stacks.emplace_back(new char[kStackBytes]);
  std::vector<ucontext_t> contexts(block->threads);
  std::vector<int> warps(block->threads / 32);
  std::iota(warps.begin(), warps.end(), 0);
  std::mt19937 random(static_cast<unsigned>(block->block.x * 7919 + block->block.y));
  int left = block->threads;
  while (left > 0) {
    const std::size_t before = progress;
    std::shuffle(warps.begin(), warps.end(), random);  // warps have no order; lanes meet too often for theirs to matter
    for (const int warp : warps) {
      for (int lane = 0; lane < 32; ++lane) {
        const int which = warp * 32 + lane;
        if (block->fibers[which].finished) continue;
        resume(which, contexts, stacks);
        if (!failure.empty()) throw std::runtime_error(failure);
        if (!block->fibers[which].finished) continue;
        if (!block->fibers[which].waited) throw std::runtime_error("a thread did not wait for the kernel before its own");
        --left;
      }
    }
    if (progress == before) {
      if (block->in_flight.empty()) throw std::runtime_error("deadlock: " + std::to_string(left) + " threads wait for what nobody will do");
      const auto copy = block->in_flight.front();
      block->in_flight.pop_front();
      copy();
    }
  }
  if (!block->in_flight.empty()) throw std::runtime_error("the block ended with TMA copies in flight");
}
}  // namespace

void yield() {
  if (_setjmp(block->fibers[thread].context) == 0) _longjmp(scheduler, 1);
}

void fail(const std::string& what) {
  failure = "thread " + std::to_string(thread) + ": " + what;
  _longjmp(scheduler, 1);
}

void run_grid(Index grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32) throw std::runtime_error("threads must be whole warps");
  std::vector<unsigned char> memory(static_cast<std::size_t>(shared_bytes) + 2048);
  auto* aligned = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  entry = &kernel;
  failure.clear();
  for (std::int64_t z = 0; z < grid.z; ++z) {
    for (std::int64_t y = 0; y < grid.y; ++y) {
      for (std::int64_t x = 0; x < grid.x; ++x) {
        std::memset(aligned, 0xff, static_cast<std::size_t>(shared_bytes));  // shared memory starts as NaN
        Block one;
        one.block = {x, y, z};
        one.grid = grid;
        one.threads = threads;
        one.shared = aligned;
        one.fibers.resize(static_cast<std::size_t>(threads));
        one.warps.resize(static_cast<std::size_t>(threads / 32));
        one.warpgroups.resize(static_cast<std::size_t>((threads + 127) / 128));
        block = &one;
        run_block();
        block = nullptr;
      }
    }
  }
}

}  // namespace emulation
