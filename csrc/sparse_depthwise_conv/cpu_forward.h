// Forward of the sparse depthwise convolution (and, with the weight turned, its input gradient).
//
// Blocks of 8 and 4 keep a tile of outputs and one kernel row of weights in registers and walk the neighbouring blocks.
// Smaller blocks would spend their time on mispredicted branches that way: each block's present neighbours are listed
// first, by the shape of their contribution, and the lists are walked for several channel vectors at once.
#pragma once
#include "sparse_depthwise_conv/cpu_common.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

template <class A>
struct Forward {
  const SparseDepthwise& p;
  const A* x;
  A* y;
  const A *weight, *bias;  // weight packed: (channel vector, tap, lane)

  Vec<A> bias_of(int64_t vector, int64_t n) const {
    const A* b = bias + vector * lanes<A>;
    return bias == nullptr ? Vec<A>{} : n == lanes<A> ? load(b) : load(b, n);
  }
  int64_t lanes_of(int64_t vector) const { return least(p.channels - vector * lanes<A>, int64_t{lanes<A>}); }
};

// Adds what one kernel row brings from a block that lies Dx blocks to the right, to the output rows First..Last of a
// tile of rows of B outputs. x: the block's row that output row First reads; weights: the kernel row.
template <int B, int Dx, int First, int Last>
CONVDIT_INLINE void add_rows(Vec<float>* out, const float* x, int64_t channels, const float* weights, int64_t n) {
  Vec<float> w[kSide];
  unroll<kSide>([&]<int k>() CONVDIT_FLAT { w[k] = load(weights + k * kFloats); });
  unroll<Last - First + 1>([&]<int r>() CONVDIT_FLAT {
    unroll<B>([&]<int c>() CONVDIT_FLAT {
      constexpr int column = c + Dx * B;  // counted from the outputs' first
      if constexpr (column >= -kHalf && column < B + kHalf) {
        const Vec<float> v = load_some(x + (r * B + c) * channels, n);
        unroll<kSide>([&]<int k>() CONVDIT_FLAT {
          constexpr int o = column - k + kHalf;
          if constexpr (o >= 0 && o < B) out[(First + r) * B + o] += v * w[k];
        });
      }
    });
  });
}

// ---- blocks of 8: two rows of outputs at a time (one where there are 16 registers) --------------------------------
constexpr int kTileRows = kVectorRegisters >= 32 ? 2 : 1;

// All kernel rows of the block at (dy, Dx), for the output rows top..top + kTileRows - 1.
template <int Dx>
CONVDIT_INLINE void add_block8(Vec<float>* out, const float* x, int dy, int top, int64_t channels, const float* weights, int64_t n) {
  constexpr int B = 8;
  const int enter = B * dy - top + kHalf;  // the kernel row with which output row `top` reads this block's row 0
  const auto row = [&](int kh) CONVDIT_FLAT { return x + (kh - enter) * B * channels; };
  const auto taps = [&](int kh) CONVDIT_FLAT { return weights + kh * kSide * kFloats; };
  if constexpr (kTileRows == 1) {
    for (int kh = most(enter, 0); kh < least(enter + B, kSide); ++kh) add_rows<B, Dx, 0, 0>(out, row(kh), channels, taps(kh), n);
  } else {
    if (enter >= 1 && enter <= kSide) add_rows<B, Dx, 1, 1>(out, x, channels, taps(enter - 1), n);
    for (int kh = most(enter, 0); kh < least(enter + B - 1, kSide); ++kh) add_rows<B, Dx, 0, 1>(out, row(kh), channels, taps(kh), n);
    const int leave = enter + B - 1;
    if (leave >= 0 && leave < kSide) add_rows<B, Dx, 0, 0>(out, row(leave), channels, taps(leave), n);
  }
}

inline void block8(const Forward<float>& f, int64_t block, int64_t vector, int64_t n) {
  constexpr int B = 8;
  const int64_t channels = f.p.channels, channel = vector * kFloats;
  const int32_t* table = f.p.neighbors + block * 9;
  const float* weights = f.weight + vector * kTaps * kFloats;
  const Vec<float> bias = f.bias_of(vector, n);
  for (int top = 0; top < B; top += kTileRows) {
    Vec<float> out[kTileRows * B];
    unroll<kTileRows * B>([&]<int i>() CONVDIT_FLAT { out[i] = bias; });
    for (int dy = top < kHalf ? -1 : 0; dy <= (top + kTileRows - 1 + kHalf >= B ? 1 : 0); ++dy) {
      const int32_t* q = table + (dy + 1) * 3;
      const auto at = [&](int32_t row) CONVDIT_FLAT { return f.x + int64_t{row} * B * B * channels + channel; };
      if (q[0] >= 0) add_block8<-1>(out, at(q[0]), dy, top, channels, weights, n);
      if (q[1] >= 0) add_block8<0>(out, at(q[1]), dy, top, channels, weights, n);
      if (q[2] >= 0) add_block8<1>(out, at(q[2]), dy, top, channels, weights, n);
    }
    float* y = f.y + (block * B * B + top * B) * channels + channel;
    unroll<kTileRows * B>([&]<int i>() CONVDIT_FLAT { store_some(y + i * channels, out[i], n); });
  }
}

