// What the instructions on values need beyond C++'s own operators. Compiled with wrapping integers and without contraction.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <bit>
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

namespace simt {

// ---- storage of halves ---------------------------------------------------------------------------------------------
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
template <class H>
struct Pair {
  H low, high;
};
using f16x2 = Pair<f16>;
using bf16x2 = Pair<bf16>;
using f32x2 = Pair<float>;

// The same bits as another type; an integer of another width is cut or extended.
template <class To, class From>
inline To as(From x) {
  if constexpr (sizeof(To) == sizeof(From)) return std::bit_cast<To>(x);
  else if constexpr (std::is_same_v<From, f16> || std::is_same_v<From, bf16>) return as<To>(x.bits);
  else if constexpr (std::is_class_v<To>) return std::bit_cast<To>(static_cast<uint16_t>(x));
  else return static_cast<To>(x);
}

inline double widen(double x) { return x; }
inline double widen(float x) { return x; }
inline double widen(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline double widen(f16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

// Round to nearest, ties to even, once.
template <class T>
inline T narrow(double x) { return static_cast<T>(x); }
template <>
inline f16 narrow<f16>(double x) { return x != x ? f16{0x7fff} : std::bit_cast<f16>(static_cast<_Float16>(x)); }
template <>
inline bf16 narrow<bf16>(double x) {
  if (x != x) return {0x7fff};
  float f = static_cast<float>(x);
  uint32_t bits = std::bit_cast<uint32_t>(f);
  if (f != x && std::isfinite(f)) {  // to odd, so that the second rounding decides alone
    if (std::fabs(double(f)) > std::fabs(x)) bits -= 1;
    bits |= 1;
  }
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T, class I>
inline T from_integer(I x) {
  if constexpr (std::is_class_v<T>) return narrow<T>(static_cast<double>(x));
  else return static_cast<T>(x);
}
template <class I>
inline I to_integer(double x) {
  if (x != x) return 0;
  if (x <= static_cast<double>(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
  if (x >= static_cast<double>(std::numeric_limits<I>::max())) return std::numeric_limits<I>::max();
  return static_cast<I>(x);
}

// x * y + z of halves, whose product a double holds, rounded to odd: so that the rounding to a half that follows decides alone.
inline double fused(double x, double y, double z) {
  const double product = x * y, sum = product + z;
  if (!std::isfinite(sum)) return sum;
  const double of_z = sum - product, error = (product - (sum - of_z)) + (z - of_z);
  if (error == 0 || std::bit_cast<uint64_t>(sum) & 1) return sum;
  return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

// f on one half, or on both of a pair.
template <class H, class F, class... Rest>
inline H lanes_of(F f, H x, Rest... rest) { return narrow<H>(f(widen(x), widen(rest)...)); }
template <class H, class F, class... Rest>
inline Pair<H> lanes_of(F f, Pair<H> x, Rest... rest) {
  return {lanes_of(f, x.low, rest.low...), lanes_of(f, x.high, rest.high...)};
}
template <class X, class F>
inline X lanes(X a, F f) { return lanes_of(f, a); }
template <class X, class F>
inline X lanes(X a, X b, F f) { return lanes_of(f, a, b); }
template <class X, class F>
inline X lanes(X a, X b, X c, F f) { return lanes_of(f, a, b, c); }

// ---- floats ----------------------------------------------------------------------------------------------------------
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }
inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }  // NaN to 0

template <class X, class F>
inline X function(X x, F f) { return static_cast<X>(f(static_cast<double>(x))); }

// The upper half of a double.
inline double leading_bits(double x) { return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & 0xffffffff00000000); }

template <class X, class F>
inline bool compare(X a, X b, F f, bool if_unordered) {
  const double x = widen(a), y = widen(b);
  return x != x || y != y ? if_unordered : f(x, y);
}

template <class T>
inline T smaller(T a, T b) { return a != a ? b : b != b ? a : (a < b || (a == b && std::signbit(a))) ? a : b; }
template <class T>
inline T larger(T a, T b) { return a != a ? b : b != b ? a : (a > b || (a == b && std::signbit(b))) ? a : b; }

inline float fused_rounded(float a, float b, float c, int way) {
  const int before = std::fegetround();
  std::fesetround(way);
  volatile float x = a, y = b, z = c;
  volatile float result = __builtin_fmaf(x, y, z);
  std::fesetround(before);
  return result;
}

// ---- integers --------------------------------------------------------------------------------------------------------
template <class T>
inline T multiply_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
}
// PTX leaves division by zero unspecified; these do not trap.
template <class T>
inline T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return static_cast<T>(-a);
  return static_cast<T>(a / b);
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}
template <class T>
inline T shift_left(T a, uint32_t n) { return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(a << n); }
template <class T>
inline T shift_right(T a, uint32_t n) { return n >= 8 * sizeof(T) ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> n); }
inline uint32_t funnel_l(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>((((uint64_t(high) << 32) | low) << n) >> 32);
}
inline uint32_t funnel_r(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>(((uint64_t(high) << 32) | low) >> n);
}
template <class T>
inline T extract_bits(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(T);
  position &= 255, length &= 255;
  if (length == 0) return 0;
  const uint32_t kept = position >= bits ? 0 : (length < bits - position ? length : bits - position);
  if (kept == 0) return static_cast<T>(a < 0 ? -1 : 0);  // beyond the top: the sign, 0 for unsigned
  using Unsigned = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<T>(static_cast<Unsigned>(a) << (bits - position - kept)) >> (bits - kept));
}
template <class T>
inline T insert_bits(T a, T b, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(T);
  position &= 255, length &= 255;
  if (length == 0 || position >= bits) return b;
  const T mask = static_cast<T>((length >= bits ? ~T(0) : (T(1) << length) - 1) << position);
  return static_cast<T>((b & ~mask) | ((a << position) & mask));
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = (uint64_t(b) << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i);
    uint8_t byte = static_cast<uint8_t>(bytes >> (8 * (selector & 7)));
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= uint32_t(byte) << (8 * i);
  }
  return result;
}
inline uint32_t logic(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
template <class T>
inline T reverse_bits(T a) {
  T result = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); ++i) result = static_cast<T>(result << 1 | (a >> i & 1));
  return result;
}

}  // namespace simt
