// Products of small matrices that lie in the caches, for attention on the CPU: a tile of the result fills the registers, two vectors
// wide. The right-hand matrix comes in panels of that width, one after the other, filled up with zeros; so do results.
#pragma once
#include "common/simd.h"
#include "common/transpose.h"
#include "common/unroll.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Registers for the tile, beside two for a row of a panel and one for a value of the left-hand matrix.
constexpr int kVectors = 2, kColumns = kVectors * kFloats, kRows = kVectorRegisters == 32 ? 14 : 6;

constexpr int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
constexpr int64_t kTurnedRows = round_up(kRows, kFloats);  // of a left-hand matrix that turn() has packed

// n things in equal parts of at most `most`, cut at multiples of `unit`, which divides `most`.
struct Cut {
  int64_t n, parts, unit, units;
  constexpr Cut(int64_t total, int64_t most, int64_t of = 1)
      : n(total), parts(ceil_div(ceil_div(total, of), most / of)), unit(of), units(ceil_div(total, of)) {}
  Range operator[](int64_t i) const {
    const Range r = part_of(units, parts, i);
    return {r.first * unit, smaller(r.last * unit, n)};
  }
};

// to[k * Width + j] = scale * from[j * step + k] for j < count, k < depth; zeros for count <= j < Width.
template <int64_t Width, class T>
void turn(const T* from, int64_t step, int64_t count, int64_t depth, float scale, float* to) {
  for (int64_t j0 = 0; j0 < Width; j0 += kFloats)
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
      for (int64_t j = 0; j < kColumns; j += kFloats) {
        const int64_t left = smaller(larger(columns - column - j, 0), kFloats);
        const T* values = from + row * step + column + j;
        store(to + column * all_rows + row * kColumns + j, left == kFloats ? load(values) * scale
                                                           : left == 0     ? Vec<float>{}
                                                                           : load(values, left) * scale);
      }
}

// c = a b, or c + a b, of one panel; value (i, k) of a is a[i * RowStep + k * step].
template <int Rows, int Vectors, int64_t RowStep>
void tile(const float* a, int64_t step, const float* b, int64_t depth, bool add, float* c, int64_t c_step) {
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
  unroll<Rows>(CONVDIT_UNROLLED(I) {
    unroll<Vectors>(CONVDIT_UNROLLED(V) {
      float* to = c + I * c_step + V * kFloats;
      store(to, add ? load(to) + sum[I][V] : sum[I][V]);
    });
  });
}

using Tile = void (*)(const float* a, int64_t step, const float* b, int64_t depth, bool add, float* c, int64_t c_step);
template <int Vectors, int64_t RowStep>
CONVDIT_INLINE Tile tile_of(int64_t rows) {
  Tile found = nullptr;
  unroll<kRows>(CONVDIT_UNROLLED(I) { found = rows == I + 1 ? tile<I + 1, Vectors, RowStep> : found; });
  return found;
}

// At most kRows rows of c, round_up(columns, kFloats) wide, from all panels of b. Calls between(panel, panels) before each.
template <int64_t RowStep, class F>
void multiply(int64_t rows, const float* a, int64_t step, const float* b, int64_t depth, int64_t columns, bool add, float* c,
              int64_t c_step, const F& between) {
  const Tile wide = tile_of<2, RowStep>(rows), narrow = tile_of<1, RowStep>(rows);
  for (int64_t column = 0; column < columns; column += kColumns, b += depth * kColumns) {
    between(column / kColumns, ceil_div(columns, kColumns));
    (columns - column > kFloats ? wide : narrow)(a, step, b, depth, add, c + column, c_step);
  }
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
