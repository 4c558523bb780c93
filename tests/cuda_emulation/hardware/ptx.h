// csrc/cuda/hardware/ptx.h in plain C++: the same names, with the semantics of the PTX ISA, over emulator.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "../emulator.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define FASTSUPCON_DEVICE inline

namespace fastsupcon::cuda::ptx {

namespace em = emulation;

inline int thread() { return em::thread; }
inline int lane() { return em::thread % 32; }
inline std::int64_t block_x() { return em::block->block.x; }
inline int block_z() { return static_cast<int>(em::block->block.z); }
inline void begin_kernel() { em::block->fibers[em::thread].waited = true; }

// ---- Shared memory

using Address = std::uint32_t;
inline unsigned char* shared_memory() { return em::block->shared; }
inline Address address(const void* shared) { return static_cast<Address>(static_cast<const unsigned char*>(shared) - em::block->shared); }
inline unsigned char* at(Address address) { return em::block->shared + address; }
inline void store_16_bytes(Address to, const std::uint32_t (&from)[4]) { std::memcpy(at(to), from, 16); }
inline std::uint32_t load_word(Address from) {
  std::uint32_t word;
  std::memcpy(&word, at(from), 4);
  return word;
}
inline void store_word(Address to, std::uint32_t word) {
  if (to / 4 >= em::block->unfenced.size()) em::fail("a store outside of shared memory");
  std::memcpy(at(to), &word, 4);
  em::block->unfenced[to / 4] = em::thread;
  em::block->fibers[em::thread].unfenced.push_back(to / 4);
}

// ---- Threads together

template <class Arguments, class Act>
void with_warp(const void* kind, Arguments& arguments, Act act) {
  em::meet(em::block->warps[em::thread / 32], 32, static_cast<std::size_t>(lane()), kind, arguments, act);
}
template <class Arguments, class Act>
void with_warpgroup(const void* kind, Arguments& arguments, Act act) {
  em::meet(em::block->warpgroups[em::thread / 128].meeting, 128, static_cast<std::size_t>(em::thread % 128), kind, arguments, act);
}

inline void sync_block() {
  static const char kind = 0;
  int nothing = 0;
  em::meet(em::block->everyone, static_cast<std::size_t>(em::block->threads), static_cast<std::size_t>(em::thread), &kind, nothing,
           [](auto&) {});
}
inline int warp() {  // a shuffle on the GPU: all lanes must come
  static const char kind = 0;
  int nothing = 0;
  with_warp(&kind, nothing, [](auto&) {});
  return em::thread / 32;
}
inline void sync_warp() {
  static const char kind = 0;
  int nothing = 0;
  with_warp(&kind, nothing, [](auto&) {});
}
inline void arrive_named(int barrier, int threads) {
  auto& named = em::block->named[barrier];
  ++em::progress;
  if (++named.count == threads) {
    named.count = 0;
    ++named.generation;
  }
}
inline void sync_named(int barrier, int threads) {
  auto& named = em::block->named[barrier];
  const std::size_t generation = named.generation;
  arrive_named(barrier, threads);
  em::wait_for_change(named.generation, generation);
}
inline bool any(bool of_lane) {
  static const char kind = 0;
  bool mine = of_lane;
  with_warp(&kind, mine, [](auto& all) {
    const bool found = std::any_of(all.begin(), all.begin() + 32, [](void* lane) { return *static_cast<bool*>(lane); });
    for (int l = 0; l < 32; ++l) *static_cast<bool*>(all[l]) = found;
  });
  return mine;
}
inline void store_two(float* to, float first, float second) {
  to[0] = first;
  to[1] = second;
}
inline void store_wide(void* to, const void* from, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(to) % bytes) em::fail("a wide store at an unaligned address");
  std::memcpy(to, from, bytes);
}
inline void store_two_words(void* to, std::uint32_t first, std::uint32_t second) {
  const std::uint32_t words[2] = {first, second};
  store_wide(to, words, sizeof words);
}
inline void store_four(float* to, const float (&from)[4]) { store_wide(to, from, sizeof from); }
inline void load_wide(void* to, const void* from, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(from) % bytes) em::fail("a wide load at an unaligned address");
  std::memcpy(to, from, bytes);
}
inline void load_two_words(std::uint32_t (&to)[2], const void* from) { load_wide(to, from, sizeof to); }
inline void load_four(float (&to)[4], const float* from) { load_wide(to, from, sizeof to); }
inline int atomic_add(int* sum, int value) { return std::exchange(*sum, *sum + value); }
inline void fence_device() {}
inline float load_fresh(const float* from) { return *from; }
template <class T>
T shuffle_xor(T value, int mask) {
  static const char kind = 0;
  struct {
    T value;
    int mask;
    T result;
  } mine{value, mask, 0};
  using Mine = decltype(mine);
  with_warp(&kind, mine, [](auto& all) {
    for (int l = 0; l < 32; ++l) static_cast<Mine*>(all[l])->result = static_cast<Mine*>(all[l ^ static_cast<Mine*>(all[l])->mask])->value;
  });
  return mine.result;
}

