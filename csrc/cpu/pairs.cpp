// The driver: cuts a problem into blocks and tiles, gives each sum its terms in the order of the schedule, and makes quantities and gradients of the
// sums. The arithmetic of tiles is in tiles.h, their order in schedule.h, the threads in team.h.
#include "pairs.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "keys.h"
#include "memory.h"
#include "schedule.h"
#include "team.h"

namespace fastsupcon::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }
std::size_t element_size(Scalar scalar) { return scalar == Scalar::f64 ? 8 : scalar == Scalar::f32 ? 4 : 2; }

template <class Sum>
const Kernels<Sum>& kernels_for(Scalar scalar) {
  const Unit& unit = unit_in_use();
  if constexpr (sizeof(Sum) == 8) {
    return *unit.f64;
  } else {
    return *(scalar == Scalar::f32 ? unit.f32 : scalar == Scalar::f16 ? unit.f16 : unit.bf16);
  }
}

// Calls f with a Sum of the scalar's sum type.
template <class F>
auto with_sum(Scalar scalar, const F& f) {
  return scalar == Scalar::f64 ? f(double()) : f(float());
}

// Threads worth waking: each gets at least 1 M multiply-adds (about 30 µs), and there are no more of them than tasks.
int threads_for(int allowed, double multiply_adds, std::int64_t tasks) {
  return int(std::max(1.0, std::min({double(allowed), multiply_adds / 1e6, double(tasks)})));
}

// Larger blocks need fewer passes over the gradient; smaller ones give more tiles to share out. Whole panels, of any type.
std::int64_t block_of(std::int64_t rows) {
  const std::int64_t block = rows <= 384 ? 64 : rows <= 1536 ? 96 : 144;
  return round_up(std::min(block, rows), unit_in_use().f32->panel);  // a multiple of f64's
}

// ---- One side of a problem ----------------------------------------------------------------------------------------------------------
// Rows, or columns, cut into blocks, and what tiles read of them. Arrays by row are as long as whole blocks.
template <class Sum>
struct Side {
  const char* data;
  std::int64_t count, depth, row_bytes, block, blocks, packed_depth;
  Sum* inverse_norms = nullptr;  // [count], if rows are brought to unit length
  Array<Sum> panels, elements, bias;
  Array<Integer<Sum>> keys, own;

  Side(const void* data_, std::int64_t count_, std::int64_t depth_, Scalar scalar, const Kernels<Sum>& kernels)
      : data(static_cast<const char*>(data_)),
        count(count_),
        depth(depth_),
        row_bytes(depth_ * element_size(scalar)),
        block(block_of(count_)),
        blocks(ceil_div(count_, block)),
        packed_depth(kernels.packed_depth(depth_)) {}

  std::int64_t padded() const { return blocks * block; }
  std::int64_t size(std::int64_t index) const { return std::min(block, count - index * block); }
  const char* rows(std::int64_t index) const { return data + index * block * row_bytes; }

  // glibc reuses a freed hole only where the next tensor fits with its header and alignment. The packed rows are as large as the tensors that
  // PyTorch makes after this call, and small ones come in between: with a little more, never touched, the hole takes one of them all the same.
  static Array<Sum> with_spare(std::int64_t size) { return Array<Sum>(size + std::min<std::int64_t>(size / 8, 1 << 16)); }
  void make_panels() { panels = with_spare(padded() * depth); }
  void make_elements() { elements = with_spare(padded() * packed_depth); }

  Face<Sum> face(std::int64_t index) const {
    Face<Sum> face{};
    face.first = index * block;
    face.count = size(index);
    face.panels = panels.data() ? panels.data() + face.first * depth : nullptr;
    face.elements = elements.data() ? elements.data() + face.first * packed_depth : nullptr;
    face.keys = keys.data() + face.first;
    face.own = own.data() ? own.data() + face.first : nullptr;
    face.bias = bias.data() ? bias.data() + face.first : nullptr;
    return face;
  }
};

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

