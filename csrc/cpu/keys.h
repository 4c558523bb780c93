// Keys, any 64-bit integers, renumbered from 0 on in the order they first appear: equal numbers fit a lane and index an array.
#pragma once

#include <cstdint>
#include <vector>

namespace fastsupcon::cpu {

class KeyNumbers {
 public:
  // `count`: of the keys that will be numbered, at most.
  explicit KeyNumbers(std::int64_t count) {
    while ((std::int64_t(1) << bits_) < 2 * count) ++bits_;
    slots_.assign(std::size_t(1) << bits_, Slot{0, -1});
  }

  template <class Number>
  void number(const std::int64_t* keys, std::int64_t count, Number* numbers) {
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint64_t at = std::uint64_t(keys[i]) * 0x9e3779b97f4a7c15u >> (64 - bits_);  // Fibonacci hashing, linear probing
      while (slots_[at].number >= 0 && slots_[at].key != keys[i]) at = (at + 1) & (slots_.size() - 1);
      if (slots_[at].number < 0) slots_[at] = {keys[i], size_++};
      numbers[i] = Number(slots_[at].number);
    }
  }

  std::int64_t size() const { return size_; }

 private:
  struct Slot {
    std::int64_t key, number;  // −1: empty
  };
  int bits_ = 4;
  std::int64_t size_ = 0;
  std::vector<Slot> slots_;
};

}  // namespace fastsupcon::cpu
