// The driver: cuts a problem into tiles, and gives each sum its terms in an order that depends on the problem's sizes alone, so that any number
// of threads gives the same bits. The arithmetic is in tiles.h, the threads in team.h.
#include "lse.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "team.h"

namespace fastsupcon::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised memory, aligned to a cache line. Throws std::bad_alloc.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : data_(::operator new(bytes, kAlign)) {}
  char* data() const { return static_cast<char*>(data_.get()); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<void, Free> data_;
};

// Threads worth starting: each gets at least 8 M multiply-adds (about 100 µs), and there are no more of them than tasks.
int threads_for(int allowed, double multiply_adds, std::int64_t tasks) {
  return int(std::max(1.0, std::min({double(allowed), multiply_adds / 8e6, double(tasks)})));
}

// One working memory for each thread, `bytes` plus what keeps them on cache lines of their own.
class Scratches {
 public:
  Scratches(int threads, std::size_t bytes) : stride_(round_up(std::int64_t(bytes), 64)), buffer_(stride_ * threads) {}
  char* of(int member) const { return buffer_.data() + stride_ * member; }

 private:
  std::size_t stride_;
  Buffer buffer_;
};

// Counts, for an accumulator, the rounds whose term it has got. Every accumulator gets one term per round, in the order of the rounds.
class Rounds {
 public:
  explicit Rounds(std::int64_t accumulators) : done_(accumulators) {}
  void wait(std::int64_t accumulator, std::int64_t round) const {
    for (Backoff backoff; done_[accumulator].load(std::memory_order_acquire) != round;) backoff.pause();
  }
  void finish(std::int64_t accumulator, std::int64_t round) { done_[accumulator].store(round + 1, std::memory_order_release); }

 private:
  std::vector<std::atomic<std::int64_t>> done_;
};

// ---- Self shape ---------------------------------------------------------------------------------------------------------------------

// Every pair of blocks once, as in a round-robin tournament: in a round each block meets one other (round 0: itself), so the tiles of a round
// write to different blocks, and every block gets its terms in the order of the rounds. A tile starts when both blocks have finished the round
// before; as tiles are handed out in order, the earliest unfinished one never waits. An odd block out meets nobody.
template <class Tile>
void tournament(Team& team, std::int64_t blocks, Rounds& rounds, const Tile& tile) {
  const std::int64_t players = blocks + blocks % 2, pairs = players / 2;
  team.each(players + (players - 1) * pairs, [&](std::int64_t task) {
    std::int64_t round = 0, i = task, j = task;
    if (task >= players) {
      round = 1 + (task - players) / pairs;
      const std::int64_t pair = (task - players) % pairs, circle = players - 1;
      i = (round - 1 + pair) % circle;
      j = pair == 0 ? circle : (round - 1 - pair + circle) % circle;
      if (i > j) std::swap(i, j);
    }
    if (i >= blocks) return;
    const bool met = j < blocks;
    rounds.wait(i, round);
    if (met && j != i) rounds.wait(j, round);
    if (met) tile(i, j);
    rounds.finish(i, round);
    if (met && j != i) rounds.finish(j, round);
  });
}

// Larger blocks need fewer passes over the gradient; smaller ones give more tiles to share out, and waste less on the diagonal.
std::int64_t self_block(std::int64_t rows, int panel) {
  const std::int64_t block = rows <= 384 ? 64 : rows <= 1536 ? 128 : kMaxBlock;
  return std::max<std::int64_t>(block / panel, 1) * panel;
}

template <class Sum>
class SelfRun {
 public:
  SelfRun(const LseProblem& problem, int threads)
      : problem_(problem),
        kernels_(*unit_in_use().kernels[int(problem.scalar)]),
        block_(self_block(problem.rows, kernels_.panel)),
        blocks_(ceil_div(problem.rows, block_)),
        threads_(threads_for(threads, double(problem.rows) * problem.rows * problem.depth / 2, blocks_)),
        panels_(ceil_div(problem.rows, kernels_.panel) * kernels_.panel_bytes(problem.depth)),
        scratches_(threads_, kernels_.scratch_bytes),
        largest_squares_(blocks_),
        rounds_(blocks_) {}

