// The driver: cuts a problem into blocks and tiles, gives each sum its terms in the order of the schedule, and has quantities and gradients
// made of the sums. The arithmetic of tiles is in tiles.h, their order in schedule.h, the threads in team.h.
#include "pairs.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "gradients.h"
#include "keys.h"
#include "quantities.h"
#include "schedule.h"
#include "side.h"
#include "team.h"

namespace fastsupcon::cpu {
namespace {

template <class Sum>
const Kernels<Sum>& kernels_for(Scalar scalar) {
  const Unit& unit = unit_in_use();
  if constexpr (sizeof(Sum) == 8) {
    return *unit.f64;
  } else {
    return *(scalar == Scalar::f32 ? unit.f32 : scalar == Scalar::f16 ? unit.f16 : unit.bf16);
  }
}

// Threads worth waking: each gets at least 1 M multiply-adds (about 30 µs), and there are no more of them than tasks.
int threads_for(int allowed, double multiply_adds, std::int64_t tasks) {
  return int(std::max(1.0, std::min({double(allowed), multiply_adds / 1e6, double(tasks)})));
}

// Counts, for an accumulator, the rounds whose term it has got.
class Rounds {
 public:
  explicit Rounds(std::int64_t accumulators) : done_(accumulators) {}
  void wait(const Team& team, const Turn& turn) const {
    team.wait([&] { return done_[turn.accumulator].load(std::memory_order_acquire) == turn.round; });
  }
  void finish(const Turn& turn) { done_[turn.accumulator].store(turn.round + 1, std::memory_order_release); }

 private:
  std::vector<std::atomic<std::int64_t>> done_;
};

// One call: the problem as its tiles see it. Two shapes are not served as they come:
//   - the exponentials of a self shape with a bias are not symmetric: it is a cross shape whose columns are its rows, each its own column
//   - without a bias or own columns, rows and columns are alike, and the fewer of them become the tiles' rows, of which few waste less
template <class Sum>
class Run {
 public:
  Run(const Problem& problem, void* norms, const void* kept, int threads)
      : problem_(problem),
        kernels_(kernels_for<Sum>(problem.scalar)),
        self_(!problem.b && !problem.bias),
        doubled_(!problem.b && problem.bias),
        swapped_(problem.b && !problem.bias && !problem.own_column && problem.columns < problem.rows),
        threads_(threads),
        rows_(kernels_, swapped_ ? problem.b : problem.a, swapped_ ? problem.columns : problem.rows, problem.depth, problem.scalar),
        columns_(kernels_, problem.b && !swapped_ ? problem.b : problem.a, swapped_ ? problem.rows : problem.columns, problem.depth,
                 problem.scalar),
        schedule_(self_ ? Schedule::self(rows_.blocks) : Schedule::cross(rows_.blocks, columns_.blocks)),
        passing_(self_ ? nullptr : schedule_.long_rows() ? &rows_ : &columns_),
        kept_(doubled_ ? nullptr : static_cast<Sum*>(const_cast<void*>(kept))),
        largest_squares_(rows_.blocks + columns_.blocks) {
    call_.depth = problem.depth;
    call_.scale = problem.scale_address ? double(*static_cast<const Sum*>(problem.scale_address)) : problem.scale;
    if (problem.unit) {
      Sum *const of_rows = static_cast<Sum*>(norms), *const of_columns = problem.b ? of_rows + problem.rows : of_rows;
      rows_.inverse_norms = swapped_ ? of_columns : of_rows;
      columns_.inverse_norms = swapped_ ? of_rows : of_columns;
    }
    workspace_.want(rows_.keys, rows_.padded());
    workspace_.want(columns_.keys, columns_.padded());
    workspace_.want(rows_.own, problem.own_column || doubled_ ? rows_.padded() : 0);
    workspace_.want(columns_.bias, problem.bias ? columns_.padded() : 0);
  }

