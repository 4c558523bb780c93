// From the logits of a tile to what the sums and the second product need: the formulas of work.h on accumulator fragments.
// A fragment is 16 rows × COLUMNS: s[j][e] is row accumulator_row(lane, e), column 8j + accumulator_column(lane, e).
#pragma once

#include <cmath>

#include "layout.h"
#include "work.h"

namespace fastsupcon::cuda {

constexpr float kInfinity = __builtin_huge_valf();

template <Product PRODUCT>
constexpr int kElementBytes = PRODUCT == Product::f16 || PRODUCT == Product::bf16 ? 2 : 4;

FASTSUPCON_DEVICE float exp(float x) { return ptx::exp2(x * kLog2e); }
FASTSUPCON_DEVICE float log(float x) { return ptx::log2(x) * kLn2; }

// ---- Which work -----------------------------------------------------------------------------------------------------------------

// What this block does: rows of x from `first_row` on with tiles first_tile … last_tile − 1 of y.
struct BlockWork {
  int pass, row_block, first_row, split, first_tile, last_tile;

  FASTSUPCON_DEVICE std::int64_t place(const Pass& of, int row) const { return std::int64_t{split} * of.x.count + row; }  // in [splits, x]
};
FASTSUPCON_DEVICE BlockWork block_work(const Work& work, int rows, int columns) {
  const auto index = static_cast<int>(ptx::block_x()), of_first = work.passes[0].row_blocks * work.passes[0].splits;
  BlockWork found;
  found.pass = index < of_first ? 0 : 1;
  const Pass& pass = work.passes[found.pass];
  const int place = index - found.pass * of_first;
  found.split = place / pass.row_blocks;
  found.row_block = place - found.split * pass.row_blocks;
  found.first_row = found.row_block * rows;
  found.first_tile = found.split * pass.tiles_per_split;
  const int tiles = static_cast<int>(ceil_div(pass.y.count, columns)), last = found.first_tile + pass.tiles_per_split;
  found.last_tile = last < tiles ? last : tiles;
  return found;
}

// Kinds of records that a kernel reads.
__host__ __device__ constexpr int record_kinds(bool backward, bool bounded) { return !backward ? 1 : bounded ? 2 : 3; }

FASTSUPCON_DEVICE float scale_of(const Scale& scale) { return scale.address ? *scale.address : static_cast<float>(scale.value); }

// Whether exp(t) stays a normal number for all |t| ≤ |scale|, and so do the weights: 2 |scale| < 126 ln 2, less a margin of 2 % for rounded
// rows. NaN is not bounded: running maxima show it.
__host__ __device__ constexpr bool in_bounds(float scale) { return 2 * 1.02f * (scale < 0 ? -scale : scale) < 126 * kLn2; }
FASTSUPCON_DEVICE bool is_bounded(const Scale& scale) { return scale.may_bound && in_bounds(scale_of(scale)); }

// ---- What rows and columns bring ------------------------------------------------------------------------------------------------

// Records of a block's rows or of a tile's columns in shared memory: Logit [count], Weight [count], Shift [count].
struct Records {
  const unsigned char* at;
  int count;