  void forward(Sum* lse) {
    const Buffer maxima(problem_.rows * sizeof(Sum));
    Team::run(threads_, [&](Team& team, int member) {
      SelfProblem tiles = prepare(team, [&](std::int64_t first, std::int64_t count) {
        std::fill_n(lse + first, count, Sum(0));  // the totals, until they are finished
        std::fill_n(maxima.as<Sum>() + first, count, -std::numeric_limits<Sum>::infinity());
      });
      tiles.total = lse;
      tiles.maximum = maxima.as<Sum>();
      tournament(team, blocks_, rounds_, [&](std::int64_t i, std::int64_t j) { kernels_.self_forward(tiles, i, j, scratches_.of(member)); });
      each_block(team, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t i = first; i < first + count; ++i) {
          const double shift = tiles.fixed ? tiles.shift * kLn2 : std::isfinite(tiles_maximum(maxima, i)) ? tiles_maximum(maxima, i) : 0;
          lse[i] = Sum(shift + std::log(double(lse[i])));
        }
      });
    });
  }

  void backward(const Sum* lse, const Sum* grad, void* da) {
    const Buffer weights(problem_.rows * sizeof(Sum));
    const bool in_place = problem_.scalar == Scalar::f32 || problem_.scalar == Scalar::f64;
    const Buffer sums(in_place ? 0 : problem_.rows * problem_.depth * sizeof(Sum));
    Sum* const gradient = in_place ? static_cast<Sum*>(da) : sums.as<Sum>();
    const int exponent = common_exponent(grad, problem_.rows);
    Team::run(threads_, [&](Team& team, int member) {
      SelfProblem tiles = prepare(team, [&](std::int64_t first, std::int64_t count) {
        std::fill_n(gradient + first * problem_.depth, count * problem_.depth, Sum(0));
      });
      each_block(team, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t i = first; i < first + count; ++i) {
          const double g = std::ldexp(double(grad[i]), -exponent);
          weights.as<Sum>()[i] = Sum(!tiles.fixed ? g : std::isinf(lse[i]) && lse[i] < 0 ? 0 : g * std::exp2(tiles.shift - lse[i] * kLog2E));
        }
      });
      tiles.weight = weights.as<Sum>();
      tiles.lse = lse;
      tiles.gradient = gradient;
      tournament(team, blocks_, rounds_, [&](std::int64_t i, std::int64_t j) { kernels_.self_backward(tiles, i, j, scratches_.of(member)); });
      each_block(team, [&](std::int64_t first, std::int64_t count) {
        char* const elements = static_cast<char*>(da) + first * problem_.depth * element_size(problem_.scalar);
        kernels_.finish(gradient + first * problem_.depth, count * problem_.depth, problem_.scale * std::ldexp(1.0, exponent), elements);
      });
    });
  }

  static std::size_t element_size(Scalar scalar) { return scalar == Scalar::f64 ? 8 : scalar == Scalar::f32 ? 4 : 2; }

  // e with |g_i| ≤ 2^e, so that g_i 2^(shift − lse_i log2 e) cannot overflow however large the gradients are; 0 if there is none.
  static int common_exponent(const Sum* grad, std::int64_t count) {
    Sum largest = 0;
    for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(grad[i]));
    return largest > 0 && std::isfinite(largest) ? std::ilogb(largest) + 1 : 0;
  }

 private:
  static Sum tiles_maximum(const Buffer& maxima, std::int64_t i) { return maxima.as<Sum>()[i]; }

  template <class Task>
  void each_block(Team& team, const Task& task) const {
    team.each(blocks_, [&](std::int64_t block) { task(block * block_, std::min(block_, problem_.rows - block * block_)); });
  }

  // Packs the rows, and decides on the shift: the same in every thread.
  template <class Task>
  SelfProblem prepare(Team& team, const Task& also) {
    each_block(team, [&](std::int64_t first, std::int64_t count) {
      const char* rows = static_cast<const char*>(problem_.a) + first * problem_.depth * element_size(problem_.scalar);
      kernels_.pack(rows, count, problem_.depth, panels_.data() + first / kernels_.panel * kernels_.panel_bytes(problem_.depth));
      largest_squares_[first / block_] = problem_.unit_rows ? 1 : kernels_.largest_square(rows, count, problem_.depth);
      also(first, count);
    });
    // 2^(s log2 e − shift) stays a normal number for all |s| ≤ c if 2c < 126 ln 2 (f64: 1022 ln 2), less 2 % for rounding. A NaN or inf norm
    // is not safe, and the careful path shows it.
    double shift = 0;
    for (const double square : largest_squares_) shift = square > shift || std::isnan(square) ? square : shift;
    shift *= std::abs(problem_.scale);
    const bool fixed = 2 * 1.02 * shift < -(std::numeric_limits<Sum>::min_exponent - 1) * kLn2;
    SelfProblem tiles{};
    tiles.rows = problem_.a;
    tiles.panels = panels_.data();
    tiles.count = problem_.rows;
    tiles.depth = problem_.depth;
    tiles.block = block_;
    tiles.scale = problem_.scale;
    tiles.fixed = fixed;
    tiles.shift = fixed ? int(std::ceil(shift * kLog2E)) : 0;
    return tiles;
  }

  const LseProblem& problem_;
  const Kernels& kernels_;
  const std::int64_t block_, blocks_;
  const int threads_;
  const Buffer panels_;
  const Scratches scratches_;
  std::vector<double> largest_squares_;
  Rounds rounds_;
};

