// From the logits of a tile to what the sums and the second product need: the formulas of work.h on accumulator fragments.
// A fragment is 16 rows × COLUMNS: s[j][e] is row accumulator_row(lane, e), column 8j + accumulator_column(lane, e).
#pragma once

#include <type_traits>

#include "line.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT>
constexpr bool kIsHalf = PRODUCT == Product::f16 || PRODUCT == Product::bf16;
template <Product PRODUCT>
constexpr int kElementBytes = kIsHalf<PRODUCT> ? 2 : 4;

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

FASTSUPCON_DEVICE float scale_of(const Scale& scale) { return scale.address ? *scale.address : static_cast<float>(scale.value); }

// Whether sums are bounded where all |t| ≤ |limit|: of unit rows the limit is the scale, of others the scale times the largest length of
// either side (a product is no larger than its rows' lengths'). 2 |limit| < 126 ln 2, less a margin of 2 % for what rounding adds to a
// product and to unit rows. So exp(t) is between 2^-63 and 2^63, and over less than 2^31 pairs its sum keeps to the normal range, as does
// exp(−log-sum) > 2^-94. A weight is the product of that with an incoming gradient and, of unit rows, 1 / |x|: it is a normal number too if
// the gradient is no smaller than 1e-14 and, of unit rows, beside the row's length, and pairs are up to 10^5; for more, as much larger.
// The lengths of rows as they are ask for nothing more: none is a factor of a weight. NaN is not bounded: running maxima show it.
__host__ __device__ constexpr bool in_bounds(float limit) { return 2 * 1.02f * (limit < 0 ? -limit : limit) < 126 * kLn2; }
FASTSUPCON_DEVICE bool is_bounded(const Scale& scale) {
  return scale.may_bound && (scale.bounded ? *scale.bounded != 0.0f : in_bounds(scale_of(scale)));
}
FASTSUPCON_DEVICE bool is_turn(const Work& work) {
  return work.turn == Turn::always || is_bounded(work.scale) == (work.turn == Turn::bounded);
}
FASTSUPCON_DEVICE int splits_of(const Splits& splits, const Scale& scale) { return is_bounded(scale) ? splits.bounded : splits.running; }

// What is known before a launch.
enum class Sums { bounded, running, either };
inline Sums known_sums(const Scale& scale) {
  if (!scale.may_bound) return Sums::running;
  if (scale.address || scale.bounded) return Sums::either;
  return in_bounds(static_cast<float>(scale.value)) ? Sums::bounded : Sums::running;
}

// ---- What rows and columns bring ------------------------------------------------------------------------------------------------

// What tiles hold of the fields: slots, of the first so many of which a kernel makes use.
//   forward   factor, code; running: bias
//   backward  factor, code, linear, different, apart: equal, all times the factor; running: factor, code, … equal as they are, the shifts
__host__ __device__ constexpr int slots(bool backward, bool running, bool apart) {
  return !backward ? (running ? 3 : 2) : running ? 8 : apart ? 5 : 4;
}
__host__ __device__ constexpr int field_of(int slot, bool backward, bool running) {
  return slot < 2 || !backward || running ? slot : slot - 2 + kScaledLinear;
}

// Of the four columns that a lane holds of a group of 16, one word each.
template <class T>
struct alignas(16) Four {
  T of[4];
};

// Slots of a tile's columns in shared memory.
struct Columns {
  const unsigned char* at;
  int count;

  // Column 8 (c / 2) + accumulator_column(lane, c % 2) of the group is the c-th.
  template <class T = float>
  FASTSUPCON_DEVICE Four<T> four(int slot, int group, int lane) const {
    return reinterpret_cast<const Four<T>*>(at + slot * count * kFieldBytes)[4 * group + lane % 4];
  }
};

// By one thread: the slots of a tile's columns, counted on the barrier. There are fields for whole tiles: these divide kFieldRows.
FASTSUPCON_DEVICE void fetch_slots(ptx::Address to, const Side& side, int first, int count, int slots, bool backward, bool running,
                                   ptx::Address barrier) {
#pragma unroll 1
  for (int slot = 0; slot < slots; ++slot) {
    const char* from = side.fields + (std::int64_t{field_of(slot, backward, running)} * side.field_rows + first) * kFieldBytes;
    ptx::copy_bulk_async(to + slot * count * kFieldBytes, from, count * kFieldBytes, barrier);
  }
}

