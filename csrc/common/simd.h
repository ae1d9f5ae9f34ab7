// Vectors of the widest registers of the level this file is compiled for (CONVDIT_LEVEL, a namespace of its own, so that
// no function compiled for AVX-512 can be picked by the linker for an older CPU; kernels use no inline std:: functions
// for the same reason). They are GNU vector types: + - * / and ?: work lane by lane, a*b+c contracts to an FMA.
//
//   Vec<float>, Vec<double>     arithmetic; lanes<A> of them
//   load<A>(p), store(p, v)     any alignment; p may point to float, double, bf16 or f16: converted on the way
//   load<A>(p, n), store(p, v, n)  the first n <= lanes<A> lanes; others load as 0 and are not stored
//   stream(p, v)                for memory that is not read again soon: past the caches, where p is aligned to a vector
//   splat, sum, vmax, exp, tanh, normal_cdf, normal_pdf
//
// Over 400 lines: each function stands once, with what the levels need to differ in inside it.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/types.h"

#ifndef CONVDIT_LEVEL
#error "compile with -DCONVDIT_LEVEL=baseline, avx2 or avx512"
#endif
#define CONVDIT_INLINE __attribute__((always_inline)) inline

namespace convdit::CONVDIT_LEVEL {

// CONVDIT_EMULATE_AVX512: the sixteen lanes of AVX-512 without its instructions, so that an older CPU can test that code.
#if defined(__AVX512F__) || defined(CONVDIT_EMULATE_AVX512)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
#define CONVDIT_AVX2
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(A));

constexpr int kFloats = lanes<float>;
typedef uint32_t VecBits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecHalves __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
CONVDIT_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};
}

// ---- scalars ---------------------------------------------------------------------------------------------------
CONVDIT_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
CONVDIT_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

CONVDIT_INLINE float widen(float x) { return x; }
CONVDIT_INLINE double widen(double x) { return x; }
CONVDIT_INLINE float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
CONVDIT_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return from_bits(sign | ((rest << 13) + 0x38000000u));
  return from_bits(sign | to_bits(static_cast<float>(rest) * 0x1p-24f));  // subnormal
}

// Round to nearest, ties to even, as PyTorch does.
template <class T>
CONVDIT_INLINE T narrow(accum_t<T> x);
template <>
CONVDIT_INLINE float narrow<float>(float x) {
  return x;
}
template <>
CONVDIT_INLINE double narrow<double>(double x) {
  return x;
}
template <>
CONVDIT_INLINE bf16 narrow<bf16>(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
CONVDIT_INLINE f16 narrow<f16>(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more: infinity
  if (rest < 0x38800000u) {  // subnormal: let the adder round to a multiple of 2^-24
    const float shifted = from_bits(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (to_bits(shifted) - to_bits(0.5f)))};
  }
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13))};
}

// ---- vectors of halves <-> vectors of floats --------------------------------------------------------------------
CONVDIT_INLINE Vec<float> widen(VecHalves halves, bf16) {
#if defined(CONVDIT_AVX2)
  const __m256i bits = _mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves));  // one instruction, which GCC does not find
  return reinterpret_cast<Vec<float>>(_mm256_slli_epi32(bits, 16));
