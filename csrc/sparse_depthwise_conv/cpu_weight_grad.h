// Weight and bias gradient of the sparse depthwise convolution.
//
// Blocks of 8 take three blocks side by side at once, as the forward does, and keep the taps of a kernel row in registers.
// Of smaller blocks, those that lie at the same offset from their output block contribute to the same taps: for a group of output blocks
// small enough for the first-level cache, the pairs (output block, input block) are listed by offset; taps then stay in
// registers while a list is walked, without a branch inside. Sums are kept by chunk of blocks and added up in order.
#pragma once
#include "sparse_depthwise_conv/cpu_common.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

template <class A>
struct WeightGrad {
  const SparseDepthwiseWeightGrad& p;
  const A *grad, *x;
  int64_t chunks, vectors;

  // Sums of one chunk and channel vector: (taps + 1, lane), the bias gradient last.
  A* sums(int64_t chunk, int64_t vector) const {
    const int64_t rows = p.kernel * p.kernel + 1;
    return static_cast<A*>(p.workspace) + (chunk * vectors + vector) * rows * lanes<A>;
  }
  Channels channels(int64_t vector) const { return channels_of<A>(p.channels, vector); }
};

struct Pair {
  int32_t out, in;
};

// Each group's sum starts from zero: fewer terms meet a large total, so less is rounded away.
template <class A, class V>
CONVDIT_INLINE void add_to(A* sum, V total) {
  store(sum, load(sum) + total);
}

template <class A>
void add_bias_sums(A* sums, const A* grad, int64_t rows, int64_t channels, int64_t n) {
  Vec<A> total[4] = {};
  int64_t row = 0;
  if (n == lanes<A>)
    for (; row + 4 <= rows; row += 4) unroll<4>([&]<int r>() CONVDIT_FLAT { total[r] += load(grad + (row + r) * channels); });
  for (; row < rows; ++row) total[0] += load(grad + row * channels, n);
  add_to(sums, (total[0] + total[1]) + (total[2] + total[3]));
}

// ---- blocks of 8, 4 and 2 -----------------------------------------------------------------------------------------
// Adds to total[tap - kLeft], the taps of one kernel row, what a row of B gradients and a row of B inputs of the block Dx
// to the right bring.
template <int B, int Dx>
struct Columns {
  static constexpr int kLeft = larger(0, Dx* B - (B - 1) + kHalf), kCount = smaller(kSide - 1, Dx* B + B - 1 + kHalf) - kLeft + 1;

  CONVDIT_INLINE static void add(Vec<float>* total, const float* grad, const float* in, int64_t channels) {
    Vec<float> d[B];
    unroll<B>([&]<int o>() CONVDIT_FLAT { d[o] = load(grad + o * channels); });
    unroll<B>([&]<int c>() CONVDIT_FLAT {
      constexpr int column = c + Dx * B;
      if constexpr (column >= -kHalf && column < B + kHalf) {
        const Vec<float> value = load(in + c * channels);
        unroll<B>([&]<int o>() CONVDIT_FLAT {
          constexpr int k = column - o + kHalf;
          if constexpr (k >= 0 && k < kSide) total[k - kLeft] += value * d[o];
        });
      }
    });
  }
};

// Blocks of 8: adds to total what R rows of gradients from `grad` on bring with R rows of x from `row` on, in one kernel row. Each
// has sums of its own: with one, too few chains of products would wait for one another.
template <int R, int Sides>
CONVDIT_INLINE void add_rows8(Vec<float>* total, const float* grad, const BlockRow& x, int row, int64_t channels) {
  constexpr int B = 8;
  Vec<float> d[R * B];
  unroll<R * B>([&]<int i>() CONVDIT_FLAT { d[i] = load(grad + i * channels); });
  unroll<B + 2 * kHalf>([&]<int i>() CONVDIT_FLAT {
    constexpr int column = i - kHalf;
    if constexpr (has_column<B, Sides>(column)) {
      unroll<R>([&]<int r>() CONVDIT_FLAT {
        const Vec<float> v = load_column<B, column>(x, row + r, channels);
        unroll<kSide>([&]<int k>() CONVDIT_FLAT {
          constexpr int o = column - k + kHalf;
          if constexpr (o >= 0 && o < B) total[r * kSide + k] += v * d[r * B + o];
        });
      });
    }
  });
}