// ---- Cross shape --------------------------------------------------------------------------------------------------------------------

template <class Sum>
class CrossRun {
 public:
  CrossRun(const LseProblem& problem, int threads)
      : problem_(problem),
        kernels_(*unit_in_use().kernels[int(problem.scalar)]),
        row_block_(std::min<std::int64_t>(kMaxBlock, round_up(problem.rows, kernels_.panel))),
        column_block_(std::min<std::int64_t>(kMaxBlock, round_up(problem.columns, kernels_.panel))),
        row_blocks_(ceil_div(problem.rows, row_block_)),
        column_blocks_(ceil_div(problem.columns, column_block_)),
        multiply_adds_(double(problem.rows) * problem.columns * problem.depth),
        threads_(threads) {
    tiles_.a = problem.a;
    tiles_.b = problem.b;
    tiles_.rows = problem.rows;
    tiles_.columns = problem.columns;
    tiles_.depth = problem.depth;
    tiles_.row_block = row_block_;
    tiles_.column_block = column_block_;
    tiles_.scale = problem.scale;
    tiles_.bias = problem.bias;
    tiles_.skip = problem.skip;
    tiles_.row_labels = problem.row_labels;
    tiles_.column_labels = problem.column_labels;
  }

  // A task is a group of row blocks, packed once, against a group of column blocks, each packed once for the group; where there are few
  // groups of rows the columns are split, and the parts joined in order.
  void forward(Sum* lse) {
    const std::int64_t rows_at_once = std::clamp<std::int64_t>(kPackedBytes / block_bytes(row_block_), 1, 4);
    const std::int64_t row_groups = ceil_div(row_blocks_, rows_at_once);
    const std::int64_t columns_at_once = ceil_div(column_blocks_, std::min(column_blocks_, ceil_div(kTasks, row_groups)));
    const std::int64_t parts = ceil_div(column_blocks_, columns_at_once);
    const int threads = threads_for(threads_, multiply_adds_, row_groups * parts);
    const Buffer sums(2 * parts * problem_.rows * sizeof(Sum));
    const Scratches scratches(threads, kernels_.scratch_bytes + rows_at_once * block_bytes(row_block_) + block_bytes(column_block_));
    const auto total = [&](std::int64_t part) { return sums.as<Sum>() + 2 * part * problem_.rows; };
    const auto maximum = [&](std::int64_t part) { return total(part) + problem_.rows; };
    Team::run(threads, [&](Team& team, int member) {
      team.each(row_groups * parts, [&](std::int64_t task) {
        const std::int64_t i = task / parts * rows_at_once, part = task % parts, j = part * columns_at_once;
        kernels_.cross_forward(tiles_, i, std::min(i + rows_at_once, row_blocks_), j, std::min(j + columns_at_once, column_blocks_),
                               total(part), maximum(part), scratches.of(member));
      });
      team.each(row_blocks_, [&](std::int64_t block) {
        for (std::int64_t i = block * row_block_; i < std::min((block + 1) * row_block_, problem_.rows); ++i) {
          double sum = 0, shift = 0;
          for (std::int64_t part = 0; part < parts; ++part) {
            const double part_sum = total(part)[i], part_shift = std::isfinite(maximum(part)[i]) ? maximum(part)[i] : 0;
            if (part_sum == 0) continue;  // no allowed column: there is no shift
            const double raised = sum == 0 ? part_shift : std::max(shift, part_shift);
            sum = sum * std::exp(shift - raised) + part_sum * std::exp(part_shift - raised);
            shift = raised;
          }
          lse[i] = Sum(shift + std::log(sum));
        }
      });
    });
  }

