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
  --block->left;
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
  const int place = block->rank * block->threads + which;
  getcontext(&contexts[place]);
  contexts[place].uc_stack.ss_sp = stacks[place].get();
  contexts[place].uc_stack.ss_size = kStackBytes;
  contexts[place].uc_link = nullptr;
  makecontext(&contexts[place], fiber_main, 0);
  setcontext(&contexts[place]);
}

// One round: the blocks in random order, each for so many turns of its warps. Warps have no order either; lanes meet too often for theirs
// to matter.
void run_round(Cluster& cluster, int most_turns, std::mt19937& random, std::vector<ucontext_t>& contexts,
               std::vector<std::unique_ptr<char[]>>& stacks) {
  std::vector<Block*> order;
  for (const auto& of : cluster.blocks) order.push_back(of.get());
  std::shuffle(order.begin(), order.end(), random);
  std::vector<int> warps(order[0]->threads / 32);
  std::iota(warps.begin(), warps.end(), 0);
  for (Block* of : order) {
    for (int turns = most_turns == 1 ? 1 : static_cast<int>(random() % (most_turns + 1)); turns > 0; --turns) {
      std::shuffle(warps.begin(), warps.end(), random);
      for (const int warp : warps) {
        for (int lane = 0; lane < 32; ++lane) {
          block = of;
          if (block->fibers[warp * 32 + lane].finished) continue;
          resume(warp * 32 + lane, contexts, stacks);
          if (!failure.empty()) throw std::runtime_error(failure);
        }
      }
    }
  }
}

void run_cluster(Cluster& cluster) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  const int threads = cluster.blocks[0]->threads * static_cast<int>(cluster.blocks.size());
  while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new char[kStackBytes]);
  std::vector<ucontext_t> contexts(threads);
  std::mt19937 random(static_cast<unsigned>(cluster.blocks[0]->block.x * 7919 + cluster.blocks[0]->block.y));
  const auto left = [&] {
    int sum = 0;
    for (const auto& of : cluster.blocks) sum += of->left;
    return sum;
  };
  while (left() > 0) {
    std::size_t before = progress;
    if (cluster.blocks.size() > 1) run_round(cluster, 8, random, contexts, stacks);
    if (progress != before) continue;
    run_round(cluster, 1, random, contexts, stacks);  // with all threads
    if (progress != before) continue;
    if (cluster.in_flight.empty()) throw std::runtime_error("deadlock: " + std::to_string(left()) + " threads wait for what nobody will do");
    const auto copy = cluster.in_flight.front();
    cluster.in_flight.pop_front();
    copy();
    if (!failure.empty()) throw std::runtime_error(failure);
  }
  if (!cluster.in_flight.empty()) throw std::runtime_error("the block ended with TMA copies in flight");
}
}  // namespace

void yield() {
  if (_setjmp(block->fibers[thread].context) == 0) _longjmp(scheduler, 1);
}

void fail(const std::string& what) {
  failure = "thread " + std::to_string(thread) + " of block " + std::to_string(block->block.x) + ": " + what;
  _longjmp(scheduler, 1);
}

void run_grid(Index grid, int cluster_blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32) throw std::runtime_error("threads must be whole warps");
  if (grid.x % cluster_blocks) throw std::runtime_error("a grid must be whole clusters");
  std::vector<std::vector<unsigned char>> memory(cluster_blocks);
  entry = &kernel;
  failure.clear();
  for (std::int64_t z = 0; z < grid.z; ++z) {
    for (std::int64_t y = 0; y < grid.y; ++y) {
      for (std::int64_t x = 0; x < grid.x; x += cluster_blocks) {
        Cluster cluster;
        for (int rank = 0; rank < cluster_blocks; ++rank) {
          memory[rank].assign(static_cast<std::size_t>(shared_bytes) + 2048, 0xff);  // shared memory starts as NaN
          Block& one = *cluster.blocks.emplace_back(std::make_unique<Block>());
          one.cluster = &cluster;
          one.rank = rank;
          one.block = {x + rank, y, z};
          one.grid = grid;
          one.threads = one.left = threads;
          one.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(memory[rank].data()) + 1023) / 1024 * 1024);
          one.fibers.resize(static_cast<std::size_t>(threads));
          one.warps.resize(static_cast<std::size_t>(threads / 32));
          one.warpgroups.resize(static_cast<std::size_t>((threads + 127) / 128));
        }
        run_cluster(cluster);
        block = nullptr;
      }
    }
  }
}

}  // namespace emulation