// What one of the lane's two rows brings. What a kernel does not use of it is not loaded.
struct Row {
  float factor, bias, linear, different, equal, shift_different, shift_equal;
  std::uint32_t code;
};
template <bool BACKWARD>
FASTSUPCON_DEVICE Row load_row(const void* fields, int field_rows, int row) {
  const auto* words = static_cast<const std::uint32_t*>(fields) + field_place(row);
  const auto word = [&](Field field) { return words[std::int64_t{field} * field_rows]; };
  const auto number = [&](Field field) { return ptx::from_bits(word(field)); };
  Row found{};
  found.factor = number(kFactor);
  found.code = word(kCode);
  found.bias = number(kBias);
  if constexpr (BACKWARD) {
    found.linear = number(kLinear);
    found.different = number(kDifferent);
    found.equal = number(kEqual);
    found.shift_different = number(kShiftDifferent);
    found.shift_equal = number(kShiftEqual);
  }
  return found;
}
template <bool BACKWARD>
FASTSUPCON_DEVICE Row load_row(const Side& side, int row) {
  return load_row<BACKWARD>(side.fields, side.field_rows, row);
}
// Codes that may stand for more than one key.
FASTSUPCON_DEVICE bool is_ambiguous(const Row& row) { return row.code >> 31 != 0; }

// v from x·y. Large logits come out with the same bits for x_i y_j and x_j y_i, so that a row's largest pair has weight exp(0) seen from
// both of its rows: an ulp of 1000 is 6e-5. Small ones save a multiplication.
template <bool RUNNING>
FASTSUPCON_DEVICE float logit(float product, float row_factor, float column_factor, float scale) {
  return RUNNING ? product * (row_factor * column_factor) * scale : product * column_factor * (row_factor * scale);
}

// Whether a tile of `columns` from `first_column` on holds pairs with `rows` from `first_row` on that are none: on the diagonal, a row's
// own, or past the last column.
FASTSUPCON_DEVICE bool needs_mask(const Work& work, const Pass& pass, int first_row, int rows, int first_column, int columns) {
  return work.exclusion == Exclusion::own || first_column + columns > pass.y.count ||
         (work.exclusion == Exclusion::diagonal && first_column < first_row + rows && first_row < first_column + columns);
}

// What a lane needs to know of its two rows in a tile with pairs that are none, or where codes are ambiguous: bit 4j + e is element e of
// group j of 8 columns.
struct Special {
  std::uint64_t excluded = 0;  // is no pair
  std::uint64_t unequal = 0;   // nor is one of equal keys, though the codes be equal
};

FASTSUPCON_DEVICE bool is_set(std::uint64_t bits, int place) {  // of one word, the place being known: one instruction
  return (static_cast<std::uint32_t>(bits >> (place / 32 * 32)) & (1u << place % 32)) != 0;
}

// For the lane's rows `row` and row + 8. Offsets are of columns, from the lane's first on. `fields` are those of the tile, and there.
template <int COLUMNS>
FASTSUPCON_DEVICE Special special_of(const Work& work, const Pass& pass, const Row (&rows)[2], int row, int first_column,
                                     const Columns& fields, int lane) {
  const int first = first_column + accumulator_column(lane, 0), columns = pass.y.count - first;
  const std::int64_t* const own = work.exclusion == Exclusion::own ? pass.y.own : nullptr;
  Special found;
  if (columns < COLUMNS) {  // those past the last
    const int whole = columns > 0 ? columns / 8 : 0, rest = columns > 0 ? columns % 8 : 0;
    if (rest < 2) found.excluded = (rest == 1 ? std::uint64_t{0xa} : std::uint64_t{0xf}) << 4 * whole;
    if (whole < COLUMNS / 8 - 1) found.excluded |= ~std::uint64_t{0} << 4 * (whole + 1);
  }
  if (!own && work.exclusion != Exclusion::none) {  // one column of each row
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = row + 8 * r;
      if (at >= pass.x.count) continue;
      const int offset = (work.exclusion == Exclusion::own ? static_cast<int>(pass.x.own[at]) : at) - first;
      if (offset >= 0 && offset < COLUMNS && offset % 8 < 2) found.excluded |= std::uint64_t{1} << (offset / 8 * 4 + 2 * r + offset % 8);
    }
  }
  if (own) {
#pragma unroll 1
    for (int place = 0; place < COLUMNS / 2; ++place) {
      const int at = row + place / 2 % 2 * 8, column = first + place / 4 * 8 + place % 2;
      if (column < pass.y.count && own[column] == at) found.excluded |= std::uint64_t{1} << place;
    }
  }
  if (is_ambiguous(rows[0]) || is_ambiguous(rows[1])) {
    // Keys are far away, and few pairs of a tile have equal codes: only theirs are compared.
#pragma unroll 1
    for (int group = 0; group < COLUMNS / 16; ++group) {
      const auto codes = fields.four<std::uint32_t>(1, group, lane);
      std::uint32_t equal = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) equal |= codes.of[i / 4 * 2 + i % 2] == rows[i / 2 % 2].code ? 1u << i : 0;
      for (; equal; equal &= equal - 1) {
        const int i = ptx::first_set(equal), at = row + i / 2 % 2 * 8, column = first + 16 * group + i / 4 * 8 + i % 2;
        const bool is_pair = at < pass.x.count && column < pass.y.count;
        if (is_pair && pass.x.keys[at] != pass.y.keys[column]) found.unequal |= std::uint64_t{1} << (8 * group + i);
      }
    }
  }
  ptx::sync_warp();  // lanes took turns of their own, and warpgroup instructions follow
  found.unequal |= found.excluded;
  return found;
}

