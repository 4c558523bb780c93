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

// ---- Shift and weights --------------------------------------------------------------------------------------------------------------

std::size_t element_size(Scalar scalar) { return scalar == Scalar::f64 ? 8 : scalar == Scalar::f32 ? 4 : 2; }

// Whether all exponentials can be taken with one shift, 2^(s log2 e − exponent), and which.
struct Shift {
  bool fixed;
  int exponent;
};

// For |s_ij| ≤ bound. 2^(s log2 e − exponent) stays a normal number if 2 · bound < 126 ln 2 (f64: 1022 ln 2), less 2 % for rounding. An unknown
// bound, NaN or inf, is not safe, and the careful path shows what is wrong with the rows.
template <class Sum>
Shift shift_for(double bound) {
  const bool fixed = 2 * 1.02 * bound < -(std::numeric_limits<Sum>::min_exponent - 1) * kLn2;
  return {fixed, fixed ? int(std::ceil(bound * kLog2E)) : 0};
}

// The largest of them, or NaN if there is one.
double largest_of(const std::vector<double>& values) {
  double largest = 0;
  for (const double value : values) largest = value > largest || std::isnan(value) ? value : largest;
  return largest;
}

// A power of two to divide scale · g_i by, so that scale g_i 2^(shift − lse_i log2 e) neither overflows nor vanishes: its last factor can reach
// the largest power there is. 1 while the largest product is in [2⁻⁴⁰, 1), as with a mean over the rows.
template <class Sum>
double common_power(const Sum* grad, std::int64_t count, double scale) {
  Sum largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::isfinite(grad[i])) largest = std::max(largest, std::abs(grad[i]));
  }
  const double product = largest * std::abs(scale);
  if (!(product > 0) || !std::isfinite(product)) return 1;
  const int exponent = std::ilogb(product);
  return exponent < -40 || exponent >= 0 ? std::ldexp(1.0, exponent + 1) : 1;
}

// What an exponential of row i is multiplied with: factor g_i, or, with one shift for all, factor g_i 2^(shift − lse_i log2 e).
template <class Sum>
void weigh(const Shift& shift, const Sum* lse, const Sum* grad, std::int64_t count, double factor, Sum* weights) {
  for (std::int64_t i = 0; i < count; ++i) {
    const double g = grad[i] * factor;
    const bool nothing = std::isinf(lse[i]) && lse[i] < 0;  // no allowed column
    weights[i] = Sum(!shift.fixed ? g : nothing ? 0 : g * std::exp2(shift.exponent - lse[i] * kLog2E));
  }
}

// ---- Self shape ---------------------------------------------------------------------------------------------------------------------

// Every pair of blocks once, as in a round-robin tournament: in a round each block meets one other (round 0: itself), so the tiles of a round
// write to different blocks, and every block gets its terms in the order of the rounds.
class Tournament {
 public:
  struct Meeting {
    std::int64_t round, i, j;  // i ≤ j; one of an odd number of blocks meets j = blocks, that is nobody
  };

  explicit Tournament(std::int64_t blocks) : players_(blocks + blocks % 2) {}

  std::int64_t meetings() const { return players_ + (players_ - 1) * (players_ / 2); }

  Meeting meeting(std::int64_t index) const {
    if (index < players_) return {0, index, index};
    const std::int64_t pairs = players_ / 2, circle = players_ - 1;
    const std::int64_t before = (index - players_) / pairs, pair = (index - players_) % pairs;
    const std::int64_t one = (before + pair) % circle, other = pair == 0 ? circle : (before - pair + circle) % circle;
    return {before + 1, std::min(one, other), std::max(one, other)};
  }

