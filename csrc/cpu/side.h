// One side of a problem, its rows or its columns: cut into blocks, and what tiles read of them. Arrays by row are as long as whole blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"
#include "dispatch.h"
#include "kernels.h"
#include "memory.h"
#include "schedule.h"

namespace fastsupcon::cpu {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

inline std::int64_t element_size(Scalar scalar) { return scalar == Scalar::f64 ? 8 : scalar == Scalar::f32 ? 4 : 2; }

// Larger blocks need fewer passes over the gradient; smaller ones give more tiles to share out. Whole panels, of any type.
inline std::int64_t block_of(std::int64_t rows) {
  const std::int64_t block = rows <= 384 ? 64 : rows <= 1536 ? 96 : 144, panel = unit_in_use().f32->panel;  // a multiple of f64's
  return ceil_div(std::min(block, rows), panel) * panel;
}

template <class Sum>
struct Side {
  const Kernels<Sum>& kernels;
  const char* const data;
  const std::int64_t count, depth, row_bytes, block, blocks, packed_depth;
  Sum* inverse_norms = nullptr;  // [count], if rows are brought to unit length
  Sum *panels = nullptr, *elements = nullptr, *bias = nullptr;
  Integer<Sum>*keys = nullptr, *own = nullptr;

  Side(const Kernels<Sum>& kernels_, const void* data_, std::int64_t count_, std::int64_t depth_, Scalar scalar)
      : kernels(kernels_),
        data(static_cast<const char*>(data_)),
        count(count_),
        depth(depth_),
        row_bytes(depth_ * element_size(scalar)),
        block(block_of(count_)),
        blocks(ceil_div(count_, block)),
        packed_depth(kernels.packed_depth(depth_)) {}

  std::int64_t padded() const { return blocks * block; }
  std::int64_t size(std::int64_t index) const { return std::min(block, count - index * block); }
  const char* rows(std::int64_t index) const { return data + index * block * row_bytes; }

  // The block `index`, which is packed in the slot's place.
  Face<Sum> face(std::int64_t index, std::int64_t slot) const {
    const auto at = [&](auto* array, std::int64_t place, std::int64_t width) { return array ? array + place * block * width : nullptr; };
    Face<Sum> face{};
    face.first = index * block;
    face.count = size(index);
    face.panels = at(panels, slot, depth);
    face.elements = at(elements, slot, packed_depth);
    face.keys = at(keys, index, 1);
    face.own = at(own, index, 1);
    face.bias = at(bias, index, 1);
    return face;
  }

  // Returns the largest |x|² of a block. Writes the inverse norms, if there are to be any.
  double measure(std::int64_t index) const { return kernels.measure(rows(index), size(index), depth, inverse_norms_of(index)); }

  void pack(std::int64_t index, std::int64_t slot) const {
    const Face<Sum> packed = face(index, slot);
    kernels.pack(rows(index), packed.count, depth, inverse_norms_of(index), const_cast<Sum*>(packed.panels),
                 const_cast<Sum*>(packed.elements));
  }

 private:
  Sum* inverse_norms_of(std::int64_t index) const { return inverse_norms ? inverse_norms + index * block : nullptr; }
};

}  // namespace fastsupcon::cpu