// ---- Arithmetic

inline float from_bits(std::uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
template <class T>
T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}
inline int first_set(std::uint32_t x) { return __builtin_ctz(x); }
inline std::uint32_t bits(float x) {
  std::uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;  // .ftz
}
inline double reciprocal_root(double x) { return 1.0 / std::sqrt(x); }
inline float log2(float x) { return std::log2(x); }
inline std::uint32_t round_to_tf32(float x) {
  return std::isfinite(x) ? (bits(x) + 0x1000) & ~0x1fffu : bits(x) & ~0x1fffu;  // nearest, ties away from zero
}
inline std::uint16_t to_f16(float x) {
  const auto half = static_cast<_Float16>(x);
  std::uint16_t y;
  std::memcpy(&y, &half, 2);
  return y;
}
inline float from_f16(std::uint16_t x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return static_cast<float>(half);
}
inline std::uint16_t to_bf16(float x) {
  if (x != x) return 0x7fff;
  const std::uint32_t b = bits(x);
  return static_cast<std::uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
inline float from_bf16(std::uint16_t x) { return from_bits(static_cast<std::uint32_t>(x) << 16); }
inline std::uint32_t pack_f16(float low, float high) { return to_f16(low) | static_cast<std::uint32_t>(to_f16(high)) << 16; }
inline std::uint32_t pack_bf16(float low, float high) { return to_bf16(low) | static_cast<std::uint32_t>(to_bf16(high)) << 16; }
// ---- sm_80

inline void copy_async_16_bytes(Address to, const void* from, bool valid) {
  if (to % 16 || reinterpret_cast<std::uintptr_t>(from) % 16) em::fail("cp.async of 16 bytes at an unaligned address");
  std::memset(at(to), 0xff, 16);
  em::block->fibers[em::thread].open.push_back({to, valid ? from : nullptr});
}
inline void copy_async_commit() {
  auto& fiber = em::block->fibers[em::thread];
  fiber.committed.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int PENDING>
void copy_async_wait() {
  auto& groups = em::block->fibers[em::thread].committed;
  for (; static_cast<int>(groups.size()) > PENDING; groups.pop_front()) {
    for (const auto& copy : groups.front()) {
      if (copy.from) std::memcpy(at(copy.to), copy.from, 16);
      else std::memset(at(copy.to), 0, 16);
    }
  }
}

template <bool TRANSPOSED>
void load_matrices_as(std::uint32_t (&out)[4], Address row) {
  static const char kind = 0;
  struct Mine {
    std::uint32_t* out;
    Address row;
  } mine{out, row};
  if (row % 16) em::fail("ldmatrix at an unaligned address");
  with_warp(&kind, mine, [](auto& all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t elements[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(elements[r], at(static_cast<Mine*>(all[8 * matrix + r])->row), 16);
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = 2 * (l % 4);
        const std::uint32_t low = TRANSPOSED ? elements[j][i] : elements[i][j], high = TRANSPOSED ? elements[j + 1][i] : elements[i][j + 1];
        static_cast<Mine*>(all[l])->out[matrix] = low | high << 16;
      }
    }
  });
}
inline void load_matrices(std::uint32_t (&out)[4], Address row) { load_matrices_as<false>(out, row); }
inline void load_matrices_transposed(std::uint32_t (&out)[4], Address row) { load_matrices_as<true>(out, row); }

inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  static const char kind = 0;
  em::mma(&kind, em::Element::f16, {d, a, {b0, b1}});
}
inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  static const char kind = 0;
  em::mma(&kind, em::Element::bf16, {d, a, {b0, b1}});
}
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  static const char kind = 0;
  em::mma(&kind, em::Element::tf32, {d, a, {b0, b1}});
}

// ---- sm_90a

struct TensorMap {
  const unsigned char* rows;
  std::int64_t count, depth;
  int box_rows;
};

template <int>
void raise_registers() {}
template <int>
void lower_registers() {}

