// Keys, any 64-bit integers, as numbers from 0 on: equal keys have equal numbers, which fit a lane and index an array.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastsupcon::cpu {

class KeyNumbers {
 public:
  // For the keys of rows and columns, or of rows alone where there are no columns.
  KeyNumbers(const std::int64_t* rows, std::int64_t row_count, const std::int64_t* columns, std::int64_t column_count) {
    std::int64_t largest = rows[0];
    lowest_ = rows[0];
    const auto widen = [&](const std::int64_t* keys, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) {
        lowest_ = std::min(lowest_, keys[i]);
        largest = std::max(largest, keys[i]);
      }
    };
    widen(rows, row_count);
    widen(columns, column_count);
    const std::uint64_t range = std::uint64_t(largest) - std::uint64_t(lowest_), count = std::uint64_t(row_count + column_count);
    if (range < 4 * count + 64) {  // near each other, as class numbers are
      size_ = std::int64_t(range) + 1;
      return;
    }
    while ((std::uint64_t(1) << bits_) < 2 * count) ++bits_;
    slots_.assign(std::size_t(1) << bits_, Slot{0, -1});
  }

  template <class Number>
  void number(const std::int64_t* keys, std::int64_t count, Number* numbers) {
    for (std::int64_t i = 0; i < count; ++i) numbers[i] = Number(slots_.empty() ? keys[i] - lowest_ : lookup(keys[i]));
  }

  std::int64_t size() const { return size_; }  // numbers lie below it

 private:
  struct Slot {
    std::int64_t key, number;  // −1: empty
  };

  // In the order of first appearance, by Fibonacci hashing and linear probing.
  std::int64_t lookup(std::int64_t key) {
    std::uint64_t at = std::uint64_t(key) * 0x9e3779b97f4a7c15u >> (64 - bits_);
    while (slots_[at].number >= 0 && slots_[at].key != key) at = (at + 1) & (slots_.size() - 1);
    if (slots_[at].number < 0) slots_[at] = {key, size_++};
    return slots_[at].number;
  }

  std::int64_t lowest_;
  int bits_ = 4;
  std::int64_t size_ = 0;
  std::vector<Slot> slots_;
};

}  // namespace fastsupcon::cpu
