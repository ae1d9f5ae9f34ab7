// Forward of the sparse depthwise convolution (and, with the weight turned, its input gradient).
//
// Blocks of 8 and 4 keep a few rows of outputs and one kernel row of weights in registers, and take three blocks side by side
// at once, in a loop for each of the seven ways in which some of them may be absent.
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

  template <bool Full = true>
  Vec<A> bias_at(int64_t channel, int64_t n = lanes<A>) const {
    return bias == nullptr ? Vec<A>{} : load_lanes<Full>(bias + channel, n);
  }
  Channels channels(int64_t vector) const { return channels_of<A>(p.channels, vector); }
};

// ---- blocks of 8 and 4: R rows of B outputs at a time ---------------------------------------------------------------
// Adds what one kernel row brings to the output rows First..Last; output row First reads the row `row` of x. The rows take
// turns: one alone would be a few chains of products that wait for one another.
template <int B, int First, int Last, int Sides>
CONVDIT_INLINE void add_rows(Vec<float>* out, const BlockRow& x, int row, int64_t channels, const float* weights) {
  Vec<float> w[kSide];
  unroll<kSide>([&]<int k>() CONVDIT_FLAT { w[k] = load(weights + k * kFloats); });
  unroll<B + 2 * kHalf>([&]<int i>() CONVDIT_FLAT {
    constexpr int column = i - kHalf;
    if constexpr (has_column<B, Sides>(column)) {
      unroll<Last - First + 1>([&]<int r>() CONVDIT_FLAT {
        const Vec<float> v = load_column<B, column>(x, row + r, channels);
        unroll<kSide>([&]<int k>() CONVDIT_FLAT {
          constexpr int o = column - k + kHalf;
          if constexpr (o >= 0 && o < B) out[(First + r) * B + o] += v * w[k];
        });
      });
    }
  });
}

// All kernel rows with which output rows top..top + R - 1 read the blocks x, dy rows of blocks below.
template <int B, int R, int Sides>
CONVDIT_INLINE void add_block_row(Vec<float>* out, const BlockRow& x, int dy, int top, int64_t channels, const float* weights) {
  const int enter = B * dy - top + kHalf;  // the kernel row with which output row `top` reads row 0 of the blocks
  const int first = enter > 0 ? enter : 0;
  const auto taps = [&](int kh) CONVDIT_FLAT { return weights + kh * kSide * kFloats; };
  if constexpr (R == 1) {
    for (int kh = first; kh < enter + B && kh < kSide; ++kh) add_rows<B, 0, 0, Sides>(out, x, kh - enter, channels, taps(kh));
  } else {
    static_assert(R == 2);
    if (enter >= 1 && enter <= kSide) add_rows<B, 1, 1, Sides>(out, x, 0, channels, taps(enter - 1));
    for (int kh = first; kh < enter + B - 1 && kh < kSide; ++kh) add_rows<B, 0, 1, Sides>(out, x, kh - enter, channels, taps(kh));
    const int leave = enter + B - 1;
    if (leave >= 0 && leave < kSide) add_rows<B, 0, 0, Sides>(out, x, B - 1, channels, taps(leave));
  }
}

inline void block8(const Forward<float>& f, int64_t block, int64_t vector, Ahead& next_x, Ahead& next_y) {
  constexpr int B = 8, R = kVectorRegisters >= 32 ? 2 : 1;
  const int64_t channels = f.p.channels, channel = f.channels(vector).first;
  const float* weights = f.weight + vector * kTaps * kFloats;
  const Vec<float> bias = f.bias_at(channel);
  for (int top = 0; top < B; top += R) {
    next_x.step(), next_y.step();
    Vec<float> out[R * B];
    unroll<R * B>([&]<int i>() CONVDIT_FLAT { out[i] = bias; });
    for (int dy = top < kHalf ? -1 : 0; dy <= (top + R - 1 + kHalf >= B ? 1 : 0); ++dy) {
      const BlockRow x = block_row<B>(f.p.neighbors + block * 9 + (dy + 1) * 3, f.x + channel, channels);
      unroll<7>([&]<int i>() CONVDIT_FLAT {
        if (x.sides == i + 1) add_block_row<B, R, i + 1>(out, x, dy, top, channels, weights);
      });
    }
    float* y = f.y + (block * B * B + top * B) * channels + channel;
    unroll<R * B>([&]<int i>() CONVDIT_FLAT { store(y + i * channels, out[i]); });
  }
}
constexpr int64_t kSteps8 = kVectorRegisters >= 32 ? 4 : 8;

