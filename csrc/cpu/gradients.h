// What the backward reads of one side's incoming gradients, and what it adds up for that side's own.
#pragma once

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "side.h"
#include "team.h"

namespace fastsupcon::cpu {

// A power of two to divide incoming gradients by, so that g_i 2^(shift − lse_i log2 e) neither overflows nor vanishes: its last factor can
// reach the largest power there is. 1 while the largest gradient is in [2⁻⁴⁰, 1), as with a mean over the rows.
inline double common_power(double largest) {
  if (!(largest > 0)) return 1;
  const int exponent = std::ilogb(largest);
  return exponent < -40 || exponent >= 0 ? std::ldexp(1.0, exponent + 1) : 1;
}

// What exponentials are multiplied with, divided by the common power.
template <class Sum>
class Weights {
 public:
  Weights(Workspace& workspace, const Side<Sum>& side, const Incoming& incoming)
      : side_(side),
        log_sums_{as(incoming.values.all), as(incoming.values.different), as(incoming.values.equal)},
        grads_{as(incoming.grads.all), as(incoming.grads.different), as(incoming.grads.equal)},
        linear_(as(incoming.grads.similarity)) {
    workspace.want(parts_, 7 * side.padded());
  }

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
  Sum* part(int index) const { return parts_ + index * side_.padded(); }

  const Side<Sum>& side_;
  const Sum *log_sums_[kOvers], *grads_[kOvers], *linear_;
  Sum* parts_;  // log-sums, or with one shift weights; grads; linear
};

// The sums of one side's gradient, in copies. The first is the output itself where that has their type.
template <class Sum>
class Gradient {
 public:
  // `wanted` may be where there is no output.
  Gradient(Workspace& workspace, const Side<Sum>& side, std::int64_t copies, void* output, bool wanted_)
      : wanted(wanted_),
        side_(side),
        size_(side.count * side.depth),
        copies_(copies),
        output_(output),
        in_place_(output && side.row_bytes == side.depth * std::int64_t(sizeof(Sum))),
        along_(side.blocks) {
    workspace.want(buffer_, wanted ? (copies - in_place_) * size_ : 0);
  }

  const bool wanted;

  void add_to(Face<Sum>& face, const Turn& turn) const {
    if (!wanted) return;
    face.gradient = copy(turn.accumulator / side_.blocks) + face.first * side_.depth;
    face.fresh = turn.round == 0;
  }

  // Joins a block's copies, and those of `more`, and makes the gradient of them. along: x̂·∂x̂, for the gradient of the scale, is wanted.
  void finish(std::int64_t block, const Gradient* more, double scale, double power, bool along) {
    if (!wanted) return;
    const double held = std::min(power, std::ldexp(1.0, std::numeric_limits<Sum>::max_exponent - 1));  // the largest power that Sum holds
    const std::int64_t first = block * side_.block, rows = side_.size(block), begin = first * side_.depth;
    Sum* const sums = copy(0) + begin;
    const auto join = [&](const Sum* from) {
      for (std::int64_t k = 0; k < rows * side_.depth; ++k) sums[k] += from[k];
    };
    for (std::int64_t index = 1; index < copies_; ++index) join(copy(index) + begin);
    for (std::int64_t index = 0; more && index < more->copies_; ++index) join(more->copy(index) + begin);
    void* const elements = output_ ? static_cast<char*>(output_) + first * side_.row_bytes : nullptr;
    const Sum* const inverse_norms = side_.inverse_norms ? side_.inverse_norms + first : nullptr;
    along_[block] = side_.kernels.finish(side_.rows(block), rows, side_.depth, inverse_norms, along, sums, Sum(scale * (power / held)),
                                         Sum(held), elements);
  }

  // Σ_i x̂_i·∂x̂_i / (scale · power)
  double along() const { return std::accumulate(along_.begin(), along_.end(), 0.0); }

 private:
  Sum* copy(std::int64_t index) const {
    return in_place_ && index == 0 ? static_cast<Sum*>(output_) : buffer_ + (index - in_place_) * size_;
  }

  const Side<Sum>& side_;
  const std::int64_t size_, copies_;
  void* const output_;
  const bool in_place_;
  Sum* buffer_;
  std::vector<double> along_;  // by block
};

}  // namespace fastsupcon::cpu
