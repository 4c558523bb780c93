// A tile's pairs in the forward of triangle.h: bounded sums over all pairs, of rows and of columns.
//
// Lanes hold the sums of their rows in registers. Those of the columns go by a butterfly over the 8 lanes that share a column, each step of
// which halves the columns that a lane is left with: of 32 columns, one.
#pragma once

#include "tile.cuh"

namespace fastsupcon::cuda {

// Sums over the 8 lanes that hold the same columns: lane l is left with value l / 4 · N / 8 of N.
template <int N, class T>
FASTSUPCON_DEVICE T butterfly(T (&values)[N], int lane) {
#pragma unroll
  for (int mask = 16, n = N / 2; mask >= 4; mask /= 2, n /= 2) {
    if (n == 0) values[0] += ptx::shuffle_xor(values[0], mask);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const bool high = (lane & mask) != 0;
      const T kept = ptx::select(high, values[k + n], values[k]), given = ptx::select(high, values[k], values[k + n]);
      values[k] = kept + ptx::shuffle_xor(given, mask);
    }
  }
  return values[0];
}

// How many pairs of equal keys a lane finds in a group of 16 columns, in fields of one word: of each of its four columns, of either row.
constexpr int kColumnCountBits = 6, kRowCountBits = 4, kRowCountsAt = 4 * kColumnCountBits;

// Where a column's count is among a warp's words of them, and its shift.
struct CountPlace {
  int word, shift;
};
FASTSUPCON_DEVICE CountPlace count_place(int column) {
  const int of_group = column % 16;
  return {column / 16 * 4 + of_group % 8 / 2, kColumnCountBits * (of_group / 8 * 2 + of_group % 2)};
}

// A lane's rows, two in each of its warpgroup's BLOCKS blocks of 64, and its share of their sums.
template <int BLOCKS>
struct TriangleRows {
  Row rows[BLOCKS][2];
  float exponentials[BLOCKS][2], similarities[BLOCKS][2];
  std::uint32_t counts[BLOCKS][2];
  bool ambiguous;  // one of the warp's rows at least

  FASTSUPCON_DEVICE TriangleRows(const Side& side, int row) {
    bool is_any_ambiguous = false;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows[b][r] = load_row<false>(side, row + 64 * b + 8 * r);
        exponentials[b][r] = similarities[b][r] = 0.0f;
        counts[b][r] = 0;
        is_any_ambiguous |= is_ambiguous(rows[b][r]);
      }
    }
    ambiguous = ptx::any(is_any_ambiguous);
  }

  // The four lanes that share a row put their sums together; of each quantity, a row's goes to its place in a group's rows from `to` on.
  FASTSUPCON_DEVICE void store(float* to, int group_rows, int row_in_group, int lane) const {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sums[kTriangleSums] = {exponentials[b][r], similarities[b][r], static_cast<float>(counts[b][r])};
#pragma unroll
        for (int i = 0; i < kTriangleSums; ++i) {
          sums[i] += ptx::shuffle_xor(sums[i], 1);
          sums[i] += ptx::shuffle_xor(sums[i], 2);
          if (lane % 4 == 0) to[i * group_rows + row_in_group + 64 * b + 8 * r] = sums[i];
        }
      }
    }
  }
};

// use(BEYOND, SPECIAL) as constants: tiles on the diagonal have pairs that are none.
template <class Use>
FASTSUPCON_DEVICE void with_tile_form(bool beyond, bool special, Use use) {
  if (!beyond) use(std::false_type{}, std::true_type{});
  else if (special) use(std::true_type{}, std::true_type{});
  else use(std::true_type{}, std::false_type{});
}

// Of a tile's columns.
template <int BLOCKS, int COLUMNS>
struct TileSums {
  // Of each 32 columns, a lane's eight over its rows, and once lanes have met, in the first place, one over the warp's: so many are 32.
  float exponentials[COLUMNS / 32][8], similarities[COLUMNS / 32][8];
  std::uint32_t counts[COLUMNS > 64 ? 8 : 4];  // over a lane's rows, of a group of 16 columns each
  std::uint32_t of_rows[BLOCKS];               // a lane's rows' counts of the 32 columns under way

