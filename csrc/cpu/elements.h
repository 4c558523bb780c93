// The element types of rows, and their conversion to and from the vectors that sums are made of (see simd.h).
#pragma once

#include "simd.h"

namespace fastsupcon::cpu::FASTSUPCON_UNIT {
namespace {

struct Half {
  std::uint16_t bits;
};
struct Bfloat {
  std::uint16_t bits;
};

template <class To, class From>
FASTSUPCON_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

FASTSUPCON_INLINE float to_sum(float x) { return x; }
FASTSUPCON_INLINE double to_sum(double x) { return x; }
FASTSUPCON_INLINE float to_sum(Bfloat x) { return bits_as<float>(std::uint32_t(x.bits) << 16); }
FASTSUPCON_INLINE float to_sum(Half x) {
  const std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fff) << 13, sign = std::uint32_t(x.bits & 0x8000) << 16;
  const bool special = (x.bits & 0x7c00) == 0x7c00;                                       // inf or NaN
  const float value = special ? bits_as<float>(magnitude | 0x7f800000) : bits_as<float>(magnitude) * 0x1p112f;  // subnormals come out right
  return bits_as<float>(bits_as<std::uint32_t>(value) | sign);
}

// Round to nearest, ties to even; what is too large becomes inf.
FASTSUPCON_INLINE void from_sum(float x, float& to) { to = x; }
FASTSUPCON_INLINE void from_sum(double x, double& to) { to = x; }
FASTSUPCON_INLINE void from_sum(float x, Bfloat& to) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  to.bits = x != x ? 0x7fc0 : std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
FASTSUPCON_INLINE void from_sum(float x, Half& to) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  std::uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude < 0x38800000) {  // below 2⁻¹⁴: adding ½ moves the rounded subnormal into the low bits
    half = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<std::uint32_t>(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    if (magnitude >= 0x47800000 || half > 0x7c00) half = 0x7c00;
  }
  to.bits = std::uint16_t(sign | half);
}

// One vector of consecutive elements, as sums.
template <class Source>
FASTSUPCON_INLINE auto load_elements(const Source* p) {
  using Sum = decltype(to_sum(*p));
  if constexpr (sizeof(Source) == sizeof(Sum)) {
    return load<Sum>(reinterpret_cast<const Sum*>(p));
  } else {
    Vector<Sum> v;
    for (int l = 0; l < kLanes<Sum>; ++l) v[l] = to_sum(p[l]);
    return v;
  }
}

#ifdef __F16C__
FASTSUPCON_INLINE Vector<float> load_elements(const Half* p) {
#ifdef __AVX512F__
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}
#endif
#ifdef __AVX2__
FASTSUPCON_INLINE Vector<float> load_elements(const Bfloat* p) {
#ifdef __AVX512F__
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vector<float>)_mm512_slli_epi32(wide, 16);
#else
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (Vector<float>)_mm256_slli_epi32(wide, 16);
#endif
}
#endif

// The same where only `available` elements can be read; the rest are 0.
template <class Source>
FASTSUPCON_INLINE auto load_elements(const Source* p, std::int64_t available) {
  constexpr int lanes = kLanes<decltype(to_sum(*p))>;
  if (available >= lanes) return load_elements(p);
  Source padded[lanes] = {};
  for (std::int64_t l = 0; l < available; ++l) padded[l] = p[l];
  return load_elements(padded);
}

// The first `available` lanes of v become elements.
template <class Sum, class Target>
FASTSUPCON_INLINE void store_elements(Target* p, Vector<Sum> v, std::int64_t available) {
  if (sizeof(Target) == sizeof(Sum) && available >= kLanes<Sum>) return store<Sum>(reinterpret_cast<Sum*>(p), v);
  for (std::int64_t l = 0; l < smaller<std::int64_t>(available, kLanes<Sum>); ++l) from_sum(v[l], p[l]);
}

}  // namespace
}  // namespace fastsupcon::cpu::FASTSUPCON_UNIT
