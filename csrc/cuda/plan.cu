// From a problem to launches: which sides and passes it has, which family serves it, how work is shared out, the scratch memory.
#include "pairs.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "families.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace fastsupcon::cuda {

std::string shape_of(const Work& work) {
  const Pass& pass = work.passes[0];
  return std::to_string(pass.x.count) + " × " + std::to_string(pass.y.count) + " rows of depth " + std::to_string(work.depth);
}

namespace {

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

Product product_of(const Problem& problem, bool allow_tf32) {
  switch (problem.scalar) {
    case Scalar::f16: return Product::f16;
    case Scalar::bf16: return Product::bf16;
    case Scalar::f32: return allow_tf32 ? Product::tf32 : Product::f32;
    default: throw std::runtime_error("fastsupcon CUDA: float64 rows are not served");
  }
}

std::size_t reserve(Plan& plan, std::size_t bytes) {  // where they begin
  const std::size_t at = plan.bytes;
  plan.bytes += (bytes + 255) / 256 * 256;
  return at;
}

template <class T>
Quantities<T*> typed(const Quantities<void*>& q) {
  return {static_cast<T*>(q.all), static_cast<T*>(q.different), static_cast<T*>(q.equal), static_cast<T*>(q.similarity),
          static_cast<T*>(q.count)};
}
Quantities<const float*> typed(const Quantities<const void*>& q) {
  return {static_cast<const float*>(q.all), static_cast<const float*>(q.different), static_cast<const float*>(q.equal),
          static_cast<const float*>(q.similarity), static_cast<const float*>(q.count)};
}
template <class Pointer>
bool any(const Quantities<Pointer>& q) {
  return q.all || q.different || q.equal || q.similarity || q.count;
}

// A problem as its sides: the rows, and the columns where they are others. A bias is the columns' alone, so that with one the self shape
// has two sides too, of the same rows.
struct Sides {
  Product product;
  bool self;
  int count;
  Side sides[2];
  RowsWork rows{};  // of the small kernels
  Work work{};      // of the tile kernels, without passes
  std::size_t fields_at[2] = {};
  int owners[2] = {};  // the sides that own the passes

  Sides(const Problem& problem, float* norms, bool allow_tf32) : product(product_of(problem, allow_tf32)), self(problem.b == nullptr) {
    count = self && !problem.bias ? 1 : 2;
    if (std::max(problem.rows, problem.columns) > std::numeric_limits<int>::max() - 2 * kFieldRows) {
      throw std::runtime_error("fastsupcon CUDA: more than 2^31 rows or columns are not served");
    }
    const void* b = self ? problem.a : problem.b;
    const std::int64_t* keys_of[2] = {problem.row_keys, self ? problem.row_keys : problem.column_keys};
    const auto side = [](const void* rows, std::int64_t count, const std::int64_t* own, const std::int64_t* keys) {
      return Side{rows, static_cast<int>(count), static_cast<int>(ceil_div(count, kFieldRows) * kFieldRows), nullptr, own, keys, nullptr};
    };
    sides[0] = side(problem.a, problem.rows, problem.own_column, keys_of[0]);
    sides[1] = side(b, problem.columns, nullptr, keys_of[1]);
    work.depth = rows.depth = problem.depth;
    work.exclusion = self ? Exclusion::diagonal : problem.own_column ? Exclusion::own : Exclusion::none;
    const std::int64_t row_bytes = problem.depth * (problem.scalar == Scalar::f32 ? 4 : 2);
    const auto starts = reinterpret_cast<std::uintptr_t>(problem.a) | reinterpret_cast<std::uintptr_t>(b);
    work.aligned = row_bytes % 16 == 0 && starts % 16 == 0;
    // Running maxima make a pair that is alone come out as exactly its similarity.
    const bool pairs_alone = std::min(problem.rows, problem.columns) <= (work.exclusion == Exclusion::none ? 1 : 2);
    const bool may_bound = !problem.bias && !pairs_alone;
    work.scale = rows.scale = {problem.scale, static_cast<const float*>(problem.scale_address), may_bound, problem.unit ? nullptr : norms};
    float* norms_of[2] = {norms, norms && !self ? norms + problem.rows : norms};
    rows.count = count;
    rows.self = self;
    for (int i = 0; i < count; ++i) {
      rows.sides[i] = {sides[i].rows, sides[i].count, sides[i].field_rows, i ? static_cast<const float*>(problem.bias) : nullptr,
                       keys_of[i], problem.unit ? norms_of[i] : nullptr, nullptr, {}, {}, nullptr};
    }
  }

