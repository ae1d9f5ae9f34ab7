// Loops whose counter is a constant, and the small arithmetic of cutting work into parts.
#pragma once
#include <utility>

#include "common/simd.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

#define CONVDIT_FLAT __attribute__((always_inline))
// A loop body over the compile-time index `i`: unroll<4>(CONVDIT_UNROLLED(I) { sum += row[I]; });
#define CONVDIT_UNROLLED(i) [&]<int i>() CONVDIT_FLAT

template <int N, class F>
CONVDIT_INLINE void unroll(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) CONVDIT_FLAT { (f.template operator()<I>(), ...); }(std::make_integer_sequence<int, N>{});
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part i of `total` things cut into `parts` of equal size but for one.
struct Range {
  int64_t first, last;
};
CONVDIT_INLINE Range part_of(int64_t total, int64_t parts, int64_t i) { return {total * i / parts, total * (i + 1) / parts}; }

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