  FASTSUPCON_DEVICE TileSums() {
#pragma unroll
    for (int group = COLUMNS / 16; group < (COLUMNS > 64 ? 8 : 4); ++group) counts[group] = 0;
  }

  // In a warp's words: for each column one of exponentials and one of similarities, for four one of counts.
  static constexpr int words = 2 * COLUMNS + COLUMNS / 4;
  FASTSUPCON_DEVICE void store_columns(float* to, int part, int lane) const {
    float* const column = to + 32 * part + lane / 16 * 16 + lane / 8 % 2 * 8 + lane % 4 * 2 + lane / 4 % 2;
    column[0] = exponentials[part][0];
    column[COLUMNS] = similarities[part][0];
  }
  FASTSUPCON_DEVICE void store_counts(float* to, int lane) {
    const std::uint32_t count = butterfly(counts, lane);
    const int group = COLUMNS > 64 ? lane / 4 : lane / 8;
    const bool is_mine = COLUMNS > 64 ? group < COLUMNS / 16 : lane / 4 % 2 == 0;
    if (is_mine) reinterpret_cast<std::uint32_t*>(to)[2 * COLUMNS + 4 * group + lane % 4] = count;
  }
};

// Adds a group of 16 columns to the sums of the lane's rows and, beyond the diagonal, to those of its columns. After the second of a part
// of 32 columns, lanes meet.
template <bool BEYOND, bool SPECIAL, int BLOCKS, int COLUMNS>
FASTSUPCON_DEVICE void add_group(TriangleRows<BLOCKS>& of, TileSums<BLOCKS, COLUMNS>& tile, const float (&s)[BLOCKS][COLUMNS / 8][4],
                                 int group, float scale, const Columns& columns, const Special (&special)[BLOCKS], int lane) {
  const int part = group / 2;
  auto& exponentials = tile.exponentials[part];
  auto& similarities = tile.similarities[part];
  const auto factors = columns.four(0, group, lane);
  const auto codes = columns.four<std::uint32_t>(1, group, lane);
  tile.counts[group] = 0;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    std::uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = 2 * group + i / 4, e = i % 4, r = e / 2, c = i / 4 * 2 + e % 2, place = 4 * j + e, k = 4 * (group % 2) + c;
      const Row& row = of.rows[block][r];
      const bool is_equal = codes.of[c] == row.code && (!SPECIAL || !is_set(special[block].unequal, place));
      const float t = logit<false>(s[block][j][e], row.factor, factors.of[c], scale);
      const float exponential = SPECIAL && is_set(special[block].excluded, place) ? 0.0f : ptx::exp2(t);
      of.exponentials[block][r] += exponential;
      const float similarity = is_equal ? t : 0.0f;
      of.similarities[block][r] += similarity;
      if (is_equal) found += 1u << kColumnCountBits * c | 1u << (kRowCountsAt + kRowCountBits * r);
      if (BEYOND) {
        const bool is_first = block == 0 && r == 0;
        exponentials[k] = is_first ? exponential : exponentials[k] + exponential;
        similarities[k] = is_first ? similarity : similarities[k] + similarity;
      }
    }
    tile.of_rows[block] = (group % 2 ? tile.of_rows[block] : 0) + (found >> kRowCountsAt);
    tile.counts[group] += found;  // what the fields of rows carry over is lost past the highest bit
  }
  if (group % 2 == 0) return;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    of.counts[block][0] += tile.of_rows[block] & ((1u << kRowCountBits) - 1);
    of.counts[block][1] += tile.of_rows[block] >> kRowCountBits;
  }
  if (BEYOND) {
    const bool any = ptx::any((tile.counts[group - 1] | tile.counts[group]) != 0);
    similarities[0] = any ? butterfly(similarities, lane) : 0.0f;
    exponentials[0] = butterfly(exponentials, lane);
  }
}

}  // namespace fastsupcon::cuda