// ---- One call -----------------------------------------------------------------------------------------------------------------------
// The problem as its tiles see it. Two shapes are not served as they come:
//   - the exponentials of a self shape with a bias are not symmetric: it is a cross shape whose columns are its rows, each row's own column itself
//   - without a bias or own columns, rows and columns are alike, and the fewer of them become the tiles' rows, of which few waste less
template <class Sum>
class Run {
 public:
  Run(const Problem& problem, void* norms, const void* kept, int threads)
      : problem_(problem),
        kernels_(kernels_for<Sum>(problem.scalar)),
        self_(!problem.b && !problem.bias),
        swapped_(problem.b && !problem.bias && !problem.own_column && problem.columns < problem.rows),
        scale_(problem.scale_address ? double(*static_cast<const Sum*>(problem.scale_address)) : problem.scale),
        threads_(threads),
        first_(side(swapped_)),
        other_(self_ ? Side<Sum>(nullptr, 1, 1, problem.scalar, kernels_) : side(!swapped_)),
        schedule_(self_ ? Schedule::self(first_.blocks) : Schedule::cross(first_.blocks, other_.blocks)),
        kept_(problem.bias && !problem.b ? nullptr : static_cast<Sum*>(const_cast<void*>(kept))),
        largest_squares_{std::vector<double>(first_.blocks), std::vector<double>(other_.blocks)} {
    if (problem.unit) {
      Sum* const of_rows = static_cast<Sum*>(norms);
      (swapped_ ? other_ : first_).inverse_norms = of_rows;
      (swapped_ ? first_ : other_).inverse_norms = problem.b ? of_rows + problem.rows : of_rows;
    }
    number_keys();
    if (problem.own_column || (problem.bias && !problem.b)) {
      first_.own = Array<Integer<Sum>>(first_.padded());
      for (std::int64_t i = 0; i < first_.count; ++i) first_.own[i] = Integer<Sum>(problem.b ? problem.own_column[i] : i);
    }
    if (problem.bias) {
      other_.bias = Array<Sum>(other_.padded());
      std::copy_n(static_cast<const Sum*>(problem.bias), problem.columns, other_.bias.data());
    }
  }

  void forward(const Quantities<void*>& of_rows, const Quantities<void*>& of_columns) {
    const auto asked = [&](void* Quantities<void*>::*quantity) { return of_rows.*quantity || of_columns.*quantity; };
    const bool all = asked(&Quantities<void*>::all), different = asked(&Quantities<void*>::different), equal = asked(&Quantities<void*>::equal);
    call_.both = all + different + equal > 1;
    call_.first = call_.both || different ? kDifferent : equal ? kEqual : kAll;
    call_.similarity = asked(&Quantities<void*>::similarity);
    first_.make_panels();
    if (!self_) other_.make_panels();
    const Sums row_sums(first_, schedule_.row_copies()), column_sums(other_, self_ ? 0 : schedule_.column_copies());
    const Sums& of_other = self_ ? row_sums : column_sums;
    Array<Sum> inverse_norms_of_columns(problem_.bias && !problem_.b && problem_.unit ? problem_.rows : 0);
    if (inverse_norms_of_columns.data()) other_.inverse_norms = inverse_norms_of_columns.data();

    const auto tile = [&](const Visit& visit) {
      Tile<Sum> tile = bare_tile(visit);
      row_sums.add_to(tile.rows, visit.rows.accumulator);
      of_other.add_to(tile.columns, visit.columns.accumulator);
      const void *const i = tile.rows.panels, *const j = tile.columns.panels;
      tile.ahead = {{i, j, i, j, i, j}};
      return tile;
    };
    run(1, kernels_.forward, tile, true, [](Team&) {}, [&](Team& team) {
      const Sums &rows = swapped_ ? of_other : row_sums, &columns = swapped_ ? row_sums : of_other;
      rows.finish(team, call_, scale_, of_rows);
      if (!self_) columns.finish(team, call_, scale_, of_columns);
    });
    count_pairs(static_cast<Sum*>(of_rows.count), static_cast<Sum*>(of_columns.count));
  }