// ---- blocks of 4: a whole block of outputs at a time (half of one where there are 16 registers) -------------------
template <int Top, int Rows>
CONVDIT_INLINE void tile4(const Forward<float>& f, int64_t block, int64_t vector, int64_t n) {
  constexpr int B = 4;
  const int64_t channels = f.p.channels, channel = vector * kFloats;
  const int32_t* table = f.p.neighbors + block * 9;
  const float* weights = f.weight + vector * kTaps * kFloats;
  const Vec<float> bias = f.bias_of(vector, n);
  Vec<float> out[Rows * B];
  unroll<Rows * B>([&]<int i>() CONVDIT_FLAT { out[i] = bias; });
  unroll<9>([&]<int neighbor>() CONVDIT_FLAT {
    constexpr int dy = neighbor / 3 - 1, dx = neighbor % 3 - 1;
    const int32_t q = table[neighbor];
    if (q < 0) return;
    const float* x = f.x + int64_t{q} * B * B * channels + channel;
    unroll<kSide>([&]<int k>() CONVDIT_FLAT {
      constexpr int shift = Top + k - kHalf - dy * B;  // output row r reads the block's row r + shift
      constexpr int first = most(0, -shift), last = least(Rows - 1, B - 1 - shift);
      if constexpr (first <= last)
        add_rows<B, dx, first, last>(out, x + (first + shift) * B * channels, channels, weights + k * kSide * kFloats, n);
    });
  });
  float* y = f.y + (block * B * B + Top * B) * channels + channel;
  unroll<Rows * B>([&]<int i>() CONVDIT_FLAT { store_some(y + i * channels, out[i], n); });
}

inline void block4(const Forward<float>& f, int64_t block, int64_t vector, int64_t n) {
  if constexpr (kVectorRegisters >= 32) {
    tile4<0, 4>(f, block, vector, n);
  } else {
    tile4<0, 2>(f, block, vector, n);
    tile4<2, 2>(f, block, vector, n);
  }
}

template <int B>
void forward_blocks(const Forward<float>& f, const Runner& run) {
  constexpr int64_t kBlocksPerTask = B == 8 ? 4 : 8, kVectorsAtOnce = 12;
  const int64_t blocks = f.p.blocks, vectors = special_vectors(f.p.channels);
  run((blocks + kBlocksPerTask - 1) / kBlocksPerTask, [&](int64_t task) {
    const int64_t first = task * kBlocksPerTask, end = least(first + kBlocksPerTask, blocks);
    // Few vectors at once, so that their weights stay in the first-level cache; block by block, as memory has them.
    for (int64_t begin = 0; begin < vectors; begin += kVectorsAtOnce)
      for (int64_t block = first; block < end; ++block)
        for (int64_t vector = begin; vector < least(begin + kVectorsAtOnce, vectors); ++vector)
          B == 8 ? block8(f, block, vector, f.lanes_of(vector)) : block4(f, block, vector, f.lanes_of(vector));
  });
}

// ---- blocks of 2: lists of present neighbours ---------------------------------------------------------------------
// A source: a block of inputs, and the tap with which its first site meets the output block's first site.
struct Source {
  int32_t row, tap;
};

// Which of a block's rows (or columns) meet which of the outputs': all pairs, or only the near ones of a block two away.
enum Meet : int { kBefore = 0, kAll = 1, kAfter = 2 };
constexpr Meet kMeets[5] = {kBefore, kAll, kAll, kAll, kAfter};
constexpr bool meets(int meet, int in, int out) { return meet == kAll || (meet == kBefore ? in == 1 && out == 0 : in == 0 && out == 1); }

struct Sources2 {
  Source source[26];  // one more: the next entry is written before it is known whether to keep it
  int8_t end[9];      // for each (row meet, column meet): where its sources end
};

