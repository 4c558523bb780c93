// From a problem to kernels: which family, how the work is split, what scratch memory it takes, and in which order they run.
#include "lse.h"

#include <algorithm>

#include "families.h"
#include "reduce.cuh"

namespace fastsupcon::cuda {

std::string shape_of(const Work& work) {
  return "N = " + std::to_string(work.x.count) + ", M = " + std::to_string(work.y.count) + ", D = " + std::to_string(work.depth);
}

namespace {

// Hands out scratch memory piece by piece. Measuring, it only counts, and nothing may be launched.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  bool measuring() const { return memory_ == nullptr; }
  std::size_t peak() const { return peak_; }
  float* floats(std::int64_t count) {
    float* piece = measuring() ? nullptr : reinterpret_cast<float*>(memory_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(float) + 255) / 256 * 256;
    peak_ = std::max(peak_, used_);
    return piece;
  }
  std::size_t mark() const { return used_; }
  void release(std::size_t mark) { used_ = mark; }  // the stream's order keeps the next user behind the last

 private:
  char* memory_;
  std::size_t used_ = 0, peak_ = 0;
};

// Runs `passes` if there is enough scratch memory for them; returns what they need.
template <class Passes>
std::size_t with_scratch(Scratch scratch, const Where& where, Passes passes) {
  Arena measured(nullptr);
  passes(measured);
  if (measured.peak() > scratch.bytes) return measured.peak();
  enter(where);
  char nothing;
  Arena arena(scratch.memory ? scratch.memory : &nothing);
  passes(arena);
  return measured.peak();
}

Product product_of(const LseProblem& problem, bool allow_tf32) {
  switch (problem.scalar) {
    case Scalar::f16: return Product::f16;
    case Scalar::bf16: return Product::bf16;
    case Scalar::f32: return allow_tf32 ? Product::tf32 : Product::f32;
    default: throw std::runtime_error("fastsupcon CUDA: float64 rows are not served");
  }
}

// use(std::integral_constant<Product, P>{})
template <class Use>
auto with_product(Product product, Use use) {
  switch (product) {
    case Product::f16: return use(std::integral_constant<Product, Product::f16>{});
    case Product::bf16: return use(std::integral_constant<Product, Product::bf16>{});
    case Product::tf32: return use(std::integral_constant<Product, Product::tf32>{});
    default: return use(std::integral_constant<Product, Product::f32>{});
  }
}

struct Plan {
  bool wgmma;
  int splits;
};

// Few rows give few blocks: the columns are then split among several, of at least four tiles each, and their sums combined.
template <Product PRODUCT>
Plan plan(Work& work, bool backward, const Device& device) {
  constexpr bool half = PRODUCT == Product::f16 || PRODUCT == Product::bf16;
  bool wgmma = false;
  if constexpr (half) wgmma = wgmma_serves<PRODUCT>(work, backward, device);
  Tiling tiling;
  if constexpr (half) tiling = wgmma ? wgmma_tiling<PRODUCT>(work, backward) : mma_tiling<PRODUCT>(work, backward);
  else tiling = mma_tiling<PRODUCT>(work, backward);
  const std::int64_t blocks = ceil_div(work.x.count, tiling.rows) * tiling.out_chunks;
  const std::int64_t tiles = ceil_div(work.y.count, tiling.columns);
  const std::int64_t room = device.multiprocessors * tiling.blocks_per_multiprocessor / blocks;
  const std::int64_t splits = std::max<std::int64_t>(1, std::min<std::int64_t>({room, tiles / 4, 32}));
  work.tiles_per_split = ceil_div(tiles, splits);
  return {wgmma, static_cast<int>(ceil_div(tiles, work.tiles_per_split))};
}

template <Product PRODUCT>
void run(const Plan& plan, const Work& work, bool backward, const Where& where) {
  if constexpr (PRODUCT == Product::f16 || PRODUCT == Product::bf16) {
    if (plan.wgmma) return wgmma_launch<PRODUCT>(work, backward, plan.splits, where);
  }
  mma_launch<PRODUCT>(work, backward, plan.splits, where);
}

template <Product PRODUCT>
void combine(const char* name, const Work& work, const float* partial, int splits, std::int64_t count, void* out, const Where& where) {
  launch(name, [&] { return shape_of(work); }, combine_sums<PRODUCT>, {ceil_div(count, kReduceThreads)}, kReduceThreads, 0, where, partial,
         splits, count, out);
}

// One backward kernel, and where the columns are split the sums over the splits.
template <Product PRODUCT>
void backward_pass(Work work, void* out, float* weight_sums, Arena& arena, const Device& device, const Where& where) {
  const Plan chosen = plan<PRODUCT>(work, true, device);
  const std::size_t mark = arena.mark();
  const bool split = chosen.splits > 1;
  work.out_is_partial = split;
  work.out = split ? arena.floats(chosen.splits * work.x.count * work.depth) : out;
  work.weight_sums = split && weight_sums ? arena.floats(chosen.splits * work.x.count) : weight_sums;
  if (!arena.measuring()) {
    run<PRODUCT>(chosen, work, true, where);
    if (split) {
      const std::int64_t count = work.x.count * work.depth;
      if (out) combine<PRODUCT>("combine_sums", work, static_cast<const float*>(work.out), chosen.splits, count, out, where);
      if (weight_sums) {
        combine<Product::f32>("combine_sums of the bias", work, work.weight_sums, chosen.splits, work.x.count, weight_sums, where);
      }
    }
  }
  arena.release(mark);
}

Work make_work(const LseProblem& problem, bool self) {
  Work work{};
  work.x = {problem.a, problem.rows, nullptr, nullptr, nullptr, nullptr};
  work.y = {problem.b, problem.columns, nullptr, nullptr, nullptr, nullptr};
  work.depth = problem.depth;
  const auto row_bytes = problem.depth * (problem.scalar == Scalar::f32 ? 4 : 2);
  const auto starts = reinterpret_cast<std::uintptr_t>(problem.a) | reinterpret_cast<std::uintptr_t>(problem.b);
  work.aligned = row_bytes % 16 == 0 && starts % 16 == 0;
  work.scale = static_cast<float>(problem.scale);
  work.scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);
  work.exclusion = self ? Exclusion::diagonal : problem.skip || problem.row_labels ? Exclusion::keys : Exclusion::none;
  return work;
}