  void backward(const Incoming& of_rows, const Incoming& of_columns, const Outgoing& out) {
    const bool joined = problem_.bias && !problem_.b;  // both sides are the rows
        const auto keyed = [](const Incoming& side) { return side.grads.different || side.grads.equal || side.grads.similarity; };
    call_.keyed = problem_.row_keys && (keyed(of_rows) || keyed(of_columns));
    const bool columns_alone = out.scale && !out.rows && out.columns;  // the scale's gradient comes out of either side's
    const Side<Sum>&rows = swapped_ ? other_ : first_, &columns = swapped_ ? first_ : other_;
    const Gradient of_problem_rows(problem_, rows, swapped_ ? schedule_.column_copies() : schedule_.row_copies(), out.rows,
                                   out.rows || (out.scale && !columns_alone));
    const Gradient of_problem_columns(problem_, columns, swapped_ ? schedule_.row_copies() : schedule_.column_copies(), out.columns,
                                      !self_ && (out.columns || (joined && (out.rows || out.scale))));
    const Gradient &row_gradient = swapped_ ? of_problem_columns : of_problem_rows,
                   &column_gradient = self_ || swapped_ ? of_problem_rows : of_problem_columns;
    if (!kept_) {
      first_.make_panels();
      if (!self_) other_.make_panels();
    }
    if (self_ || column_gradient.wanted) first_.make_elements();
    if (!self_ && row_gradient.wanted) other_.make_elements();
    const Weights row_weights(first_, swapped_ ? of_columns : of_rows), column_weights(other_, swapped_ ? of_rows : of_columns);
    const Weights& of_other = self_ ? row_weights : column_weights;
    const double power = common_power(std::max(row_weights.largest(), self_ ? 0 : column_weights.largest()));
    const std::int64_t bias_size = out.bias ? schedule_.column_copies() * other_.padded() : 0;
    const Array<Sum> bias_sums(bias_size);
    std::fill_n(bias_sums.data(), bias_size, Sum(0));

    const auto tile = [&](const Visit& visit) {
      Tile<Sum> tile = bare_tile(visit);
      row_weights.read_by(tile.rows);
      of_other.read_by(tile.columns);
      row_gradient.add_to(tile.rows, visit.rows);
      column_gradient.add_to(tile.columns, visit.columns);
      if (out.bias) tile.columns.bias_gradient = bias_sums.data() + visit.columns.accumulator * other_.block;
      const auto or_rows = [&](const void* part) { return part ? part : tile.rows.panels; };
      tile.ahead = {{tile.rows.panels, tile.columns.panels, or_rows(tile.rows.elements), or_rows(tile.columns.elements), or_rows(tile.rows.gradient),
                     or_rows(tile.columns.gradient)}};
      return tile;
    };
    run(
        3, kernels_.backward, tile, !problem_.unit,
        [&](Team& team) {
          row_weights.fill(team, call_, power);
          if (!self_) column_weights.fill(team, call_, power);
        },
        [&](Team& team) {
          if (joined) of_problem_rows.join(team, of_problem_columns);
          of_problem_rows.finish(team, kernels_, scale_, power, out.scale && !columns_alone);
          if (!self_ && !joined) of_problem_columns.finish(team, kernels_, scale_, power, columns_alone);
        });
    if (out.scale) *static_cast<Sum*>(out.scale) = Sum((columns_alone ? of_problem_columns : of_problem_rows).along() * power / (self_ || joined ? 2 : 1));
    for (std::int64_t j = 0; out.bias && j < problem_.columns; ++j) {
      double sum = 0;
      for (std::int64_t copy = 0; copy < schedule_.column_copies(); ++copy) sum += bias_sums[copy * other_.padded() + j];
      static_cast<Sum*>(out.bias)[j] = Sum(sum * power);
    }
  }