// ---- blocks of 4: a whole block of outputs at a time (half of one where there are 16 registers), every loop unrolled ----
template <int Top, int Rows>
CONVDIT_INLINE void tile4(const Forward<float>& f, int64_t block, int64_t vector) {
  constexpr int B = 4;
  const int64_t channels = f.p.channels, channel = f.channels(vector).first;
  const float* weights = f.weight + vector * kTaps * kFloats;
  const Vec<float> bias = f.bias_at(channel);
  Vec<float> out[Rows * B];
  unroll<Rows * B>([&]<int i>() CONVDIT_FLAT { out[i] = bias; });
  unroll<9>([&]<int neighbor>() CONVDIT_FLAT {
    constexpr int dy = neighbor / 3 - 1, column = neighbor % 3;
    if (f.p.neighbors[block * 9 + neighbor] < 0) return;
    const BlockRow x = block_row<B>(f.p.neighbors + block * 9 + (dy + 1) * 3, f.x + channel, channels);
    unroll<kSide>([&]<int k>() CONVDIT_FLAT {
      constexpr int shift = Top + k - kHalf - dy * B;  // output row r reads the block's row r + shift
      constexpr int first = shift < 0 ? -shift : 0, last = B - 1 - shift < Rows - 1 ? B - 1 - shift : Rows - 1;
      if constexpr (first <= last) add_rows<B, first, last, 1 << column>(out, x, first + shift, channels, weights + k * kSide * kFloats);
    });
  });
  float* y = f.y + (block * B * B + Top * B) * channels + channel;
  unroll<Rows * B>([&]<int i>() CONVDIT_FLAT { store(y + i * channels, out[i]); });
}

inline void block4(const Forward<float>& f, int64_t block, int64_t vector, Ahead& next_x, Ahead& next_y) {
  next_x.step(), next_y.step();
  if constexpr (kVectorRegisters >= 32) {
    tile4<0, 4>(f, block, vector);
  } else {
    tile4<0, 2>(f, block, vector);
    tile4<2, 2>(f, block, vector);
  }
}