  FASTSUPCON_DEVICE Logit logit(int i) const { return reinterpret_cast<const Logit*>(at)[i]; }
  FASTSUPCON_DEVICE Weight weight(int i) const { return reinterpret_cast<const Weight*>(at + count * kRecordBytes)[i]; }
  FASTSUPCON_DEVICE Shift shift(int i) const { return reinterpret_cast<const Shift*>(at + 2 * count * kRecordBytes)[i]; }
};

// v from x·y. Large logits come out with the same bits for x_i y_j and x_j y_i, so that a row's largest pair has weight exp(0) seen from
// both of its rows: an ulp of 1000 is 6e-5. Small ones save a multiplication.
template <bool RUNNING>
FASTSUPCON_DEVICE float logit(float product, float row_factor, float column_factor, float scale) {
  return RUNNING ? product * (row_factor * column_factor) * scale : product * column_factor * (row_factor * scale);
}

// By one thread: the records of `count` rows, counted on the barrier. There are some for whole blocks and tiles: these divide kRecordRows.
FASTSUPCON_DEVICE void fetch_records(ptx::Address to, const Side& side, int first, int count, int kinds, ptx::Address barrier) {
#pragma unroll 1
  for (int kind = 0; kind < kinds; ++kind) {
    const char* from = side.records + (std::int64_t{kind} * side.record_rows + first) * kRecordBytes;
    ptx::copy_bulk_async(to + kind * count * kRecordBytes, from, count * kRecordBytes, barrier);
  }
}

FASTSUPCON_DEVICE bool equal_keys(const Logit& a, const Logit& b) { return a.key_low == b.key_low && a.key_high == b.key_high; }

// Whether a tile of `columns` from `first_column` on holds pairs with `rows` from `first_row` on that are none: on the diagonal, a row's
// own, or past the last column.
FASTSUPCON_DEVICE bool needs_mask(const Work& work, const Pass& pass, int first_row, int rows, int first_column, int columns) {
  return work.exclusion == Exclusion::own || first_column + columns > pass.y.count ||
         (work.exclusion == Exclusion::diagonal && first_column < first_row + rows && first_row < first_column + columns);
}

// Which pairs of the lane's two rows (`row`, row + 8) with a tile's columns are none: bit 4j + e.
template <int COLUMNS>
FASTSUPCON_DEVICE std::uint64_t excluded_pairs(const Work& work, const Pass& pass, int row, int first_column, int lane) {
  const auto place = [](const Side& side, int at) { return side.own && at < side.count ? static_cast<int>(side.own[at]) : at; };
  int places[2] = {-1, -1};
  if (work.exclusion != Exclusion::none) {
    places[0] = place(pass.x, row);
    places[1] = place(pass.x, row + 8);
  }
  std::uint64_t bits = 0;
#pragma unroll 1
  for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = first_column + 8 * j + accumulator_column(lane, c), of_column = place(pass.y, column);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (column >= pass.y.count || of_column == places[r]) bits |= std::uint64_t{1} << (4 * j + 2 * r + c);
      }
    }
  }
  return bits;
}

FASTSUPCON_DEVICE bool is_set(std::uint64_t bits, int place) {  // of one word, the place being known: one instruction
  return (static_cast<std::uint32_t>(bits >> (place / 32 * 32)) & (1u << place % 32)) != 0;
}

// use(MASKED), use(RUNNING, MASKED) as constants: the branches are uniform over the block. Running sums are compiled with the mask alone.
template <class Use>
FASTSUPCON_DEVICE void with_mask(bool masked, Use use) {
  masked ? use(std::true_type{}) : use(std::false_type{});
}
template <class Use>
FASTSUPCON_DEVICE void with_form(bool running, bool masked, Use use) {
  if (running) use(std::true_type{}, std::true_type{});
  else with_mask(masked, [&](auto m) { use(std::false_type{}, m); });
}

// ---- Forward --------------------------------------------------------------------------------------------------------------------

// A running log Σ exp(t): `sum` is relative to exp(finite(maximum)), so that a maximum of ±inf needs no branch where it is used.
struct LogSum {
  float maximum = -kInfinity, sum = 0.0f;
};

FASTSUPCON_DEVICE float finite(float maximum) { return fabsf(maximum) == kInfinity ? 0.0f : maximum; }

FASTSUPCON_DEVICE float rescaled(const LogSum& of, float origin) {
  return of.sum == 0.0f ? 0.0f : of.sum * exp(finite(of.maximum) - origin);
}

FASTSUPCON_DEVICE LogSum merged(const LogSum& a, const LogSum& b) {
  const float maximum = fmaxf(a.maximum, b.maximum), origin = finite(maximum);
  return {maximum, rescaled(a, origin) + rescaled(b, origin)};
}

