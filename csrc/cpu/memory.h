// Memory of one call: one block, uninitialised.
//
// glibc's malloc adapts to it: a block it has mapped once is from then on taken from the heap, which is not given back below twice its
// size. Arrays allocated one by one were given back together, and came anew at every call: 380 page faults of up to 3 µs in a backward of
// 1024 × 128.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace fastsupcon::cpu {

class Workspace {
 public:
  // `array` will point to `size` elements, on cache lines of their own, once allocate() has been called. It must not move until then.
  template <class T>
  void want(T*& array, std::int64_t size) {
    array = nullptr;
    if (size <= 0) return;
    wanted_.push_back({&array, bytes_});
    bytes_ += (size * std::int64_t(sizeof(T)) + 63) / 64 * 64;
  }

  // Throws std::bad_alloc. The block has more than it needs, never touched, for two reasons. Twice its size is to be more than what a step's
  // tensors leave free at the heap's end, which would be given back and come anew (350 page faults a step of PSC, 1024 × 128, 100 classes).
  // And a freed hole takes the next tensor only if that fits with its header and alignment, while small tensors come in between.
  void allocate() {
    block_.reset(static_cast<char*>(::operator new(bytes_ + kLine + kSpare)));
    char* const first = block_.get() + (kLine - reinterpret_cast<std::uintptr_t>(block_.get()) % kLine) % kLine;
    for (const auto& [array, offset] : wanted_) {
      char* const place = first + offset;
      std::memcpy(array, &place, sizeof place);
    }
  }

 private:
  static constexpr std::int64_t kSpare = 1 << 21;
  static constexpr std::int64_t kLine = 64;  // aligned by hand: glibc does not put an aligned block where it lay before
  struct Free {
    void operator()(char* p) const { ::operator delete(p); }
  };
  struct Wanted {
    void* array;  // where the pointer to it goes
    std::int64_t offset;
  };
  std::vector<Wanted> wanted_;
  std::int64_t bytes_ = 0;
  std::unique_ptr<char, Free> block_;
};

}  // namespace fastsupcon::cpu