inline void add_block8(const WeightGrad<float>& w, int64_t block, int64_t chunk, int64_t vector, Ahead& next_grad, Ahead& next_x) {
  constexpr int B = 8, R = kVectorRegisters >= 32 ? 2 : 1, kRows = 4 * R;  // 4 rows a sum: those of more would lose digits
  const int64_t channels = w.p.channels, channel = w.channels(vector).first;
  const float *const grad = w.grad + block * B * B * channels + channel, *const x = w.x + channel;
  float* const sums = w.sums(chunk, vector);
  add_bias_sums(sums + kTaps * kFloats, grad, B * B, channels, kFloats);
  for (int kh = 0; kh < kSide; ++kh) {
    next_grad.step(), next_x.step();
    for (int first = 0; first < B; first += kRows) {
      Vec<float> total[R * kSide] = {};
      for (int dy = -1; dy <= 1; ++dy) {
        const int shift = kh - kHalf - dy * B;  // output row r meets the row r + shift of the blocks
        int r = static_cast<int>(larger(first, -shift));
        const int last = static_cast<int>(smaller(first + kRows, B - shift)) - 1;
        if (r > last) continue;
        const BlockRow in = block_row<B>(w.p.neighbors + block * 9 + (dy + 1) * 3, x, channels);
        unroll<7>([&]<int i>() CONVDIT_FLAT {
          if (in.sides != i + 1) return;
          for (; r + R - 1 <= last; r += R) add_rows8<R, i + 1>(total, grad + r * B * channels, in, r + shift, channels);
          if (R > 1 && r <= last) add_rows8<1, i + 1>(total, grad + r * B * channels, in, r + shift, channels);
        });
      }
      unroll<kSide>([&]<int k>() CONVDIT_FLAT {
        if constexpr (R > 1) total[k] += total[kSide + k];
        add_to(sums + (kh * kSide + k) * kFloats, total[k]);
      });
    }
  }
}

// Blocks of 4: one kernel row at a time, V channel vectors.
template <int V, int B, int Dx>
void add_pairs(float* const* sums, const Pair* pairs, int count, int dy, const float* grad, const float* x, int64_t channels) {
  using C = Columns<B, Dx>;
  for (int kh = larger(0, dy * B - (B - 1) + kHalf); kh <= smaller(kSide - 1, dy * B + B - 1 + kHalf); ++kh) {
    const int shift = kh - kHalf - dy * B;  // output row r meets the input block's row r + shift
    const int top = larger(0, -shift), bottom = smaller(B - 1, B - 1 - shift);
    Vec<float> total[V * C::kCount] = {};
    unroll<B>([&]<int more>() CONVDIT_FLAT {  // no loop over so few rows: its end would be mispredicted
      if (bottom - top != more) return;
      for (int i = 0; i < count; ++i) {
        const float* g = grad + (int64_t{pairs[i].out} * B + top) * B * channels;
        const float* in = x + (int64_t{pairs[i].in} * B + top + shift) * B * channels;
        unroll<more + 1>([&]<int r>() CONVDIT_FLAT {
          unroll<V>([&]<int v>() CONVDIT_FLAT {
            C::add(total + v * C::kCount, g + r * B * channels + v * kFloats, in + r * B * channels + v * kFloats, channels);
          });
        });
      }
    });
    unroll<V>([&]<int v>() CONVDIT_FLAT {
      unroll<C::kCount>([&]<int k>() CONVDIT_FLAT { add_to(sums[v] + (kh * kSide + C::kLeft + k) * kFloats, total[v * C::kCount + k]); });
    });
  }
}

