// Picks the instantiation of wgmma.cuh, or of the kernels for more depth, for a depth.
#pragma once

#include "families.h"
#include "wgmma.cuh"
#include "wgmma_deep_backward.cuh"
#include "wgmma_deep_forward.cuh"
#include "wgmma_deep_triangle.cuh"
#include "wgmma_triangle.cuh"

namespace fastsupcon::cuda {

// Sides of the same rows in boxes of the same height share a map, as the driver takes its time to make one.
template <Product PRODUCT>
Maps maps_of(const Work& work, const Tiling& tiling) {
  struct Made {
    const Side* side;
    int rows;
    ptx::TensorMap map;
  };
  std::vector<Made> made;
  const auto map_of = [&](const Side& side, int rows) {
    for (const Made& other : made) {
      if (other.side->rows == side.rows && other.side->count == side.count && other.rows == rows) return other.map;
    }
    const auto shape = [&] { return shape_of(work); };
    made.push_back({&side, rows, make_tensor_map(side.rows, side.count, work.depth, PRODUCT == Product::bf16, rows, shape)});
    return made.back().map;
  };
  Maps maps;
  for (int i = 0; i < work.count; ++i) {
    maps.x[i] = map_of(work.passes[i].x, tiling.rows);
    maps.y[i] = map_of(work.passes[i].y, tiling.columns);
  }
  return maps;
}

// Rows that TMA can fetch, of whole 16 bytes and so aligned.
inline bool wgmma_serves(const Work& work, const Device& device) {
  return device.capability == 90 && work.aligned && work.depth <= kDeepDepth;
}

// use(whether the scale's gradient is wanted) as a constant.
template <class Use>
void with_summed(const Work& work, Use use) {
  work.passes[0].products ? use(std::true_type{}) : use(std::false_type{});
}

template <Product PRODUCT, int PANELS, bool BACKWARD, bool APART>
struct WgmmaVariant {
  using Shape = WgmmaShape<PANELS, BACKWARD, APART>;
  static Tiling tiling(std::int64_t, int consumers) { return {64 * consumers, Shape::columns, 1, 1}; }
  static void launch(const Work& work, int consumers, const Where& where) {
    const Tiling tiling = WgmmaVariant::tiling(work.depth, consumers);
    const Grid grid = tile_grid(work, tiling);
    const auto shape = [&] { return shape_of(work); };
    const Maps maps = maps_of<PRODUCT>(work, tiling);
    const int threads = 128 * (consumers + 1);
    if constexpr (BACKWARD) {
      with_summed(work, [&](auto summed) {
        cuda::launch("wgmma_backward", shape, wgmma_backward<PRODUCT, PANELS, APART, decltype(summed)::value>, grid, threads,
                     Shape::shared_bytes, where, work, consumers, maps);
      });
    } else {
      cuda::launch("wgmma_forward", shape, wgmma_forward<PRODUCT, PANELS, APART>, grid, threads, Shape::shared_bytes, where, work,
                   consumers, maps);
    }
  }
};

// OUT_PANELS: of the result, in each of the backward's two consumers; 0 in the forward. COLUMNS: of a tile.
template <Product PRODUCT, int OUT_PANELS, bool BACKWARD, bool APART, int COLUMNS>
struct DeepVariant {
  using Shape = DeepShape<BACKWARD, APART, COLUMNS>;
  static DeepLayout layout(std::int64_t depth, int consumers) {
    const int slabs = static_cast<int>(ceil_div(depth, Shape::slab_depth));
    return {slabs, OUT_PANELS / Shape::slab_panels, consumers, Shape::fitting_places(slabs, consumers)};
  }
  static Tiling tiling(std::int64_t depth, int consumers) {
    const DeepLayout layout = DeepVariant::layout(depth, consumers);
    const int out_chunks = BACKWARD ? static_cast<int>(ceil_div(layout.slabs, 2 * layout.slice)) : 1;
    return {Shape::rows(layout.consumers), Shape::columns, 1, out_chunks};
  }
  static void launch(const Work& work, int consumers, const Where& where) {
    const DeepLayout layout = DeepVariant::layout(work.depth, consumers);
    const Tiling tiling = DeepVariant::tiling(work.depth, consumers);
    const Grid grid = tile_grid(work, tiling);
    const int threads = 128 * (layout.consumers + 1);
    const int shared_bytes = Shape::ring_at(layout.slabs, layout.consumers) + layout.places * Shape::slab_bytes;
    const auto shape = [&] { return shape_of(work); };
    const Maps maps = maps_of<PRODUCT>(work, tiling);
    if constexpr (BACKWARD) {
      with_summed(work, [&](auto summed) {
        cuda::launch("wgmma_deep_backward", shape, wgmma_deep_backward<PRODUCT, OUT_PANELS, APART, COLUMNS, decltype(summed)::value>, grid,
                     threads, shared_bytes, where, work, layout, maps);
      });
    } else {
      cuda::launch("wgmma_deep_forward", shape, wgmma_deep_forward<PRODUCT, APART, COLUMNS>, grid, threads, shared_bytes, where, work,
                   layout, maps);
    }
  }
};

template <Product PRODUCT, class Use>
auto with_wgmma_variant(std::int64_t depth, bool backward, bool apart, Use use) {
  const auto of = [&](auto is_backward, auto is_apart) {
    constexpr bool BACKWARD = decltype(is_backward)::value, APART = decltype(is_apart)::value;
    if (depth <= 64) return use(WgmmaVariant<PRODUCT, 1, BACKWARD, APART>{});
    if (depth <= 128) return use(WgmmaVariant<PRODUCT, 2, BACKWARD, APART>{});
    if (depth <= 256) return use(WgmmaVariant<PRODUCT, 4, BACKWARD, APART>{});
    if constexpr (!BACKWARD) {
      if (depth > 512 && depth <= 768) return use(DeepVariant<PRODUCT, 0, false, APART, 64>{});
      return use(DeepVariant<PRODUCT, 0, false, APART, 128>{});
    } else {
      if (depth <= 512) return use(DeepVariant<PRODUCT, 4, true, APART, 64>{});
      if (depth <= 768) return use(DeepVariant<PRODUCT, 6, true, APART, 32>{});
      return use(DeepVariant<PRODUCT, 4, true, APART, 32>{});
    }
  };
  const auto of_side = [&](auto is_backward) { return apart ? of(is_backward, std::true_type{}) : of(is_backward, std::false_type{}); };
  return backward ? of_side(std::true_type{}) : of_side(std::false_type{});
}

// Consumers that a block may have, most first.
inline std::vector<int> wgmma_consumers(std::int64_t depth, bool backward) {
  if (depth <= 256) return backward ? std::vector<int>{2, 1} : std::vector<int>{4, 2, 1};
  return {backward || depth <= 12 * kPanelDepth ? 2 : 1};
}

inline ptx::TensorMap triangle_map(const Work& work, bool bf16, int box_rows) {
  const Side& side = work.passes[0].x;
  return make_tensor_map(side.rows, side.count, work.depth, bf16, box_rows, [&] { return shape_of(work); });
}

inline Grid triangle_grid(const Work& work) { return {work.triangle.blocks()}; }

template <Product PRODUCT, int PANELS>
struct TriangleVariant {
  using Shape = TriangleShape<PANELS>;
  static Tiling tiling(std::int64_t) { return {Shape::rows, Shape::columns, 1, 1}; }
  static void launch(const Work& work, const Where& where) {
    const auto map = [&](int rows) { return triangle_map(work, PRODUCT == Product::bf16, rows); };
    cuda::launch("wgmma_triangle", [&] { return shape_of(work); }, wgmma_triangle<PRODUCT, PANELS>, triangle_grid(work), Shape::threads,
                 Shape::shared_bytes, where, work, map(64), map(Shape::columns));
  }
};

template <Product PRODUCT, int COLUMNS>
struct DeepTriangleVariant {
  using Shape = DeepTriangleShape<COLUMNS>;
  static Tiling tiling(std::int64_t depth) { return {Shape::rows(Shape::consumers(depth)), COLUMNS, 1, 1}; }
  static void launch(const Work& work, const Where& where) {
    const DeepLayout layout = Shape::layout(work.depth);
    const auto map = [&](int rows) { return triangle_map(work, PRODUCT == Product::bf16, rows); };
    cuda::launch("wgmma_deep_triangle", [&] { return shape_of(work); }, wgmma_deep_triangle<PRODUCT, COLUMNS>, triangle_grid(work),
                 128 * (layout.consumers + 1), Shape::shared_bytes(layout), where, work, layout, map(Shape::rows(layout.consumers)),
                 map(COLUMNS));
  }
};

template <Product PRODUCT, class Use>
auto with_triangle_variant(std::int64_t depth, Use use) {
  if (depth <= 64) return use(TriangleVariant<PRODUCT, 1>{});
  if (depth <= 128) return use(TriangleVariant<PRODUCT, 2>{});
  if (depth <= 256) return use(TriangleVariant<PRODUCT, 4>{});
  if (depth <= 512) return use(DeepTriangleVariant<PRODUCT, 128>{});
  return use(DeepTriangleVariant<PRODUCT, 64>{});
}

template <Product PRODUCT>
Family wgmma_family() {
  return {"wgmma", false, wgmma_serves, wgmma_consumers,
          [](const Work& work, bool backward, int consumers) {
            return with_wgmma_variant<PRODUCT>(work.depth, backward, work.apart,
                                               [&](auto variant) { return decltype(variant)::tiling(work.depth, consumers); });
          },
          [](const Work& work, bool backward, int consumers, const Where& where) {
            with_wgmma_variant<PRODUCT>(work.depth, backward, work.apart,
                                        [&](auto variant) { decltype(variant)::launch(work, consumers, where); });
          },
          [](std::int64_t depth) {
            return with_triangle_variant<PRODUCT>(depth, [&](auto variant) { return decltype(variant)::tiling(depth); });
          },
          [](const Work& work, const Where& where) {
            with_triangle_variant<PRODUCT>(work.depth, [&](auto variant) { decltype(variant)::launch(work, where); });
          }};
}

}  // namespace fastsupcon::cuda