  // Tiles form squares: the longer side is cut into groups of as many blocks as the shorter one has, and in round r of a square its block s meets
  // block s + r of the shorter side. So in a round every block of the longer side, and every block of a group's own copy of the shorter side's
  // gradient, gets one term. The copies take no more memory than the longer side's gradient; they are added in the order of the groups.
  void backward(const Sum* lse, const Sum* grad, void* da, void* db, void* dbias) {
    const bool long_rows = row_blocks_ >= column_blocks_;
    const std::int64_t long_blocks = std::max(row_blocks_, column_blocks_), short_blocks = std::min(row_blocks_, column_blocks_);
    const std::int64_t groups = ceil_div(long_blocks, short_blocks);
    const std::int64_t row_copies = long_rows ? 1 : groups, column_copies = long_rows ? groups : 1;
    const Accumulator rows(problem_.scalar, problem_.rows, problem_.depth, row_copies, da);
    const Accumulator columns(problem_.scalar, problem_.columns, problem_.depth, column_copies, db);
    const Accumulator biases(sizeof(Sum) == 8 ? Scalar::f64 : Scalar::f32, problem_.columns, 1, column_copies, dbias);
    const int threads = threads_for(threads_, 3 * multiply_adds_, long_blocks);
    const Scratches scratches(threads, kernels_.scratch_bytes + block_bytes(row_block_) + block_bytes(column_block_));
    Rounds long_rounds(long_blocks), short_rounds(groups * short_blocks);
    CrossProblem tiles = tiles_;
    tiles.weight = grad;
    tiles.lse = lse;
    Team::run(threads, [&](Team& team, int member) {
      rows.zero(team);
      columns.zero(team);
      biases.zero(team);
      team.each(short_blocks * groups * short_blocks, [&](std::int64_t task) {
        const std::int64_t round = task / (groups * short_blocks), group = task / short_blocks % groups, s = task % short_blocks;
        const std::int64_t on_long = group * short_blocks + s, on_short = (s + round) % short_blocks;
        short_rounds.wait(group * short_blocks + on_short, round);
        if (on_long < long_blocks) {
          long_rounds.wait(on_long, round);
          const std::int64_t row_copy = long_rows ? 0 : group, column_copy = long_rows ? group : 0;
          kernels_.cross_backward(tiles, long_rows ? on_long : on_short, long_rows ? on_short : on_long, rows.copy(row_copy),
                                  columns.copy(column_copy), biases.copy(column_copy), scratches.of(member));
          long_rounds.finish(on_long, round);
        }
        short_rounds.finish(group * short_blocks + on_short, round);
      });
      rows.finish(team, kernels_, problem_.scale);
      columns.finish(team, kernels_, problem_.scale);
      biases.finish(team, *unit_in_use().kernels[int(sizeof(Sum) == 8 ? Scalar::f64 : Scalar::f32)], 1);
    });
  }

 private:
  static constexpr std::int64_t kPackedBytes = 512 << 10;  // of rows packed at once: with the tile and a block of columns they fit L2
  static constexpr std::int64_t kTasks = 64;               // enough to share out evenly among many threads