 private:
  std::int64_t players_;
};

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
        panels_(with_spare(ceil_div(problem.rows, kernels_.panel) * kernels_.panel_bytes(problem.depth))),
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
      all_pairs(team, tiles, kernels_.self_forward, scratches_.of(member));
      each_block(team, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t i = first; i < first + count; ++i) {
          const Sum maximum = maxima.as<Sum>()[i];
          const double shift = tiles.fixed ? tiles.shift * kLn2 : std::isfinite(maximum) ? maximum : 0;
          lse[i] = Sum(shift + std::log(double(lse[i])));
        }
      });
    });
  }

  void backward(const Sum* lse, const Sum* grad, void* da) {
    const Buffer weights(problem_.rows * sizeof(Sum));
    const bool in_place = element_size(problem_.scalar) == sizeof(Sum);
    const Buffer sums(in_place ? 0 : problem_.rows * problem_.depth * sizeof(Sum));
    Sum* const gradient = in_place ? static_cast<Sum*>(da) : sums.as<Sum>();
    const double power = common_power(grad, problem_.rows, problem_.scale);
    Team::run(threads_, [&](Team& team, int member) {
      SelfProblem tiles = prepare(team, [&](std::int64_t first, std::int64_t count) {
        std::fill_n(gradient + first * problem_.depth, count * problem_.depth, Sum(0));
      });
      each_block(team, [&](std::int64_t first, std::int64_t count) {
        weigh({tiles.fixed, tiles.shift}, lse + first, grad + first, count, problem_.scale / power, weights.as<Sum>() + first);
      });
      tiles.weight = weights.as<Sum>();
      tiles.lse = lse;
      tiles.gradient = gradient;
      all_pairs(team, tiles, kernels_.self_backward, scratches_.of(member));
      if (in_place && power == 1) return;
      each_block(team, [&](std::int64_t first, std::int64_t count) {
        char* const elements = static_cast<char*>(da) + first * problem_.depth * element_size(problem_.scalar);
        kernels_.finish(gradient + first * problem_.depth, count * problem_.depth, power, elements);
      });
    });
  }

 private:
  // glibc reuses a freed hole only where the next tensor fits with its header and alignment. The packed rows are as large as the tensors that
  // PyTorch makes after this call, and small ones come in between: with a little more, never touched, the hole takes one of them all the same.
  static std::size_t with_spare(std::size_t bytes) { return bytes + std::min<std::size_t>(bytes / 8, 256 << 10); }

  template <class Task>
  void each_block(Team& team, const Task& task) const {
    team.each(blocks_, [&](std::int64_t block) { task(block * block_, std::min(block_, problem_.rows - block * block_)); });
  }

  const char* elements(std::int64_t block) const {
    return static_cast<const char*>(problem_.a) + block * block_ * problem_.depth * element_size(problem_.scalar);
  }
  char* panels(std::int64_t block) const { return panels_.data() + block * block_ / kernels_.panel * kernels_.panel_bytes(problem_.depth); }

  // Packs the rows, and decides on the shift: the same in every thread.
  template <class Task>
  SelfProblem prepare(Team& team, const Task& also) {
    each_block(team, [&](std::int64_t first, std::int64_t count) {
      const std::int64_t block = first / block_;
      kernels_.pack(elements(block), count, problem_.depth, panels(block));
      largest_squares_[block] = problem_.unit_rows ? 1 : kernels_.largest_square(elements(block), count, problem_.depth);
      also(first, count);
    });
    const Shift shift = shift_for<Sum>(largest_of(largest_squares_) * std::abs(problem_.scale));
    SelfProblem tiles{};
    tiles.rows = problem_.a;
    tiles.panels = panels_.data();
    tiles.count = problem_.rows;
    tiles.depth = problem_.depth;
    tiles.block = block_;
    tiles.scale = problem_.scale;
    tiles.fixed = shift.fixed;
    tiles.shift = shift.exponent;
    return tiles;
  }

  // Calls tile(tiles, i, j, what to fetch, scratch) for every pair of blocks i ≤ j. A tile starts when both blocks have finished the round
  // before; as tiles are handed out in order, the earliest unfinished one never waits.
  template <class Tile>
  void all_pairs(Team& team, const SelfProblem& tiles, const Tile& tile, void* scratch) {
    const Tournament tournament(blocks_);
    team.each(tournament.meetings(), [&](std::int64_t index) {
      const auto [round, i, j] = tournament.meeting(index);
      if (i >= blocks_) return;
      const bool met = j < blocks_;
      rounds_.wait(i, round);
      if (met && j != i) rounds_.wait(j, round);
      // most likely this thread's next tile
      if (met) tile(tiles, i, j, ahead(tiles, tournament.meeting(std::min(index + team.size(), tournament.meetings() - 1))), scratch);
      rounds_.finish(i, round);
      if (met && j != i) rounds_.finish(j, round);
    });
  }

  Ahead ahead(const SelfProblem& tiles, const Tournament::Meeting& next) const {
    const std::int64_t i = std::min(next.i, blocks_ - 1), j = std::min(next.j, blocks_ - 1);
    if (!tiles.gradient) return {{panels(i), panels(j), panels(i), panels(j), panels(i), panels(j)}};
    const auto gradient = [&](std::int64_t block) { return static_cast<const Sum*>(tiles.gradient) + block * block_ * problem_.depth; };
    return {{panels(i), panels(j), elements(i), elements(j), gradient(i), gradient(j)}};
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

// Rows, or columns, cut into blocks.
struct Side {
  const void* data;  // [count, depth] elements
  std::int64_t count, block, blocks, row_bytes;

  Side(const void* data_, std::int64_t count_, std::int64_t row_bytes_, int panel)
      : data(data_),
        count(count_),
        block(std::min<std::int64_t>(kMaxBlock, round_up(count, panel))),
        blocks(ceil_div(count, block)),
        row_bytes(row_bytes_) {}

  std::int64_t size(std::int64_t index) const { return std::min(block, count - index * block); }
  const char* elements(std::int64_t index) const { return static_cast<const char*>(data) + index * block * row_bytes; }
};

// Of the two sides the one with fewer blocks is packed whole. Each block of the longer one is packed by the task that takes it through blocks of
// the shorter one.
template <class Sum>
class CrossRun {
 public:
  CrossRun(const LseProblem& problem, int threads)
      : problem_(problem),
        kernels_(*unit_in_use().kernels[int(problem.scalar)]),
        rows_(problem.a, problem.rows, problem.depth * element_size(problem.scalar), kernels_.panel),
        columns_(problem.b, problem.columns, problem.depth * element_size(problem.scalar), kernels_.panel),
        long_rows_(rows_.blocks >= columns_.blocks),
        long_(long_rows_ ? rows_ : columns_),
        short_(long_rows_ ? columns_ : rows_),
        multiply_adds_(double(problem.rows) * problem.columns * problem.depth),
        threads_(threads),
        short_panels_(short_.blocks * panel_bytes(short_)),
        largest_squares_of_long_(long_.blocks),
        largest_squares_of_short_(short_.blocks) {}

  // A task is a slice of the rows against a part of the columns. A row's sums over the parts are joined in order. Parts cost memory, and packing
  // where rows are the longer side: there a slice is one block, packed anew for each part.
  void forward(Sum* lse) {
    const std::int64_t slices = long_rows_ ? rows_.blocks : ceil_div(rows_.blocks, 8);
    const std::int64_t parts = std::min(columns_.blocks, ceil_div(long_rows_ ? kTasks / 4 : kTasks, slices));
    const int threads = threads_for(threads_, multiply_adds_, slices * parts);
    const Scratches scratches(threads, kernels_.scratch_bytes), long_panels(threads, panel_bytes(long_));
    const Buffer sums(2 * parts * problem_.rows * sizeof(Sum));
    const auto total = [&](std::int64_t part) { return sums.as<Sum>() + 2 * part * problem_.rows; };
    const auto maximum = [&](std::int64_t part) { return total(part) + problem_.rows; };
    Team::run(threads, [&](Team& team, int member) {
      const CrossProblem tiles = prepare(team, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t part = 0; part < parts; ++part) {
          std::fill_n(total(part) + first, count, Sum(0));
          std::fill_n(maximum(part) + first, count, -std::numeric_limits<Sum>::infinity());
        }
      });
      char* const packed = long_panels.of(member);
      team.each(slices * parts, [&](std::int64_t task) {
        const std::int64_t slice = task / parts, part = task % parts;
        const Range rows{rows_.blocks * slice / slices, rows_.blocks * (slice + 1) / slices};
        const Range columns{columns_.blocks * part / parts, columns_.blocks * (part + 1) / parts};
        const Range &over = long_rows_ ? rows : columns, &through = long_rows_ ? columns : rows;
        for (std::int64_t l = over.begin; l < over.end; ++l) {
          pack(long_, l, packed);
          for (std::int64_t s = through.begin; s < through.end; ++s) {
            const bool last = s + 1 == through.end;
            const void* const next_short = short_panels(last ? through.begin : s + 1);
            const void* const next_long = long_.elements(last ? std::min(l + 1, long_.blocks - 1) : l);
            const Tile tile = tile_of(l, s, packed);
            kernels_.cross_forward(tiles, tile.i, tile.j, tile.row_panels, tile.column_panels,
                                   {{next_short, next_long, next_short, next_long, next_short, next_long}}, total(part), maximum(part),
                                   scratches.of(member));
          }
        }
      });
      team.each(rows_.blocks, [&](std::int64_t block) {
        const std::int64_t first = block * rows_.block;
        for (std::int64_t i = first; i < first + rows_.size(block); ++i) {
          double sum = 0, shift = 0;
          bool infinite = false;  // inf · exp(−inf) would be NaN
          for (std::int64_t part = 0; part < parts; ++part) {
            const Sum part_sum = total(part)[i], part_maximum = maximum(part)[i];
            const double part_shift = tiles.fixed ? tiles.shift * kLn2 : std::isfinite(part_maximum) ? part_maximum : 0;
            infinite |= std::isinf(part_sum);
            if (part_sum == 0 || std::isinf(part_sum)) continue;  // with no allowed column there is no shift
            const double raised = sum == 0 ? part_shift : std::max(shift, part_shift);
            const auto lowered = [&](double from) { return from == raised ? 1 : std::exp(from - raised); };
            sum = sum == 0 ? part_sum : sum * lowered(shift) + part_sum * lowered(part_shift);
            shift = raised;
          }
          lse[i] = Sum(infinite && !std::isnan(sum) ? std::numeric_limits<double>::infinity() : shift + std::log(sum));
        }
      });
    });
  }

  // A task takes a block of the longer side through all blocks of the shorter one, in order. Tasks are dealt out to groups, each with its own copy
  // of the shorter side's gradient; within a group each follows on the heels of the one before, so that every sum gets its terms in one order.
  // There are groups enough for kTasks tiles at a time, but no more than make the copies as large as the longer side's gradient, or two.
  void backward(const Sum* lse, const Sum* grad, void* da, void* db, void* dbias) {
    const std::int64_t groups =
        std::min({long_.blocks, ceil_div(kTasks, short_.blocks), std::max<std::int64_t>(2, long_.blocks / short_.blocks)});
    const int threads = threads_for(threads_, 3 * multiply_adds_, long_.blocks);
    const Scratches scratches(threads, kernels_.scratch_bytes), long_panels(threads, panel_bytes(long_));
    const Buffer weights(problem_.rows * sizeof(Sum));
    const double power = common_power(grad, problem_.rows, 1);  // the scale comes at the end, for dbias has none
    const Accumulator long_sums(problem_.scalar, problem_.depth, long_, 1, long_rows_ ? da : db);
    const Accumulator short_sums(problem_.scalar, problem_.depth, short_, groups, long_rows_ ? db : da);
    const Accumulator bias_sums(kSumScalar, 1, columns_, long_rows_ ? groups : 1, dbias);
    Rounds turns(groups * short_.blocks);
    Team::run(threads, [&](Team& team, int member) {
      CrossProblem tiles = prepare(team, [](std::int64_t, std::int64_t) {});
      team.each(rows_.blocks, [&](std::int64_t block) {
        const std::int64_t first = block * rows_.block;
        weigh({tiles.fixed, tiles.shift}, lse + first, grad + first, rows_.size(block), 1 / power, weights.as<Sum>() + first);
      });
      long_sums.zero(team);
      short_sums.zero(team);
      bias_sums.zero(team);
      tiles.weight = weights.as<Sum>();
      tiles.lse = lse;
      char* const packed = long_panels.of(member);
      team.each(long_.blocks, [&](std::int64_t l) {
        const std::int64_t group = l % groups, turn = l / groups;
        Sum* const row_sums = long_rows_ ? long_sums.copy(0) : short_sums.copy(group);
        Sum* const column_sums = long_rows_ ? short_sums.copy(group) : long_sums.copy(0);
        Sum* const dbias_sums = bias_sums.copy(long_rows_ ? group : 0);
        pack(long_, l, packed);
        for (std::int64_t s = 0; s < short_.blocks; ++s) {
          const bool last = s + 1 == short_.blocks;
          const std::int64_t next_s = last ? 0 : s + 1, next_l = last ? std::min(l + team.size(), long_.blocks - 1) : l;
          const Ahead ahead{{short_panels(next_s), short_.elements(next_s), long_.elements(next_l), long_sums.block(0, next_l),
                             short_sums.block(next_l % groups, next_s), short_panels(next_s)}};
          const Tile tile = tile_of(l, s, packed);
          turns.wait(group * short_.blocks + s, turn);
          kernels_.cross_backward(tiles, tile.i, tile.j, tile.row_panels, tile.column_panels, ahead, row_sums, column_sums, dbias_sums,
                                  scratches.of(member));
          turns.finish(group * short_.blocks + s, turn);
        }
      });
      long_sums.finish(team, kernels_, problem_.scale * power);
      short_sums.finish(team, kernels_, problem_.scale * power);
      bias_sums.finish(team, *unit_in_use().kernels[int(kSumScalar)], power);
    });
  }

 private:
  static constexpr Scalar kSumScalar = sizeof(Sum) == 8 ? Scalar::f64 : Scalar::f32;
  static constexpr std::int64_t kTasks = 64;  // enough to share out evenly among many threads

  struct Range {
    std::int64_t begin, end;
  };
  struct Tile {
    std::int64_t i, j;
    const void *row_panels, *column_panels;
  };

  // Sums of one output, in several copies. The first is the output itself where that has their type.
  class Accumulator {
   public:
    Accumulator(Scalar scalar, std::int64_t depth, const Side& side, std::int64_t copies, void* output)
        : depth_(depth),
          side_(side),
          size_(side.count * depth),
          copies_(copies),
          element_size_(element_size(scalar)),
          output_(output),
          in_place_(element_size_ == sizeof(Sum)),
          buffer_(output ? (copies - in_place_) * size_ * sizeof(Sum) : 0) {}

    Sum* copy(std::int64_t index) const {
      if (!output_) return nullptr;
      return in_place_ && index == 0 ? static_cast<Sum*>(output_) : buffer_.template as<Sum>() + (index - in_place_) * size_;
    }
    // To be fetched: where there is no output, what is at hand.
    const void* block(std::int64_t index, std::int64_t block) const {
      return output_ ? static_cast<const void*>(copy(index) + block * side_.block * depth_) : side_.elements(block);
    }
    void zero(Team& team) const {
      if (!output_) return;
      each_part(team, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t index = 0; index < copies_; ++index) std::fill_n(copy(index) + first, count, Sum(0));
      });
    }
    void finish(Team& team, const Kernels& kernels, double factor) const {
      if (!output_) return;
      each_part(team, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t index = 1; index < copies_; ++index) {
          for (std::int64_t k = first; k < first + count; ++k) copy(0)[k] += copy(index)[k];
        }
        kernels.finish(copy(0) + first, count, factor, static_cast<char*>(output_) + first * element_size_);
      });
    }

   private:
    template <class Task>
    void each_part(Team& team, const Task& task) const {
      constexpr std::int64_t part = 1 << 14;
      team.each(ceil_div(size_, part), [&](std::int64_t t) { task(t * part, std::min(part, size_ - t * part)); });
    }

    const std::int64_t depth_;
    const Side& side_;
    const std::int64_t size_, copies_;
    const std::size_t element_size_;
    void* const output_;
    const bool in_place_;
    const Buffer buffer_;
  };

  std::size_t panel_bytes(const Side& side) const { return side.block / kernels_.panel * kernels_.panel_bytes(problem_.depth); }
  char* short_panels(std::int64_t block) const { return short_panels_.data() + block * panel_bytes(short_); }
  void pack(const Side& side, std::int64_t block, void* panels) const {
    kernels_.pack(side.elements(block), side.size(block), problem_.depth, panels);
  }
  Tile tile_of(std::int64_t l, std::int64_t s, const void* packed) const {
    return long_rows_ ? Tile{l, s, packed, short_panels(s)} : Tile{s, l, short_panels(s), packed};
  }

  // Packs the shorter side and decides on the shift, the same in every thread: a bias leaves the logits without a bound. Calls also(first, count)
  // for all rows.
  template <class Task>
  CrossProblem prepare(Team& team, const Task& also) {
    const auto largest_square = [&](const Side& side, std::int64_t block) {
      return kernels_.largest_square(side.elements(block), side.size(block), problem_.depth);
    };
    team.each(long_.blocks, [&](std::int64_t block) {
      if (!problem_.bias) largest_squares_of_long_[block] = largest_square(long_, block);
      if (block < short_.blocks) {
        if (!problem_.bias) largest_squares_of_short_[block] = largest_square(short_, block);
        pack(short_, block, short_panels(block));
      }
      if (block < rows_.blocks) also(block * rows_.block, rows_.size(block));
    });
    // squares below the normal range may have vanished from the sum
    const auto norm = [&](const std::vector<double>& squares) {
      return std::sqrt(largest_of(squares) + problem_.depth * double(std::numeric_limits<Sum>::min()));
    };
    const double norms = norm(largest_squares_of_long_) * norm(largest_squares_of_short_);
    const Shift shift = shift_for<Sum>(problem_.bias ? std::numeric_limits<double>::infinity() : norms * std::abs(problem_.scale));
    CrossProblem tiles{};
    tiles.a = problem_.a;
    tiles.b = problem_.b;
    tiles.rows = problem_.rows;
    tiles.columns = problem_.columns;
    tiles.depth = problem_.depth;
    tiles.row_block = rows_.block;
    tiles.column_block = columns_.block;
    tiles.scale = problem_.scale;
    tiles.fixed = shift.fixed;
    tiles.shift = shift.exponent;
    tiles.bias = problem_.bias;
    tiles.skip = problem_.skip;
    tiles.row_labels = problem_.row_labels;
    tiles.column_labels = problem_.column_labels;
    return tiles;
  }

  const LseProblem& problem_;
  const Kernels& kernels_;
  const Side rows_, columns_;
  const bool long_rows_;
  const Side &long_, &short_;
  const double multiply_adds_;
  const int threads_;
  const Buffer short_panels_;
  std::vector<double> largest_squares_of_long_, largest_squares_of_short_;
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
