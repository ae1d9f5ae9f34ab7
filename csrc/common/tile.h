// Tiles of a matrix product that fill the registers, and the packing of its factors. A tile of the result is two vectors wide; the
// right-hand matrix comes in panels of that width, one after the other, whose last vector is filled up with zeros.
#pragma once
#include "common/simd.h"
#include "common/transpose.h"
#include "common/unroll.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Registers for the tile, beside two for a row of a panel and one for a value of the left-hand matrix.
constexpr int kVectors = 2, kColumns = kVectors * kFloats, kRows = kVectorRegisters == 32 ? 14 : 6;

constexpr int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// to[k * Width + j] = scale * from[j * step + k] for j < count, k < depth; zeros from there to a whole vector.
template <int64_t Width, class T>
void turn(const T* from, int64_t step, int64_t count, int64_t depth, float scale, float* to) {
  for (int64_t j0 = 0; j0 < count; j0 += kFloats)
    for (int64_t k0 = 0; k0 < depth; k0 += kFloats) {
      const int64_t left = smaller(depth - k0, kFloats);
      Vec<float> square[kFloats];
      for (int64_t j = 0; j < kFloats; ++j) {
        const T* row = from + (j0 + j) * step + k0;
        square[j] = j0 + j >= count ? Vec<float>{} : (left == kFloats ? load(row) : load(row, left)) * scale;
      }
      transpose<float>(square);
      for (int64_t k = 0; k < left; ++k) store(to + (k0 + k) * Width + j0, square[k]);
    }
}

// Rows `first` to `last` of panels of `all_rows` rows: those of `from`, times `scale`.
template <class T>
void pack(const T* from, int64_t step, int64_t first, int64_t last, int64_t all_rows, int64_t columns, float scale, float* to) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t column = 0; column < columns; column += kColumns)
      for (int64_t j = 0; j < smaller(columns - column, kColumns); j += kFloats) {
        const int64_t left = columns - column - j;
        const T* values = from + row * step + column + j;
        store(to + column * all_rows + row * kColumns + j, (left >= kFloats ? load(values) : load(values, left)) * scale);
      }
}

// The tile a b of one panel: value (i, k) of a is a[i * RowStep + k * step]. write(row, vector, sum), the first two as constants, I.value.
template <int I>
struct Index {
  static constexpr int value = I;
};
template <int Rows, int Vectors, int64_t RowStep, class F>
CONVDIT_INLINE void sum_tile(const float* a, int64_t step, const float* b, int64_t depth, const F& write) {
  Vec<float> sum[Rows][Vectors] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, a += step, b += kColumns) {
    Vec<float> row[Vectors];
    unroll<Vectors>(CONVDIT_UNROLLED(V) { row[V] = load(b + V * kFloats); });
    unroll<Rows>(CONVDIT_UNROLLED(I) {
      const Vec<float> value = splat(a[I * RowStep]);
      unroll<Vectors>(CONVDIT_UNROLLED(V) { sum[I][V] += value * row[V]; });
    });
  }
  unroll<Rows>(CONVDIT_UNROLLED(I) { unroll<Vectors>(CONVDIT_UNROLLED(V) { write(Index<I>{}, Index<V>{}, sum[I][V]); }); });
}

// of.operator()<Rows>(), a function for tiles of `rows` rows: chosen once a product, not once a tile.
template <class F>
CONVDIT_INLINE auto tile_of(int64_t rows, const F& of) {
  auto found = of.template operator()<kRows>();
  unroll<kRows - 1>(CONVDIT_UNROLLED(I) {
    if (rows == I + 1) found = of.template operator()<I + 1>();
  });
  return found;
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