// For one pair alone exactly its t: the sum is 1.
FASTSUPCON_DEVICE float log_of(const LogSum& total) { return finite(total.maximum) + log(total.sum); }

// Of one row; each lane sums the columns that it holds, and lanes meet only at the end.
struct RowSums {
  LogSum different, equal;
  float similarity = 0.0f, count = 0.0f;
};

// Adds a tile to the sums of the lane's two rows. s is used up.
template <bool RUNNING, bool MASKED, int COLUMNS>
FASTSUPCON_DEVICE void add_tile(RowSums (&sums)[2], float (&s)[COLUMNS / 8][4], const Logit (&rows)[2], float scale, const Records& columns,
                                std::uint64_t excluded_bits, int lane) {
  float different[2] = {sums[0].different.maximum, sums[1].different.maximum}, equal[2] = {sums[0].equal.maximum, sums[1].equal.maximum};
  std::uint32_t equal_bits[2] = {0, 0};  // as those of excluded pairs
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
    const int first = 8 * j + accumulator_column(lane, 0);
    const Logit pair[2] = {columns.logit(first), columns.logit(first + 1)};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = e / 2, place = 4 * j + e;
      const Logit& column = pair[e % 2];
      const bool excluded = MASKED && is_set(excluded_bits, place);
      const bool is_equal = equal_keys(column, rows[r]);
      float t = logit<RUNNING>(s[j][e], rows[r].factor, column.factor, scale);
      if (is_equal && !excluded) {
        sums[r].similarity += t;
        sums[r].count += 1.0f;
      }
      if (RUNNING) t = t + column.bias + rows[r].bias;
      if (excluded) t = -kInfinity;
      if (RUNNING) {
        s[j][e] = t;
        if (is_equal) equal_bits[place / 32] |= 1u << place % 32;
        equal[r] = fmaxf(equal[r], is_equal ? t : -kInfinity);
        different[r] = fmaxf(different[r], is_equal ? -kInfinity : t);
      } else {
        const float exponential = ptx::exp2(t);
        if (is_equal) sums[r].equal.sum += exponential;
        else sums[r].different.sum += exponential;
      }
    }
  }
  if constexpr (RUNNING) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums[r].different = {different[r], rescaled(sums[r].different, finite(different[r]))};
      sums[r].equal = {equal[r], rescaled(sums[r].equal, finite(equal[r]))};
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2, place = 4 * j + e;
        const bool is_equal = (equal_bits[place / 32] & (1u << place % 32)) != 0;
        const float exponential = exp(s[j][e] - finite(is_equal ? equal[r] : different[r]));
        if (is_equal) sums[r].equal.sum += exponential;
        else sums[r].different.sum += exponential;
      }
    }
  }
}

// What the logits are in, and so similarities: natural units, or log 2 where exponentials are summed as they are.
__host__ __device__ constexpr float logit_unit(bool bounded) { return bounded ? kLog2e : 1.0f; }

FASTSUPCON_DEVICE void start(RowSums& sums, bool bounded) {
  if (bounded) sums.different.maximum = sums.equal.maximum = 0.0f;
}

// The four lanes that share a row put their sums together, and the first of them writes those of this split.
FASTSUPCON_DEVICE void store_sums(const Pass& pass, const BlockWork& block, RowSums& sums, int row, bool bounded, int lane) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const auto other = [&](float value) { return ptx::shuffle_xor(value, mask); };
    sums.different = merged(sums.different, {other(sums.different.maximum), other(sums.different.sum)});
    sums.equal = merged(sums.equal, {other(sums.equal.maximum), other(sums.equal.sum)});
    sums.similarity += other(sums.similarity);
    sums.count += other(sums.count);
  }
  if (lane % 4 != 0 || row >= pass.x.count) return;
  float* partial = pass.partial + kPartials * block.place(pass, row);
  partial[0] = sums.different.maximum;
  partial[1] = sums.different.sum;
  partial[2] = sums.equal.maximum;
  partial[3] = sums.equal.sum;
  partial[4] = bounded ? sums.similarity * kLn2 : sums.similarity;
  partial[5] = sums.count;
}

