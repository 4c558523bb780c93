#include "rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "team.h"

namespace fastsupcon::cpu {
namespace {

const Kernels& kernels_of(const Rows& rows) { return *unit_in_use().kernels[int(rows.scalar)]; }

// task(first, last) for parts of [0, count), on as many threads as get 2²⁰ elements each (about 200 µs): a start costs 10 µs.
template <class Task>
void each_part(std::int64_t count, std::int64_t part, const Rows& rows, int threads, const Task& task) {
  const std::int64_t parts = (count + part - 1) / part;
  threads = int(std::max<std::int64_t>(1, std::min({std::int64_t(threads), parts, rows.count * rows.depth >> 20})));
  if (threads == 1) return task(std::int64_t(0), count);
  Team::run(threads, [&](Team& team, int) { team.each(parts, [&](std::int64_t p) { task(p * part, std::min(count, (p + 1) * part)); }); });
}

template <class Task>
void each_rows(const Rows& rows, int threads, const Task& task) {
  constexpr std::int64_t elements = 1 << 16;  // of a part
  each_part(rows.count, std::max<std::int64_t>(1, elements / rows.depth), rows, threads, [&](std::int64_t first, std::int64_t last) {
    task(first, last - first);
  });
}

std::int64_t size_of(Scalar scalar) { return scalar == Scalar::f64 ? 8 : scalar == Scalar::f32 ? 4 : 2; }
std::int64_t size_of_sum(Scalar scalar) { return scalar == Scalar::f64 ? 8 : 4; }

const char* at(const void* data, std::int64_t index, std::int64_t size) { return static_cast<const char*>(data) + index * size; }
char* at(void* data, std::int64_t index, std::int64_t size) { return static_cast<char*>(data) + index * size; }

void check(const std::int64_t* ids, std::int64_t count, std::int64_t classes) {
  const auto outside = [=](std::int64_t id) { return id < 0 || id >= classes; };
  const std::int64_t* const bad = std::find_if(ids, ids + count, outside);
  if (bad != ids + count) throw std::out_of_range("ids must lie in [0, " + std::to_string(classes) + "), got " + std::to_string(*bad));
}

template <class Sum>
void gather_share(const std::vector<std::int64_t>& sizes, const std::int64_t* ids, std::int64_t count, void* share) {
  for (std::int64_t i = 0; i < count; ++i) static_cast<Sum*>(share)[i] = sizes[ids[i]] > 1 ? 1 / Sum(sizes[ids[i]] - 1) : 0;
}

}  // namespace

void unit_rows(const Rows& x, void* unit, void* norm, int threads) {
  const std::int64_t row = x.depth * size_of(x.scalar), sum = size_of_sum(x.scalar);
  each_rows(x, threads, [&](std::int64_t first, std::int64_t count) {
    kernels_of(x).unit_rows(at(x.data, first, row), count, x.depth, at(unit, first, row), at(norm, first, sum));
  });
}

void unit_rows_backward(const Rows& unit, const void* norm, const void* grad, void* dx, int threads) {
  const std::int64_t row = unit.depth * size_of(unit.scalar), sum = size_of_sum(unit.scalar);
  each_rows(unit, threads, [&](std::int64_t first, std::int64_t count) {
    kernels_of(unit).unit_rows_backward(at(unit.data, first, row), at(norm, first, sum), at(grad, first, row), count, unit.depth,
                                        at(dx, first, row));
  });
}

std::int64_t number_labels(Scalar scalar, const std::int64_t* labels, std::int64_t count, std::int64_t* ids, void* share) {
  std::unordered_map<std::int64_t, std::int64_t> known;
  std::vector<std::int64_t> sizes;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto [label, is_new] = known.try_emplace(labels[i], std::int64_t(sizes.size()));
    if (is_new) sizes.push_back(0);
    ++sizes[ids[i] = label->second];
  }
  scalar == Scalar::f64 ? gather_share<double>(sizes, ids, count, share) : gather_share<float>(sizes, ids, count, share);
  return std::int64_t(sizes.size());
}

void sum_rows(const Rows& x, const std::int64_t* ids, const void* weight, std::int64_t classes, const void* start, void* sums, int threads) {
  check(ids, x.count, classes);
  constexpr std::int64_t columns = 64;  // of a part: whole cache lines of every row
  each_part(x.depth, columns, x, threads, [&](std::int64_t first, std::int64_t last) {
    kernels_of(x).sum_rows(x.data, ids, weight, start, x.count, classes, x.depth, first, last, sums);
  });
}

void row_dots(const Rows& z, const void* table, std::int64_t classes, const std::int64_t* ids, bool others, void* dots, int threads) {
  check(ids, z.count, classes);
  const std::int64_t row = z.depth * size_of(z.scalar), sum = size_of_sum(z.scalar);
  each_rows(z, threads, [&](std::int64_t first, std::int64_t count) {
    kernels_of(z).row_dots(at(z.data, first, row), table, ids + first, others, count, z.depth, at(dots, first, sum));
  });
}

void row_dots_backward(const Rows& z, const void* table, std::int64_t classes, const std::int64_t* ids, const void* grad, const void* grad_sums,
                       const void* start, void* dz, int threads) {
  check(ids, z.count, classes);
  const std::int64_t row = z.depth * size_of(z.scalar), sum = size_of_sum(z.scalar);
  each_rows(z, threads, [&](std::int64_t first, std::int64_t count) {
    kernels_of(z).row_dots_backward(at(z.data, first, row), table, ids + first, at(grad, first, sum), grad_sums,
                                    start ? at(start, first, row) : nullptr, count, z.depth, at(dz, first, row));
  });
}

}  // namespace fastsupcon::cpu