// use(SPECIAL), use(RUNNING, SPECIAL) as constants: the branches are uniform over the warp. Running sums are compiled with SPECIAL alone.
template <class Use>
FASTSUPCON_DEVICE void with_special(bool special, Use use) {
  special ? use(std::true_type{}) : use(std::false_type{});
}
template <class Use>
FASTSUPCON_DEVICE void with_form(bool running, bool special, Use use) {
  if (running) use(std::true_type{}, std::true_type{});
  else with_special(special, [&](auto s) { use(std::false_type{}, s); });
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

// Of one row; each lane sums the columns that it holds, and lanes meet only at the end. Unless apart, all pairs are in `different`.
struct RowSums {
  LogSum different, equal;
  float similarity = 0.0f, count = 0.0f;
};

// Adds a tile to the sums of the lane's two rows. s is used up.
template <bool RUNNING, bool SPECIAL, bool APART, int COLUMNS>
FASTSUPCON_DEVICE void add_tile(RowSums (&sums)[2], float (&s)[COLUMNS / 8][4], const Row (&rows)[2], float scale, const Columns& columns,
                                const Special& special, int lane) {
  float different[2] = {sums[0].different.maximum, sums[1].different.maximum}, equal[2] = {sums[0].equal.maximum, sums[1].equal.maximum};
  std::uint32_t equal_bits[2] = {0, 0};
#pragma unroll
  for (int group = 0; group < COLUMNS / 16; ++group) {
    const auto factors = columns.four(0, group, lane);
    const auto codes = columns.four<std::uint32_t>(1, group, lane);
    Four<float> biases;
    if (RUNNING) biases = columns.four(kBias, group, lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = 2 * group + i / 4, e = i % 4, r = e / 2, c = i / 4 * 2 + e % 2, place = 4 * j + e;
      const bool is_pair = !SPECIAL || !is_set(special.excluded, place);
      const bool is_equal = codes.of[c] == rows[r].code && (!SPECIAL || !is_set(special.unequal, place));
      float t = logit<RUNNING>(s[j][e], rows[r].factor, factors.of[c], scale);
      if (is_equal) {
        sums[r].similarity += t;
        sums[r].count += 1.0f;
      }
      if (RUNNING) t = t + biases.of[c] + rows[r].bias;
      if (!is_pair) t = -kInfinity;
      if (RUNNING) {
        s[j][e] = t;
        if (is_equal) equal_bits[place / 32] |= 1u << place % 32;
        equal[r] = fmaxf(equal[r], is_equal ? t : -kInfinity);
        different[r] = fmaxf(different[r], is_equal ? -kInfinity : t);
      } else {
        const float exponential = ptx::exp2(t);
        if (APART && is_equal) sums[r].equal.sum += exponential;
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

// The four lanes that share a row put their sums together, and the first of them writes those of this split.
FASTSUPCON_DEVICE void store_sums(const Pass& pass, const BlockWork& block, RowSums& sums, int row, bool bounded, int lane) {
  if (bounded) sums.different.maximum = sums.equal.maximum = 0.0f;  // what they are relative to
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

// Each thread one row and each warp 32, once the splits of these rows have written their sums.
FASTSUPCON_DEVICE void combine_splits(const Pass& pass, int row) {
  LineRow found{row < pass.x.count, {}};
  if (found.is_row) {
    RowSums total;
    load_ahead<4>(
        0, pass.splits, 1,
        [&](int split) {
          const float* partial = pass.partial + kPartials * (std::int64_t{split} * pass.x.count + row);
          const auto at = [&](int i) { return ptx::load_fresh(partial + i); };
          return RowSums{{at(0), at(1)}, {at(2), at(3)}, at(4), at(5)};
        },
        [&](const RowSums& of_split) {
          total.different = merged(total.different, of_split.different);
          total.equal = merged(total.equal, of_split.equal);
          total.similarity += of_split.similarity;
          total.count += of_split.count;
        });
    const auto& out = pass.quantities;
    if (out.all) out.all[row] = found.q.all = log_of(merged(total.different, total.equal));
    if (out.different) out.different[row] = found.q.different = log_of(total.different);
    if (out.equal) out.equal[row] = found.q.equal = log_of(total.equal);
    if (out.similarity) out.similarity[row] = found.q.similarity = total.similarity;
    if (out.count) out.count[row] = found.q.count = total.count;
  }
  if (pass.line.loss) add_to_loss(pass.line, found, row);
}

// ---- Backward -------------------------------------------------------------------------------------------------------------------

// Of one row over its pairs, before any rounding: for the gradients of a bias and of the scale.
struct PairSums {
  float weights = 0.0f;   // w without the linear terms; where there is a bias, nothing is bounded
  float products = 0.0f;  // w x·y factor_j · unit
};

// s becomes w · factor_j · unit, what the rows y are summed with. Running forms are apart.
template <bool RUNNING, bool SPECIAL, bool APART, int COLUMNS>
FASTSUPCON_DEVICE void weigh_tile(PairSums (&sums)[2], float (&s)[COLUMNS / 8][4], const Row (&rows)[2], float scale, float unit,
                                  bool summed, const Columns& columns, const Special& special, int lane) {
#pragma unroll
  for (int group = 0; group < COLUMNS / 16; ++group) {
    const auto four = [&](int slot) { return columns.four(slot, group, lane); };
    const auto factors = four(0);
    const auto codes = columns.four<std::uint32_t>(1, group, lane);
    const auto linear = four(RUNNING ? kLinear : 2), different = four(RUNNING ? kDifferent : 3);
    Four<float> biases, equal, shift_different, shift_equal;
    if (RUNNING || APART) equal = four(RUNNING ? kEqual : 4);
    if (RUNNING) {
      biases = four(kBias);
      shift_different = four(kShiftDifferent);
      shift_equal = four(kShiftEqual);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = 2 * group + i / 4, e = i % 4, r = e / 2, c = i / 4 * 2 + e % 2, place = 4 * j + e;
      const bool is_pair = !SPECIAL || !is_set(special.excluded, place);
      const bool is_equal = codes.of[c] == rows[r].code && (!SPECIAL || !is_set(special.unequal, place));
      const float product = s[j][e], t = logit<RUNNING>(product, rows[r].factor, factors.of[c], scale);
      float w;
      if constexpr (RUNNING) {
        const float biased = is_pair ? t + biases.of[c] + rows[r].bias : -kInfinity;
        const float of_row = is_equal ? rows[r].equal : rows[r].different, of_column = is_equal ? equal.of[c] : different.of[c];
        w = of_row * exp(biased + (is_equal ? rows[r].shift_equal : rows[r].shift_different)) +
            of_column * exp(biased + (is_equal ? shift_equal.of[c] : shift_different.of[c]));
        if (summed) sums[r].weights += w;
        if (is_equal) w += rows[r].linear + linear.of[c];
        w *= factors.of[c] * unit;
      } else {
        const float factor = factors.of[c] * unit;
        float weight = fmaf(rows[r].different, factor, different.of[c] * unit);
        if (APART) weight = is_equal ? fmaf(rows[r].equal, factor, equal.of[c] * unit) : weight;
        w = ptx::exp2(t) * weight;
        if (is_equal) w += fmaf(rows[r].linear, factor, linear.of[c] * unit);
        if (SPECIAL && !is_pair) w = 0.0f;
      }
      if (summed) sums[r].products += w * product;
      s[j][e] = w;
    }
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
// two brings that times the largest factor just below 2^15, so that what is 2^-29 of it keeps full precision. bfloat16 and single need
// none.
template <Product PRODUCT>
FASTSUPCON_DEVICE float weight_unit(const Pass& pass) {
  if constexpr (PRODUCT != Product::f16) {
    return 1.0f;
  } else {
    float largest[2] = {0.0f, 0.0f}, factor = 0.0f;
    for (int side = 0; side < 2; ++side) {
      const Side& of = side ? pass.y : pass.x;
      for (int i = ptx::lane(); i < of.field_rows / kLargestRows; i += 32) {
        largest[side] = fmaxf(largest[side], of.largest[2 * i]);
        if (side) factor = fmaxf(factor, of.largest[2 * i + 1]);
      }
    }
    const float bound = (warp_largest(largest[0]) + warp_largest(largest[1])) * warp_largest(factor);
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

// Two neighbours of a row of the result, which begins at `out`.
FASTSUPCON_DEVICE void store_pair(float* out, std::int64_t depth, std::int64_t column, float first, float second) {
  if (column >= depth) return;
  if (depth % 2 == 0) {
    ptx::store_two(out + column, first, second);
  } else {
    out[column] = first;
    if (column + 1 < depth) out[column + 1] = second;
  }
}

}  // namespace fastsupcon::cuda
