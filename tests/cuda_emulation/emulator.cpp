#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <unordered_set>

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
  static std::vector<ucontext_t> contexts;
  if (static_cast<int>(contexts.size()) < block->threads) contexts.resize(static_cast<std::size_t>(block->threads));
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
        const Fiber& fiber = block->fibers[which];
        if (fiber.finished || (fiber.watched && *fiber.watched == fiber.seen)) continue;
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
        one.unfenced.assign(static_cast<std::size_t>(shared_bytes) / 4 + 1, -1);
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

namespace {
float from_bits(std::uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
std::uint32_t bits(float x) {
  std::uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}

// Of every half number: without F16C each conversion is a call.
const float* halves(bool is_bf16) {
  static std::vector<float> tables[2];
  auto& table = tables[is_bf16];
  if (table.empty()) {
    table.resize(1 << 16);
    for (std::uint32_t x = 0; x < 1 << 16; ++x) {
      const auto word = static_cast<std::uint16_t>(x);
      _Float16 half;
      std::memcpy(&half, &word, 2);
      table[x] = is_bf16 ? from_bits(x << 16) : static_cast<float>(half);
    }
  }
  return table.data();
}

float round_toward_zero(double exact) {
  const auto nearest = static_cast<float>(exact);
  const bool too_far = std::isfinite(nearest) && std::abs(static_cast<double>(nearest)) > std::abs(exact);
  return too_far ? from_bits(bits(nearest) - 1) : nearest;  // the neighbour of the smaller magnitude
}

// sums += a b, in the order of the depth.
template <int DEPTH>
void multiply(int rows, int columns, const double* __restrict__ a, const double* __restrict__ b, double* __restrict__ sums) {
  for (int row = 0; row < rows; ++row, sums += columns) {
    for (int k = 0; k < DEPTH; ++k) {
      const double factor = a[row * DEPTH + k];
      for (int column = 0; column < columns; ++column) sums[column] += factor * b[k * columns + column];
    }
  }
}

// Fragments of mma.m16n8kK, from the figures of the PTX ISA. K = 16: two elements per register; K = 8 (tf32): one.
template <int K, class Of>
void mma_of(const std::vector<void*>& all, Of element) {
  constexpr int per_word = K / 8;
  static double left[16 * K], right[K * 8], sums[16 * 8];
  for (int l = 0; l < 32; ++l) {
    const auto& of = *static_cast<MmaOperands*>(all[l]);
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < per_word; ++e) {
        left[(l / 4 + 8 * (i % 2)) * K + (l % 4) * per_word + e + (i / 2) * (K / 2)] = element(of.a[i], e);
      }
      sums[(l / 4 + 8 * (i / 2)) * 8 + 2 * (l % 4) + i % 2] = of.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < per_word; ++e) right[((l % 4) * per_word + e + i * (K / 2)) * 8 + l / 4] = element(of.b[i], e);
    }
  }
  multiply<K>(16, 8, left, right, sums);
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      static_cast<MmaOperands*>(all[l])->d[i] = round_toward_zero(sums[(l / 4 + 8 * (i / 2)) * 8 + 2 * (l % 4) + i % 2]);
    }
  }
}

// Shared-memory operand of wgmma: element (k, mn) of the 16 × N or 16 × 64 slice a descriptor names.
float operand_element(std::uint64_t descriptor, bool is_row_major, int k, int mn, const float* halves) {
  const auto start = static_cast<std::uint32_t>(descriptor & 0x3fff) << 4;
  const auto leading = static_cast<std::uint32_t>((descriptor >> 16) & 0x3fff) << 4;
  const auto stride = static_cast<std::uint32_t>((descriptor >> 32) & 0x3fff) << 4;
  const std::uint32_t place = swizzled(is_row_major ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                                    : start + mn / 8 * stride + mn % 8 * 128 + k * 2);
  if (place / 4 >= block->unfenced.size()) fail("wgmma reads outside of shared memory");
  if (block->unfenced[place / 4] >= 0) fail("wgmma reads what was written without a fence for the asynchronous proxy");
  std::uint16_t element;
  std::memcpy(&element, block->shared + place, 2);
  return halves[element];
}
void check_descriptor(std::uint64_t descriptor) {
  if (descriptor >> 62 != 1) fail("only descriptors of the 128-byte swizzle are known");
  if ((descriptor >> 49) & 7) fail("a base offset is not known");
}

