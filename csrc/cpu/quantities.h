// What the forward adds up for one side of a problem, and the quantities that it makes of it.
#pragma once

#include <cmath>
#include <limits>

#include "side.h"
#include "team.h"

namespace fastsupcon::cpu {

// Σ of exponentials, sum · exp(shift), from parts with shifts of their own.
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
  void add(const LogSum& other) {
    add(other.sum, other.shift);
    infinite |= other.infinite;
  }
  double value() const { return infinite && !std::isnan(sum) ? std::numeric_limits<double>::infinity() : shift + std::log(sum); }
};

template <class Sum>
class Sums {
 public:
  Sums(Workspace& workspace, const Side<Sum>& side, std::int64_t copies) : side_(side), copies_(copies), size_(copies * side.padded()) {
    workspace.want(parts_, 5 * size_);
  }
  void clear() const {
    std::fill_n(part(0), 3 * size_, Sum(0));
    std::fill_n(part(3), 2 * size_, -std::numeric_limits<Sum>::infinity());
  }
  void add_to(Face<Sum>& face, std::int64_t accumulator) const {
    const std::int64_t at = accumulator * side_.block;
    face.total[0] = part(0) + at;
    face.total[1] = part(1) + at;
    face.similarity = part(2) + at;
    face.maximum[0] = part(3) + at;
    face.maximum[1] = part(4) + at;
  }

  // Everything but the counts.
  void finish(Team& team, const Call& call, const Quantities<void*>& out) const {
    team.each(side_.blocks, [&](std::int64_t block) {
      const std::int64_t begin = block * side_.block;
      for (std::int64_t i = begin; i < begin + side_.size(block); ++i) {
        LogSum first, second;
        Sum similarity = 0;
        for (std::int64_t at = i; at < size_; at += side_.padded()) {
          const auto shift = [&](Sum maximum) { return call.bounded ? call.shift * kLn2 : std::isfinite(maximum) ? double(maximum) : 0; };
          first.add(part(0)[at], shift(part(3)[at]));
          if (call.both) second.add(part(1)[at], shift(part(4)[at]));
          similarity += part(2)[at];
        }
        const auto give = [&](void* to, double value) { static_cast<Sum*>(to)[i] = Sum(value); };
        if (out.different) give(out.different, first.value());
        if (out.equal) give(out.equal, (call.both ? second : first).value());
        if (out.similarity) give(out.similarity, similarity * Sum(call.scale));
        if (!out.all) continue;
        first.add(second);
        give(out.all, first.value());
      }
    });
  }

 private:
  Sum* part(int index) const { return parts_ + index * size_; }

  const Side<Sum>& side_;
  const std::int64_t copies_, size_;
  Sum* parts_;  // totals of the first and second sum, similarities, maxima of the first and second sum: [copies, blocks of the side] each
};

}  // namespace fastsupcon::cpu