inline void list_sources(const int32_t* table, Sources2& list) {
  int count = 0;
  for (int rows = 0; rows < 3; ++rows)
    for (int columns = 0; columns < 3; ++columns) {
      for (int dy = 0; dy < 5; ++dy) {
        if (kMeets[dy] != rows) continue;
        for (int dx = 0; dx < 5; ++dx) {
          if (kMeets[dx] != columns) continue;
          const int32_t q = table[dy * 5 + dx];
          list.source[count] = {q, (2 * dy - 4 + kHalf) * kSide + 2 * dx - 4 + kHalf};
          count += q >= 0;
        }
      }
      list.end[rows * 3 + columns] = static_cast<int8_t>(count);
    }
}

template <int V>
void block2(const Forward<float>& f, const Sources2& list, int64_t block, int64_t vector, int64_t n) {
  constexpr int B = 2;
  const int64_t channels = f.p.channels, channel = vector * kFloats;
  const float *const x = f.x + channel, *const weights = f.weight + vector * kTaps * kFloats;
  Vec<float> out[V * B * B];
  unroll<V>([&]<int v>() CONVDIT_FLAT {
    const Vec<float> bias = f.bias_of(vector + v, n);
    unroll<B * B>([&]<int o>() CONVDIT_FLAT { out[v * B * B + o] = bias; });
  });
  int s = 0;
  unroll<9>([&]<int kind>() CONVDIT_FLAT {
    constexpr int rows = kind / 3, columns = kind % 3;
    for (; s < list.end[kind]; ++s) {
      const float* in = x + int64_t{list.source[s].row} * B * B * channels;
      const float* w = weights + list.source[s].tap * kFloats;
      unroll<V>([&]<int v>() CONVDIT_FLAT {
        unroll<B * B>([&]<int i>() CONVDIT_FLAT {
          constexpr int iy = i / B, ix = i % B;
          if constexpr ((meets(rows, iy, 0) || meets(rows, iy, 1)) && (meets(columns, ix, 0) || meets(columns, ix, 1))) {
            const Vec<float> value = load_some(in + i * channels + v * kFloats, n);
            unroll<B * B>([&]<int o>() CONVDIT_FLAT {
              constexpr int oy = o / B, ox = o % B;
              if constexpr (meets(rows, iy, oy) && meets(columns, ix, ox))
                out[v * B * B + o] += value * load(w + (v * kTaps + (iy - oy) * kSide + ix - ox) * kFloats);
            });
          }
        });
      });
    }
  });
  float* y = f.y + block * B * B * channels + channel;
  unroll<V>([&]<int v>() CONVDIT_FLAT {
    unroll<B * B>([&]<int o>() CONVDIT_FLAT { store_some(y + o * channels + v * kFloats, out[v * B * B + o], n); });
  });
}

constexpr int64_t kListedBlocks = 16;

inline void forward_blocks2(const Forward<float>& f, const Runner& run) {
  constexpr int V = kVectorRegisters >= 32 ? 4 : 2;
  const int64_t blocks = f.p.blocks, vectors = special_vectors(f.p.channels), full = f.p.channels / kFloats;
  run((blocks + kListedBlocks - 1) / kListedBlocks, [&](int64_t task) {
    const int64_t first = task * kListedBlocks, count = least(kListedBlocks, blocks - first);
    Sources2 lists[kListedBlocks];
    for (int64_t i = 0; i < count; ++i) list_sources(f.p.neighbors + (first + i) * 25, lists[i]);
    int64_t vector = 0;
    for (; vector + V <= full; vector += V)
      for (int64_t i = 0; i < count; ++i) block2<V>(f, lists[i], first + i, vector, kFloats);
    for (; vector < vectors; ++vector)
      for (int64_t i = 0; i < count; ++i) block2<1>(f, lists[i], first + i, vector, f.lanes_of(vector));
  });
}

// ---- any kernel, any block: lists of present taps, site by site ---------------------------------------------------
template <bool Full, int V, class A>
CONVDIT_INLINE void convolve_site(const Forward<A>& f, const Source* source, const Source* end, int64_t row, int64_t vector, int64_t taps, int64_t n) {
  const int64_t channels = f.p.channels, channel = vector * lanes<A>;
  const A *const x = f.x + channel, *const weights = f.weight + vector * taps * lanes<A>;
  Vec<A> out[V];
  unroll<V>([&]<int v>() CONVDIT_FLAT { out[v] = f.bias_of(vector + v, n); });
  for (; source != end; ++source) {
    const A *in = x + source->row * channels, *w = weights + source->tap * lanes<A>;
    unroll<V>([&]<int v>() CONVDIT_FLAT { out[v] += load_lanes<Full>(in + v * lanes<A>, n) * load(w + v * taps * lanes<A>); });
  }
  A* y = f.y + row * channels + channel;
  unroll<V>([&]<int v>() CONVDIT_FLAT { store_lanes<Full>(y + v * lanes<A>, out[v], n); });
}

