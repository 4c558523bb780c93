// Picks the instantiation of wgmma.cuh for a depth.
#pragma once

#include "families.h"
#include "wgmma.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT, int PANELS, bool BACKWARD>
struct WgmmaVariant {
  using Shape = WgmmaShape<PANELS, BACKWARD>;
  static Tiling tiling() { return {Shape::rows, Shape::columns, 1, 1}; }
  static void launch(const Work& work, int splits, const Where& where) {
    const Grid grid{ceil_div(work.x.count, Shape::rows), splits, 1};
    const auto shape = [&] { return shape_of(work); };
    const auto map = [&](const Side& side, int rows) {
      return make_tensor_map(side.rows, side.count, work.depth, PRODUCT == Product::bf16, rows, shape);
    };
    const auto x_map = map(work.x, Shape::rows), y_map = map(work.y, Shape::columns);
    if constexpr (BACKWARD) {
      const auto kernel = work.form == Form::sum   ? wgmma_backward<PRODUCT, PANELS, Form::sum>
                          : work.form == Form::two ? wgmma_backward<PRODUCT, PANELS, Form::two>
                                                   : wgmma_backward<PRODUCT, PANELS, Form::one>;
      cuda::launch("wgmma_backward", shape, kernel, grid, Shape::threads, Shape::shared_bytes, where, work, x_map, y_map);
    } else {
      cuda::launch("wgmma_forward", shape, wgmma_forward<PRODUCT, PANELS>, grid, Shape::threads, Shape::shared_bytes, where, work, x_map,
                   y_map);
    }
  }
};

template <Product PRODUCT, class Use>
auto with_wgmma_variant(const Work& work, bool backward, Use use) {
  const auto of_panels = [&](auto panels) {
    constexpr int PANELS = decltype(panels)::value;
    return backward ? use(WgmmaVariant<PRODUCT, PANELS, true>{}) : use(WgmmaVariant<PRODUCT, PANELS, false>{});
  };
  if (work.depth <= 64) return of_panels(std::integral_constant<int, 1>{});
  if (work.depth <= 128) return of_panels(std::integral_constant<int, 2>{});
  return of_panels(std::integral_constant<int, 4>{});
}

template <Product PRODUCT>
bool wgmma_serves(const Work& work, bool, const Device& device) {
  constexpr std::int64_t last = 0x7fffff00;  // TMA counts rows in 32 bits
  return device.capability == 90 && work.aligned && work.depth <= 256 && work.x.count < last && work.y.count < last;
}

template <Product PRODUCT>
Tiling wgmma_tiling(const Work& work, bool backward) {
  return with_wgmma_variant<PRODUCT>(work, backward, [](auto variant) { return decltype(variant)::tiling(); });
}

template <Product PRODUCT>
void wgmma_launch(const Work& work, bool backward, int splits, const Where& where) {
  with_wgmma_variant<PRODUCT>(work, backward, [&](auto variant) { decltype(variant)::launch(work, splits, where); });
}

#define FASTSUPCON_WGMMA_INSTANTIATE(PRODUCT)                              \
  template bool wgmma_serves<PRODUCT>(const Work&, bool, const Device&);   \
  template Tiling wgmma_tiling<PRODUCT>(const Work&, bool);                \
  template void wgmma_launch<PRODUCT>(const Work&, bool, int, const Where&);

}  // namespace fastsupcon::cuda
