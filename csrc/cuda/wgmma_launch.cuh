// Picks the instantiation of wgmma.cuh, or of the kernels for more depth, for a depth.
#pragma once

#include "families.h"
#include "wgmma.cuh"
#include "wgmma_deep_backward.cuh"
#include "wgmma_deep_forward.cuh"

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
  const bool bounded = scale.may_bound && !scale.address && in_bounds(static_cast<float>(scale.value));
  return device.capability == 90 && work.aligned && work.depth <= kDeepDepth && bounded;
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

// OUT_PANELS: of the result, in each of the backward's two consumers; 0 in the forward.
template <Product PRODUCT, int OUT_PANELS, bool BACKWARD>
struct DeepVariant {
  using Shape = DeepShape<BACKWARD>;
  static DeepLayout layout(std::int64_t depth) {
    const int panels = static_cast<int>(ceil_div(depth, kPanelDepth));
    const int consumers = BACKWARD || panels <= 12 ? 2 : 1;
    return {panels, OUT_PANELS, consumers, Shape::fitting_places(panels, consumers)};
  }
  static Tiling tiling(std::int64_t depth) {
    const DeepLayout layout = DeepVariant::layout(depth);
    const int out_chunks = BACKWARD ? static_cast<int>(ceil_div(layout.panels, 2 * OUT_PANELS)) : 1;
    return {Shape::rows(layout.consumers), Shape::columns, 1, out_chunks};
  }
  static void launch(const Work& work, const Where& where) {
    const DeepLayout layout = DeepVariant::layout(work.depth);
    const Tiling tiling = DeepVariant::tiling(work.depth);
    const Grid grid = tile_grid(work, tiling);
    const int threads = 128 * (layout.consumers + 1);
    const int shared_bytes = Shape::ring_at(layout.panels, layout.consumers) + layout.places * Shape::panel_bytes;
    const auto shape = [&] { return shape_of(work); };
    const Maps maps = maps_of<PRODUCT>(work, tiling);
    if constexpr (BACKWARD) {
      cuda::launch("wgmma_deep_backward", shape, wgmma_deep_backward<PRODUCT, OUT_PANELS>, grid, threads, shared_bytes, where, work, layout,
                   maps);
    } else {
      cuda::launch("wgmma_deep_forward", shape, wgmma_deep_forward<PRODUCT>, grid, threads, shared_bytes, where, work, layout, maps);
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
  if (depth <= 256) return of_panels(std::integral_constant<int, 4>{});
  if (!backward) return use(DeepVariant<PRODUCT, 0, false>{});
  if (depth <= 512 || depth > 768) return use(DeepVariant<PRODUCT, 4, true>{});
  return use(DeepVariant<PRODUCT, 6, true>{});
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
