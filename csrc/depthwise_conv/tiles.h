// Inner kernels of the depthwise convolution: one vector of channels, one row of output columns kept in registers.
//
// A tile reads vectors of the accumulate dtype, `step` elements from column to column: from the map itself, or from a ring of
// rows in which dtype, channel tail and the zeros around the map are settled. For K = 7 a kernel row's seven weights
// stay in registers as well, and the three columns beyond an edge of the map are skipped, not multiplied by zero: on a map
// 7 columns wide they are a quarter of the taps.
#pragma once
#include "common/ahead.h"
#include "common/unroll.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Accumulators of a tile; with 7 weights and one value of x they fill the registers.
constexpr int kMaxTile = kVectorRegisters == 32 ? 14 : 7;

// Which sides of a tile have neighbours: bit 0 the left, bit 1 the right.
enum Sides : int { kAlone = 0, kHasLeft = 1, kHasRight = 2, kInner = 3 };
constexpr int kSides = 4;
// Whether column C of x, counted from the leftmost tap, lies in the map.
constexpr bool tile_reads(int C, int columns, int side) { return (C >= 3 || (side & kHasLeft)) && (C < columns + 3 || (side & kHasRight)); }

// The lines of two arrays that a tile fetches, some with each kernel row.
struct Fetch {
  Lines a, b;
  CONVDIT_INLINE void some() { a.two(), b.two(); }
  CONVDIT_INLINE void rest() { a.rest(), b.rest(); }
};

// What a tile reads. x[i] + offset is the leftmost tap of the tile's first column at kernel row i.
template <class A>
struct TileRows {
  const A* const* x;
  int64_t step, offset;
  int64_t first, last;  // of x, those that lie in the map
  int64_t kernel;
  int64_t outputs;  // 1, or 2: x has a row more
  Fetch ahead;      // meanwhile
};

// ---- forward: out[column] = start + sum of weight * x ------------------------------------------------------------
constexpr int kMaxPair = kVectorRegisters == 32 ? 7 : 0;  // columns of a tile of two rows: what it sums up fills the registers

// A narrow tile sums odd and even taps apart: with fewer than ten chains of dependent FMAs the units would wait. Not where rows
// also go in pairs: a row's sums must not depend on whether it does.
template <int Columns, int Side>
constexpr int kChains = kVectorRegisters == 32 && Columns < 10 && (Side != kAlone || Columns > kMaxPair) ? 2 : 1;

template <class A, int Columns, int Side>
__attribute__((noinline)) void forward_tile_7(const TileRows<A>& t, const A* weight, Vec<A> start, A* out, int64_t out_step) {
  constexpr int chains = kChains<Columns, Side>;
  Vec<A> sum[chains][Columns] = {};
  unroll<Columns>(CONVDIT_UNROLLED(I) { sum[0][I] = start; });
  Fetch ahead = t.ahead;
  for (int64_t row = t.first; row < t.last; ++row) {
    ahead.some();
    const A *x = t.x[row] + t.offset, *w = weight + row * 7 * lanes<A>;
    Vec<A> tap[7];
    unroll<7>(CONVDIT_UNROLLED(I) { tap[I] = load(w + I * lanes<A>); });
    unroll<Columns + 6>(CONVDIT_UNROLLED(C) {
      if constexpr (tile_reads(C, Columns, Side)) {
        const Vec<A> v = load(x + C * t.step);
        unroll<7>(CONVDIT_UNROLLED(K) {
          if constexpr (C >= K && C - K < Columns) sum[K % chains][C - K] += v * tap[K];
        });
      }
    });
  }
  ahead.rest();
  unroll<Columns>(CONVDIT_UNROLLED(I) {
    if constexpr (chains == 2) sum[0][I] += sum[1][I];
    store(out + I * out_step, sum[0][I]);
  });
}

// Two rows of output of a map as narrow as the tile: twice the sums for each value of x, and no chain is left waiting. x[i] is the
// map's row under kernel row i of the first output row, and under kernel row i - 1 of the second.
template <class A, int Columns>
__attribute__((noinline)) void forward_pair_7(const TileRows<A>& t, const A* weight, Vec<A> start, A* out, int64_t out_step,
                                              int64_t out_row) {
  Vec<A> sum[2][Columns];
  unroll<Columns>(CONVDIT_UNROLLED(I) { sum[0][I] = sum[1][I] = start; });
  // The output rows First to Last - 1 take what row i of x adds to them.
  Fetch ahead = t.ahead;
  const auto add = [&]<int First, int Last>(int64_t i) CONVDIT_FLAT {
    ahead.some();
    const A* x = t.x[i] + t.offset;
    Vec<A> tap[2][7];
    unroll<Last - First>(CONVDIT_UNROLLED(R) {
      unroll<7>(CONVDIT_UNROLLED(K) { tap[First + R][K] = load(weight + ((i - First - R) * 7 + K) * lanes<A>); });
    });
    unroll<Columns>(CONVDIT_UNROLLED(C) {
      const Vec<A> v = load(x + (C + 3) * t.step);
      unroll<Last - First>(CONVDIT_UNROLLED(R) {
        unroll<7>(CONVDIT_UNROLLED(K) {
          constexpr int column = C + 3 - K;
          if constexpr (column >= 0 && column < Columns) sum[First + R][column] += v * tap[First + R][K];
        });
      });
    });
  };
  int64_t i = t.first;
  if (i == 0) add.template operator()<0, 1>(i++);
  for (; i < smaller(t.last, 7); ++i) add.template operator()<0, 2>(i);
  if (t.last == 8) add.template operator()<1, 2>(7);
  ahead.rest();
  unroll<Columns>(CONVDIT_UNROLLED(I) { store(out + I * out_step, sum[0][I]), store(out + out_row + I * out_step, sum[1][I]); });
}

