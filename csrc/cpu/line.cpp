// Losses that are linear in the quantities of their rows: one call forward, one backward, for a call takes as long as hundreds of rows do.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pairs.h"

namespace fastsupcon::cpu {
namespace {

// Over how many rows a mean is.
template <class Sum>
double divisor(const Line& line, std::int64_t rows, const Sum* count) {
  if (line.reduction != Line::Reduction::mean) return 1;
  return line.skip_lone ? double(std::max<std::int64_t>(1, rows - std::count(count, count + rows, Sum(0)))) : double(rows);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Sum>
void line_of(const Line& line, std::int64_t rows, const Quantities<const void*>& values, Sum* loss) {
  const auto of = [](const void* quantity) { return static_cast<const Sum*>(quantity); };
  const Sum* const count = of(values.count);
  double total = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    double x = line.log_count ? line.log_count * std::log(std::max(count[i], Sum(1))) : 0;
    if (values.all) x += line.all * of(values.all)[i];
    if (values.different) x += line.different * of(values.different)[i];
    if (values.equal) x += line.equal * of(values.equal)[i];
    if (values.similarity) x += line.similarity * (of(values.similarity)[i] / std::max(count[i], Sum(1)));
    x *= line.factor;
    const bool infinite = (values.all && of(values.all)[i] == kInfinity) || (values.different && of(values.different)[i] == kInfinity);
    if (!(count[i] > 0) && !std::isnan(x) && !infinite) x = line.lone;
    if (line.reduction == Line::Reduction::none) loss[i] = Sum(x);
    total += x;
  }
  if (line.reduction != Line::Reduction::none) *loss = Sum(total / divisor(line, rows, count));
}

template <class Sum>
void line_backward_of(const Line& line, std::int64_t rows, const Quantities<const void*>& values, const Sum* grad,
                      const Quantities<void*>& grads) {
  const auto of = [](void* quantity) { return static_cast<Sum*>(quantity); };
  const Sum* const count = static_cast<const Sum*>(values.count);
  const double factor = line.factor / divisor(line, rows, count);
  for (std::int64_t i = 0; i < rows; ++i) {
    const double g = count[i] > 0 ? factor * grad[line.reduction == Line::Reduction::none ? i : 0] : line.lone;
    if (grads.all) of(grads.all)[i] = Sum(g * line.all);
    if (grads.different) of(grads.different)[i] = Sum(g * line.different);
    if (grads.equal) of(grads.equal)[i] = Sum(g * line.equal);
    if (grads.similarity) of(grads.similarity)[i] = Sum(g * line.similarity / std::max(count[i], Sum(1)));
  }
}

}  // namespace

void loss(const Problem& problem, const Line& line, const Quantities<void*>& values, void* norms, void* kept, void* loss, int threads) {
  forward(problem, values, {}, norms, kept, threads);
  with_sum(problem.scalar, [&](auto sum) { line_of(line, problem.rows, constant(values), static_cast<decltype(sum)*>(loss)); });
}

void loss_backward(const Problem& problem, const Line& line, const Quantities<const void*>& values, const void* norms, const void* kept,
                   const void* grad, const Outgoing& out, int threads) {
  with_sum(problem.scalar, [&](auto sum) {
    using Sum = decltype(sum);
    std::vector<Sum> memory(4 * problem.rows);
    const auto there = [&](const void* value, int index) { return value ? memory.data() + index * problem.rows : nullptr; };
    const Quantities<void*> grads{there(values.all, 0), there(values.different, 1), there(values.equal, 2), there(values.similarity, 3),
                                  nullptr};
    line_backward_of(line, problem.rows, values, static_cast<const Sum*>(grad), grads);
    backward(problem, {values, constant(grads)}, {}, norms, kept, out, threads);
  });
}

}  // namespace fastsupcon::cpu
