// A product of matrices in blocks (Goto & van de Geijn 2008): panels of b are packed side by side, then blocks of rows of a, each of
// which stays in the second-level cache, and tiles of c that fill the registers are summed from one of each.
#include "linear/linear.h"

#include "common/tile.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int kBlockRows = kVectorRegisters == 32 ? 112 : 96;  // of a: whole tiles, and whole vectors
// Of a packed row: some more than its values, so that the rows of a tile do not all fall in one set of the first-level cache.
constexpr int kStride = kProductDepth + 16;
static_assert(kProductColumns % kColumns == 0 && kPanelMultiple % kColumns == 0 && kBlockRows % kRows == 0 && kBlockRows % kFloats == 0);

// Rows k0 to k0 + depth of a panel of b, `columns` of it.
void pack_panel(const Product& p, int64_t k0, int64_t depth, int64_t column, int64_t columns, float* to) {
  const float* from = p.b + k0 * p.b_row + column * p.b_column;
  if (p.b_column == 1) return pack(from, p.b_row, 0, depth, depth, columns, 1.f, to);
  if (p.b_row == 1) return turn<kColumns>(from, p.b_column, columns, depth, 1.f, to);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t i = 0; i < round_up(columns, kFloats); ++i) to[k * kColumns + i] = i < columns ? from[k * p.b_row + i * p.b_column] : 0;
}

// Values k0 to k0 + depth of some rows of a.
void pack_rows(const Product& p, int64_t row, int64_t rows, int64_t k0, int64_t depth, float* to) {
  const float* from = p.a + row * p.a_row + k0 * p.a_column;
  if (p.a_row == 1 && p.a_column != 1) return turn<kStride>(from, p.a_column, depth, rows, 1.f, to);
  for (int64_t i = 0; i < rows; ++i) {
    const float* values = from + i * p.a_row;
    if (p.a_column == 1) std::memcpy(to + i * kStride, values, sizeof(float) * depth);
    else
      for (int64_t k = 0; k < depth; ++k) to[i * kStride + k] = values[k * p.a_column];
  }
}

// A tile of c: from packed rows of a and a packed panel of b, `columns` of it. `first`: of the sums over K.
template <int Rows, int Vectors>
void tile(const float* a, const float* b, int64_t depth, int64_t columns, bool first, const float* bias, float* c, int64_t c_row) {
  sum_tile<Rows, Vectors, kStride>(a, 1, b, depth, [&](auto row, auto vector, Vec<float> sum) CONVDIT_FLAT {
    constexpr int kFirst = vector.value * kFloats;
    const int64_t left = smaller(columns - kFirst, kFloats);
    float* to = c + row.value * c_row + kFirst;
    Vec<float> before{};
    if (!first) before = left == kFloats ? load(to) : load(to, left);
    else if (bias != nullptr) before = load(bias + kFirst, left);
    if (left == kFloats) store(to, sum + before);
    else store(to, sum + before, left);
  });
}

template <int Vectors>
CONVDIT_INLINE auto tile_of_rows(int64_t rows) {
  return tile_of(rows, []<int Rows>() { return tile<Rows, Vectors>; });
}

void multiply_section(const Product& p, const Runner& run) {
  const int64_t all_panels = ceil_div(p.n, kColumns), parts = larger(ceil_div(p.k, kProductDepth), 1);
  const int64_t groups = ceil_div(p.n, kProductColumns), tiles = ceil_div(p.m, kRows), tasks = run.threads == 1 ? 1 : 4 * run.threads;
  const int64_t blocks = larger(ceil_div(tiles, kBlockRows / kRows), smaller(tiles, tasks));
  for (int64_t step = 0; step < groups * parts; ++step) {
    const Range columns_here = part_of(all_panels, groups, step / parts), range = part_of(p.k, parts, step % parts);
    const int64_t depth = range.last - range.first, panels = columns_here.last - columns_here.first;
    const auto panel_at = [&](int64_t i) { return p.packed + i * kColumns * depth; };
    run(panels, [&](int64_t i) {
      const int64_t column = (columns_here.first + i) * kColumns;
      pack_panel(p, range.first, depth, column, smaller(p.n - column, kColumns), panel_at(i));
    });
    // Columns are shared out too where there are few blocks of rows for the threads; each share packs its rows of a again.
    const int64_t shares = smaller(ceil_div(tasks, larger(blocks, 1)), panels);
    run(blocks * shares, [&](int64_t task) {
      alignas(64) float rows_of_a[kBlockRows * kStride];
      const Range some = part_of(tiles, blocks, task / shares), share = part_of(panels, shares, task % shares);
      const int64_t first = some.first * kRows, last = smaller(some.last * kRows, p.m);
      pack_rows(p, first, last - first, range.first, depth, rows_of_a);
      using Tile = void (*)(const float*, const float*, int64_t, int64_t, bool, const float*, float*, int64_t);
      const int64_t rows_left = (last - first) % kRows;
      const Tile whole[] = {tile<kRows, 1>, tile<kRows, kVectors>},
                 part[] = {tile_of_rows<1>(rows_left), tile_of_rows<kVectors>(rows_left)};
      for (int64_t i = share.first; i < share.last; ++i) {
        const int64_t column = (columns_here.first + i) * kColumns, columns = smaller(p.n - column, kColumns);
        const float* bias = p.bias != nullptr ? p.bias + column : nullptr;
        const bool wide = columns > kFloats;
        for (int64_t row = first; row < last; row += kRows) {
          const float* a = rows_of_a + (row - first) * kStride;
          float* c = p.c + row * p.c_row + column;
          const auto compute = last - row >= kRows ? whole[wide] : part[wide];
          compute(a, panel_at(i), depth, columns, step % parts == 0, bias, c, p.c_row);
        }
      }
    });
  }
}

void multiply(const Product& p, const Runner& run) {
  const int64_t sections = product_sections(p.m, p.n, p.k), values = p.m * p.n;
  if (sections == 1) return multiply_section(p, run);
  float* const sums = p.packed + sections * product_panels(p.n, p.k);  // of all sections but the first, whose are in c
  run(sections, [&](int64_t i) {
    const Range terms = part_of(p.k, sections, i);
    Product part = p;
    part.k = terms.last - terms.first, part.a += terms.first * p.a_column, part.b += terms.first * p.b_row;
    part.packed += i * product_panels(p.n, p.k);
    if (i > 0) part.bias = nullptr, part.c = sums + (i - 1) * values, part.c_row = p.n;
    multiply_section(part, {nullptr, 1});
  });
  run(ceil_div(p.m, kRows), [&](int64_t task) {
    for (int64_t row = task * kRows; row < smaller((task + 1) * kRows, p.m); ++row)
      for (int64_t i = 0; i < sections - 1; ++i)
        for (int64_t j = 0; j < p.n; ++j) p.c[row * p.c_row + j] += sums[i * values + row * p.n + j];
  });
}

}  // namespace

extern const LinearKernels linear = {multiply};

}  // namespace convdit::CONVDIT_LEVEL