// Blocks of 2: every tap that the offset (Dy, Dx) meets, at most 9, at once.
template <int V, int Dy, int Dx>
void add_pairs2(float* const* sums, const Pair* pairs, int count, const float* grad, const float* x, int64_t channels) {
  constexpr int B = 2;
  using R = Columns<B, Dy>;  // rows, by the same rule
  using C = Columns<B, Dx>;
  constexpr int kCount = R::kCount * C::kCount;
  Vec<float> total[V * kCount] = {};
  for (int i = 0; i < count; ++i) {
    const float* g = grad + int64_t{pairs[i].out} * B * B * channels;
    const float* in = x + int64_t{pairs[i].in} * B * B * channels;
    unroll<V>([&]<int v>() CONVDIT_FLAT {
      unroll<B>([&]<int r>() CONVDIT_FLAT {
        unroll<B>([&]<int s>() CONVDIT_FLAT {  // input row s meets output row r in kernel row
          constexpr int kh = s + Dy * B - r + kHalf;
          if constexpr (kh >= 0 && kh < kSide)
            C::add(total + v * kCount + (kh - R::kLeft) * C::kCount, g + r * B * channels + v * kFloats,
                   in + s * B * channels + v * kFloats, channels);
        });
      });
    });
  }
  unroll<V>([&]<int v>() CONVDIT_FLAT {
    unroll<kCount>([&]<int k>() CONVDIT_FLAT {
      add_to(sums[v] + ((R::kLeft + k / C::kCount) * kSide + C::kLeft + k % C::kCount) * kFloats, total[v * kCount + k]);
    });
  });
}

// A group of output blocks, and its pairs by the offset of their neighbours.
template <int B>
struct Group {
  static constexpr int kRadius = (kHalf + B - 1) / B, kAround = 2 * kRadius + 1, kBlocks = B == 4 ? 4 : 16;
  Pair pairs[kAround * kAround][kBlocks];
  int count[kAround * kAround];
  int64_t first, blocks;

  void list(const int32_t* neighbors, int64_t begin, int64_t end) {
    first = begin, blocks = end - begin;
    for (int k = 0; k < kAround * kAround; ++k) {
      int c = 0;
      for (int64_t block = begin; block < end; ++block) {
        const int32_t q = neighbors[block * kAround * kAround + k];
        if (q >= 0) pairs[k][c++] = {static_cast<int32_t>(block), q};
      }
      count[k] = c;
    }
  }
};

template <int V, int B>
void add_group(const WeightGrad<float>& w, const Group<B>& group, int64_t chunk, int64_t vector) {
  using G = Group<B>;
  const int64_t channels = w.p.channels, channel = w.channels(vector).first;
  const float *grad = w.grad + channel, *x = w.x + channel;
  float* sums[V];
  for (int v = 0; v < V; ++v) sums[v] = w.sums(chunk, vector + v);
  if constexpr (B == 2) {
    unroll<G::kAround * G::kAround>([&]<int k>() CONVDIT_FLAT {
      if (group.count[k] > 0)
        add_pairs2<V, k / G::kAround - G::kRadius, k % G::kAround - G::kRadius>(sums, group.pairs[k], group.count[k], grad, x, channels);
    });
  } else {
    for (int dy = -1; dy <= 1; ++dy)
      unroll<3>([&]<int dx>() CONVDIT_FLAT {
        const int k = (dy + 1) * 3 + dx;
        if (group.count[k] > 0) add_pairs<V, B, dx - 1>(sums, group.pairs[k], group.count[k], dy, grad, x, channels);
      });
  }
  for (int v = 0; v < V; ++v)  // last, when the products have brought the gradients close
    add_bias_sums(sums[v] + kTaps * kFloats, grad + group.first * B * B * channels + v * kFloats, group.blocks * B * B, channels, kFloats);
}

constexpr int64_t kVectorsPerTask = 8;

