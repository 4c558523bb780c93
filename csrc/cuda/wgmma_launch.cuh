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

// What TMA can fetch: rows of whole 16 bytes, so aligned, counted in 32 bits.
inline bool tma_serves(const Work& work, const Device& device) {
  bool small = true;
  for (int i = 0; i < work.count; ++i) small &= work.passes[i].x.count < 0x7fffff00 && work.passes[i].y.count < 0x7fffff00;
  return device.capability == 90 && work.aligned && small;
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
  return {"wgmma", [](const Work& work, const Device& device) { return work.depth <= 256 && tma_serves(work, device); },
          [](std::int64_t depth, bool backward) {
            return with_wgmma_variant<PRODUCT>(depth, backward, [&](auto variant) { return decltype(variant)::tiling(depth); });
          },
          [](const Work& work, bool backward, const Where& where) {
            with_wgmma_variant<PRODUCT>(work.depth, backward, [&](auto variant) { decltype(variant)::launch(work, where); });
          }};
}

}  // namespace fastsupcon::cuda
