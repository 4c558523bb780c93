// Vectors of one instruction set: GCC's vector extension, with intrinsics only where it has no word for the instruction.
//
// A unit (unit_*.cpp) is compiled with one instruction set's flags, and this and the headers on top of it (elements.h, pack.h, product.h,
// tiles.h) give their code a namespace of that set's own. No function of the standard library is called in them: an inline one, compiled
// with a unit's flags, could replace the one that older processors run.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTSUPCON_UNIT avx512
#define FASTSUPCON_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTSUPCON_UNIT avx2
#define FASTSUPCON_VECTOR_BYTES 32
#else
#define FASTSUPCON_UNIT generic
#define FASTSUPCON_VECTOR_BYTES 16
#endif

namespace fastsupcon::cpu::FASTSUPCON_UNIT {
namespace {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FASTSUPCON_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(FASTSUPCON_VECTOR_BYTES), aligned(1), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = FASTSUPCON_VECTOR_BYTES / sizeof(T);

#define FASTSUPCON_INLINE inline __attribute__((always_inline))

template <class T>
FASTSUPCON_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
FASTSUPCON_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <class T>
FASTSUPCON_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

template <class T>
FASTSUPCON_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

// f(0), f(1), … f(N − 1), with the index as a constant.
template <int Index>
struct Constant {
  static constexpr int value = Index;
  constexpr operator int() const { return Index; }
};
template <int... I>
struct Constants {};
template <int N, int... I>
struct FirstConstants : FirstConstants<N - 1, N - 1, I...> {};
template <int... I>
struct FirstConstants<0, I...> {
  using type = Constants<I...>;
};
template <int N>
using First = typename FirstConstants<N>::type;  // 0, 1, … N − 1

template <int N, int I = 0, class F>
FASTSUPCON_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f(Constant<I>{});
    unroll<N, I + 1>(f);
  }
}

// A lane-wise maximum that keeps b where the two cannot be compared, so max(bound, x) keeps a NaN x and max(x, best) ignores it. x86 has an
// instruction for just that, which compilers do not find in the comparison.
#if defined(__x86_64__)
#define FASTSUPCON_EXTREMUM(name, intrinsic, vector)                                         \
  FASTSUPCON_INLINE Vector<float> name(Vector<float> a, Vector<float> b) {                   \
    return (Vector<float>)intrinsic##_ps((vector)a, (vector)b);                              \
  }                                                                                          \
  FASTSUPCON_INLINE Vector<double> name(Vector<double> a, Vector<double> b) {                \
    return (Vector<double>)intrinsic##_pd((vector##d)a, (vector##d)b);                       \
  }
#if FASTSUPCON_VECTOR_BYTES == 64
FASTSUPCON_EXTREMUM(maximum, _mm512_max, __m512)
FASTSUPCON_EXTREMUM(minimum, _mm512_min, __m512)
#elif FASTSUPCON_VECTOR_BYTES == 32
FASTSUPCON_EXTREMUM(maximum, _mm256_max, __m256)
FASTSUPCON_EXTREMUM(minimum, _mm256_min, __m256)
#else
FASTSUPCON_EXTREMUM(maximum, _mm_max, __m128)
FASTSUPCON_EXTREMUM(minimum, _mm_min, __m128)
#endif
#undef FASTSUPCON_EXTREMUM
#else
template <class V>
FASTSUPCON_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FASTSUPCON_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}
#endif

// The lanes joined pairwise, in log2 W steps.
template <class T, int kStep, int... I>
FASTSUPCON_INLINE Vector<T> exchange(Vector<T> v, Constants<I...>) {
  return __builtin_shufflevector(v, v, (I ^ kStep)...);
}
template <class T, int kStep = kLanes<T> / 2, class F>
FASTSUPCON_INLINE T reduce(Vector<T> v, const F& join) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    return reduce<T, kStep / 2>(join(v, exchange<T, kStep>(v, First<kLanes<T>>{})), join);
  }
}
template <class T>
FASTSUPCON_INLINE T sum_of_lanes(Vector<T> v) {
  return reduce<T>(v, [](Vector<T> a, Vector<T> b) __attribute__((always_inline)) { return a + b; });
}
template <class T>
FASTSUPCON_INLINE T maximum_of_lanes(Vector<T> v) {
  return reduce<T>(v, [](Vector<T> a, Vector<T> b) __attribute__((always_inline)) { return maximum(a, b); });
}

