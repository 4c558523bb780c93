// What the losses need of rows beside the log-sum-exp, a few at a time: unit length, sums by class, products with a gathered row.
// Included by a unit (see simd.h). Sums are made in vectors: one rounding order per instruction set, whatever the rows are shared out to.

// f(d, n): the columns d … d + n of one row, n = kLanes or what is left at its end.
template <class Sum, class F>
FASTSUPCON_INLINE void each_vector(std::int64_t depth, const F& f) {
  std::int64_t d = 0;
  for (; d + kLanes<Sum> <= depth; d += kLanes<Sum>) f(d, std::int64_t(kLanes<Sum>));
  if (d < depth) f(d, depth - d);
}

template <class Sum, class Target>
FASTSUPCON_INLINE void store_elements(Target* p, Vector<Sum> v, std::int64_t available) {
  if (sizeof(Target) == sizeof(Sum) && available == kLanes<Sum>) return store<Sum>(reinterpret_cast<Sum*>(p), v);
  for (std::int64_t l = 0; l < available; ++l) from_sum(v[l], p[l]);
}

FASTSUPCON_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FASTSUPCON_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Squares of such a row leave the range of Sum: its largest entry is divided out first. A row of zeros stays as it is, with norm 1; so does
// one below the normal range.
template <class Sum, class Source>
Sum careful_unit_row(const Source* x, std::int64_t depth, Source* unit) {
  Sum largest = 0, square = 0;
  for (std::int64_t d = 0; d < depth; ++d) {
    const Sum magnitude = to_sum(x[d]) < 0 ? -to_sum(x[d]) : to_sum(x[d]);
    if (magnitude > largest) largest = magnitude;
  }
  constexpr Sum smallest_normal = sizeof(Sum) == 4 ? Sum(0x1p-126) : Sum(0x1p-1022);
  if (largest < smallest_normal) largest = 1;
  for (std::int64_t d = 0; d < depth; ++d) square += to_sum(x[d]) / largest * (to_sum(x[d]) / largest);
  const Sum norm = square < 1 ? 1 : square_root(square);  // the largest entry is 1 now, unless there was none; a NaN stays
  for (std::int64_t d = 0; d < depth; ++d) from_sum(to_sum(x[d]) / largest / norm, unit[d]);
  return norm * largest;
}

template <class Sum, class Source>
void unit_rows(const void* x_, std::int64_t count, std::int64_t depth, void* unit_, void* norm) {
  constexpr Sum low = sizeof(Sum) == 4 ? Sum(0x1p-80) : Sum(0x1p-900), high = sizeof(Sum) == 4 ? Sum(0x1p80) : Sum(0x1p900);
  for (std::int64_t i = 0; i < count; ++i) {
    const Source* const x = static_cast<const Source*>(x_) + i * depth;
    Source* const unit = static_cast<Source*>(unit_) + i * depth;
    Vector<Sum> squares = {};
    each_vector<Sum>(depth, [&](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
      const Vector<Sum> v = load_elements(x + d, n);
      squares += v * v;
    });
    const Sum square = sum_of_lanes<Sum>(squares);
    if (square > low && square < high) {
      const Sum length = square_root(square);
      each_vector<Sum>(depth, [&](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
        store_elements<Sum>(unit + d, load_elements(x + d, n) / length, n);
      });
      static_cast<Sum*>(norm)[i] = length;
    } else {
      static_cast<Sum*>(norm)[i] = careful_unit_row<Sum>(x, depth, unit);
    }
  }
}

template <class Sum, class Source>
void unit_rows_backward(const void* unit_, const void* norm, const void* grad_, std::int64_t count, std::int64_t depth, void* dx_) {
  for (std::int64_t i = 0; i < count; ++i) {
    const Source* const unit = static_cast<const Source*>(unit_) + i * depth;
    const Source* const grad = static_cast<const Source*>(grad_) + i * depth;
    Source* const dx = static_cast<Source*>(dx_) + i * depth;
    Vector<Sum> products = {};
    each_vector<Sum>(depth, [&](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
      products += load_elements(unit + d, n) * load_elements(grad + d, n);
    });
    const Sum along = sum_of_lanes<Sum>(products), length = static_cast<const Sum*>(norm)[i];
    each_vector<Sum>(depth, [&](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
      store_elements<Sum>(dx + d, (load_elements(grad + d, n) - along * load_elements(unit + d, n)) / length, n);
    });
  }
}

template <class Sum, class Source>
void sum_rows(const void* x, const std::int64_t* ids, const void* weight, const void* start, std::int64_t count, std::int64_t classes,
              std::int64_t depth, std::int64_t first, std::int64_t last, void* sums_) {
  const bool started = start == sums_;
  for (std::int64_t k = 0; !started && k < classes; ++k) {
    const Source* const row = start ? static_cast<const Source*>(start) + k * depth + first : nullptr;
    Sum* const sums = static_cast<Sum*>(sums_) + k * depth + first;
    each_vector<Sum>(last - first, [&](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
      store_elements<Sum>(sums + d, row ? load_elements(row + d, n) : Vector<Sum>{}, n);
    });
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const Source* const row = static_cast<const Source*>(x) + i * depth + first;
    Sum* const sums = static_cast<Sum*>(sums_) + ids[i] * depth + first;
    const Sum w = weight ? static_cast<const Sum*>(weight)[i] : Sum(1);
    each_vector<Sum>(last - first, [&](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
      store_elements<Sum>(sums + d, load_elements(sums + d, n) + w * load_elements(row + d, n), n);
    });
  }
}

template <class Sum, class Source>
void row_dots(const void* z_, const void* table_, const std::int64_t* ids, bool others, std::int64_t count, std::int64_t depth, void* dots) {
  for (std::int64_t i = 0; i < count; ++i) {
    const Source* const z = static_cast<const Source*>(z_) + i * depth;
    const Sum* const table = static_cast<const Sum*>(table_) + ids[i] * depth;
    Vector<Sum> products = {};
    each_vector<Sum>(depth, [&](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
      const Vector<Sum> v = load_elements(z + d, n), t = load_elements(table + d, n);
      products += v * (others ? t - v : t);
    });
    static_cast<Sum*>(dots)[i] = sum_of_lanes<Sum>(products);
  }
}

template <class Sum, class Source>
void row_dots_backward(const void* z_, const void* table_, const std::int64_t* ids, const void* grad, const void* grad_sums_,
                       const void* start_, std::int64_t count, std::int64_t depth, void* dz_) {
  for (std::int64_t i = 0; i < count; ++i) {
    const Source* const z = static_cast<const Source*>(z_) + i * depth;
    const Sum* const table = static_cast<const Sum*>(table_) + ids[i] * depth;
    const Sum* const sums = grad_sums_ ? static_cast<const Sum*>(grad_sums_) + ids[i] * depth : nullptr;
    const Source* const start = start_ ? static_cast<const Source*>(start_) + i * depth : nullptr;
    Source* const dz = static_cast<Source*>(dz_) + i * depth;
    const Sum g = static_cast<const Sum*>(grad)[i];
    each_vector<Sum>(depth, [&](std::int64_t d, std::int64_t n) __attribute__((always_inline)) {
      Vector<Sum> v = load_elements(table + d, n);
      v = sums ? g * (v - 2 * load_elements(z + d, n)) + load_elements(sums + d, n) : g * v;
      store_elements<Sum>(dz + d, start ? v + load_elements(start + d, n) : v, n);
    });
  }
}