template <class A, int Columns>
__attribute__((noinline)) void forward_tile(const TileRows<A>& t, const A* weight, Vec<A> start, A* out, int64_t out_step) {
  Vec<A> sum[Columns];
  unroll<Columns>(CONVDIT_UNROLLED(I) { sum[I] = start; });
  Fetch{t.ahead}.rest();
  for (int64_t row = t.first; row < t.last; ++row) {
    const A *x = t.x[row] + t.offset, *w = weight + row * t.kernel * lanes<A>;
    for (int64_t i = 0; i < t.kernel; ++i, x += t.step, w += lanes<A>) {
      const Vec<A> tap = load(w);
      unroll<Columns>(CONVDIT_UNROLLED(I) { sum[I] += load(x + I * t.step) * tap; });
    }
  }
  unroll<Columns>(CONVDIT_UNROLLED(I) { store(out + I * out_step, sum[I]); });
}

// ---- weight gradient: total[tap] += sum over columns of grad * x, total[K*K] += sum of grad -----------------------
// Each tile sums its columns on their own before it adds them up: shorter chains, smaller rounding errors.
template <class A, int Columns>
CONVDIT_INLINE void add_bias_sum(const Vec<A>* grad, A* total) {
  Vec<A> sum = grad[0];
  unroll<Columns - 1>(CONVDIT_UNROLLED(I) { sum += grad[I + 1]; });
  store(total, load(total) + sum);
}

template <class A, int Columns, int Side>
__attribute__((noinline)) void weight_tile_7(const TileRows<A>& t, const A* grad, int64_t grad_step, A* total) {
  constexpr int chains = kVectorRegisters == 32 ? 2 : 1;  // seven chains of products would wait for one another
  Vec<A> g[Columns];
  unroll<Columns>(CONVDIT_UNROLLED(I) { g[I] = load(grad + I * grad_step); });
  Fetch ahead = t.ahead;
  for (int64_t row = t.first; row < t.last; ++row) {
    ahead.some();
    const A* x = t.x[row] + t.offset;
    A* row_total = total + row * 7 * lanes<A>;
    Vec<A> sum[chains][7] = {};
    unroll<Columns + 6>(CONVDIT_UNROLLED(C) {
      if constexpr (tile_reads(C, Columns, Side)) {
        const Vec<A> v = load(x + C * t.step);
        unroll<7>(CONVDIT_UNROLLED(K) {
          if constexpr (C >= K && C - K < Columns) sum[C % chains][K] += v * g[C - K];
        });
      }
    });
    unroll<7>(CONVDIT_UNROLLED(I) {
      if constexpr (chains == 2) sum[0][I] += sum[1][I];
      store(row_total + I * lanes<A>, load(row_total + I * lanes<A>) + sum[0][I]);
    });
  }
  ahead.rest();
  add_bias_sum<A, Columns>(g, total + 49 * lanes<A>);
}

// A map of one vector of channels that is as narrow as a tile, with copies of x and grad, (rows, columns, lanes): read in place, lines
// a site's channels apart share a few sets of the first-level cache and evict one another.
template <class A>
struct NarrowMap {
  const A *x, *grad;
  int64_t height;
  Range rows;  // those of grad; of x all
  Fetch ahead;
};
constexpr int64_t kMaxNarrowRows = 7;  // the sums of more would be less exact

// Kernel row k: its sums stay in registers for all rows of the map, odd and even rows apart: twice as many chains of products.
template <class A, int Columns>
__attribute__((noinline)) void weight_narrow_7(const NarrowMap<A>& m, int64_t k, A* total) {
  constexpr int64_t row_size = Columns * lanes<A>;
  Vec<A> sum[2][7] = {};
  Fetch ahead = m.ahead;
  const auto add = [&]<int Chain>(int64_t row) CONVDIT_FLAT {
    ahead.some();
    const A *x = m.x + (row + k - 3) * row_size, *grad = m.grad + (row - m.rows.first) * row_size;
    Vec<A> g[Columns];
    unroll<Columns>(CONVDIT_UNROLLED(I) { g[I] = load(grad + I * lanes<A>); });
    unroll<Columns>(CONVDIT_UNROLLED(C) {
      const Vec<A> v = load(x + C * lanes<A>);
      unroll<7>(CONVDIT_UNROLLED(K) {
        constexpr int column = C + 3 - K;
        if constexpr (column >= 0 && column < Columns) sum[Chain][K] += v * g[column];
      });
    });
    if (k == 3) add_bias_sum<A, Columns>(g, total + 49 * lanes<A>);  // which meets every row
  };
  int64_t row = larger(m.rows.first, 3 - k);
  const int64_t last = smaller(m.rows.last, m.height + 3 - k);
  for (; row + 1 < last; row += 2) add.template operator()<0>(row), add.template operator()<1>(row + 1);
  if (row < last) add.template operator()<0>(row);
  ahead.rest();
  A* to = total + k * 7 * lanes<A>;
  unroll<7>(CONVDIT_UNROLLED(I) { store(to + I * lanes<A>, load(to + I * lanes<A>) + (sum[0][I] + sum[1][I])); });
}

