// A loss that is linear in the rows' quantities, and what all kernels share.
#pragma once

#include <cmath>

#include "layout.h"
#include "work.h"

namespace fastsupcon::cuda {

constexpr float kInfinity = __builtin_huge_valf();

FASTSUPCON_DEVICE float exp(float x) { return ptx::exp2(x * kLog2e); }
FASTSUPCON_DEVICE float log(float x) { return ptx::log2(x) * kLn2; }

// use(load(i)) for every `step`-th i from `first` to `end`, in order, where AHEAD loads are in flight together.
template <int AHEAD, class Index, class Load, class Use>
FASTSUPCON_DEVICE void load_ahead(Index first, Index end, Index step, Load load, Use use) {
  for (Index i = first; i < end; i += AHEAD * step) {
    decltype(load(i)) found[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (i + k * step < end) found[k] = load(i + k * step);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (i + k * step < end) use(found[k]);
    }
  }
}

FASTSUPCON_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
  return value;
}

FASTSUPCON_DEVICE float warp_largest(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, ptx::shuffle_xor(value, mask));
  return value;
}

// Zero what there is not.
FASTSUPCON_DEVICE Quantities<float> quantities_of(const Quantities<const float*>& q, std::int64_t row) {
  const auto of = [=](const float* there) { return there ? there[row] : 0.0f; };
  return {of(q.all), of(q.different), of(q.equal), of(q.similarity), of(q.count)};
}

FASTSUPCON_DEVICE float line_of(const LineWork& line, const Quantities<float>& q) {
  const float count = fmaxf(q.count, 1.0f);
  const float loss = (line.log_count * log(count) + line.all * q.all + line.different * q.different + line.equal * q.equal +
                      line.similarity * (q.similarity / count)) * line.factor;
  const bool infinite = q.all == INFINITY || q.different == INFINITY;
  return q.count > 0.0f || loss != loss || infinite ? loss : line.lone;
}

FASTSUPCON_DEVICE float line_divisor(const LineWork& line, float paired) {
  return line.reduction != Line::Reduction::mean ? 1.0f : line.skip_lone ? fmaxf(paired, 1.0f) : static_cast<float>(line.rows);
}

// What a lane brings to a sum over 32 rows.
struct LineRow {
  bool is_row;
  Quantities<float> q;
};
struct LineSum {
  float losses, paired;
};
FASTSUPCON_DEVICE LineSum line_sum(const LineWork& line, const LineRow& of) {
  return {warp_sum(of.is_row ? line_of(line, of.q) : 0.0f), warp_sum(of.is_row && of.q.count > 0.0f ? 1.0f : 0.0f)};
}
FASTSUPCON_DEVICE void store_loss(const LineWork& line, const LineSum& total) {
  *line.loss = total.losses / line_divisor(line, total.paired);
  if (line.paired) *line.paired = total.paired;
}

// By a warp, for 32 rows of which `row` is the lane's. Whichever warp is last, it adds up in the order of the rows.
FASTSUPCON_DEVICE void add_to_loss(const LineWork& line, const LineRow& of, std::int64_t row) {
  if (line.reduction == Line::Reduction::none) {
    if (of.is_row) line.loss[row] = line_of(line, of.q);
    return;
  }
  const LineSum sum = line_sum(line, of);
  const std::int64_t groups = ceil_div(line.rows, 32);
  float* const paired = line.sums + groups;
  bool is_last = false;
  if (ptx::lane() == 0 && of.is_row) {
    line.sums[row / 32] = sum.losses;
    paired[row / 32] = sum.paired;
    ptx::fence_device();
    is_last = ptx::atomic_add(line.done, 1) == groups - 1;
    ptx::fence_device();
  }
  if (!ptx::any(is_last)) return;
  ptx::sync_warp();
  LineSum total{0.0f, 0.0f};
  load_ahead<8, std::int64_t>(
      ptx::lane(), groups, 32, [&](std::int64_t group) { return LineSum{ptx::load_fresh(line.sums + group), ptx::load_fresh(paired + group)}; },
      [&](const LineSum& found) {
        total.losses += found.losses;
        total.paired += found.paired;
      });
  total = {warp_sum(total.losses), warp_sum(total.paired)};
  if (ptx::lane() == 0) store_loss(line, total);
}

FASTSUPCON_DEVICE Quantities<float> line_gradient(const LineWork& line, std::int64_t row, float paired) {
  const float pairs = line.values.count[row], of_loss = line.grad[line.reduction == Line::Reduction::none ? row : 0];
  const float grad = pairs > 0.0f ? of_loss * line.factor / line_divisor(line, paired) : line.lone;
  return {grad * line.all, grad * line.different, grad * line.equal, grad * line.similarity / fmaxf(pairs, 1.0f), 0.0f};
}

}  // namespace fastsupcon::cuda
