// Picks the instantiation of wgmma.cuh for a depth.
#pragma once

#include "families.h"
#include "wgmma.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT>
Maps maps_of(const Work& work, const Tiling& tiling) {
  Maps maps;
  const auto map_of = [&](const Side& side, int rows) {
    return make_tensor_map(side.rows, side.count, work.depth, PRODUCT == Product::bf16, rows, [&] { return shape_of(work); });
  };
  for (int i = 0; i < work.count; ++i) {
    maps.x[i] = map_of(work.passes[i].x, tiling.rows);
    maps.y[i] = map_of(work.passes[i].y, tiling.columns);
  }
  return maps;
}

// Rows that TMA can fetch, of whole 16 bytes and so aligned; and sums known to be bounded before a kernel runs, which leaves out a bias, a
// scale on the device and its gradient. Running sums of a tile of 128 columns spilled 0.3 KiB in the forward and in the backward.
inline bool wgmma_serves(const Work& work, const Device& device) {
  const Scale& scale = work.scale;
  return device.capability == 90 && work.aligned && work.depth <= 256 && scale.may_bound && !scale.address && in_bounds(static_cast<float>(scale.value));
}

template <Product PRODUCT, int PANELS, bool BACKWARD>
struct WgmmaVariant {
  using Shape = WgmmaShape<PANELS, BACKWARD>;
  static Tiling tiling(std::int64_t) { return {Shape::rows, Shape::columns, 1, 1}; }
  static void launch(const Work& work, const Where& where) {
    const Grid grid = tile_grid(work, tiling(work.depth));
    const auto shape = [&] { return shape_of(work); };
    const Maps maps = maps_of<PRODUCT>(work, tiling(work.depth));
    if constexpr (BACKWARD) {
      cuda::launch("wgmma_backward", shape, wgmma_backward<PRODUCT, PANELS>, grid, Shape::threads, Shape::shared_bytes, where, work, maps);
    } else {
      cuda::launch("wgmma_forward", shape, wgmma_forward<PRODUCT, PANELS>, grid, Shape::threads, Shape::shared_bytes, where, work, maps);
    }
  }
};

template <Product PRODUCT, class Use>
auto with_wgmma_variant(std::int64_t depth, bool backward, Use use) {
  const auto of_panels = [&](auto panels) {
    constexpr int PANELS = decltype(panels)::value;
    return backward ? use(WgmmaVariant<PRODUCT, PANELS, true>{}) : use(WgmmaVariant<PRODUCT, PANELS, false>{});
  };
  if (depth <= 64) return of_panels(std::integral_constant<int, 1>{});
  if (depth <= 128) return of_panels(std::integral_constant<int, 2>{});
  return of_panels(std::integral_constant<int, 4>{});
}

template <Product PRODUCT>
Family wgmma_family() {
  return {"wgmma", wgmma_serves,
          [](std::int64_t depth, bool backward) {
            return with_wgmma_variant<PRODUCT>(depth, backward, [&](auto variant) { return decltype(variant)::tiling(depth); });
          },
          [](const Work& work, bool backward, const Where& where) {
            with_wgmma_variant<PRODUCT>(work.depth, backward, [&](auto variant) { decltype(variant)::launch(work, where); });
          }};
}

}  // namespace fastsupcon::cuda