// Whether this block is the last of its rows' splits to be done, known to every thread on return. The sums of other blocks are then there
// to be read by load_fresh. `sync` joins the threads that ask; all of them have joined since they stored their sums.
template <class Sync>
FASTSUPCON_DEVICE bool is_last_split(const Pass& pass, const BlockWork& block, int thread, Sync sync) {
  if (pass.splits == 1) return true;
  auto* last = reinterpret_cast<int*>(ptx::shared_memory());  // nothing else is there any more
  if (thread == 0) {
    ptx::fence_device();
    *last = ptx::atomic_add(pass.done + block.row_block, 1) == pass.splits - 1;
    ptx::fence_device();
  }
  sync();
  return *last != 0;
}

// Each thread one row, once the splits of these rows have written their sums.
FASTSUPCON_DEVICE void combine_splits(const Pass& pass, int row) {
  if (row >= pass.x.count) return;
  RowSums total;
  for (int split = 0; split < pass.splits; ++split) {
    const float* partial = pass.partial + kPartials * (std::int64_t{split} * pass.x.count + row);
    total.different = merged(total.different, {ptx::load_fresh(partial), ptx::load_fresh(partial + 1)});
    total.equal = merged(total.equal, {ptx::load_fresh(partial + 2), ptx::load_fresh(partial + 3)});
    total.similarity += ptx::load_fresh(partial + 4);
    total.count += ptx::load_fresh(partial + 5);
  }
  const auto& out = pass.quantities;
  if (out.all) out.all[row] = log_of(merged(total.different, total.equal));
  if (out.different) out.different[row] = log_of(total.different);
  if (out.equal) out.equal[row] = log_of(total.equal);
  if (out.similarity) out.similarity[row] = total.similarity;
  if (out.count) out.count[row] = total.count;
}

// ---- Backward -------------------------------------------------------------------------------------------------------------------

// Of one row over its pairs, before any rounding: for the gradients of a bias and of the scale.
struct PairSums {
  float weights = 0.0f;   // w without the linear terms; where there is a bias, nothing is bounded
  float products = 0.0f;  // w x·y factor_j
};

// s becomes w · factor_j · unit, what the rows y are summed with.
template <bool RUNNING, bool MASKED, int COLUMNS>
FASTSUPCON_DEVICE void weigh_tile(PairSums (&sums)[2], float (&s)[COLUMNS / 8][4], const Records& rows, int row, float scale, float unit,
                                  bool summed, const Records& columns, std::uint64_t excluded_bits, int lane) {
  const Logit logits[2] = {rows.logit(row), rows.logit(row + 8)};
  const Weight weights[2] = {rows.weight(row), rows.weight(row + 8)};
  Shift shifts[2];
  if (RUNNING) {
    shifts[0] = rows.shift(row);
    shifts[1] = rows.shift(row + 8);
  }
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
    // ptxas would read the records of more columns at once than it has registers for, and spill some.
    if (j > 0 && j % 4 == 0) ptx::fence_block();
    const int first = 8 * j + accumulator_column(lane, 0);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Logit column = columns.logit(first + c);
      const Weight weight = columns.weight(first + c);
      Shift shift;
      if (RUNNING) shift = columns.shift(first + c);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool excluded = MASKED && is_set(excluded_bits, 4 * j + 2 * r + c);
        const bool is_equal = equal_keys(column, logits[r]);
        const float product = s[j][2 * r + c];
        float t = logit<RUNNING>(product, logits[r].factor, column.factor, scale), w;
        if (RUNNING) t = t + column.bias + logits[r].bias;
        if (excluded) t = -kInfinity;
        const float of_row = is_equal ? weights[r].equal : weights[r].different, of_column = is_equal ? weight.equal : weight.different;
        if (RUNNING) {
          w = of_row * exp(t + (is_equal ? shifts[r].equal : shifts[r].different)) +
              of_column * exp(t + (is_equal ? shift.equal : shift.different));
        } else {
          w = ptx::exp2(t) * (of_row + of_column);
        }
        if (RUNNING && summed) sums[r].weights += w;
        if (is_equal && !excluded) w += weights[r].linear + weight.linear;
        if (summed) sums[r].products += w * (product * column.factor);
        s[j][2 * r + c] = w * (column.factor * unit);
      }
    }
  }
}