// x as it is when rounded to T: keeps the compiler from fusing the product that made it with the addition that follows.
template <class V>
FASTSUPCON_INLINE V rounded(V x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

// ---- Powers of two ----------------------------------------------------------------------------------------------------------------
// 2^r on [−½, ½] by a minimax polynomial with p(0) = 1: relative error 2.6e-9 (float, 8e-8 with its rounding) and 3e-16 (double).
template <class T>
struct Power;
template <>
struct Power<float> {
  using Int = std::int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr float kCoefficients[] = {1.f,           0x1.62e432p-1f, 0x1.ebfbe2p-3f, 0x1.c6ae72p-5f,
                                            0x1.3b270ep-7f, 0x1.5f7276p-10f, 0x1.470b4ap-13f};
};
template <>
struct Power<double> {
  using Int = std::int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kCoefficients[] = {1.,
                                             0.69314718055995161589,
                                             0.24022650695910472037,
                                             0.055504108664346603749,
                                             0.0096181291073807671233,
                                             0.0013333558246477721031,
                                             0.00015403530800751130076,
                                             0.000015252647749349884664,
                                             1.3215235667023535774e-6,
                                             1.0210506159276830676e-7,
                                             7.1117534195268368611e-9};
};
template <class T>
using Int = typename Power<T>::Int;
template <class T>
using IntVector = Vector<Int<T>>;

template <class T>
FASTSUPCON_INLINE Vector<T> polynomial(Vector<T> r) {
  constexpr int degree = sizeof(Power<T>::kCoefficients) / sizeof(T) - 1;
  Vector<T> p = broadcast(Power<T>::kCoefficients[degree]);
  unroll<degree>([&](auto k) __attribute__((always_inline)) { p = p * r + Power<T>::kCoefficients[degree - 1 - k]; });
  return p;
}

// 2^(s·factor − shift) for |s·factor| ≤ shift ≤ half the exponent's range. The shift is an integer that enters the exponent alone, so the
// only rounding beside the polynomial's is that of r. A NaN stays NaN: the power is a product, whatever bits the exponent gets.
template <class T>
struct BoundedPower {
  T factor, round;
  FASTSUPCON_INLINE BoundedPower(double factor_, int shift) : factor(T(factor_)), round(Power<T>::kRound + T(Power<T>::kBias - shift)) {}
  FASTSUPCON_INLINE Vector<T> operator()(Vector<T> s) const {
    const Vector<T> biased = s * factor + round;  // the low bits: n − shift + bias, with n the integer nearest to s·factor
    const Vector<T> r = s * factor - (biased - round);
    return polynomial<T>(r) * reinterpret_cast<Vector<T>>(reinterpret_cast<IntVector<T>>(biased) << Power<T>::kMantissa);
  }
};

// 2^t for every t: 0 below the normal range, inf above it, NaN for NaN.
template <class T>
FASTSUPCON_INLINE Vector<T> power_of_two(Vector<T> t) {
  constexpr T round = Power<T>::kRound + Power<T>::kBias;
  t = maximum(broadcast(T(-Power<T>::kBias)), t);
  t = minimum(broadcast(T(Power<T>::kBias + 1)), t);
  const Vector<T> rounded = t + round;
  const Vector<T> r = t - (rounded - round);
  return polynomial<T>(r) * reinterpret_cast<Vector<T>>(reinterpret_cast<IntVector<T>>(rounded) << Power<T>::kMantissa);
}

template <class T>
constexpr T kInfinity = T(__builtin_inf());
constexpr double kLog2E = 1.4426950408889634;

// 2^(x log2 e) = exp(x)
template <class T>
FASTSUPCON_INLINE Vector<T> exp_of(Vector<T> x) {
  return power_of_two<T>(x * T(kLog2E));
}

}  // namespace
}  // namespace fastsupcon::cpu::FASTSUPCON_UNIT