 private:
  // What the forward adds up for one side.
  class Sums {
   public:
    Sums(const Side<Sum>& side, std::int64_t copies) : side_(side), copies_(copies), size_(copies * side.padded()), sums_(5 * size_) {
      std::fill_n(sums_.data(), 3 * size_, Sum(0));
      std::fill_n(sums_.data() + 3 * size_, 2 * size_, -std::numeric_limits<Sum>::infinity());
    }
    void add_to(Face<Sum>& face, std::int64_t accumulator) const {
      const std::int64_t at = accumulator * side_.block;
      face.total[0] = part(0) + at;
      face.total[1] = part(1) + at;
      face.similarity = part(2) + at;
      face.maximum[0] = part(3) + at;
      face.maximum[1] = part(4) + at;
    }

    void finish(Team& team, const Call& call, double scale, const Quantities<void*>& out) const {
      team.each(side_.blocks, [&](std::int64_t block) {
        for (std::int64_t i = block * side_.block; i < block * side_.block + side_.size(block); ++i) {
          LogSum first, second;
          Sum similarity = 0;
          for (std::int64_t copy = 0; copy < copies_; ++copy) {
            const std::int64_t at = copy * side_.padded() + i;
            const auto shift = [&](Sum maximum) { return call.bounded ? call.shift * kLn2 : std::isfinite(maximum) ? double(maximum) : 0; };
            first.add(part(0)[at], shift(part(3)[at]));
            second.add(part(1)[at], shift(part(4)[at]));
            similarity += part(2)[at];
          }
          const auto give = [&](void* to, double value) {
            if (to) static_cast<Sum*>(to)[i] = Sum(value);
          };
          if (out.different) give(out.different, first.value());
          if (out.equal) give(out.equal, (call.both ? second : first).value());
          if (out.all) {
            if (call.both) first.add(second.sum, second.shift);
            first.infinite |= second.infinite;
            give(out.all, first.value());
          }
          give(out.similarity, similarity * Sum(scale));
        }
      });
    }

   private:
    // Σ of exponentials, each part with a shift of its own: sum · exp(shift).
    struct LogSum {
      double sum = 0, shift = 0;
      bool infinite = false;  // inf · exp(−inf) would be NaN

      void add(double part, double part_shift) {
        infinite |= std::isinf(part);
        if (part == 0 || std::isinf(part)) return;  // over no pair there is no shift
        const double raised = sum == 0 ? part_shift : std::max(shift, part_shift);
        const auto lowered = [&](double from) { return from == raised ? 1 : std::exp(from - raised); };
        sum = sum == 0 ? part : sum * lowered(shift) + part * lowered(part_shift);
        shift = raised;
      }
      double value() const { return infinite && !std::isnan(sum) ? std::numeric_limits<double>::infinity() : shift + std::log(sum); }
    };

    Sum* part(int index) const { return sums_.data() + index * size_; }

    const Side<Sum>& side_;
    const std::int64_t copies_, size_;
    const Array<Sum> sums_;
  };

  // What the backward multiplies one side's exponentials with, divided by a common power of two.
  class Weights {
   public:
    Weights(const Side<Sum>& side, const Incoming& incoming)
        : side_(side),
          log_sums_{as(incoming.values.all), as(incoming.values.different), as(incoming.values.equal)},
          grads_{as(incoming.grads.all), as(incoming.grads.different), as(incoming.grads.equal)},
          linear_(as(incoming.grads.similarity)),
          parts_(7 * side.padded()) {}

    double largest() const {
      Sum largest = 0;
      for (const Sum* grad : {grads_[kAll], grads_[kDifferent], grads_[kEqual], linear_}) {
        for (std::int64_t i = 0; grad && i < side_.count; ++i) {
          const Sum magnitude = std::abs(grad[i]);
          if (magnitude > largest && magnitude <= std::numeric_limits<Sum>::max()) largest = magnitude;
        }
      }
      return double(largest);
    }