#else
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(halves, VecBits) << 16);
#endif
}
CONVDIT_INLINE VecHalves narrow(Vec<float> x, bf16) {
  const VecBits bits = reinterpret_cast<VecBits>(x);
  const VecBits rounded = x != x ? VecBits{} + 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
#if defined(CONVDIT_AVX2)
  const __m256i wide = reinterpret_cast<__m256i>(rounded);
  return reinterpret_cast<VecHalves>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(rounded, VecHalves);
#endif
}
#if defined(__AVX512F__)
CONVDIT_INLINE Vec<float> widen(VecHalves halves, f16) {
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(halves)));
}
CONVDIT_INLINE VecHalves narrow(Vec<float> x, f16) {
  return reinterpret_cast<VecHalves>(_mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(CONVDIT_AVX2)
CONVDIT_INLINE Vec<float> widen(VecHalves halves, f16) {
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(halves)));
}
CONVDIT_INLINE VecHalves narrow(Vec<float> x, f16) {
  return reinterpret_cast<VecHalves>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
CONVDIT_INLINE Vec<float> widen(VecHalves halves, f16) {
  Vec<float> x;
  for (int i = 0; i < kFloats; ++i) x[i] = widen(f16{halves[i]});
  return x;
}
CONVDIT_INLINE VecHalves narrow(Vec<float> x, f16) {
  VecHalves halves;
  for (int i = 0; i < kFloats; ++i) halves[i] = narrow<f16>(x[i]).bits;
  return halves;
}
#endif

// ---- memory ------------------------------------------------------------------------------------------------------
CONVDIT_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
CONVDIT_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class H>
CONVDIT_INLINE Vec<float> load(const H* p) {
  VecHalves halves;
  std::memcpy(&halves, p, sizeof halves);
  return widen(halves, H{});
}
CONVDIT_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
CONVDIT_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
template <class H>
CONVDIT_INLINE void store(H* p, Vec<float> v) {
  const VecHalves halves = narrow(v, H{});
  std::memcpy(p, &halves, sizeof halves);
}

#if defined(__AVX512BW__)
CONVDIT_INLINE uint32_t first(int64_t n) { return (1u << n) - 1; }
CONVDIT_INLINE Vec<float> load(const float* p, int64_t n) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n)), p));
}
CONVDIT_INLINE Vec<double> load(const double* p, int64_t n) {
  return reinterpret_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(first(n)), p));
}
template <class H>
CONVDIT_INLINE Vec<float> load(const H* p, int64_t n) {
  return widen(reinterpret_cast<VecHalves>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first(n)), p)), H{});
}
CONVDIT_INLINE void store(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first(n)), reinterpret_cast<__m512>(v));
}
CONVDIT_INLINE void store(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first(n)), reinterpret_cast<__m512d>(v));
}
template <class H>
CONVDIT_INLINE void store(H* p, Vec<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(first(n)), reinterpret_cast<__m256i>(narrow(v, H{})));
}
#elif defined(CONVDIT_AVX2)
// A masked store is slow on many CPUs, and a loop over the lanes becomes a call of memcpy: hence pieces of 16, 8, 4, 2 bytes.
CONVDIT_INLINE __m256i first(int64_t ints) {
  static constexpr int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + 8 - ints));
}
CONVDIT_INLINE Vec<float> load(const float* p, int64_t n) { return reinterpret_cast<Vec<float>>(_mm256_maskload_ps(p, first(n))); }
CONVDIT_INLINE Vec<double> load(const double* p, int64_t n) { return reinterpret_cast<Vec<double>>(_mm256_maskload_pd(p, first(2 * n))); }
template <class H>
CONVDIT_INLINE Vec<float> load(const H* p, int64_t n) {
  if (n == kFloats) return load(p);
  uint64_t low = 0, last = 0;  // the first four halves, and those that are left
  uint32_t two = 0;
  if (n & 4) std::memcpy(&low, p, 8);
  if (n & 1) last = p[n - 1].bits;
  if (n & 2) std::memcpy(&two, p + (n & 4), 4), last = last << 32 | two;
  const __m128i halves =
      n & 4 ? _mm_set_epi64x(static_cast<int64_t>(last), static_cast<int64_t>(low)) : _mm_cvtsi64_si128(static_cast<int64_t>(last));
  return widen(reinterpret_cast<VecHalves>(halves), H{});
}
CONVDIT_INLINE void store_bytes(void* p, __m128i v, int64_t bytes) {
  char* to = static_cast<char*>(p);
  if (bytes & 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
  if (bytes & 8) _mm_storel_epi64(reinterpret_cast<__m128i*>(to), v), v = _mm_unpackhi_epi64(v, v), to += 8;
  int64_t rest = _mm_cvtsi128_si64(v);
  if (bytes & 4) std::memcpy(to, &rest, 4), rest >>= 32, to += 4;
  if (bytes & 2) std::memcpy(to, &rest, 2);
}
CONVDIT_INLINE void store_bytes(void* p, __m256i v, int64_t bytes) {
  char* to = static_cast<char*>(p);
  if (bytes & 32) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  __m128i half = _mm256_castsi256_si128(v);
  if (bytes & 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half), half = _mm256_extracti128_si256(v, 1), to += 16;
  store_bytes(to, half, bytes & 15);
}
CONVDIT_INLINE void store(float* p, Vec<float> v, int64_t n) { store_bytes(p, reinterpret_cast<__m256i>(v), 4 * n); }
CONVDIT_INLINE void store(double* p, Vec<double> v, int64_t n) { store_bytes(p, reinterpret_cast<__m256i>(v), 8 * n); }
template <class H>
CONVDIT_INLINE void store(H* p, Vec<float> v, int64_t n) {
  store_bytes(p, reinterpret_cast<__m128i>(narrow(v, H{})), 2 * n);
}
#else
template <class T>
CONVDIT_INLINE Vec<accum_t<T>> load(const T* p, int64_t n) {
  accum_t<T> values[lanes<accum_t<T>>] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = widen(p[i]);
  return load(values);
}
template <class T>
CONVDIT_INLINE void store(T* p, Vec<accum_t<T>> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = narrow<T>(v[i]);
}
#endif

// Stores that leave the caches alone, and so do not read the line first: a third of the traffic of a copy. p is aligned to
// the vector as it lies in memory. stream_fence() orders them before whatever tells another thread of them.
#if defined(__AVX512F__)
CONVDIT_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
template <class H>
CONVDIT_INLINE void stream(H* p, Vec<float> v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(narrow(v, H{})));
}
#elif defined(CONVDIT_AVX2)
CONVDIT_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, reinterpret_cast<__m256>(v)); }
template <class H>
CONVDIT_INLINE void stream(H* p, Vec<float> v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(narrow(v, H{})));
}
#else
template <class T>
CONVDIT_INLINE void stream(T* p, Vec<accum_t<T>> v) {
  store(p, v);
}
#endif
CONVDIT_INLINE void stream(double* p, Vec<double> v) { store(p, v); }
CONVDIT_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// n lanes where n may also be all of them; `Full` is known at compile time.
template <bool Full, class T>
CONVDIT_INLINE Vec<accum_t<T>> load_lanes(const T* p, int64_t n) {
  if constexpr (Full) return load(p);
  else return load(p, n);
}
template <bool Full, class T>
CONVDIT_INLINE void store_lanes(T* p, Vec<accum_t<T>> v, int64_t n) {
  if constexpr (Full) store(p, v);
  else store(p, v, n);
}