  // Sums of one output, in the output itself where it has their type and there is one copy.
  class Accumulator {
   public:
    Accumulator(Scalar scalar, std::int64_t count, std::int64_t depth, std::int64_t copies, void* output)
        : size_(count * depth),
          copies_(copies),
          element_size_(SelfRun<Sum>::element_size(scalar)),
          output_(output),
          in_place_(copies == 1 && element_size_ == sizeof(Sum)),
          buffer_(output && !in_place_ ? copies * size_ * sizeof(Sum) : 0) {}

    Sum* copy(std::int64_t index) const {
      return !output_ ? nullptr : in_place_ ? static_cast<Sum*>(output_) : buffer_.template as<Sum>() + index * size_;
    }
    void zero(Team& team) const {
      if (!output_) return;
      each_part(team, size_ * copies_, [&](std::int64_t first, std::int64_t count) { std::fill_n(copy(0) + first, count, Sum(0)); });
    }
    void finish(Team& team, const Kernels& kernels, double factor) const {
      if (!output_) return;
      each_part(team, size_, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t index = 1; index < copies_; ++index) {
          for (std::int64_t k = first; k < first + count; ++k) copy(0)[k] += copy(index)[k];
        }
        kernels.finish(copy(0) + first, count, factor, static_cast<char*>(output_) + first * element_size_);
      });
    }

   private:
    template <class Task>
    static void each_part(Team& team, std::int64_t size, const Task& task) {
      constexpr std::int64_t part = 1 << 14;
      team.each(ceil_div(size, part), [&](std::int64_t t) { task(t * part, std::min(part, size - t * part)); });
    }

    std::int64_t size_, copies_, element_size_;
    void* output_;
    bool in_place_;
    Buffer buffer_;
  };

  std::int64_t block_bytes(std::int64_t block) const { return block / kernels_.panel * std::int64_t(kernels_.panel_bytes(problem_.depth)); }

  const LseProblem& problem_;
  const Kernels& kernels_;
  const std::int64_t row_block_, column_block_, row_blocks_, column_blocks_;
  const double multiply_adds_;
  const int threads_;
  CrossProblem tiles_{};
};

}  // namespace

void self_forward(const LseProblem& problem, void* lse, int threads) {
  if (problem.scalar == Scalar::f64) {
    SelfRun<double>(problem, threads).forward(static_cast<double*>(lse));
  } else {
    SelfRun<float>(problem, threads).forward(static_cast<float*>(lse));
  }
}

void self_backward(const LseProblem& problem, const void* lse, const void* grad, void* da, int threads) {
  if (problem.scalar == Scalar::f64) {
    SelfRun<double>(problem, threads).backward(static_cast<const double*>(lse), static_cast<const double*>(grad), da);
  } else {
    SelfRun<float>(problem, threads).backward(static_cast<const float*>(lse), static_cast<const float*>(grad), da);
  }
}

void cross_forward(const LseProblem& problem, void* lse, int threads) {
  if (problem.scalar == Scalar::f64) {
    CrossRun<double>(problem, threads).forward(static_cast<double*>(lse));
  } else {
    CrossRun<float>(problem, threads).forward(static_cast<float*>(lse));
  }
}

void cross_backward(const LseProblem& problem, const void* lse, const void* grad, void* da, void* db, void* dbias, int threads) {
  if (problem.scalar == Scalar::f64) {
    CrossRun<double>(problem, threads).backward(static_cast<const double*>(lse), static_cast<const double*>(grad), da, db, dbias);
  } else {
    CrossRun<float>(problem, threads).backward(static_cast<const float*>(lse), static_cast<const float*>(grad), da, db, dbias);
  }
}

double micro_kernel(Scalar scalar, std::int64_t times, int threads) {
  const Kernels& kernels = *unit_in_use().kernels[int(scalar)];
  const Scratches scratches(threads, kernels.scratch_bytes);
  std::vector<double> multiply_adds(threads);
  Team::run(threads, [&](Team& team, int member) {
    team.each(threads, [&](std::int64_t task) { multiply_adds[task] = kernels.micro_kernel(times, scratches.of(member)); });
  });
  return std::accumulate(multiply_adds.begin(), multiply_adds.end(), 0.0);
}

}  // namespace fastsupcon::cpu