inline void barrier_init(Address barrier, int arrivals) { em::block->transactions[barrier] = {arrivals, arrivals, 0, 0}; }
inline void barrier_init_done() {}
inline void barrier_settle(em::Transaction& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    barrier.phase ^= 1;
    ++em::progress;
  }
}
inline em::Transaction& transaction(Address barrier) {
  const auto found = em::block->transactions.find(barrier);
  if (found == em::block->transactions.end()) em::fail("no barrier was initialised here");
  return found->second;
}
inline void barrier_arrive_expecting(Address barrier, int bytes) {
  auto& of = transaction(barrier);
  if (of.pending == 0) em::fail("more arrivals than the barrier expects");
  of.bytes += bytes;
  --of.pending;
  ++em::progress;
  barrier_settle(of);
}
inline void barrier_arrive(Address barrier) { barrier_arrive_expecting(barrier, 0); }
inline void barrier_wait(Address barrier, int parity) {
  auto& of = transaction(barrier);
  em::wait_for_change(of.phase, static_cast<std::size_t>(parity));
}

using em::swizzled;

inline void copy_box_async(Address to, const TensorMap& map, int column, int row, Address barrier) {
  if (to % 1024) em::fail("a swizzled box must start at a multiple of 1024 bytes");
  const int bytes = map.box_rows * 128;
  std::memset(at(to), 0xff, static_cast<std::size_t>(bytes));
  em::block->in_flight.push_back([=] {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < 64; c += 8) {  // 16 bytes at a time, which the swizzle leaves together
        std::uint16_t chunk[8] = {};
        const std::int64_t i = std::int64_t{row} + r, j = std::int64_t{column} + c;
        for (int e = 0; e < 8; ++e) {
          if (i >= 0 && i < map.count && j + e >= 0 && j + e < map.depth) std::memcpy(&chunk[e], map.rows + (i * map.depth + j + e) * 2, 2);
        }
        std::memcpy(at(swizzled(to + static_cast<Address>(r * 128 + c * 2))), chunk, 16);
      }
    }
    auto& of = transaction(barrier);
    of.bytes -= bytes;
    barrier_settle(of);
    ++em::progress;
  });
}

inline void copy_bulk_async(Address to, const void* from, int bytes, Address barrier) {
  if (to % 16 || reinterpret_cast<std::uintptr_t>(from) % 16 || bytes % 16) em::fail("a bulk copy must be of whole 16 bytes");
  std::memset(at(to), 0xff, static_cast<std::size_t>(bytes));
  em::block->in_flight.push_back([=] {
    std::memcpy(at(to), from, static_cast<std::size_t>(bytes));
    auto& of = transaction(barrier);
    of.bytes -= bytes;
    barrier_settle(of);
    ++em::progress;
  });
}

inline void fence_async_proxy() {
  auto& mine = em::block->fibers[em::thread].unfenced;
  for (const auto word : mine) {
    if (em::block->unfenced[word] == em::thread) em::block->unfenced[word] = -1;
  }
  mine.clear();
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  static const char kind = 0;
  int nothing = 0;
  auto& group = em::block->warpgroups[em::thread / 128];
  with_warpgroup(&kind, nothing, [&](auto&) {
    group.committed.push_back(std::move(group.open));
    group.open.clear();
  });
}
template <int PENDING>
void wgmma_wait() {
  static const char kind = 0;
  em::wait_for_wgmma(&kind, PENDING);
}
template <class T, int N>
void hold(T (&)[N][4]) {}

template <bool BF16, int N>
struct Wgmma {
  static void shared(float (&d)[N / 8][4], std::uint64_t a, std::uint64_t b, bool accumulate) {
    static const char kind = 0;
    em::issue_wgmma(&kind, {N, BF16, false, false}, {&d[0][0], {}, a, b, accumulate});
  }
  static void shared_row_major(float (&d)[N / 8][4], std::uint64_t a, std::uint64_t b) {
    static const char kind = 0;
    em::issue_wgmma(&kind, {N, BF16, false, true}, {&d[0][0], {}, a, b, true});
  }
  static void registers(float (&d)[N / 8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    static const char kind = 0;
    em::issue_wgmma(&kind, {N, BF16, true, false}, {&d[0][0], {a[0], a[1], a[2], a[3]}, 0, b, true});
  }
  static void registers_row_major(float (&d)[N / 8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    static const char kind = 0;
    em::issue_wgmma(&kind, {N, BF16, true, true}, {&d[0][0], {a[0], a[1], a[2], a[3]}, 0, b, true});
  }
};

}  // namespace fastsupcon::cuda::ptx