// Unit rows: |s| ≤ scale, so with 2·scale < 126 log 2 both exp(s) and exp(−lse) stay normal numbers in single precision.
bool bounded(const LseProblem& problem, bool self) { return self && problem.unit_rows && 2 * problem.scale * 1.4426950408889634 < 124; }

}  // namespace

// All kernels are built by one nvcc for the same generations, so any of them will do.
std::string unusable(int device) { return why_not(largest_magnitude, device); }

std::size_t forward(const LseProblem& problem, bool self, bool allow_tf32, float* lse, Scratch scratch, const Where& where) {
  const Device device = device_info(where.device);
  Work work = make_work(problem, self);
  work.online = !bounded(problem, self);
  work.y.bias = static_cast<const float*>(problem.bias);
  work.x.keys = problem.skip ? problem.skip : problem.row_labels;
  work.y.keys = problem.column_labels;
  return with_scratch(scratch, where, [&](Arena& arena) {
    with_product(product_of(problem, allow_tf32), [&](auto product) {
      constexpr Product PRODUCT = decltype(product)::value;
      const Plan chosen = plan<PRODUCT>(work, false, device);
      const bool split = chosen.splits > 1;
      work.lse = split ? nullptr : lse;
      work.partial = split ? arena.floats(2 * chosen.splits * work.x.count) : nullptr;
      if (arena.measuring()) return;
      run<PRODUCT>(chosen, work, false, where);
      if (split) {
        launch("combine_logsums", [&] { return shape_of(work); }, combine_logsums, {ceil_div(work.x.count, kReduceThreads)}, kReduceThreads,
               0, where, work.partial, chosen.splits, work.x.count, lse);
      }
    });
  });
}

std::size_t backward(const LseProblem& problem, bool self, bool allow_tf32, const float* lse, const float* grad, void* da, void* db,
                     float* dbias, Scratch scratch, const Where& where) {
  const Device device = device_info(where.device);
  const Work base = make_work(problem, self);
  const auto* bias = static_cast<const float*>(problem.bias);
  return with_scratch(scratch, where, [&](Arena& arena) {
    with_product(product_of(problem, allow_tf32), [&](auto product) {
      constexpr Product PRODUCT = decltype(product)::value;
      const bool half = PRODUCT == Product::f16;
      const float shift = half ? 14.0f : 0.0f;
      const float* largest = nullptr;
      if (half && (self || db || dbias)) {
        float* place = arena.floats(1);
        if (!arena.measuring()) {
          launch("largest_magnitude", [&] { return shape_of(base); }, largest_magnitude, {1}, kLargestThreads, 128, where, grad, problem.rows,
                 place);
        }
        largest = place;
      }
      if (self) {
        Work work = base;
        work.form = bounded(problem, self) ? Form::sum : Form::two;
        work.shift = shift;
        work.largest = largest;
        work.x.lse = work.y.lse = lse;
        work.x.grad = work.y.grad = grad;
        backward_pass<PRODUCT>(work, da, nullptr, arena, device, where);
        return;
      }
      if (da) {
        Work work = base;
        work.form = Form::one;
        work.shift = shift;
        work.x.lse = lse;
        work.y.bias = bias;
        work.x.keys = problem.skip ? problem.skip : problem.row_labels;
        work.y.keys = problem.column_labels;
        work.out_grad = grad;
        backward_pass<PRODUCT>(work, da, nullptr, arena, device, where);
      }
      if (db || dbias) {
        Work work = base;
        std::swap(work.x, work.y);
        work.form = Form::one;
        work.shift = shift;
        work.largest = largest;
        work.x.bias = bias;
        work.y.lse = lse;
        work.y.grad = grad;
        work.x.keys = problem.column_labels;
        work.y.keys = problem.skip ? problem.skip : problem.row_labels;
        backward_pass<PRODUCT>(work, db, dbias, arena, device, where);
      }
    });
  });
}

}  // namespace fastsupcon::cuda