    void fill(Team& team, const Call& call, double power) const {
      team.each(side_.blocks, [&](std::int64_t block) {
        for (std::int64_t i = block * side_.block; i < (block + 1) * side_.block; ++i) {
          const bool there = i < side_.count;
          part(6)[i] = linear_ && there ? Sum(linear_[i] / power) : Sum(0);
          double weight[kOvers] = {};
          for (int over = kAll; over < kOvers; ++over) {
            if (!grads_[over]) continue;
            const double log_sum = there ? double(log_sums_[over][i]) : 0, grad = there ? grads_[over][i] / power : 0;
            const bool nothing = std::isinf(log_sum) && log_sum < 0;  // over no pair: passes nothing
            part(over)[i] = nothing ? std::numeric_limits<Sum>::infinity() : Sum(log_sum);
            part(3 + over)[i] = nothing ? Sum(0) : Sum(grad);
            if (call.bounded && !nothing) weight[over] = grad * std::exp2(call.shift - log_sum * kLog2E);
          }
          if (!call.bounded) continue;
          part(kDifferent)[i] = Sum(weight[kAll] + weight[kDifferent]);
          part(kEqual)[i] = Sum(weight[kAll] + weight[kEqual]);
        }
      });
    }

    void read_by(Face<Sum>& face) const {
      for (int over = kAll; over < kOvers; ++over) {
        face.weight[over] = part(over) + face.first;
        face.log_sum[over] = grads_[over] ? part(over) + face.first : nullptr;
        face.grad[over] = part(3 + over) + face.first;
      }
      face.linear = part(6) + face.first;
    }

   private:
    static const Sum* as(const void* p) { return static_cast<const Sum*>(p); }
    Sum* part(int index) const { return parts_.data() + index * side_.padded(); }

    const Side<Sum>& side_;
    const Sum *log_sums_[kOvers], *grads_[kOvers], *linear_;
    const Array<Sum> parts_;  // log-sums, or weights with one shift; grads; linear
  };

  // The sums of one side's gradient, in copies. The first is the output itself where that has their type.
  class Gradient {
   public:
    Gradient(const Problem& problem, const Side<Sum>& side, std::int64_t copies, void* output, bool wanted_)
        : wanted(wanted_),
          side_(side),
          depth_(problem.depth),
          size_(side.count * problem.depth),
          copies_(copies),
          output_(output),
          in_place_(output && element_size(problem.scalar) == sizeof(Sum)),
          buffer_(wanted ? (copies - in_place_) * size_ : 0),
          along_(side.blocks) {}

    const bool wanted;

    void add_to(Face<Sum>& face, const Turn& turn) const {
      if (!wanted) return;
      face.gradient = copy(turn.accumulator / side_.blocks) + face.first * depth_;
      face.fresh = turn.round == 0;
    }