template <int B>
void weight_grad_blocks(const WeightGrad<float>& w, const Runner& run) {
  constexpr int V = kVectorRegisters >= 32 ? 2 : 1;
  const int64_t blocks = w.p.blocks, per_chunk = (blocks + w.chunks - 1) / w.chunks;
  const int64_t vectors = w.vectors, full = w.p.channels / kFloats, ranges = ceil_div(vectors, kVectorsPerTask),
                size = B * B * w.p.channels;
  run(w.chunks * ranges, [&](int64_t task) {
    const int64_t chunk = task / ranges, first = task % ranges * kVectorsPerTask, end = smaller(first + kVectorsPerTask, vectors);
    float* sums = w.sums(chunk, first);
    for (int64_t i = 0; i < (end - first) * (kTaps + 1) * kFloats; ++i) sums[i] = 0;
    const int64_t begin = smaller(chunk * per_chunk, blocks), last = smaller(begin + per_chunk, blocks);
    constexpr int64_t kBlocks = B == 8 ? 1 : Group<B>::kBlocks;
    for (int64_t block = begin; block < last; block += kBlocks) {
      const int64_t block_end = smaller(block + kBlocks, last);
      if constexpr (B == 8) {
        const int64_t next_end = smaller(block_end + kBlocks, blocks), read = read_until(w.p.neighbors, block_end - 1);
        const int64_t until = larger(read, read_until(w.p.neighbors, next_end - 1));
        const int64_t steps = (end - first) * kSide;
        Ahead next_grad = blocks_ahead(w.grad, block_end, next_end, size, steps), next_x = blocks_ahead(w.x, read, until, size, steps);
        for (int64_t vector = first; vector < end; ++vector) add_block8(w, block, chunk, vector, next_grad, next_x);
      } else {
        Group<B> group;
        group.list(w.p.neighbors, block, block_end);
        int64_t vector = first;
        for (; vector + V <= smaller(end, full); vector += V) add_group<V>(w, group, chunk, vector);
        for (; vector < end; ++vector) add_group<1>(w, group, chunk, vector);
      }
    }
  });
}

// ---- any kernel, any block: one kernel row a task, site by site ---------------------------------------------------
constexpr int64_t kSitesPerGroup = 64;

template <bool Full, int V, class A>
void add_site_group(const WeightGrad<A>& w, const Pair (*pairs)[kSitesPerGroup], const int* count, int64_t chunk, int64_t ky,
                    int64_t vector) {
  const int64_t channels = w.p.channels, kernel = w.p.kernel;
  const auto [channel, n] = w.channels(vector);
  const A *grad = w.grad + channel, *x = w.x + channel;
  for (int64_t kx = 0; kx < kernel; ++kx) {
    Vec<A> even[V] = {}, odd[V] = {};  // two sums: fewer additions wait for one another, and fewer digits are lost
    const auto add = [&](Vec<A>* total, Pair pair) CONVDIT_FLAT {
      const A *g = grad + pair.out * channels, *in = x + pair.in * channels;
      unroll<V>([&]<int v>() CONVDIT_FLAT { total[v] += load_lanes<Full>(g + v * lanes<A>, n) * load_lanes<Full>(in + v * lanes<A>, n); });
    };
    int i = 0;
    for (; i + 2 <= count[kx]; i += 2) add(even, pairs[kx][i]), add(odd, pairs[kx][i + 1]);
    if (i < count[kx]) add(even, pairs[kx][i]);
    unroll<V>([&]<int v>() CONVDIT_FLAT { add_to(w.sums(chunk, vector + v) + (ky * kernel + kx) * lanes<A>, even[v] + odd[v]); });
  }
}

