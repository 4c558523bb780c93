// Picks the instantiation of mma.cuh for a depth.
#pragma once

#include "families.h"
#include "mma.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT, int PANELS, bool BACKWARD>
struct MmaVariant {
  using Shape = MmaShape<PRODUCT, PANELS, BACKWARD>;
  static Tiling tiling(std::int64_t depth) {
    const std::int64_t panels = ceil_div(depth * kElementBytes<PRODUCT>, kPanelBytes);
    return {Shape::rows, Shape::columns, 2, BACKWARD && PANELS == 0 ? static_cast<int>(ceil_div(panels, kOutPanels)) : 1};
  }
  static void launch(const Work& work, const Where& where) {
    const Grid grid = tile_grid(work, tiling(work.depth));
    const auto shape = [&] { return shape_of(work); };
    if constexpr (BACKWARD) {
      cuda::launch("mma_backward", shape, mma_backward<PRODUCT, PANELS>, grid, kMmaThreads, Shape::shared_bytes, where, work);
    } else {
      cuda::launch("mma_forward", shape, mma_forward<PRODUCT, PANELS>, grid, kMmaThreads, Shape::shared_bytes, where, work);
    }
  }
};

// use(MmaVariant<...>{}) of the variant for this depth. Single: one panel would be a depth of 32, hardly worth compiling.
template <Product PRODUCT, class Use>
auto with_mma_variant(std::int64_t depth, bool backward, Use use) {
  const auto of_panels = [&](auto panels) {
    constexpr int PANELS = decltype(panels)::value;
    return backward ? use(MmaVariant<PRODUCT, PANELS, true>{}) : use(MmaVariant<PRODUCT, PANELS, false>{});
  };
  const std::int64_t panels = ceil_div(depth * kElementBytes<PRODUCT>, kPanelBytes);
  if constexpr (kIsHalf<PRODUCT>) {
    if (panels == 1) return of_panels(std::integral_constant<int, 1>{});
  }
  if (panels <= 2) return of_panels(std::integral_constant<int, 2>{});
  if (panels <= 4) return of_panels(std::integral_constant<int, 4>{});
  return of_panels(std::integral_constant<int, 0>{});
}

template <Product PRODUCT>
Family mma_family() {
  return {"mma", true, [](const Work&, const Device&) { return true; }, [](std::int64_t, bool) { return std::vector<int>{1}; },
          [](const Work& work, bool backward, int) {
            return with_mma_variant<PRODUCT>(work.depth, backward, [&](auto variant) { return decltype(variant)::tiling(work.depth); });
          },
          [](const Work& work, bool backward, int, const Where& where) {
            with_mma_variant<PRODUCT>(work.depth, backward, [&](auto variant) { decltype(variant)::launch(work, where); });
          }};
}

}  // namespace fastsupcon::cuda
