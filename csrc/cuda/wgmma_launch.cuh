// Picks the instantiation of wgmma.cuh for a depth.
#pragma once

#include "families.h"
#include "wgmma.cuh"
#include "wgmma_deep_backward.cuh"
#include "wgmma_deep_forward.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT>
ptx::TensorMap map_of(const Work& work, const Side& side, int box_rows) {
  return make_tensor_map(side.rows, side.count, work.depth, PRODUCT == Product::bf16, box_rows, [&] { return shape_of(work); });
}

template <Product PRODUCT, int PANELS, bool BACKWARD>
struct WgmmaVariant {
  using Shape = WgmmaShape<PANELS, BACKWARD>;
  static Tiling tiling(const Work&) { return {Shape::rows, Shape::columns, 1, 1}; }
  static void launch(const Work& work, int splits, const Where& where) {
    const Grid grid{ceil_div(work.x.count, Shape::rows), splits, 1};
    const auto shape = [&] { return shape_of(work); };
    const auto x_map = map_of<PRODUCT>(work, work.x, Shape::rows), y_map = map_of<PRODUCT>(work, work.y, Shape::columns);
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

// OUT_PANELS: of the result, in each of the backward's two consumers; 0 in the forward.
template <Product PRODUCT, int OUT_PANELS, bool BACKWARD>
struct DeepVariant {
  using Shape = DeepShape<BACKWARD>;
  static DeepLayout layout(const Work& work) {
    const int panels = static_cast<int>(ceil_div(work.depth, kPanelDepth));
    const int consumers = BACKWARD || panels <= 12 ? 2 : 1;
    return {panels, OUT_PANELS, consumers, Shape::fitting_places(panels, consumers)};
  }
  static Tiling tiling(const Work& work) {
    const DeepLayout layout = DeepVariant::layout(work);
    const int out_chunks = BACKWARD ? static_cast<int>(ceil_div(layout.panels, 2 * OUT_PANELS)) : 1;
    return {Shape::rows(layout.consumers), Shape::columns, 1, out_chunks};
  }
  static void launch(const Work& work, int splits, const Where& where) {
    const DeepLayout layout = DeepVariant::layout(work);
    const Tiling tiling = DeepVariant::tiling(work);
    const Grid grid{ceil_div(work.x.count, tiling.rows), splits, tiling.out_chunks};
    const int threads = 128 * (layout.consumers + 1);
    const int shared_bytes = Shape::ring_at(layout.panels, layout.consumers) + layout.places * Shape::panel_bytes;
    const auto shape = [&] { return shape_of(work); };
    const auto x_map = map_of<PRODUCT>(work, work.x, tiling.rows), y_map = map_of<PRODUCT>(work, work.y, tiling.columns);
    if constexpr (BACKWARD) {
      const auto kernel = work.form == Form::sum   ? wgmma_deep_backward<PRODUCT, OUT_PANELS, Form::sum>
                          : work.form == Form::two ? wgmma_deep_backward<PRODUCT, OUT_PANELS, Form::two>
                                                   : wgmma_deep_backward<PRODUCT, OUT_PANELS, Form::one>;
      cuda::launch("wgmma_deep_backward", shape, kernel, grid, threads, shared_bytes, where, work, layout, x_map, y_map);
    } else {
      cuda::launch("wgmma_deep_forward", shape, wgmma_deep_forward<PRODUCT>, grid, threads, shared_bytes, where, work, layout, x_map,
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
  if (work.depth <= 256) return of_panels(std::integral_constant<int, 4>{});
  if (!backward) return use(DeepVariant<PRODUCT, 0, false>{});
  if (work.depth <= 512 || work.depth > 768) return use(DeepVariant<PRODUCT, 4, true>{});
  return use(DeepVariant<PRODUCT, 6, true>{});
}

template <Product PRODUCT>
bool wgmma_serves(const Work& work, bool, const Device& device) {
  constexpr std::int64_t last = 0x7fffff00;  // TMA counts rows in 32 bits
  return device.capability == 90 && work.aligned && work.depth <= kDeepDepth && work.x.count < last && work.y.count < last;
}

template <Product PRODUCT>
Tiling wgmma_tiling(const Work& work, bool backward) {
  return with_wgmma_variant<PRODUCT>(work, backward, [&](auto variant) { return decltype(variant)::tiling(work); });
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