  void forward(const Quantities<void*>& of_rows, const Quantities<void*>& of_columns) {
    const bool all = of_rows.all || of_columns.all, different = of_rows.different || of_columns.different;
    const bool equal = of_rows.equal || of_columns.equal;
    call_.both = all + different + equal > 1;
    call_.first = call_.both || different ? kDifferent : equal ? kEqual : kAll;
    call_.similarity = of_rows.similarity || of_columns.similarity;
    count_threads(1);
    want_panels();
    Sum* twice;  // a doubled problem's norms, which both sides measure
    workspace_.want(twice, doubled_ && problem_.unit ? problem_.rows : 0);
    const Sums<Sum> row_sums(workspace_, rows_, schedule_.row_copies());
    const Sums<Sum> column_sums(workspace_, columns_, self_ ? 0 : schedule_.column_copies());
    const Sums<Sum>& other_sums = self_ ? row_sums : column_sums;
    const auto tile = [&](const Visit& visit, int member) {
      Tile<Sum> tile = bare_tile(visit, member);
      row_sums.add_to(tile.rows, visit.rows.accumulator);
      other_sums.add_to(tile.columns, visit.columns.accumulator);
      const void *const i = tile.rows.panels, *const j = tile.columns.panels;
      tile.ahead = {{i, j, i, j, i, j}};
      return tile;
    };
    const auto begin = [&] {
      row_sums.clear();
      column_sums.clear();
      if (twice) columns_.inverse_norms = twice;
    };
    const Quantities<void*>&to_rows = swapped_ ? of_columns : of_rows, &to_columns = swapped_ ? of_rows : of_columns;
    run(true, kernels_.forward, tile, begin, [](Team&) {}, [](std::int64_t) {}, [&](Team& team) {
      row_sums.finish(team, call_, to_rows);
      if (!self_) column_sums.finish(team, call_, to_columns);
    });
    count_pairs(static_cast<Sum*>(to_rows.count), static_cast<Sum*>(to_columns.count));
  }

  void backward(const Incoming& of_rows, const Incoming& of_columns, const Outgoing& out) {
    const auto keyed = [](const Incoming& side) { return side.grads.different || side.grads.equal || side.grads.similarity; };
    call_.keyed = problem_.row_keys && (keyed(of_rows) || keyed(of_columns));
    void *const out_rows = swapped_ ? out.columns : out.rows, *const out_columns = swapped_ ? out.rows : out.columns;
    const bool along_rows = out.scale && (out_rows || !out_columns), along_columns = out.scale && !along_rows;  // for the scale's, either
    const bool rows_wanted = out_rows || along_rows;
    Gradient<Sum> row_gradient(workspace_, rows_, schedule_.row_copies(), out_rows, rows_wanted);
    Gradient<Sum> column_gradient(workspace_, columns_, schedule_.column_copies(), out_columns, out_columns || (doubled_ && rows_wanted));
    Gradient<Sum>& other_gradient = self_ ? row_gradient : column_gradient;
    count_threads(3);
    if (!kept_) want_panels();
    workspace_.want(rows_.elements, other_gradient.wanted ? slots(rows_) * rows_.block * rows_.packed_depth : 0);
    workspace_.want(columns_.elements, !self_ && row_gradient.wanted ? slots(columns_) * columns_.block * columns_.packed_depth : 0);
    const Weights<Sum> row_weights(workspace_, rows_, swapped_ ? of_columns : of_rows);
    const Weights<Sum> column_weights(workspace_, columns_, swapped_ ? of_rows : of_columns);
    const Weights<Sum>& other_weights = self_ ? row_weights : column_weights;
    const double power = common_power(std::max(row_weights.largest(), column_weights.largest()));
    const std::int64_t bias_size = out.bias ? schedule_.column_copies() * columns_.padded() : 0;
    Sum* bias_sums;
    workspace_.want(bias_sums, bias_size);

    const auto tile = [&](const Visit& visit, int member) {
      Tile<Sum> tile = bare_tile(visit, member);
      row_weights.read_by(tile.rows);
      other_weights.read_by(tile.columns);
      row_gradient.add_to(tile.rows, visit.rows);
      other_gradient.add_to(tile.columns, visit.columns);
      if (out.bias) tile.columns.bias_gradient = bias_sums + visit.columns.accumulator * columns_.block;
      const Face<Sum>&i = tile.rows, &j = tile.columns;
      const auto there = [&](const Sum* part) { return part ? part : i.panels; };
      tile.ahead = {{i.panels, j.panels, there(i.elements), there(j.elements), there(i.gradient), there(j.gradient)}};
      return tile;
    };
    const auto weigh = [&](Team& team) {
      row_weights.fill(team, call_, power);
      if (!self_) column_weights.fill(team, call_, power);
    };
    const auto finish_rows = [&](std::int64_t block) {
      row_gradient.finish(block, doubled_ ? &column_gradient : nullptr, call_.scale, power, along_rows);
    };
    const auto finish_columns = [&](std::int64_t block) { column_gradient.finish(block, nullptr, call_.scale, power, along_columns); };
    const Side<Sum>* const early = doubled_ ? nullptr : passing_;  // a doubled problem's gradient is of both of its sides
    const auto passed = [&](std::int64_t block) {
      if (early) early == &rows_ ? finish_rows(block) : finish_columns(block);
    };
    run(!problem_.unit, kernels_.backward, tile, [&] { std::fill_n(bias_sums, bias_size, Sum(0)); }, weigh, passed, [&](Team& team) {
      if (early != &rows_) team.each(rows_.blocks, finish_rows);
      if (early != &columns_ && !self_ && !doubled_) team.each(columns_.blocks, finish_columns);
    });
    const double along = (along_rows ? row_gradient : column_gradient).along() * power;
    if (out.scale) *static_cast<Sum*>(out.scale) = Sum(self_ || doubled_ ? along / 2 : along);
    for (std::int64_t j = 0; out.bias && j < problem_.columns; ++j) {
      double sum = 0;
      for (std::int64_t at = j; at < bias_size; at += columns_.padded()) sum += bias_sums[at];
      static_cast<Sum*>(out.bias)[j] = Sum(sum * power);
    }
  }