void run_wgmma(Warpgroup& group, const WgmmaForm& form, const std::vector<WgmmaOperands>& threads) {
  static double a[64 * 16], b[16 * 256], sums[64 * 256];
  const int columns = form.columns;
  const float* table = halves(form.is_bf16);
  check_descriptor(threads[0].b_at);
  if (!form.from_registers) check_descriptor(threads[0].a_at);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; ++n) b[k * columns + n] = operand_element(threads[0].b_at, form.is_row_major, k, n, table);
  }
  std::vector<float*> accumulators;
  for (int t = 0; t < 128; ++t) {
    const int first = t / 32 * 16 + t % 32 / 4;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        const int row = first + 8 * (i % 2), k = 2 * (t % 4) + e + 8 * (i / 2);
        a[row * 16 + k] = form.from_registers ? table[threads[t].a[i] >> (16 * e) & 0xffff]
                                              : operand_element(threads[t].a_at, false, k, row, table);
      }
    }
    accumulators.push_back(group.shadow.at(threads[t].d).data());
    for (int i = 0; i < columns / 2; ++i) {
      sums[(first + 8 * (i / 2 % 2)) * columns + i / 4 * 8 + 2 * (t % 4) + i % 2] = threads[t].accumulate ? accumulators[t][i] : 0.0f;
    }
  }
  multiply<16>(64, columns, a, b, sums);
  for (int t = 0; t < 128; ++t) {
    const int first = t / 32 * 16 + t % 32 / 4;
    for (int i = 0; i < columns / 2; ++i) {
      accumulators[t][i] = round_toward_zero(sums[(first + 8 * (i / 2 % 2)) * columns + i / 4 * 8 + 2 * (t % 4) + i % 2]);
    }
  }
}
}  // namespace

void mma(const void* kind, Element element, MmaOperands mine) {
  meet(block->warps[thread / 32], 32, static_cast<std::size_t>(thread % 32), kind, mine, [&](auto& all) {
    if (element == Element::tf32) {
      mma_of<8>(all, [](std::uint32_t word, int) { return from_bits(word & ~0x1fffu); });  // the unit does not read the low 13 bits
    } else {
      mma_of<16>(all, [table = halves(element == Element::bf16)](std::uint32_t word, int e) { return table[word >> (16 * e) & 0xffff]; });
    }
  });
}

void issue_wgmma(const void* kind, WgmmaForm form, WgmmaOperands mine) {
  auto& group = block->warpgroups[thread / 128];
  meet(group.meeting, 128, static_cast<std::size_t>(thread % 128), kind, mine, [&](auto& all) {
    std::vector<WgmmaOperands> threads;
    Product product;
    for (int t = 0; t < 128; ++t) {
      const auto& of = *static_cast<WgmmaOperands*>(all[t]);
      if (of.a_at != threads.emplace_back(of).a_at || of.b_at != threads[0].b_at) fail("descriptors differ within a warpgroup");
      product.accumulators.push_back(of.d);
      if (!group.shadow.count(of.d)) {
        group.shadow[of.d].assign(of.d, of.d + form.columns / 2);
        std::fill(of.d, of.d + form.columns / 2, std::numeric_limits<float>::quiet_NaN());
      }
    }
    product.run = [&group, form, threads] { run_wgmma(group, form, threads); };
    group.open.push_back(std::move(product));
  });
}

void wait_for_wgmma(const void* kind, int pending) {
  int nothing = 0;
  auto& group = block->warpgroups[thread / 128];
  meet(group.meeting, 128, static_cast<std::size_t>(thread % 128), kind, nothing, [&](auto&) {
    for (; static_cast<int>(group.committed.size()) > pending; group.committed.pop_front()) {
      for (auto& product : group.committed.front()) product.run();
    }
    std::unordered_set<void*> busy;
    for (const auto& products : group.committed) {
      for (const auto& product : products) busy.insert(product.accumulators.begin(), product.accumulators.end());
    }
    for (auto shadow = group.shadow.begin(); shadow != group.shadow.end();) {  // hand back what nothing in flight adds to
      if (busy.count(shadow->first)) {
        ++shadow;
        continue;
      }
      std::memcpy(shadow->first, shadow->second.data(), shadow->second.size() * sizeof(float));
      shadow = group.shadow.erase(shadow);
    }
  });
}

}  // namespace emulation