    // Adds another's sums to the first copy.
    void join(Team& team, const Gradient& other) const {
      if (!wanted) return;
      each_part(team, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t index = 0; index < other.copies_; ++index) {
          for (std::int64_t k = first; k < last; ++k) copy(0)[k] += other.copy(index)[k];
        }
      });
    }

    void finish(Team& team, const Kernels<Sum>& kernels, double scale, double power, bool along_wanted) const {
      if (!wanted) return;
      const double held = std::min(power, std::ldexp(1.0, std::numeric_limits<Sum>::max_exponent - 1));  // the largest power that Sum holds
      team.each(side_.blocks, [&](std::int64_t block) {
        const std::int64_t first = block * side_.block, rows = side_.size(block);
        Sum* const sums = copy(0) + first * depth_;
        for (std::int64_t index = 1; index < copies_; ++index) {
          for (std::int64_t k = 0; k < rows * depth_; ++k) sums[k] += copy(index)[first * depth_ + k];
        }
        void* const elements = output_ ? static_cast<char*>(output_) + block * side_.block * side_.row_bytes : nullptr;
        along_[block] = kernels.finish(side_.rows(block), rows, depth_, side_.inverse_norms ? side_.inverse_norms + first : nullptr, along_wanted, sums,
                                       Sum(scale * (power / held)), Sum(held), elements);
      });
    }

    double along() const { return std::accumulate(along_.begin(), along_.end(), 0.0); }

   private:
    Sum* copy(std::int64_t index) const {
      return in_place_ && index == 0 ? static_cast<Sum*>(output_) : buffer_.data() + (index - in_place_) * size_;
    }
    template <class Task>
    void each_part(Team& team, const Task& task) const {
      constexpr std::int64_t part = 1 << 14;
      team.each(ceil_div(size_, part), [&](std::int64_t t) { task(t * part, std::min(size_, (t + 1) * part)); });
    }

    const Side<Sum>& side_;
    const std::int64_t depth_, size_, copies_;
    void* const output_;
    const bool in_place_;
    const Array<Sum> buffer_;
    mutable std::vector<double> along_;
  };

  Side<Sum> side(bool of_columns) const {
    const void* const data = of_columns && problem_.b ? problem_.b : problem_.a;
    return Side<Sum>(data, of_columns ? problem_.columns : problem_.rows, problem_.depth, problem_.scalar, kernels_);
  }

  // Without keys all pairs are different.
  void number_keys() {
    first_.keys = Array<Integer<Sum>>(first_.padded());
    if (!self_ || !problem_.row_keys) other_.keys = Array<Integer<Sum>>(self_ ? first_.padded() : other_.padded());
    if (!problem_.row_keys) {
      std::fill_n(first_.keys.data(), first_.padded(), 0);
      std::fill_n(other_.keys.data(), self_ ? first_.padded() : other_.padded(), 1);
      return;
    }
    const std::int64_t *first = problem_.row_keys, *other = problem_.column_keys ? problem_.column_keys : problem_.row_keys;
    if (swapped_) std::swap(first, other);
    KeyNumbers numbers(first, first_.count, other, self_ ? 0 : other_.count);
    numbers.number(first, first_.count, first_.keys.data());
    if (!self_) numbers.number(other, other_.count, other_.keys.data());
    keys_ = numbers.size();
  }

  // How many pairs of equal keys there are.
  void count_pairs(Sum* of_first, Sum* of_other) const {
    if (swapped_) std::swap(of_first, of_other);
    const Array<Integer<Sum>>& other_keys = self_ ? first_.keys : other_.keys;
    const std::int64_t others = self_ ? first_.count : other_.count;
    const auto count = [&](const Array<Integer<Sum>>& mine, std::int64_t count, const Array<Integer<Sum>>& theirs, std::int64_t their_count, Sum* out) {
      if (!out) return;
      if (!keys_) return (void)std::fill_n(out, count, Sum(0));
      std::vector<std::int64_t> sizes(keys_);
      for (std::int64_t j = 0; j < their_count; ++j) ++sizes[theirs[j]];
      for (std::int64_t i = 0; i < count; ++i) out[i] = Sum(sizes[mine[i]] - self_);
    };
    count(first_.keys, first_.count, other_keys, others, of_first);
    if (!self_) count(other_.keys, other_.count, first_.keys, first_.count, of_other);
    for (std::int64_t i = 0; first_.own.data() && keys_ && i < first_.count; ++i) {
      const std::int64_t own = first_.own[i];
      if (own < 0 || own >= others || first_.keys[i] != other_keys[own]) continue;
      if (of_first) --of_first[i];
      if (of_other) --of_other[own];
    }
  }

  Tile<Sum> bare_tile(const Visit& visit) const {
    const Side<Sum>& other = self_ ? first_ : other_;
    Tile<Sum> tile{call_, first_.face(visit.i), other.face(visit.j), self_ && visit.i == visit.j, nullptr, first_.block, {}};
    if (self_ && other_.keys.data()) tile.columns.keys = other_.keys.data() + tile.columns.first;
    if (kept_) {
      const std::int64_t index = self_ ? visit.j * (visit.j + 1) / 2 + visit.i : visit.i * other.blocks + visit.j;
      tile.kept = kept_ + index * first_.block * other.block;
    }
    return tile;
  }

  // Packs the rows, decides on the shift, calls prepare(team), makes all visits, calls finish(team). tile(visit) makes a tile with, as what to fetch,
  // what it reads itself.
  template <class MakeTile, class Prepare, class Finish>
  void run(int products, void (*kernel)(const Tile<Sum>&, void*), const MakeTile& make_tile, bool measured, const Prepare& prepare,
           const Finish& finish) {
    const std::int64_t others = self_ ? 0 : other_.blocks;
    const double multiply_adds = double(products) * first_.count * (self_ ? first_.count / 2 : other_.count) * problem_.depth;
    const int threads = threads_for(threads_, multiply_adds, schedule_.tasks());
    const std::int64_t scratch_bytes = round_up(kernels_.scratch_bytes, 64);
    const Array<char> scratch(threads * scratch_bytes);
    Rounds row_rounds(schedule_.row_copies() * (first_.blocks + 1)), column_rounds(schedule_.column_copies() * (other_.blocks + 1));
    Rounds& other_rounds = self_ ? row_rounds : column_rounds;
    const auto present = [&](const Visit& visit) { return visit.i < first_.blocks && visit.j < (self_ ? first_.blocks : other_.blocks); };
    Team::run(threads, [&](Team& team, int member) {
      team.each(first_.blocks + others, [&](std::int64_t block) {
        block < first_.blocks ? pack(first_, block, measured, largest_squares_[0]) : pack(other_, block - first_.blocks, measured, largest_squares_[1]);
      });
      team.each(1, [&](std::int64_t) { decide(); });
      prepare(team);
      team.each(schedule_.tasks(), [&](std::int64_t task) {
        for (std::int64_t step = 0; step < schedule_.steps(); ++step) {
          const Visit visit = schedule_.visit(task, step);
          const bool diagonal = self_ && visit.i == visit.j;
          row_rounds.wait(team, visit.rows);
          if (!diagonal) other_rounds.wait(team, visit.columns);
          if (present(visit)) {
            Tile<Sum> tile = make_tile(visit);
            const bool last = step + 1 == schedule_.steps();  // most likely this thread's next tile
            const Visit next = last ? schedule_.visit(std::min(task + team.size(), schedule_.tasks() - 1), 0) : schedule_.visit(task, step + 1);
            if (present(next)) tile.ahead = make_tile(next).ahead;
            kernel(tile, scratch.data() + member * scratch_bytes);
          }
          row_rounds.finish(visit.rows);
          if (!diagonal) other_rounds.finish(visit.columns);
        }
      });
      finish(team);
    });
  }

  void pack(const Side<Sum>& side, std::int64_t block, bool measured, std::vector<double>& largest_squares) const {
    const std::int64_t first = block * side.block, count = side.size(block);
    Sum* const inverse_norms = side.inverse_norms ? side.inverse_norms + first : nullptr;
    if (measured) largest_squares[block] = kernels_.measure(side.rows(block), count, problem_.depth, inverse_norms);
    const auto of = [&](const Array<Sum>& packed, std::int64_t width) { return packed.data() ? packed.data() + first * width : nullptr; };
    kernels_.pack(side.rows(block), count, problem_.depth, inverse_norms, of(side.panels, problem_.depth), of(side.elements, side.packed_depth));
  }

  // One shift serves all sums where 2^(s log2 e − shift) stays a normal number: where |s_ij| ≤ bound and 2 · bound < 126 ln 2 (f64: 1022 ln 2), less 2 %
  // for rounding. An unknown bound, NaN or inf, is not safe, and running maxima show what is wrong with the rows. A bias leaves the logits without a
  // bound. Where a sum may be over one pair it is to be exactly that pair's logit, as the running maximum makes it.
  void decide() {
    const auto norm = [&](const std::vector<double>& squares) {
      double largest = 0;
      for (const double square : squares) largest = square > largest || std::isnan(square) ? square : largest;
      return std::sqrt(largest + problem_.depth * double(std::numeric_limits<Sum>::min()));  // squares below the normal range may have vanished
    };
    const double norms = problem_.unit ? 1 : norm(largest_squares_[0]) * norm(largest_squares_[self_ ? 0 : 1]);
    const double bound = norms * std::abs(scale_);
    call_.depth = problem_.depth;
    call_.scale = scale_;
    call_.bounded = !problem_.bias && std::min(problem_.rows, problem_.columns) > 2 &&
                    2 * 1.02 * bound < -(std::numeric_limits<Sum>::min_exponent - 1) * kLn2;
    call_.shift = call_.bounded ? int(std::ceil(bound * kLog2E)) : 0;
  }

  // A power of two to divide incoming gradients by, so that g_i 2^(shift − lse_i log2 e) neither overflows nor vanishes: its last factor can reach the
  // largest power there is. 1 while the largest gradient is in [2⁻⁴⁰, 1), as with a mean over the rows.
  static double common_power(double largest) {
    if (!(largest > 0)) return 1;
    const int exponent = std::ilogb(largest);
    return exponent < -40 || exponent >= 0 ? std::ldexp(1.0, exponent + 1) : 1;
  }

  const Problem& problem_;
  const Kernels<Sum>& kernels_;
  const bool self_, swapped_;
  const double scale_;
  const int threads_;
  Side<Sum> first_, other_;  // the tiles' rows and columns; in the self shape the first is both
  const Schedule schedule_;
  Sum* const kept_;
  std::vector<double> largest_squares_[2];
  std::int64_t keys_ = 0;  // how many different ones
  Call call_{};
};

}  // namespace