  void reserve_fields(Plan& plan, int fields) {
    for (int i = 0; i < count; ++i) fields_at[i] = reserve(plan, std::size_t{kFieldBytes} * fields * sides[i].field_rows);
  }

  // Adds the pass whose owner x is side `owner`; y is the other side, or the same where there is but one.
  Pass& add_pass(int owner) {
    owners[work.count] = owner;
    Pass& pass = work.passes[work.count++];
    pass.x = sides[owner];
    pass.y = sides[count - 1 - owner];
    return pass;
  }

  // Work with its fields in scratch memory.
  Work tile_work(const Work& of, char* scratch) const {
    Work placed = of;
    for (int i = 0; i < work.count; ++i) {
      placed.passes[i].x.fields = scratch + fields_at[owners[i]];
      placed.passes[i].y.fields = scratch + fields_at[count - 1 - owners[i]];
    }
    return placed;
  }
  RowsWork rows_work(char* scratch) const {
    RowsWork placed = rows;
    for (int i = 0; i < count; ++i) placed.sides[i].fields = scratch + fields_at[i];
    return placed;
  }
  std::int64_t blocks(int rows_of_block) const {  // of the kernels of rows.cuh
    std::int64_t total = 0;
    for (int i = 0; i < count; ++i) total += ceil_div(sides[i].field_rows, rows_of_block);
    return total;
  }
};

// The families of a product, fastest first.
template <Product PRODUCT>
const std::vector<Family>& families_of() {
  if constexpr (PRODUCT == Product::f16 || PRODUCT == Product::bf16) {
    static const std::vector<Family> families{wgmma_family<PRODUCT>(), mma_family<PRODUCT>()};
    return families;
  } else {
    static const std::vector<Family> families{mma_family<PRODUCT>()};
    return families;
  }
}

struct Share {
  int consumers;
  std::int64_t clocks;
};

// Shares the tiles of y out, and chooses how many consumers a block has, so that the launch takes the fewest clocks: its waves of blocks,
// each as long as a block's tiles and what a block costs beside them, and, backward, what the sums of the splits cost to write and to add
// up. The rates are an H200's: 1,300 products a clock and multiprocessor, but no more than 10 pairs; a consumer alone takes 5/3 of its
// share of two, as nothing runs under its exponentials (where there is no choice the factor weighs on all splits alike); 1,700 bytes a
// clock. The sums of several splits take no more than 64 MiB.
Share share_out(Work& work, const Family& family, bool backward, const Device& device) {
  constexpr std::int64_t of_block = 3000, most_splits = 64, most_sums = (64 << 20) / sizeof(float);
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  int chosen = 0;
  Pass best[2] = {};
  for (const int consumers : family.consumers(work.depth, backward)) {
    const Tiling tiling = family.tiling(work, backward, consumers);
    const std::int64_t slots = std::max(std::int64_t{device.multiprocessors} * tiling.blocks_per_multiprocessor, std::int64_t{1});
    const std::int64_t pairs = std::int64_t{tiling.rows} * tiling.columns, products = pairs * work.depth * (backward ? 2 : 1);
    const std::int64_t of_tile = std::max(products / 1300, pairs / 10) * tiling.blocks_per_multiprocessor * (consumers == 1 ? 5 : 3) / 3;
    std::int64_t tiles[2] = {}, longest = 1;
    for (int i = 0; i < work.count; ++i) {
      work.passes[i].row_blocks = static_cast<int>(ceil_div(work.passes[i].x.count, tiling.rows));
      tiles[i] = ceil_div(work.passes[i].y.count, tiling.columns);
      longest = std::max(longest, tiles[i]);
    }
    for (std::int64_t splits = 1; splits <= std::min(longest, most_splits); ++splits) {
      const std::int64_t each = ceil_div(longest, splits);
      std::int64_t blocks = 0, sums = 0;
      for (int i = 0; i < work.count; ++i) {
        Pass& pass = work.passes[i];
        pass.tiles_per_split = static_cast<int>(each);
        pass.splits = static_cast<int>(ceil_div(tiles[i], each));
        blocks += std::int64_t{pass.row_blocks} * pass.splits * tiling.out_chunks;
        sums += std::int64_t{pass.splits} * pass.x.count * work.depth;
      }
      if (backward && splits > 1 && sums > most_sums) break;
      const std::int64_t cost = ceil_div(blocks, slots) * (each * of_tile + of_block) + (backward ? sums * 8 / 1700 : 0);
      if (cost < least) {
        least = cost;
        chosen = consumers;
        std::copy(work.passes, work.passes + 2, best);
      }
    }
  }
  std::copy(best, best + 2, work.passes);
  return {chosen, least};
}

struct TriangleBytes {
  std::int64_t rows, columns;  // of their sums
};
TriangleBytes triangle_bytes(const Triangle& of) {
  constexpr std::int64_t each = sizeof(float) * kTriangleSums;
  return {each * of.folds() * of.length * of.group_rows(), each * of.columns_before(of.groups)};
}

// Cuts a forward in the self shape as triangle.h says, for the fewest clocks, if they are fewer than `clocks`; else, and where that does
// not serve, into nothing. The rates are an H100's, as optimistic as those of share_out: 1,050 products a clock and multiprocessor, but no
// more than 6 pairs, as columns' sums take instructions too. The sums take no more than 64 MiB, or than those of the backward.
// FASTSUPCON_TRIANGLE=0 is never, a larger number wherever it serves, of as many row blocks to a group or more where there are as many.
Triangle cut_triangle(const Work& work, const Family& family, const Device& device, std::int64_t clocks) {
  constexpr std::int64_t of_block = 3000, of_launch = 5000, most_waves = 12, most_rows = 1 << 30;  // in ints with room for a group
  const Tiling tiling = family.triangle_tiling ? family.triangle_tiling(work.depth) : Tiling{};
  const Pass& pass = work.passes[0];
  const char* const forced = std::getenv("FASTSUPCON_TRIANGLE");
  const auto refuse = [&](const char* why) {
    throw std::runtime_error("fastsupcon CUDA: FASTSUPCON_TRIANGLE=" + std::string(forced) + ' ' + why);
  };
  char* end = nullptr;
  const long least_group = forced ? std::strtol(forced, &end, 10) : 1;
  if (forced && (end == forced || *end != '\0')) refuse("is no number");
  const bool serves = tiling.rows > 0 && work.exclusion == Exclusion::diagonal && work.count == 1 && !work.apart;
  if (!serves || pass.x.count > most_rows || least_group <= 0) return {};
  const std::int64_t pairs = std::int64_t{tiling.rows} * tiling.columns, of_tile = std::max(pairs * work.depth / 1050, pairs / 6);
  const std::int64_t most_sums = std::max(std::int64_t{64} << 20, std::int64_t{sizeof(float)} * pass.x.count * work.depth);
  std::int64_t least = forced ? std::numeric_limits<std::int64_t>::max() : clocks;
  Triangle best{}, cut{};
  cut.rows = tiling.rows;
  cut.columns = tiling.columns;
  cut.count = pass.x.count;
  for (cut.group = static_cast<int>(std::min<long>(least_group, cut.row_blocks())); cut.groups != 1; cut.group *= 2) {
    cut.groups = static_cast<int>(ceil_div(cut.row_blocks(), cut.group));
    if (triangle_bytes(cut).columns > most_sums) continue;
    const std::int64_t tiles = cut.columns_before(cut.groups) / cut.columns;
    for (std::int64_t waves = 1; waves <= most_waves; ++waves) {
      const std::int64_t ragged = cut.groups / 2, wanted = std::max(waves * device.multiprocessors - ragged, std::int64_t{1});
      cut.chunk = static_cast<int>(std::min(ceil_div(tiles, wanted), std::int64_t{cut.tiles()}));
      cut.length = 0;
      std::int64_t chunks = 0;
      for (int fold = 0; fold < cut.folds(); ++fold) {
        const int other = cut.groups - 1 - fold, of_fold = cut.chunks(fold) + (other > fold ? cut.chunks(other) : 0);
        cut.length = std::max(cut.length, of_fold);
        chunks += of_fold;
      }
      const TriangleBytes bytes = triangle_bytes(cut);
      const std::int64_t cost = ceil_div(chunks, device.multiprocessors) * cut.group * (cut.chunk * of_tile + of_block) + of_launch +
                                (bytes.rows + bytes.columns) / 1700;
      if (bytes.rows + bytes.columns <= most_sums && cost < least) {
        least = cost;
        best = cut;
      }
    }
  }
  if (forced && best.group == 0) refuse("needs more memory for its sums than a triangle may take");
  return best;
}

// A family and how it cuts the work.
struct Cut {
  const Family* family;
  Work work;
  int consumers = 0;
};

// For the first of the families that serves; FASTSUPCON_CUDA names one. For two where that one needs bounded sums and only the device knows
// whether they are.
template <Product PRODUCT>
std::vector<Cut> cut_work(const Work& work, bool backward, const Device& device) {
  const char* wanted = std::getenv("FASTSUPCON_CUDA");
  const Sums sums = known_sums(work.scale);
  std::vector<Cut> cuts;
  for (const Family& family : families_of<PRODUCT>()) {
    const bool serves = family.serves(work, device) && (family.runs || sums != Sums::running);
    if (!serves || (wanted && wanted != std::string(family.name))) continue;
    Cut found{&family, work};
    found.work.turn = !cuts.empty() ? Turn::running : family.runs || sums == Sums::bounded ? Turn::always : Turn::bounded;
    const Share share = share_out(found.work, family, backward, device);
    found.consumers = share.consumers;
    if (!backward) found.work.triangle = cut_triangle(found.work, family, device, share.clocks);
    cuts.push_back(found);
    if (found.work.turn != Turn::bounded) return cuts;
  }
  throw std::runtime_error("fastsupcon CUDA: FASTSUPCON_CUDA=" + std::string(wanted) + " does not serve such rows on this device");
}

// reserve(cut) for each of the cuts, of which one alone runs: in the same memory.
template <class Reserve>
void reserve_shared(Plan& plan, const std::vector<Cut>& cuts, Reserve reserve) {
  const std::size_t first = plan.bytes;
  std::size_t last = first;
  for (const Cut& cut : cuts) {
    plan.bytes = first;
    reserve(cut);
    last = std::max(last, plan.bytes);
  }
  plan.bytes = last;
}

// With a line, the tiles of the rows end with its loss.
Plan plan_forward(const Problem& problem, const Quantities<void*>& rows, const Quantities<void*>& columns, void* norms, bool allow_tf32,
                  int device, const LineWork& line) {
  Plan plan;
  Sides sides(problem, static_cast<float*>(norms), allow_tf32);
  sides.reserve_fields(plan, kForwardFields);
  if (any(rows)) sides.add_pass(0).quantities = typed<float>(rows);
  if (any(columns)) sides.add_pass(1).quantities = typed<float>(columns);
  sides.work.apart = rows.different || rows.equal || columns.different || columns.equal;
  with_product(sides.product, [&](auto product) {
    constexpr Product PRODUCT = decltype(product)::value;
    const std::vector<Cut> cuts = cut_work<PRODUCT>(sides.work, false, device_info(device));
    std::size_t done_at[2] = {};
    const std::size_t first_done = plan.bytes;
    for (int i = 0; i < sides.work.count; ++i) {
      int row_blocks = 0;
      for (const Cut& cut : cuts) row_blocks = std::max(row_blocks, cut.work.passes[i].row_blocks);
      done_at[i] = reserve(plan, sizeof(int) * static_cast<std::size_t>(row_blocks));
    }
    const std::size_t line_done_at = reserve(plan, sizeof(int));
    const std::int64_t done_count = static_cast<std::int64_t>((plan.bytes - first_done) / sizeof(int));
    const std::size_t line_sums_at = reserve(plan, 2 * sizeof(float) * static_cast<std::size_t>(ceil_div(line.rows, 32)));
    const int lanes = row_lanes(sides.work.depth), rows_of_block = kRowsThreads / lanes;
    const std::int64_t lengths = !problem.unit ? sides.blocks(rows_of_block) * kRowsWarps : 0;
    const std::size_t lengths_at = reserve(plan, sizeof(float) * static_cast<std::size_t>(lengths));
    plan.launches.push_back([=](char* scratch, const Where& where) {
      RowsWork of = sides.rows_work(scratch);
      of.done = reinterpret_cast<int*>(scratch + first_done);
      of.done_count = done_count;
      of.wide = is_wide<PRODUCT>(of.depth, {of.sides[0].rows, of.sides[1].rows});
      of.row_lanes = lanes;
      if (!problem.unit) of.lengths = reinterpret_cast<float*>(scratch + lengths_at);
      launch("prepare_forward", [&] { return shape_of(sides.work); }, prepare_forward<PRODUCT>, {sides.blocks(rows_of_block)}, kRowsThreads,
             0, where, of);
      if (problem.unit) return;
      const std::int64_t first = ceil_div(sides.sides[0].field_rows, rows_of_block) * kRowsWarps;
      const LengthsWork work{of.lengths, first, lengths, of.scale, static_cast<float*>(norms)};
      launch("decide_bounded", [&] { return shape_of(sides.work); }, decide_bounded, {1}, kBlockThreads, kBlockSumBytes, where, work);
    });
    if (sides.work.count == 0) return;
    reserve_shared(plan, cuts, [&](const Cut& cut) {
      const bool is_triangle = cut.work.triangle.group > 0;
      std::size_t partial_at[2] = {}, row_sums_at = 0, column_sums_at = 0;
      if (is_triangle) {
        const TriangleBytes sums = triangle_bytes(cut.work.triangle);
        row_sums_at = reserve(plan, static_cast<std::size_t>(sums.rows));
        column_sums_at = reserve(plan, static_cast<std::size_t>(sums.columns));
      } else {
        for (int i = 0; i < cut.work.count; ++i) {
          const Pass& pass = cut.work.passes[i];
          partial_at[i] = reserve(plan, sizeof(float) * kPartials * pass.splits * pass.x.count);
        }
      }
      plan.launches.push_back([=](char* scratch, const Where& where) {
        Work of = sides.tile_work(cut.work, scratch);
        for (int i = 0; i < of.count; ++i) {
          of.passes[i].partial = reinterpret_cast<float*>(scratch + partial_at[i]);
          of.passes[i].done = reinterpret_cast<int*>(scratch + done_at[i]);
        }
        LineWork& of_line = of.passes[0].line = line;
        of_line.sums = reinterpret_cast<float*>(scratch + line_sums_at);
        of_line.done = reinterpret_cast<int*>(scratch + line_done_at);
        if (!is_triangle) return cut.family->launch(of, false, cut.consumers, where);
        of.triangle.row_sums = reinterpret_cast<float*>(scratch + row_sums_at);
        of.triangle.column_sums = reinterpret_cast<float*>(scratch + column_sums_at);
        cut.family->launch_triangle(of, where);
        launch("combine_triangle", [&] { return shape_of(of); }, combine_triangle, {ceil_div(of.triangle.count, 32)}, kRowsThreads,
               kCombineBytes, where, of);
      });
    });
  });
  return plan;
}

LineWork line_work(const Line& line, std::int64_t rows, const Quantities<const void*>& values) {
  const auto f = [](double value) { return static_cast<float>(value); };
  LineWork work{f(line.all), f(line.different), f(line.equal), f(line.similarity), f(line.log_count), f(line.factor), f(line.lone)};
  work.skip_lone = line.skip_lone && line.reduction == Line::Reduction::mean;  // what else asks how many rows are paired?
  work.reduction = line.reduction;
  work.rows = rows;
  work.values = typed(values);
  return work;
}

void launch_line(const LineWork& work, const Where& where) {
  const std::int64_t blocks = work.reduction == Line::Reduction::none ? ceil_div(work.rows, kBlockThreads) : 1;
  launch("line_forward", [&] { return std::to_string(work.rows) + " rows"; }, line_forward, {blocks}, kBlockThreads, kBlockSumBytes, where,
         work);
}

void launch_line_gradients(const LineWork& work, const Where& where) {
  launch("line_gradients", [&] { return std::to_string(work.rows) + " rows"; }, line_gradients, {ceil_div(work.rows, kBlockThreads)},
         kBlockThreads, kBlockSumBytes, where, work);
}

// With a line, the gradients of the rows' quantities are made from the loss's.
Plan plan_backward(const Problem& problem, const Incoming& rows, const Incoming& columns, const void* norms, const Outgoing& out,
                   bool allow_tf32, int device, const LineWork& line) {
  Plan plan;
  Sides sides(problem, static_cast<float*>(const_cast<void*>(norms)), allow_tf32);
  const bool both_ways = sides.self && sides.count == 2;  // the self shape with a bias: its rows' gradients come of both passes
  sides.rows.sides[0].values = typed(rows.values);
  sides.rows.sides[0].grads = typed(rows.grads);
  sides.rows.sides[1].values = typed(columns.values);
  sides.rows.sides[1].grads = typed(columns.grads);
  sides.rows.line = line;
  sides.reserve_fields(plan, kBackwardFields);
  if (out.rows || out.scale) sides.add_pass(0);
  if (out.columns || out.bias || (both_ways && out.rows)) sides.add_pass(1);
  if (sides.work.count == 0) return plan;
  sides.work.apart = rows.values.different || rows.values.equal || columns.values.different || columns.values.equal;
  with_product(sides.product, [&](auto product) {
    constexpr Product PRODUCT = decltype(product)::value;
    const std::vector<Cut> cuts = cut_work<PRODUCT>(sides.work, true, device_info(device));
    std::size_t largest_at[2] = {}, weight_sums_at = 0, products_at = 0;
    if (PRODUCT == Product::f16) {
      for (int i = 0; i < sides.count; ++i) {
        largest_at[i] = reserve(plan, 2 * sizeof(float) * static_cast<std::size_t>(sides.sides[i].field_rows / kLargestRows));
      }
    }
    // The passes' sums one after the other, so that those of one side are added up as the splits of one.
    std::int64_t sums_of[2] = {}, sums = 0;
    Splits splits[2];
    for (int i = 0; i < sides.work.count; ++i) {
      const Side& x = sides.work.passes[i].x;
      splits[i] = {cuts.front().work.passes[i].splits, cuts.back().work.passes[i].splits};
      const int most_splits = std::max(splits[i].bounded, splits[i].running);
      sums_of[i] = sums;
      sums += std::int64_t{most_splits} * x.count * sides.work.depth;
      const std::size_t of_rows = sizeof(float) * most_splits * x.count;
      if (out.bias && sides.owners[i] == 1) weight_sums_at = reserve(plan, of_rows);
      if (out.scale && sides.owners[i] == 0) products_at = reserve(plan, of_rows);
    }
    const std::size_t sums_at = reserve(plan, sizeof(float) * static_cast<std::size_t>(sums));
    const auto shape = [=] { return shape_of(sides.work); };

    plan.launches.push_back([=](char* scratch, const Where& where) {
      RowsWork of = sides.rows_work(scratch);
      for (int i = 0; PRODUCT == Product::f16 && i < of.count; ++i) of.sides[i].largest = reinterpret_cast<float*>(scratch + largest_at[i]);
      launch("prepare_backward", shape, prepare_backward, {sides.blocks(kRowsThreads)}, kRowsThreads, kPrepareBytes, where, of);
    });
    for (const Cut& cut : cuts) {
      plan.launches.push_back([=](char* scratch, const Where& where) {
        Work of = sides.tile_work(cut.work, scratch);
        for (int i = 0; i < of.count; ++i) {
          Pass& pass = of.passes[i];
          pass.out = reinterpret_cast<float*>(scratch + sums_at) + sums_of[i];
          if (out.bias && sides.owners[i] == 1) pass.weight_sums = reinterpret_cast<float*>(scratch + weight_sums_at);
          if (out.scale && sides.owners[i] == 0) pass.products = reinterpret_cast<float*>(scratch + products_at);
          pass.x.largest = reinterpret_cast<const float*>(scratch + largest_at[sides.owners[i]]);
          pass.y.largest = reinterpret_cast<const float*>(scratch + largest_at[sides.count - 1 - sides.owners[i]]);
        }
        cut.family->launch(of, true, cut.consumers, where);
      });
    }
    plan.launches.push_back([=](char* scratch, const Where& where) {
      FinishWork of{};
      of.depth = sides.work.depth;
      of.scale = sides.work.scale;
      for (int i = 0; i < sides.work.count; ++i) {
        const Pass& pass = sides.work.passes[i];
        const int owner = sides.owners[i];
        Finish& finish = of.sides[of.count && both_ways ? 0 : of.count++];
        if (!finish.sums) {
          finish.rows = pass.x.rows;
          finish.count = pass.x.count;
          finish.norms = sides.rows.sides[owner].norms;
          finish.sums = reinterpret_cast<float*>(scratch + sums_at) + sums_of[i];
          finish.out = owner && !both_ways ? out.columns : out.rows;
        }
        finish.splits.bounded += splits[i].bounded;
        finish.splits.running += splits[i].running;
        if (out.bias && owner == 1) {
          finish.weight_sums = reinterpret_cast<const float*>(scratch + weight_sums_at);
          finish.weight_splits = splits[i].running;
          finish.bias = static_cast<float*>(out.bias);
        }
      }
      of.wide = is_wide<PRODUCT>(of.depth, {of.sides[0].rows, of.sides[0].out, of.sides[1].rows, of.sides[1].out});
      for (of.row_warps = 1; of.row_warps < kRowsWarps && of.row_warps * kWarpColumns < of.depth;) of.row_warps *= 2;
      std::int64_t blocks = 0;
      for (int i = 0; i < of.count; ++i) blocks += ceil_div(of.sides[i].count, kRowsWarps / of.row_warps);
      if (out.scale) {
        const float factor = sides.self && !both_ways ? 0.5f : 1.0f;  // w_ij + w_ji: both rows of a pair have its product
        of.gradient = {reinterpret_cast<const float*>(scratch + products_at), sides.work.passes[0].x.count, splits[0], factor,
                       static_cast<float*>(out.scale)};
        ++blocks;
      }
      launch("finish_gradients", shape, finish_gradients<PRODUCT>, {blocks}, kRowsThreads, kRowSumBytes, where, of);
    });
  });
  return plan;
}

}  // namespace

