// What the CPU kernels of the sparse depthwise convolution share. Included once a level, by cpu.cpp.
//
// Kernels know float and double only: halves are copied to float32 first, since each feature is read about ten times.
#pragma once
#include "common/ahead.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "common/unroll.h"
#include "sparse_depthwise_conv/sparse_depthwise_conv.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// The specialised kernels: 7x7, blocks of 8, 4 and 2. Taps lie in memory as (channel vector, tap, lane).
constexpr int kSide = 7, kHalf = 3, kTaps = 49;

template <class A>
int64_t vectors_of(int64_t channels) {
  return ceil_div(channels, lanes<A>);
}

// A vector of channels. The last one overlaps the one before it, so that it is full, too: a masked load costs the units that
// multiply. Only where there are fewer channels than lanes a vector is not full.
struct Channels {
  int64_t first, lanes;
};
template <class A>
CONVDIT_INLINE Channels channels_of(int64_t channels, int64_t vector) {
  return {larger(0, smaller(vector * lanes<A>, channels - lanes<A>)), smaller(lanes<A>, channels)};
}

// Whether the specialised kernels take it. They know float and full vectors only.
inline bool is_special(int64_t kernel, int64_t block, int64_t channels) {
  return kernel == kSide && (block == 8 || block == 4 || block == 2) && channels >= kFloats;
}

// The row of the site at (y, x), counted from the first site of the block with this row of the table, or -1.
CONVDIT_INLINE int32_t neighbor_site(const int32_t* table, int64_t block, int64_t radius, int64_t y, int64_t x) {
  const int64_t down = y + radius * block, right = x + radius * block;  // at least 0
  const int32_t q = table[down / block * (2 * radius + 1) + right / block];
  return q < 0 ? -1 : static_cast<int32_t>((q * block + down % block) * block + right % block);
}

// Three blocks side by side around an output block, at one vector of channels: where each lies, and which are there. Bits of
// `sides`: 1 the left, 2 the middle, 4 the right.
struct BlockRow {
  const float *left, *middle, *right;
  int sides;
};
template <int B>
CONVDIT_INLINE BlockRow block_row(const int32_t* q, const float* x, int64_t channels) {
  const auto at = [&](int32_t block) CONVDIT_FLAT { return x + int64_t{block} * B * B * channels; };
  return {at(q[0]), at(q[1]), at(q[2]), (q[0] >= 0) | (q[1] >= 0) << 1 | (q[2] >= 0) << 2};
}
// Whether the column C, counted from the outputs' first, lies in a block that is there; and its value in row `row`.
template <int B, int Sides>
constexpr bool has_column(int C) {
  return C >= -kHalf && C < B + kHalf && (Sides & (C < 0 ? 1 : C < B ? 2 : 4));
}
template <int B, int C>
CONVDIT_INLINE Vec<float> load_column(const BlockRow& x, int row, int64_t channels) {
  constexpr int column = C < 0 ? C + B : C < B ? C : C - B;
  return load((C < 0 ? x.left : C < B ? x.middle : x.right) + (row * B + column) * channels);
}

// The first block of x that the blocks of 8 or 4 up to `block` do not read: later blocks have later neighbours.
inline int64_t read_until(const int32_t* neighbors, int64_t block) {
  for (int i = 8; i > 4; --i)
    if (neighbors[block * 9 + i] >= 0) return neighbors[block * 9 + i] + 1;
  return block + 1;
}

// Blocks first to last - 1 of features, fetched in `steps` steps; `size`: floats a block.
inline Ahead blocks_ahead(const float* features, int64_t first, int64_t last, int64_t size, int64_t steps) {
  return {features + first * size, (last - first) * size * static_cast<int64_t>(sizeof(float)), steps};
}

constexpr int64_t kConvertedPerTask = 1 << 14;

template <class From, class To>
void convert_all(const From* from, To* to, int64_t count, const Runner& run) {
  run(ceil_div(count, kConvertedPerTask), [&](int64_t task) {
    const int64_t first = task * kConvertedPerTask;
    for_each_vector<float>(smaller(kConvertedPerTask, count - first), [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT {
      constexpr bool kFull = decltype(full)::value;
      store_lanes<kFull>(to + first + i, load_lanes<kFull>(from + first + i, n), n);
    });
  });
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