std::int64_t kept_size(std::int64_t rows, std::int64_t columns, std::int64_t depth, bool self) {
  const std::int64_t row_block = block_of(rows), column_block = block_of(columns);
  const std::int64_t row_blocks = ceil_div(rows, row_block), column_blocks = ceil_div(columns, column_block);
  const std::int64_t size = row_block * column_block * (self ? row_blocks * (row_blocks + 1) / 2 : row_blocks * column_blocks);
  return size <= (rows + columns) * depth + (1 << 16) ? size : 0;
}

void forward(const Problem& problem, const Quantities<void*>& rows, const Quantities<void*>& columns, void* norms, void* kept, int threads) {
  with_sum(problem.scalar, [&](auto sum) { Run<decltype(sum)>(problem, norms, kept, threads).forward(rows, columns); });
}

void backward(const Problem& problem, const Incoming& rows, const Incoming& columns, const void* norms, const void* kept, const Outgoing& out,
              int threads) {
  with_sum(problem.scalar, [&](auto sum) { Run<decltype(sum)>(problem, const_cast<void*>(norms), kept, threads).backward(rows, columns, out); });
}

double micro_kernel(Scalar scalar, std::int64_t times, int threads) {
  return with_sum(scalar, [&](auto sum) {
    const auto& kernels = kernels_for<decltype(sum)>(scalar);
    const std::int64_t bytes = round_up(kernels.scratch_bytes, 64);
    const Array<char> scratch(threads * bytes);
    std::vector<double> multiply_adds(threads);
    Team::run(threads, [&](Team& team, int member) {
      team.each(threads, [&](std::int64_t task) { multiply_adds[task] = kernels.micro_kernel(times, scratch.data() + member * bytes); });
    });
    return std::accumulate(multiply_adds.begin(), multiply_adds.end(), 0.0);
  });
}

}  // namespace fastsupcon::cpu