 private:
  // A tile has `products` products.
  void count_threads(int products) {
    const double multiply_adds = double(products) * rows_.count * columns_.count * problem_.depth / (self_ ? 2 : 1);
    threads_ = threads_for(threads_, multiply_adds, schedule_.tasks());
  }

  // How many of a side's blocks are packed at a time: of the passing side that of each thread, which takes the next one's place.
  std::int64_t slots(const Side<Sum>& side) const { return &side == passing_ ? threads_ : side.blocks; }

  void want_panels() {
    workspace_.want(rows_.panels, slots(rows_) * rows_.block * problem_.depth);
    workspace_.want(columns_.panels, self_ ? 0 : slots(columns_) * columns_.block * problem_.depth);
  }

  // Without keys all pairs are different.
  void number_keys() {
    if (!problem_.row_keys) {
      std::fill_n(rows_.keys, rows_.padded(), 0);
      std::fill_n(columns_.keys, columns_.padded(), 1);
      return;
    }
    const std::int64_t *rows = problem_.row_keys, *columns = problem_.column_keys ? problem_.column_keys : problem_.row_keys;
    if (swapped_) std::swap(rows, columns);
    KeyNumbers numbers(rows, rows_.count, columns, columns_.count);
    numbers.number(rows, rows_.count, rows_.keys);
    numbers.number(columns, columns_.count, columns_.keys);
    keys_ = numbers.size();
  }

  void number_columns() {
    for (std::int64_t i = 0; rows_.own && i < rows_.count; ++i) rows_.own[i] = Integer<Sum>(doubled_ ? i : problem_.own_column[i]);
    if (columns_.bias) std::copy_n(static_cast<const Sum*>(problem_.bias), problem_.columns, columns_.bias);
  }

  // How many pairs of equal keys there are.
  void count_pairs(Sum* of_rows, Sum* of_columns) const {
    const auto count = [&](const Side<Sum>& mine, const Side<Sum>& theirs, Sum* out) {
      std::vector<std::int64_t> sizes(std::max<std::int64_t>(keys_, 2));
      for (std::int64_t j = 0; j < theirs.count; ++j) ++sizes[theirs.keys[j]];
      for (std::int64_t i = 0; i < mine.count; ++i) out[i] = Sum(sizes[mine.keys[i]] - (self_ && keys_));
    };
    if (of_rows) count(rows_, columns_, of_rows);
    if (of_columns) count(columns_, rows_, of_columns);
    for (std::int64_t i = 0; rows_.own && i < rows_.count; ++i) {
      const std::int64_t own = rows_.own[i];
      if (own < 0 || own >= columns_.count || rows_.keys[i] != columns_.keys[own]) continue;
      if (of_rows) --of_rows[i];
      if (of_columns) --of_columns[own];
    }
  }