template <class A, int Columns>
__attribute__((noinline)) void weight_tile(const TileRows<A>& t, const A* grad, int64_t grad_step, A* total) {
  Vec<A> g[Columns];
  unroll<Columns>(CONVDIT_UNROLLED(I) { g[I] = load(grad + I * grad_step); });
  Fetch{t.ahead}.rest();
  for (int64_t row = t.first; row < t.last; ++row) {
    const A* x = t.x[row] + t.offset;
    A* to = total + row * t.kernel * lanes<A>;
    for (int64_t i = 0; i < t.kernel; ++i, x += t.step, to += lanes<A>) {
      Vec<A> sum = load(x) * g[0];
      unroll<Columns - 1>(CONVDIT_UNROLLED(I) { sum += load(x + (I + 1) * t.step) * g[I + 1]; });
      store(to, load(to) + sum);
    }
  }
  add_bias_sum<A, Columns>(g, total + t.kernel * t.kernel * lanes<A>);
}

// ---- tables by the number of columns, and the sides for K = 7 -----------------------------------------------------
template <class A>
using ForwardTile = void (*)(const TileRows<A>&, const A* weight, Vec<A> start, A* out, int64_t out_step);
template <class A>
using ForwardPair = void (*)(const TileRows<A>&, const A* weight, Vec<A> start, A* out, int64_t out_step, int64_t out_row);
template <class A>
using WeightTile = void (*)(const TileRows<A>&, const A* grad, int64_t grad_step, A* total);
template <class A>
using WeightNarrow = void (*)(const NarrowMap<A>&, int64_t k, A* total);

template <class A>
struct Tiles {
  ForwardTile<A> forward[kMaxTile + 1];
  WeightTile<A> weight[kMaxTile + 1];
  ForwardPair<A> pair[kMaxTile + 1];  // null where two rows do not fit
  WeightNarrow<A> narrow[kMaxTile + 1];  // likewise
};
template <class A, int... I>
constexpr Tiles<A> make_tiles(std::integer_sequence<int, I...>) {
  return {{nullptr, forward_tile<A, I + 1>...}, {nullptr, weight_tile<A, I + 1>...}, {}, {}};
}
// A strip of columns is cut into tiles of equal width but for one: a tile with neighbours has at least half of kMaxTile columns.
constexpr bool tile_exists(int columns, int side) { return side == kAlone || columns >= kMaxTile / 2; }
template <int Columns, int Side>
constexpr ForwardPair<float> forward_pair() {
  if constexpr (Side == kAlone && Columns <= kMaxPair) return forward_pair_7<float, Columns>;
  else return nullptr;
}
template <int Columns, int Side>
constexpr WeightNarrow<float> weight_narrow() {
  if constexpr (Side == kAlone && Columns <= kMaxPair) return weight_narrow_7<float, Columns>;
  else return nullptr;
}
template <int Side, int... I>
constexpr Tiles<float> make_tiles_7(std::integer_sequence<int, I...>) {
  return {{nullptr, forward_tile_7 < float, tile_exists(I + 1, Side) ? I + 1 : kMaxTile, Side > ...},
          {nullptr, weight_tile_7 < float, tile_exists(I + 1, Side) ? I + 1 : kMaxTile, Side > ...},
          {nullptr, forward_pair<I + 1, Side>()...},
          {nullptr, weight_narrow<I + 1, Side>()...}};
}
using TileWidths = std::make_integer_sequence<int, kMaxTile>;
template <class A>
constexpr Tiles<A> kTiles = make_tiles<A>(TileWidths{});
constexpr Tiles<float> kTiles7[kSides] = {make_tiles_7<kAlone>(TileWidths{}), make_tiles_7<kHasLeft>(TileWidths{}),
                                          make_tiles_7<kHasRight>(TileWidths{}), make_tiles_7<kInner>(TileWidths{})};

// float64 is there to check gradients: it takes the kernels for any K.
template <class A>
constexpr bool tiles_skip_edges(int64_t kernel) {
  return sizeof(A) == 4 && kernel == 7;
}
template <class A>
CONVDIT_INLINE const Tiles<A>& tiles_for(int64_t kernel, int side) {
  if constexpr (sizeof(A) == 4) {
    if (kernel == 7) return kTiles7[side];
  }
  return kTiles<A>;
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