template <class A>
void weight_grad_sites(const WeightGrad<A>& w, const Runner& run) {
  constexpr int V = 4;
  const int64_t kernel = w.p.kernel, half = kernel / 2, block = w.p.block, area = block * block, taps = kernel * kernel;
  const int64_t radius = (half + block - 1) / block, around = (2 * radius + 1) * (2 * radius + 1);
  const int64_t channels = w.p.channels, full = channels / lanes<A>, per_chunk = (w.p.blocks + w.chunks - 1) / w.chunks * area;
  run(w.chunks * kernel, [&](int64_t task) {
    const int64_t chunk = task / kernel, ky = task % kernel;
    const int64_t top = smaller(chunk * per_chunk, w.p.blocks * area), bottom = smaller(top + per_chunk, w.p.blocks * area);
    for (int64_t vector = 0; vector < w.vectors; ++vector) {
      A* sums = w.sums(chunk, vector) + ky * kernel * lanes<A>;
      for (int64_t i = 0; i < kernel * lanes<A>; ++i) sums[i] = 0;
    }
    Pair pairs[kSparseDepthwiseMaxKernel][kSitesPerGroup];
    int count[kSparseDepthwiseMaxKernel];
    for (int64_t first = top; first < bottom; first += kSitesPerGroup) {
      for (int64_t kx = 0; kx < kernel; ++kx) {
        int c = 0;
        for (int64_t row = first; row < smaller(first + kSitesPerGroup, bottom); ++row) {
          const int32_t* table = w.p.neighbors + row / area * around;
          const int32_t q = block == 1 ? table[ky * kernel + kx]
                                       : neighbor_site(table, block, radius, row / block % block + ky - half, row % block + kx - half);
          if (q >= 0) pairs[kx][c++] = {static_cast<int32_t>(row), q};
        }
        count[kx] = c;
      }
      int64_t vector = 0;
      if (full == 0) add_site_group<false, 1>(w, pairs, count, chunk, ky, vector++);
      for (; vector + V <= full; vector += V) add_site_group<true, V>(w, pairs, count, chunk, ky, vector);
      for (; vector < w.vectors; ++vector) add_site_group<true, 1>(w, pairs, count, chunk, ky, vector);
    }
    for (int64_t vector = 0; vector < w.vectors && ky == 0; ++vector) {
      const Channels c = w.channels(vector);
      A* sums = w.sums(chunk, vector) + taps * lanes<A>;
      store(sums, Vec<A>{});
      add_bias_sums(sums, w.grad + top * channels + c.first, bottom - top, channels, c.lanes);
    }
  });
}

// The chunks' sums, added up in order, to (C, taps) and (C,).
template <class A>
void add_chunks(const WeightGrad<A>& w, const Runner& run) {
  const int64_t taps = w.p.kernel * w.p.kernel;
  run(w.vectors, [&](int64_t vector) {
    const auto [channel, n] = w.channels(vector);
    const int64_t known = vector * lanes<A> - channel;  // channels that the vector before has, too: the same sums
    A* const total = w.sums(0, vector);
    for (int64_t chunk = 1; chunk < w.chunks; ++chunk)
      for (int64_t tap = 0; tap <= taps; ++tap) add_to(total + tap * lanes<A>, load(w.sums(chunk, vector) + tap * lanes<A>));
    unpack_taps(total, known, n, taps, static_cast<A*>(w.p.grad_weight) + channel * taps);
    for (int64_t i = known; i < n; ++i) static_cast<A*>(w.p.grad_bias)[channel + i] = total[taps * lanes<A> + i];
  });
}

template <class A>
void weight_grad(const SparseDepthwiseWeightGrad& p, const A* grad, const A* x, const Runner& run) {
  const WeightGrad<A> w{p, grad, x, sparse_depthwise_chunks(p.blocks, p.block), vectors_of<A>(p.channels)};
  bool special = false;
  if constexpr (sizeof(A) == sizeof(float)) {
    special = is_special(p.kernel, p.block, p.channels);
    if (special && p.block == 8) weight_grad_blocks<8>(w, run);
    if (special && p.block == 4) weight_grad_blocks<4>(w, run);
    if (special && p.block == 2) weight_grad_blocks<2>(w, run);
  }
  if (!special) weight_grad_sites(w, run);
  add_chunks(w, run);
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