Plan forward(const Problem& problem, const Quantities<void*>& rows, const Quantities<void*>& columns, void* norms, bool allow_tf32,
             int device) {
  return plan_forward(problem, rows, columns, norms, allow_tf32, device, {});
}

Plan backward(const Problem& problem, const Incoming& rows, const Incoming& columns, const void* norms, const Outgoing& out,
              bool allow_tf32, int device) {
  return plan_backward(problem, rows, columns, norms, out, allow_tf32, device, {});
}

Plan loss(const Problem& problem, const Line& line, const Quantities<void*>& values, void* norms, void* paired, void* loss, bool allow_tf32,
          int device) {
  LineWork work = line_work(line, problem.rows, constant(values));
  work.loss = static_cast<float*>(loss);
  work.paired = static_cast<float*>(paired);
  return plan_forward(problem, values, {}, norms, allow_tf32, device, work);
}

Plan loss_backward(const Problem& problem, const Line& line, const Quantities<const void*>& values, const void* norms, void* paired,
                   const void* grad, const Outgoing& out, bool allow_tf32, int device) {
  LineWork work = line_work(line, problem.rows, values);
  work.paired = static_cast<float*>(paired);
  work.grad = static_cast<const float*>(grad);
  return plan_backward(problem, {values, {}}, {}, norms, out, allow_tf32, device, work);
}

void run(const Plan& plan, void* scratch, const Where& where) {
  enter(where);
  for (const auto& launch : plan.launches) launch(static_cast<char*>(scratch), where);
}

void line(const Line& line, std::int64_t rows, const Quantities<const void*>& values, void* loss, const Where& where) {
  LineWork work = line_work(line, rows, values);
  work.loss = static_cast<float*>(loss);
  enter(where);
  launch_line(work, where);
}

void line_backward(const Line& line, std::int64_t rows, const Quantities<const void*>& values, const void* grad,
                   const Quantities<void*>& grads, const Where& where) {
  LineWork work = line_work(line, rows, values);
  work.grad = static_cast<const float*>(grad);
  work.grads = typed<float>(grads);
  enter(where);
  launch_line_gradients(work, where);
}

// All kernels are built by one nvcc for the same generations, so any of them will do.
std::string unusable(int device) { return why_not(decide_bounded, device); }

}  // namespace fastsupcon::cuda