// The weights of pairs that are none become 0: where they are finite and nothing but the product sums them, in less code than a mask.
template <int COLUMNS>
FASTSUPCON_DEVICE void clear_excluded(float (&w)[COLUMNS / 8][4], std::uint64_t excluded_bits) {
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) w[j][e] = is_set(excluded_bits, 4 * j + e) ? 0.0f : w[j][e];
  }
}

// Half: w as the A fragments of the second product, 16 columns of the tile each.
template <Product PRODUCT, int COLUMNS>
FASTSUPCON_DEVICE void pack_weights(std::uint32_t (&packed)[COLUMNS / 16][4], const float (&w)[COLUMNS / 8][4]) {
#pragma unroll
  for (int k = 0; k < COLUMNS / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = w[2 * k + i / 2][2 * (i % 2)], high = w[2 * k + i / 2][2 * (i % 2) + 1];
      packed[k][i] = PRODUCT == Product::f16 ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
    }
  }
}

// Range. 16-bit floats hold w factor as an operand of the second product. Half: |w| ≤ largest weights + linear of either side; a power of
// two brings that times the largest factor just below 2^15, so that what is 2^-29 of it keeps full precision. bfloat16 and single need none.
template <Product PRODUCT>
FASTSUPCON_DEVICE float weight_unit(const Pass& pass) {
  if constexpr (PRODUCT != Product::f16) {
    return 1.0f;
  } else {
    float largest[2] = {0.0f, 0.0f}, factor = 0.0f;
    for (int side = 0; side < 2; ++side) {
      const Side& of = side ? pass.y : pass.x;
      for (int i = ptx::lane(); i < of.record_rows / kLargestRows; i += 32) {
        largest[side] = fmaxf(largest[side], of.largest[2 * i]);
        if (side) factor = fmaxf(factor, of.largest[2 * i + 1]);
      }
    }
    const auto over_lanes = [](float value) {
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, ptx::shuffle_xor(value, mask));
      return value;
    };
    const float bound = (over_lanes(largest[0]) + over_lanes(largest[1])) * over_lanes(factor);
    const int exponent = static_cast<int>((ptx::bits(bound) >> 23) & 0xff);  // biased; 2^(exponent - 127) ≤ bound
    const int wanted = 127 + 14 - (exponent - 127);                          // of the unit, biased
    return ptx::from_bits(static_cast<std::uint32_t>(wanted < 1 ? 1 : wanted > 253 ? 253 : wanted) << 23);
  }
}

// The four lanes that share a row put their sums together, and the first writes what is wanted; no thread may be missing.
FASTSUPCON_DEVICE void store_pair_sums(const Pass& pass, const BlockWork& block, PairSums sums, float factor, int row, int lane) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    sums.weights += ptx::shuffle_xor(sums.weights, mask);
    sums.products += ptx::shuffle_xor(sums.products, mask);
  }
  if (lane % 4 != 0 || row >= pass.x.count) return;
  const std::int64_t place = block.place(pass, row);
  if (pass.weight_sums) pass.weight_sums[place] = sums.weights;
  if (pass.products) pass.products[place] = sums.products * factor;
}

// Two neighbours of the result of this split.
FASTSUPCON_DEVICE void store_pair(const Work& work, const Pass& pass, const BlockWork& block, int row, std::int64_t column, float first,
                                  float second) {
  if (column >= work.depth) return;
  float* out = pass.out + block.place(pass, row) * work.depth + column;
  out[0] = first;
  if (column + 1 < work.depth) out[1] = second;
}

}  // namespace fastsupcon::cuda
