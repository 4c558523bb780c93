// Picks the instantiation of mma.cuh for a depth.
#pragma once

#include "families.h"
#include "mma.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT>
int mma_panels(const Work& work) {
  const std::int64_t panels = ceil_div(work.depth * kElementBytes<PRODUCT>, kPanelBytes);
  if (panels > 4) return 0;
  if (panels > 2) return 4;
  return panels == 2 || kElementBytes<PRODUCT> == 4 ? 2 : 1;  // single: 1 would be a depth of 32, hardly worth compiling
}

template <Product PRODUCT, int PANELS, bool BACKWARD>
struct MmaVariant {
  using Shape = MmaShape<PRODUCT, PANELS, BACKWARD>;
  static Tiling tiling(const Work& work) {
    const std::int64_t panels = ceil_div(work.depth * kElementBytes<PRODUCT>, kPanelBytes);
    return {Shape::rows, kMmaColumns, 2, BACKWARD && PANELS == 0 ? static_cast<int>(ceil_div(panels, kOutPanels)) : 1};
  }
  static void launch(const Work& work, int splits, const Where& where) {
    const Tiling tiling = MmaVariant::tiling(work);
    const Grid grid{ceil_div(work.x.count, tiling.rows), splits, tiling.out_chunks};
    const auto shape = [&] { return shape_of(work); };
    if constexpr (BACKWARD) {
      cuda::launch("mma_backward", shape, mma_backward<PRODUCT, PANELS>, grid, kMmaThreads, Shape::shared_bytes, where, work);
    } else {
      cuda::launch("mma_forward", shape, mma_forward<PRODUCT, PANELS>, grid, kMmaThreads, Shape::shared_bytes, where, work);
    }
  }
};

// use(MmaVariant<...>{}) of the variant for this depth.
template <Product PRODUCT, class Use>
auto with_mma_variant(const Work& work, bool backward, Use use) {
  const auto of_panels = [&](auto panels) {
    constexpr int PANELS = decltype(panels)::value;
    return backward ? use(MmaVariant<PRODUCT, PANELS, true>{}) : use(MmaVariant<PRODUCT, PANELS, false>{});
  };
  switch (mma_panels<PRODUCT>(work)) {
    case 1:
      if constexpr (kElementBytes<PRODUCT> == 2) return of_panels(std::integral_constant<int, 1>{});
    case 2: return of_panels(std::integral_constant<int, 2>{});
    case 4: return of_panels(std::integral_constant<int, 4>{});
    default: return of_panels(std::integral_constant<int, 0>{});
  }
}

template <Product PRODUCT>
Tiling mma_tiling(const Work& work, bool backward) {
  return with_mma_variant<PRODUCT>(work, backward, [&](auto variant) { return decltype(variant)::tiling(work); });
}

template <Product PRODUCT>
void mma_launch(const Work& work, bool backward, int splits, const Where& where) {
  with_mma_variant<PRODUCT>(work, backward, [&](auto variant) { decltype(variant)::launch(work, splits, where); });
}

#define FASTSUPCON_MMA_INSTANTIATE(PRODUCT)                           \
  template Tiling mma_tiling<PRODUCT>(const Work&, bool);             \
  template void mma_launch<PRODUCT>(const Work&, bool, int, const Where&);

}  // namespace fastsupcon::cuda