  Tile<Sum> bare_tile(const Visit& visit, int member) const {
    const auto face = [&](const Side<Sum>& side, std::int64_t index) { return side.face(index, &side == passing_ ? member : index); };
    Tile<Sum> tile{call_, face(rows_, visit.i), face(columns_, visit.j), self_ && visit.i == visit.j, nullptr, rows_.block, {}};
    if (self_) {
      tile.columns.panels = face(rows_, visit.j).panels;
      tile.columns.elements = face(rows_, visit.j).elements;
    }
    if (kept_) {
      const std::int64_t index = self_ ? visit.j * (visit.j + 1) / 2 + visit.i : visit.i * columns_.blocks + visit.j;
      tile.kept = kept_ + index * rows_.block * columns_.block;
    }
    return tile;
  }

  // Allocates what was asked for and calls begin(); packs what does not pass, decides on the shift, calls prepare(team); makes all visits; calls
  // finish(team). The passing side's blocks are packed as their task begins, while they are in the caches, and passed(block) is called as it
  // ends. tile(visit, member) makes a tile that has what it reads itself as what to fetch.
  template <class MakeTile, class Begin, class Prepare, class Passed, class Finish>
  void run(bool measured, void (*kernel)(const Tile<Sum>&, void*), const MakeTile& make_tile, const Begin& begin, const Prepare& prepare,
           const Passed& passed, const Finish& finish) {
    const std::int64_t scratch_bytes = ceil_div(kernels_.scratch_bytes, 64) * 64;
    char* scratch;
    workspace_.want(scratch, threads_ * scratch_bytes);
    workspace_.allocate();
    number_keys();
    number_columns();
    begin();
    Rounds row_rounds(schedule_.row_copies() * (rows_.blocks + 1)), column_rounds(schedule_.column_copies() * (columns_.blocks + 1));
    Rounds& other_rounds = self_ ? row_rounds : column_rounds;
    const auto present = [&](const Visit& visit) { return visit.i < rows_.blocks && visit.j < columns_.blocks; };
    const bool late = measured && problem_.unit;  // the shift does not depend on norms, so they may be taken as blocks are packed
    const auto ready = [&](const Side<Sum>& side, std::int64_t block) {
      const double largest = measured && !(late && &side == passing_) ? side.measure(block) : 0;
      if (&side != passing_) side.pack(block, block);
      return largest;
    };
    Team::run(threads_, [&](Team& team, int member) {
      team.each(rows_.blocks + (self_ ? 0 : columns_.blocks), [&](std::int64_t block) {
        largest_squares_[block] = block < rows_.blocks ? ready(rows_, block) : ready(columns_, block - rows_.blocks);
      });
      team.each(1, [&](std::int64_t) { decide(); });
      prepare(team);
      team.each(schedule_.tasks(), [&](std::int64_t task) {
        if (passing_) {
          if (late) passing_->measure(task);
          passing_->pack(task, member);
        }
        for (std::int64_t step = 0; step < schedule_.steps(); ++step) {
          const Visit visit = schedule_.visit(task, step);
          const bool diagonal = self_ && visit.i == visit.j;
          row_rounds.wait(team, visit.rows);
          if (!diagonal) other_rounds.wait(team, visit.columns);
          if (present(visit)) {
            Tile<Sum> tile = make_tile(visit, member);
            const bool last = step + 1 == schedule_.steps();
            const std::int64_t next_task = last ? std::min(task + team.size(), schedule_.tasks() - 1) : task;  // most likely this thread's
            const Visit next = schedule_.visit(next_task, last ? 0 : step + 1);
            if (present(next)) tile.ahead = make_tile(next, member).ahead;
            kernel(tile, scratch + member * scratch_bytes);
          }
          row_rounds.finish(visit.rows);
          if (!diagonal) other_rounds.finish(visit.columns);
        }
        passed(task);
      });
      finish(team);
    });
  }