// ---- blocks of 8 and 4 ----------------------------------------------------------------------------------------------
template <int B>
void forward_blocks(const Forward<float>& f, const Runner& run) {
  constexpr int64_t kBlocksPerTask = B == 8 ? 4 : 8;
  const int64_t blocks = f.p.blocks, vectors = vectors_of<float>(f.p.channels), size = B * B * f.p.channels;
  run(ceil_div(blocks, kBlocksPerTask), [&](int64_t task) {
    const int64_t first = task * kBlocksPerTask, end = smaller(first + kBlocksPerTask, blocks);
    // What this thread's next task will need, as far as one can tell.
    const int64_t ahead = smaller(first + run.threads * kBlocksPerTask, blocks), ahead_end = smaller(ahead + kBlocksPerTask, blocks);
    const int64_t read = read_until(f.p.neighbors, ahead - 1), until = larger(read, read_until(f.p.neighbors, ahead_end - 1));
    const int64_t steps = vectors * (end - first) * (B == 8 ? kSteps8 : 1);
    Ahead next_x = blocks_ahead(f.x, read, until, size, steps), next_y = blocks_ahead(f.y, ahead, ahead_end, size, steps);
    // A vector of channels for all blocks, then the next: what neighbours share of x, and the weights, stay in the first-level cache.
    for (int64_t vector = 0; vector < vectors; ++vector)
      for (int64_t block = first; block < end; ++block) {
        if constexpr (B == 8) block8(f, block, vector, next_x, next_y);
        else block4(f, block, vector, next_x, next_y);
      }
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
void block2(const Forward<float>& f, const Sources2& list, int64_t block, int64_t vector) {
  constexpr int B = 2;
  const int64_t channels = f.p.channels, channel = f.channels(vector).first;
  const float *const x = f.x + channel, *const weights = f.weight + vector * kTaps * kFloats;
  Vec<float> out[V * B * B];
  unroll<V>([&]<int v>() CONVDIT_FLAT {
    const Vec<float> bias = f.bias_at(channel + v * kFloats);
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
            const Vec<float> value = load(in + i * channels + v * kFloats);
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
  unroll<V>([&]<int v>()
                CONVDIT_FLAT { unroll<B * B>([&]<int o>() CONVDIT_FLAT { store(y + o * channels + v * kFloats, out[v * B * B + o]); }); });
}

constexpr int64_t kListedBlocks = 16;

inline void forward_blocks2(const Forward<float>& f, const Runner& run) {
  constexpr int V = kVectorRegisters >= 32 ? 4 : 2;
  const int64_t blocks = f.p.blocks, vectors = vectors_of<float>(f.p.channels), full = f.p.channels / kFloats;
  run((blocks + kListedBlocks - 1) / kListedBlocks, [&](int64_t task) {
    const int64_t first = task * kListedBlocks, count = smaller(kListedBlocks, blocks - first);
    Sources2 lists[kListedBlocks];
    for (int64_t i = 0; i < count; ++i) list_sources(f.p.neighbors + (first + i) * 25, lists[i]);
    int64_t vector = 0;
    for (; vector + V <= full; vector += V)
      for (int64_t i = 0; i < count; ++i) block2<V>(f, lists[i], first + i, vector);
    for (; vector < vectors; ++vector)
      for (int64_t i = 0; i < count; ++i) block2<1>(f, lists[i], first + i, vector);
  });
}

// ---- any kernel, any block: lists of present taps, site by site ---------------------------------------------------
template <bool Full, int V, class A>
CONVDIT_INLINE void convolve_site(const Forward<A>& f, const Source* source, const Source* end, int64_t row, int64_t vector, int64_t taps) {
  const int64_t channels = f.p.channels;
  const auto [channel, n] = f.channels(vector);
  const A *const x = f.x + channel, *const weights = f.weight + vector * taps * lanes<A>;
  Vec<A> out[V];
  unroll<V>([&]<int v>() CONVDIT_FLAT { out[v] = f.template bias_at<Full>(channel + v * lanes<A>, n); });
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

template <class A>
void forward_sites(const Forward<A>& f, const Runner& run) {
  constexpr int V = 4;
  const int64_t taps = f.p.kernel * f.p.kernel, radius = (f.p.kernel / 2 + f.p.block - 1) / f.p.block;
  const int64_t rows = f.p.blocks * f.p.block * f.p.block, per_task = smaller(kRoom / taps, kListedSites);
  const int64_t vectors = vectors_of<A>(f.p.channels), full = f.p.channels / lanes<A>;
  run((rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t first = task * per_task, count = smaller(per_task, rows - first);
    Source sources[kRoom + 1];
    Source* ends[kListedSites + 1];
    ends[0] = sources;
    for (int64_t i = 0; i < count; ++i) ends[i + 1] = list_taps(f.p, first + i, radius, ends[i]);
    const auto convolve = [&]<bool Full, int W>(int64_t vector) CONVDIT_FLAT {
      for (int64_t i = 0; i < count; ++i) convolve_site<Full, W>(f, ends[i], ends[i + 1], first + i, vector, taps);
    };
    int64_t vector = 0;
    if (full == 0) return convolve.template operator()<false, 1>(vector);
    for (; vector + V <= full; vector += V) convolve.template operator()<true, V>(vector);
    for (; vector < vectors; ++vector) convolve.template operator()<true, 1>(vector);
  });
}

// weight (C, taps) -> (channel vector, tap, lane), turned by 180 degrees if asked.
template <class A>
void pack_weight(const SparseDepthwise& p, const Runner& run) {
  const int64_t taps = p.kernel * p.kernel;
  run(vectors_of<A>(p.channels), [&](int64_t vector) {
    const Channels c = channels_of<A>(p.channels, vector);
    pack_taps(static_cast<const A*>(p.weight) + c.first * taps, c.lanes, taps, p.flip,
              static_cast<A*>(p.workspace) + vector * lanes<A> * taps);
  });
}

template <class A>
void forward(const SparseDepthwise& p, const A* x, A* y, const Runner& run) {
  pack_weight<A>(p, run);
  const Forward<A> f{p, x, y, static_cast<const A*>(p.workspace), static_cast<const A*>(p.bias)};
  if constexpr (sizeof(A) == sizeof(float)) {  // float64 need not be fast
    if (is_special(p.kernel, p.block, p.channels)) {
      if (p.block == 8) return forward_blocks<8>(f, run);
      if (p.block == 4) return forward_blocks<4>(f, run);
      return forward_blocks2(f, run);
    }
  }
  forward_sites(f, run);
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
