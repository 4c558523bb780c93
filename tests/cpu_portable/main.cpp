// The CPU kernels without Python: value and gradient of both shapes against the definition in double. Exits 1 where one is wrong.
// Built for other architectures and by other compilers in test_cpu_portable.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/pairs.h"

using fastsupcon::Incoming;
using fastsupcon::Outgoing;
using fastsupcon::Problem;
using fastsupcon::Quantities;
using fastsupcon::Scalar;
using Matrix = std::vector<double>;

namespace {

bool wrong = false;

void expect(const char* what, const Matrix& ours, const Matrix& exact, double tolerance) {
  double error = 0, largest = 1e-30;
  for (std::size_t k = 0; k < exact.size(); ++k) {
    if (std::isinf(exact[k]) && ours[k] == exact[k]) continue;
    error = std::max(error, std::isfinite(ours[k]) ? std::fabs(ours[k] - exact[k]) : std::numeric_limits<double>::infinity());
    largest = std::max(largest, std::fabs(exact[k]));
  }
  const bool failed = !(error <= tolerance * largest);
  wrong |= failed;
  std::printf("%-44s error %.1e of %.1e, allowed %.0e%s\n", what, error / largest, largest, tolerance, failed ? "  WRONG" : "");
}

// bfloat16 keeps the upper half of a float; here the lower half is simply cut, so the rows are what the kernel reads, exactly.
template <class Element> Element narrow(double x) { return static_cast<Element>(x); }
template <> std::uint16_t narrow(double x) {
  const float single = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &single, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}
double widen(float x) { return x; }
double widen(double x) { return x; }
double widen(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float single;
  std::memcpy(&single, &bits, 4);
  return single;
}

template <class Element> std::vector<Element> unit_rows(int rows, int depth, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<Element> out;
  for (int i = 0; i < rows; ++i) {
    Matrix row(depth);
    double norm = 0;
    for (double& x : row) norm += (x = normal(random)) * x;
    for (double x : row) out.push_back(narrow<Element>(x / std::sqrt(norm)));
  }
  return out;
}

template <class T> Matrix wide(const std::vector<T>& x) {
  Matrix out;
  for (const T& value : x) out.push_back(widen(value));
  return out;
}

template <class Element, class Sum>
void check(const char* name, Scalar scalar, int rows, int columns, int depth, double scale, bool self, double tolerance) {
  std::mt19937 random(rows + 7 * columns);
  const auto a = unit_rows<Element>(rows, depth, random);
  const auto b = self ? a : unit_rows<Element>(columns, depth, random);
  std::vector<Sum> bias(columns), grad(rows), lse(rows), dbias(columns);
  std::vector<std::int64_t> skip(rows);
  for (int j = 0; j < columns; ++j) bias[j] = self ? 0 : static_cast<Sum>(0.1 * (j % 7));
  for (int i = 0; i < rows; ++i) grad[i] = static_cast<Sum>(1 + 0.3 * (i % 5)), skip[i] = self ? i : (3 * i) % columns;

  const Matrix x = wide(a), y = wide(b);
  Matrix exact(rows), da(rows * depth, 0.0), db(columns * depth, 0.0), exact_dbias(columns, 0.0);
  for (int i = 0; i < rows; ++i) {
    Matrix logits(columns);
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int j = 0; j < columns; ++j) {
      double dot = 0;
      for (int d = 0; d < depth; ++d) dot += x[i * depth + d] * y[j * depth + d];
      logits[j] = j == skip[i] ? -std::numeric_limits<double>::infinity() : scale * dot + double(bias[j]);
      largest = std::max(largest, logits[j]);
    }
    for (double s : logits) sum += std::exp(s - largest);
    exact[i] = largest + std::log(sum);
    for (int j = 0; j < columns; ++j) {
      const double weight = double(grad[i]) * std::exp(logits[j] - exact[i]);
      exact_dbias[j] += weight;
      for (int d = 0; d < depth; ++d) {
        da[i * depth + d] += scale * weight * y[j * depth + d];
        (self ? da : db)[j * depth + d] += scale * weight * x[i * depth + d];
      }
    }
  }

  const Problem problem{scalar, rows, columns, depth, a.data(), self ? nullptr : b.data(), self ? nullptr : bias.data(), nullptr, nullptr,
                        self ? nullptr : skip.data(), scale, nullptr, false};
  std::vector<Element> ours_da(rows * depth), ours_db(columns * depth);
  char what[64];
  const auto report = [&](const char* part, const Matrix& ours, const Matrix& truth, double allowed) {
    std::snprintf(what, sizeof what, "%s %s %dx%dx%d scale %g: %s", name, self ? "self" : "cross", rows, columns, depth, scale, part);
    expect(what, ours, truth, allowed);
  };
  const double rounding = std::max(tolerance, scalar == Scalar::bf16 ? 8e-3 : 0.0);  // of the gradient to the rows' own dtype
  const Quantities<void*> none{};
  fastsupcon::cpu::forward(problem, {lse.data(), nullptr, nullptr, nullptr, nullptr}, none, nullptr, nullptr, 2);
  const Incoming incoming{{lse.data(), nullptr, nullptr, nullptr, nullptr}, {grad.data(), nullptr, nullptr, nullptr, nullptr}};
  const Outgoing out{ours_da.data(), self ? nullptr : ours_db.data(), self ? nullptr : dbias.data(), nullptr};
  fastsupcon::cpu::backward(problem, incoming, Incoming{}, nullptr, nullptr, out, 2);
  if (!self) {
    report("db", wide(ours_db), db, rounding);
    report("dbias", wide(dbias), exact_dbias, tolerance);
  }
  report("lse", wide(lse), exact, tolerance);
  report("da", wide(ours_da), da, rounding);
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", fastsupcon::cpu::instruction_set().c_str());
  for (const double scale : {10.0, 1000.0}) {  // fixed shift and running maximum
    for (const int rows : {2, 65, 300}) {
      const double loss_of_digits = scale / 10;  // an exponent of size `scale` loses that many digits more
      check<float, float>("f32", Scalar::f32, rows, rows, 33, scale, true, 1e-6 * loss_of_digits);
      check<double, double>("f64", Scalar::f64, rows, rows, 33, scale, true, 1e-13 * loss_of_digits);
      check<std::uint16_t, float>("bf16", Scalar::bf16, rows, rows, 33, scale, true, 1e-6 * loss_of_digits);
      check<float, float>("f32", Scalar::f32, rows, 130, 33, scale, false, 1e-6 * loss_of_digits);
      check<double, double>("f64", Scalar::f64, rows, 130, 33, scale, false, 1e-13 * loss_of_digits);
    }
  }
  return wrong;
}