// Calls f(first_lane, n, full) for each vector of `count` elements; full is std::true_type-like: decltype(full)::value.
struct FullVector {
  static constexpr bool value = true;
};
struct PartVector {
  static constexpr bool value = false;
};
template <class A, class F>
CONVDIT_INLINE void for_each_vector(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + lanes<A> <= count; i += lanes<A>) f(i, lanes<A>, FullVector{});
  if (i < count) f(i, count - i, PartVector{});
}

// ---- arithmetic --------------------------------------------------------------------------------------------------
// Sum of the lanes, in a fixed order: the upper half is added to the lower one until one lane is left.
template <class V>
CONVDIT_INLINE auto sum(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v) == 64) {  // left to itself GCC goes through the stack
    typedef decltype(v[0] + 0) Half __attribute__((vector_size(32)));
    const __m512i bits = reinterpret_cast<__m512i>(v);
    return sum(reinterpret_cast<Half>(_mm512_maskz_extracti64x4_epi64(0xff, bits, 0)) +
               reinterpret_cast<Half>(_mm512_maskz_extracti64x4_epi64(0xff, bits, 1)));
  } else
#endif
  {
    auto parts = v;
    for (int half = sizeof(v) / sizeof(v[0]) / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
  }
}

// Sum over `count` elements of the vectors f(first_lane, n, full); absent lanes of the last one must be 0.
template <class A, class F>
CONVDIT_INLINE A sum_vectors(int64_t count, const F& f) {
  Vec<A> parts[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes<A> <= count; i += 4 * lanes<A>)
    for (int u = 0; u < 4; ++u) parts[u] += f(i + u * lanes<A>, lanes<A>, FullVector{});
  for (; i + lanes<A> <= count; i += lanes<A>) parts[0] += f(i, lanes<A>, FullVector{});
  if (i < count) parts[1] += f(i, count - i, PartVector{});
  return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// A product that must be rounded before it is subtracted from its like: the compiler may not contract it into an FMA.
template <class V>
CONVDIT_INLINE V rounded(V v) {
#if defined(CONVDIT_EMULATE_AVX512)
  asm("" : "+m"(v));
#elif defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

template <class V>
CONVDIT_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
CONVDIT_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
template <class V>
CONVDIT_INLINE V vabs(V a) {
  return a < 0 ? -a : a;
}

// e^x, relative error below 2e-7 (float); 0 below -104, infinity above 88.7.
CONVDIT_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> clamped = vmin(splat(89.f), vmax(splat(-104.f), x));  // in this order a NaN stays one
#if defined(__AVX512F__)
  const Vec<float> n = reinterpret_cast<Vec<float>>(
      _mm512_roundscale_ps(reinterpret_cast<__m512>(clamped * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Vec<float> shift = splat(0x1.8p23f);
  const Vec<float> n = (clamped * 1.44269504f + shift) - shift;  // rounded to an integer by the adder
#endif
  Vec<float> r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec<float> p = splat(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // 2^n in two steps, so that subnormal results and results near the largest float are right.
  typedef typename VecOf<float>::integer Int;
  const Int whole = __builtin_convertvector(n, Int), half = whole >> 1;
  const Vec<float> a = reinterpret_cast<Vec<float>>((half + 127) << 23);
  const Vec<float> b = reinterpret_cast<Vec<float>>((whole - half + 127) << 23);
  return p * a * b;
#endif
}

// 1/(1+e^-2x) - 1/(1+e^2x), by a polynomial near 0 where that would cancel; absolute error below 2e-7.
CONVDIT_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> a = vabs(x), e = exp(-2.f * a);
  const Vec<float> far = (1.f - e) / (1.f + e), s = x * x;
  Vec<float> p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  return a < 0.625f ? x + x * s * p : (x < 0 ? -far : far);
}

// The standard normal distribution at x, absolute error below 1.5e-7; exactly 0 and 1 beyond 5.5 standard deviations, so
// that x * normal_cdf(x), the GELU, is right for huge x. Inside, 1/2 + x * (p(x^2) / q(x^2) + 0.09), a minimax fit: the
// constant is most of the sum where x is large, so that p and q may be rounded. The division has a unit of its own.
CONVDIT_INLINE Vec<float> normal_cdf(Vec<float> x) {
  const Vec<float> s = x * x;
  Vec<float> p = splat(-8.49717239e-08f), q = splat(1.19751928e-06f);
  p = p * s + -2.45887463e-07f, q = q * s + 7.30744723e-05f;
  p = p * s + -1.57889883e-06f, q = q * s + 0.00187553803f;
  p = p * s + 0.00209721364f, q = q * s + 0.028560102f;
  p = p * s + 0.011102017f, q = q * s + 0.251154393f;
  p = p * s + 0.308942258f, q = q * s + 1.f;
  const Vec<float> far = x < 0 ? splat(0.f) : splat(1.f);
  return s > 30.25f ? far : x * (p / q + 0.09f) + 0.5f;
}
// Its density, e^(-x^2/2) / sqrt(2 pi), absolute error below 1e-7: 2^t for t <= 0, split into 2^n, whose exponent's bits are
// made by an addition, and a polynomial for the rest; exactly 0 from t = -127 on, so that x * normal_pdf(x) is right for huge x.
CONVDIT_INLINE Vec<float> normal_pdf(Vec<float> x) {
  typedef typename VecOf<float>::integer Int;
  const Vec<float> t = vmax(splat(-127.f), x * x * -0.721347520f);  // in this order a NaN stays one
  const Vec<float> shift = splat(0x1.8p23f + 127.f), biased = t + shift, r = t - (biased - shift);
  Vec<float> p = splat(5.296548479e-4f);
  p = p * r + 3.859982593e-3f;
  p = p * r + 2.214414254e-2f;
  p = p * r + 9.583438933e-2f;
  p = p * r + 2.765256464e-1f;
  p = p * r + 3.989423215e-1f;
  return p * reinterpret_cast<Vec<float>>(reinterpret_cast<Int>(biased) << 23);
}

// float64 exists for checking gradients: exact rather than fast.
CONVDIT_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}
CONVDIT_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}
CONVDIT_INLINE Vec<double> normal_cdf(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = 0.5 * ::erfc(x[i] * -0.70710678118654752440);
  return x;
}
CONVDIT_INLINE Vec<double> normal_pdf(Vec<double> x) { return exp(x * x * -0.5) * 0.39894228040143267794; }

}  // namespace convdit::CONVDIT_LEVEL