  // One shift serves all sums where 2^(s log2 e − shift) stays a normal number: where |s_ij| ≤ bound and 2 · bound < 126 ln 2 (f64: 1022 ln
  // 2), less 2 % for rounding. An unknown bound, NaN or inf, is not safe, and running maxima show what is wrong with the rows. A bias
  // leaves the logits without a bound. Where a sum may be over one pair it is to be exactly that pair's logit, as the running maximum makes
  // it.
  void decide() {
    const auto norm = [&](std::int64_t begin, std::int64_t end) {
      double largest = 0;
      for (std::int64_t block = begin; block < end; ++block) {
        const double square = largest_squares_[block];
        largest = square > largest || std::isnan(square) ? square : largest;
      }
      return std::sqrt(largest + problem_.depth * double(std::numeric_limits<Sum>::min()));  // squares that vanished were below its terms
    };
    const double of_rows = problem_.unit ? 1 : norm(0, rows_.blocks);
    const double of_columns = problem_.unit || self_ ? of_rows : norm(rows_.blocks, rows_.blocks + columns_.blocks);
    const double bound = of_rows * of_columns * std::abs(call_.scale);
    call_.bounded = !problem_.bias && std::min(problem_.rows, problem_.columns) > 2 &&
                    2 * 1.02 * bound < -(std::numeric_limits<Sum>::min_exponent - 1) * kLn2;
    call_.shift = call_.bounded ? int(std::ceil(bound * kLog2E)) : 0;
  }

  const Problem& problem_;
  const Kernels<Sum>& kernels_;
  const bool self_, doubled_, swapped_;
  int threads_;
  Side<Sum> rows_, columns_;  // the tiles'. In the self shape the columns have nothing of their own but the numbers of keys
  const Schedule schedule_;
  const Side<Sum>* const passing_;  // the longer side of a cross shape, of which a task has one block to itself
  Sum* const kept_;
  std::vector<double> largest_squares_;  // by block, of rows and then of columns
  std::int64_t keys_ = 0;                // numbers of keys lie below it
  Call call_{};
  Workspace workspace_;
};

}  // namespace

std::int64_t kept_size(std::int64_t rows, std::int64_t columns, std::int64_t depth, bool self) {
  const std::int64_t row_block = block_of(rows), column_block = block_of(columns);
  const std::int64_t row_blocks = ceil_div(rows, row_block), column_blocks = ceil_div(columns, column_block);
  const std::int64_t size = row_block * column_block * (self ? row_blocks * (row_blocks + 1) / 2 : row_blocks * column_blocks);
  constexpr std::int64_t few = 1 << 20;  // 4 MiB of floats
  return size <= 2 * (self ? rows : rows + columns) * depth + few ? size : 0;
}

void forward(const Problem& problem, const Quantities<void*>& rows, const Quantities<void*>& columns, void* norms, void* kept,
             int threads) {
  with_sum(problem.scalar, [&](auto sum) { Run<decltype(sum)>(problem, norms, kept, threads).forward(rows, columns); });
}

void backward(const Problem& problem, const Incoming& rows, const Incoming& columns, const void* norms, const void* kept,
              const Outgoing& out, int threads) {
  with_sum(problem.scalar, [&](auto sum) {
    Run<decltype(sum)>(problem, const_cast<void*>(norms), kept, threads).backward(rows, columns, out);
  });
}

double micro_kernel(Scalar scalar, std::int64_t times, int threads) {
  return with_sum(scalar, [&](auto sum) {
    const auto& kernels = kernels_for<decltype(sum)>(scalar);
    const std::int64_t bytes = ceil_div(kernels.scratch_bytes, 64) * 64;
    char* scratch;
    Workspace workspace;
    workspace.want(scratch, threads * bytes);
    workspace.allocate();
    std::vector<double> multiply_adds(threads);
    Team::run(threads, [&](Team& team, int member) {
      team.each(threads, [&](std::int64_t task) { multiply_adds[task] = kernels.micro_kernel(times, scratch + member * bytes); });
    });
    return std::accumulate(multiply_adds.begin(), multiply_adds.end(), 0.0);
  });
}

}  // namespace fastsupcon::cpu