// The present taps of site `row`; returns the end of the list.
inline Source* list_taps(const SparseDepthwise& p, int64_t row, int64_t radius, Source* out) {
  const int64_t block = p.block, kernel = p.kernel, half = kernel / 2, side = 2 * radius + 1;
  const int32_t* table = p.neighbors + row / (block * block) * side * side;
  const int64_t i = row / block % block, j = row % block;
  int32_t tap = 0;
  for (int64_t ky = 0; ky < kernel; ++ky)
    for (int64_t kx = 0; kx < kernel; ++kx, ++tap) {
      const int32_t q = block == 1 ? table[tap] : neighbor_site(table, block, radius, i + ky - half, j + kx - half);
      *out = {q, tap};
      out += q >= 0;
    }
  return out;
}

constexpr int64_t kRoom = kSparseDepthwiseMaxKernel * kSparseDepthwiseMaxKernel, kListedSites = 16;

// The channel vectors from `begin` on.
template <class A>
void forward_sites(const Forward<A>& f, int64_t begin, const Runner& run) {
  constexpr int V = 4;
  const int64_t taps = f.p.kernel * f.p.kernel, radius = (f.p.kernel / 2 + f.p.block - 1) / f.p.block;
  const int64_t rows = f.p.blocks * f.p.block * f.p.block, per_task = least(kRoom / taps, kListedSites);
  const int64_t vectors = vectors_of<A>(f.p.channels), full = f.p.channels / lanes<A>;
  if (begin == vectors) return;
  run((rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task, count = least(per_task, rows - first);
    Source sources[kRoom + 1];
    Source* ends[kListedSites + 1];
    ends[0] = sources;
    for (int64_t i = 0; i < count; ++i) ends[i + 1] = list_taps(f.p, first + i, radius, ends[i]);
    int64_t vector = begin;
    for (; vector + V <= full; vector += V)
      for (int64_t i = 0; i < count; ++i) convolve_site<true, V>(f, ends[i], ends[i + 1], first + i, vector, taps, lanes<A>);
    for (; vector < full; ++vector)
      for (int64_t i = 0; i < count; ++i) convolve_site<true, 1>(f, ends[i], ends[i + 1], first + i, vector, taps, lanes<A>);
    if (vector < vectors)
      for (int64_t i = 0; i < count; ++i) convolve_site<false, 1>(f, ends[i], ends[i + 1], first + i, vector, taps, f.lanes_of(vector));
  });
}

// weight (C, taps) -> (channel vector, tap, lane), absent lanes 0, turned by 180 degrees if asked.
template <class A>
void pack_weight(const SparseDepthwise& p, const Runner& run) {
  const int64_t taps = p.kernel * p.kernel;
  run(vectors_of<A>(p.channels), [&](int64_t vector) {
    const int64_t n = least(p.channels - vector * lanes<A>, int64_t{lanes<A>});
    const A* in = static_cast<const A*>(p.weight) + vector * lanes<A> * taps;
    A* out = static_cast<A*>(p.workspace) + vector * lanes<A> * taps;
    for (int64_t tap = 0; tap < taps; ++tap, out += lanes<A>) {
      const A* from = in + (p.flip ? taps - 1 - tap : tap);
      for (int64_t lane = 0; lane < lanes<A>; ++lane) out[lane] = lane < n ? from[lane * taps] : 0;
    }
  });
}

template <class A>
void forward(const SparseDepthwise& p, const A* x, A* y, const Runner& run) {
  pack_weight<A>(p, run);
  const Forward<A> f{p, x, y, static_cast<const A*>(p.workspace), static_cast<const A*>(p.bias)};
  int64_t done = 0;  // channel vectors
  if constexpr (sizeof(A) == sizeof(float)) {  // float64 need not be fast
    if (p.kernel == kSide && (p.block == 8 || p.block == 4 || p.block == 2)) {
      done = special_vectors(p.channels);
      if (p.block == 8) forward_blocks<8>(f, run);
      if (p.block == 4) forward_blocks<4>(f, run);
      if (p.block == 2) forward_blocks2(f, run);
    }
  }
  forward_sites(f, done, run);
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
