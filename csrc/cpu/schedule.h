// Which pairs of blocks are worked on in which order. A sum gets its terms in the order of its rounds, which depends on the numbers of
// blocks alone: so any number of threads gives the same bits, and no two of them add to one sum at a time.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastsupcon::cpu {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// An accumulator, copy · blocks + block, and the how-manieth term this is to it.
struct Turn {
  std::int64_t accumulator, round;
};

// Row block i meets column block j. One of them may be absent, ≥ the number of blocks: then the other's turn just passes.
struct Visit {
  std::int64_t i, j;
  Turn rows, columns;
};

// Tasks are taken up in order, and each makes its visits in order. A visit waits until its accumulators have had their earlier rounds,
// which belong to earlier visits of this task or to earlier tasks: the earliest unfinished task never waits for long.
class Schedule {
 public:
  // Every pair of blocks i ≤ j once, as in a round-robin tournament: in a round each block meets one other (round 0: itself). Rows and
  // columns share their accumulators.
  static Schedule self(std::int64_t blocks) {
    const std::int64_t players = blocks + blocks % 2;
    return Schedule(true, players, players, players + (players - 1) * (players / 2), 1, 1, 1);
  }

  // A task takes a block of the longer side through all blocks of the shorter one. Tasks are dealt out to groups, each with its own copy of
  // the shorter side's accumulators; within a group each follows on the heels of the one before. There are groups enough for kAtATime tiles
  // at a time, but no more than make the copies as large as the longer side.
  static Schedule cross(std::int64_t row_blocks, std::int64_t column_blocks) {
    constexpr std::int64_t kAtATime = 16;
    const bool long_rows = row_blocks >= column_blocks;
    const std::int64_t tasks = std::max(row_blocks, column_blocks), steps = std::min(row_blocks, column_blocks);
    const std::int64_t groups = std::max<std::int64_t>(1, std::min(tasks / steps, ceil_div(kAtATime, steps)));
    return Schedule(false, row_blocks, column_blocks, tasks, steps, long_rows ? 1 : groups, long_rows ? groups : 1);
  }

  // Whether the longer side of a cross shape are the rows. Task t works on its block t, and no other task does.
  bool long_rows() const { return row_blocks_ >= column_blocks_; }
  std::int64_t tasks() const { return tasks_; }
  std::int64_t steps() const { return steps_; }  // visits of a task
  std::int64_t row_copies() const { return row_copies_; }
  std::int64_t column_copies() const { return column_copies_; }

  Visit visit(std::int64_t task, std::int64_t step) const {
    if (self_) return meeting(task);
    const std::int64_t groups = row_copies_ * column_copies_;
    const Turn of_long{task, step}, of_short{task % groups * steps_ + step, task / groups};
    return long_rows() ? Visit{task, step, of_long, of_short} : Visit{step, task, of_short, of_long};
  }

 private:
  Schedule(bool self, std::int64_t row_blocks, std::int64_t column_blocks, std::int64_t tasks, std::int64_t steps, std::int64_t row_copies,
           std::int64_t column_copies)
      : self_(self),
        row_blocks_(row_blocks),
        column_blocks_(column_blocks),
        tasks_(tasks),
        steps_(steps),
        row_copies_(row_copies),
        column_copies_(column_copies) {}

  Visit meeting(std::int64_t index) const {
    const std::int64_t players = row_blocks_, pairs = players / 2, circle = players - 1;
    if (index < players) return {index, index, {index, 0}, {index, 0}};
    const std::int64_t before = (index - players) / pairs, pair = (index - players) % pairs;
    const std::int64_t one = (before + pair) % circle, other = pair == 0 ? circle : (before - pair + circle) % circle;
    const std::int64_t i = std::min(one, other), j = std::max(one, other);
    return {i, j, {i, before + 1}, {j, before + 1}};
  }

  bool self_;
  std::int64_t row_blocks_, column_blocks_, tasks_, steps_, row_copies_, column_copies_;
};

}  // namespace fastsupcon::cpu
