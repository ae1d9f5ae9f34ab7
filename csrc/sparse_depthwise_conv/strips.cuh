// The 7x7 sparse convolution on strips: blocks of 1, 2 and 4 sites a side, and halves of blocks of 8.
//
// A warp takes one strip after the other. The 49 taps of its channels, or the sums for their gradient, stay in registers, so that all
// places around the strip are constants; which of them are taken are bits of a word, the same in all lanes, and an absent strip costs
// one test.
#pragma once
#include "sparse_depthwise_conv/windows.cuh"

namespace convdit::cuda {
namespace {

// The strips around one, spread over the lanes of a warp: entry `lane` + 32 k is in word k.
template <class T, int B>
struct Neighbors {
  using S = Strips<B>;
  static constexpr int kWords = (S::kAround + kWarp - 1) / kWarp;
  int32_t at[kWords];      // the bytes before it in shared memory, if it is in the window; else -1 - the strip
  uint32_t there[kWords];  // bits of the entries that are not absent
  __device__ __forceinline__ Neighbors(const int32_t* table, int strip, const Window& w) {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const int entry = threadIdx.x % kWarp + k * kWarp;
      const int32_t q = entry < S::kAround ? neighbor(table, strip, entry) : -1, place = q - w.first;
      at[k] = place >= 0 && place < w.count ? place * S::kSites * S::kGroup * static_cast<int>(sizeof(T)) : -1 - q;
      there[k] = __ballot_sync(0xffffffffu, q >= 0);
    }
  }
  // The table is of blocks.
  static __device__ __forceinline__ int32_t neighbor(const int32_t* table, int strip, int entry) {
    if constexpr (S::kOfBlock == 1) {
      return table[int64_t{strip} * S::kAround + entry];
    } else {
      static_assert(S::kOfBlock == 2 && S::kReach == 1);
      const int down = strip % 2 + entry / S::kSide + 1;  // in strips, from the first of the blocks above
      const int32_t block = table[int64_t{strip / 2} * S::kAround + down / 2 * S::kSide + entry % S::kSide];
      return block < 0 ? -1 : block * 2 + down % 2;
    }
  }
};

// Counted in bytes, so that the number needs no multiplication at each use.
template <class T>
__device__ __forceinline__ const T* moved(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

// Calls f(row, column, values) for every site around a strip that the kernel reaches; rows and columns count from the strip's first
// site. `x` and `shared`: from this lane's first channel on.
template <class T, int B, class F>
__device__ __forceinline__ void for_sites_around(const T* x, const T* shared, int64_t row_bytes, const Neighbors<T, B>& neighbors,
                                                 const F& f) {
  using S = Strips<B>;
  constexpr int V = S::kLane;
#pragma unroll
  for (int entry = 0; entry < S::kAround; ++entry) {
    const int word = entry / kWarp, row = (entry / S::kSide - S::kReach) * S::kRows, column = (entry % S::kSide - S::kReach) * S::kColumns;
    const uint32_t bit = 1u << entry % kWarp;
    const bool own = row == 0 && column == 0;
    if (!own && !(neighbors.there[word] & bit)) continue;
    const int at = __shfl_sync(0xffffffffu, neighbors.at[word], entry % kWarp);
    const auto reached = [row, column](int site) {
      const int y = row + site / S::kColumns, x = column + site % S::kColumns;
      return y >= -kRadius && y < S::kRows + kRadius && x >= -kRadius && x < S::kColumns + kRadius;
    };
    float values[S::kSites][V];
    if (own || at >= 0) {
      const T* from = moved(shared, at);
#pragma unroll
      for (int i = 0; i < S::kSites; ++i)
        if (reached(i)) load(from + i * S::kGroup, V, true, values[i]);
    } else {
      const T* from = moved(x, (-1 - at) * (S::kSites * row_bytes));
      int before = 0;
#pragma unroll
      for (int i = 0; i < S::kSites; ++i) {
        if (!reached(i)) continue;
        from = moved(from, (i - before) * row_bytes);
        before = i;
        load(from, V, true, values[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < S::kSites; ++i)
      if (reached(i)) f(row + i / S::kColumns, column + i % S::kColumns, values[i]);
  }
}

// Calls f(site, tap) for the sites of a strip which take the site at (row, column) by some tap.
template <int B, class F>
__device__ __forceinline__ void for_taps(int row, int column, const F& f) {
  using S = Strips<B>;
#pragma unroll
  for (int site = 0; site < S::kSites; ++site) {
    const int down = row - site / S::kColumns + kRadius, right = column - site % S::kColumns + kRadius;
    if (down >= 0 && down < kTaps && right >= 0 && right < kTaps) f(site, down * kTaps + right);
  }
}

// ---- forward and input gradient --------------------------------------------------------------------------------------------
constexpr int kForwardThreads = 128;

// The weights of some channels, one after the other, to shared memory; for `flip` from the last to the first, which turns each by 180
// degrees. Those of channels from the 32nd on lie one place further: lanes that are 16 apart would else meet in the same banks.
template <int Most>
__device__ __forceinline__ void stage_taps(const float* weight, int channels, bool flip, float* shared) {
  const int count = channels * kTapCount;
  const int64_t step = flip ? -kForwardThreads : kForwardThreads;
#pragma unroll
  for (int first = 0; first < Most * kTapCount; first += kWarp * kTapCount) {
    int i = first + threadIdx.x;
    const float* from = weight + (flip ? count - 1 - i : i);
    float* to = shared + i + first / (kWarp * kTapCount);
    const int end = min(count, first + kWarp * kTapCount);
#pragma unroll 4
    for (; i < end; i += kForwardThreads, from += step, to += kForwardThreads) *to = *from;
  }
}

template <class T, int B>
__global__ void __launch_bounds__(kForwardThreads, 3) forward_strips(SparseDepthwise p, int64_t groups) {
  using S = Strips<B>;
  constexpr int V = S::kLane, warps = kForwardThreads / kWarp;
  __shared__ __align__(16) T shared[S::kWindow * S::kGroup];
  __shared__ float weights[S::kGroup * kTapCount + 1];
  const float* bias = static_cast<const float*>(p.bias);
  const int64_t windows = ceil_div(p.blocks * S::kOfBlock, S::kOfWindow), row_bytes = p.channels * static_cast<int>(sizeof(T));
  for (int64_t task = blockIdx.x; task < windows * groups; task += gridDim.x) {
    const Window w = window_at<B>(task / groups, task % groups * S::kGroup, p.blocks);
    const int64_t left = p.channels - w.c0;
    const bool exists = threadIdx.x % kWarp * V < left;
    const int c = exists ? threadIdx.x % kWarp * V : 0;
    const int here = static_cast<int>(min(left, int64_t{S::kGroup}));
    __syncthreads();  // the window before may still be read
    stage_window<T, B, kForwardThreads>(static_cast<const T*>(p.x), w, p.channels, shared);
    stage_taps<S::kGroup>(static_cast<const float*>(p.weight) + w.c0 * kTapCount, here, p.flip, weights);
    finish_copies();
    float taps[kTapCount][V], start[V] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int channel = p.flip ? here - 1 - c - v : c + v;
      const float* own = weights + channel * kTapCount + (channel >= kWarp);
#pragma unroll
      for (int k = 0; k < kTapCount; ++k) taps[k][v] = own[k];
    }
    if (bias) load(bias + w.c0 + c, V, false, start);
    for (int place = threadIdx.x / kWarp; place < w.count; place += warps) {
      const int strip = w.first + place;
      const Neighbors<T, B> neighbors(p.neighbors, strip, w);
      float sum[S::kSites][V];
#pragma unroll
      for (int i = 0; i < S::kSites; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[i][v] = start[v];
      for_sites_around<T, B>(static_cast<const T*>(p.x) + w.c0 + c, shared + c, row_bytes, neighbors,
                             [&](int row, int column, const float (&x)[V]) {
                               for_taps<B>(row, column, [&](int site, int tap) {
#pragma unroll
                                 for (int v = 0; v < V; ++v) sum[site][v] += x[v] * taps[tap][v];
                               });
                             });
      if (!exists) continue;
      T* y = static_cast<T*>(p.y) + int64_t{strip} * S::kSites * p.channels + w.c0 + c;
#pragma unroll
      for (int i = 0; i < S::kSites; ++i, y += p.channels) store(y, V, true, sum[i]);
    }
  }
}

// ---- weight gradient ---------------------------------------------------------------------------------------------------------
// Sums lie as (parts, 50, padded C), the last row for the bias; a part is a run of windows. One long sum would round badly: a warp's
// is of kLongestSum sites, then the warps add theirs to the part's in turn.
constexpr int kLongestSum = 128;

template <int B>
constexpr int kWeightThreads = B > 2 ? 128 : 256;
template <int B>
constexpr int kWeightBlocks = B > 2 ? 3 : 1;  // for each multiprocessor: as many as their registers allow

template <class T, int B>
__global__ void __launch_bounds__(kWeightThreads<B>, kWeightBlocks<B>)
    weight_strips(SparseDepthwiseWeightGrad p, int64_t groups, int64_t parts) {
  using S = Strips<B>;
  constexpr int V = S::kLane, threads = kWeightThreads<B>, warps = threads / kWarp, together = kLongestSum * warps / S::kWindow;
  __shared__ __align__(16) T shared[S::kWindow * S::kGroup];
  __shared__ __align__(16) float totals[(kTapCount + 1) * S::kGroup];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t windows = ceil_div(p.blocks * S::kOfBlock, S::kOfWindow), row_size = padded(p.channels, kSparseDepthwisePadding);
  const int64_t row_bytes = p.channels * static_cast<int>(sizeof(T));
  for (int64_t task = blockIdx.x; task < parts * groups; task += gridDim.x) {
    const int64_t part = task / groups, c0 = task % groups * S::kGroup, left = p.channels - c0, end = windows * (part + 1) / parts;
    const int c = lane * V < left ? lane * V : 0;
    bool first = true;
    for (int64_t index = windows * part / parts; index < end; first = false) {
      float sum[kTapCount + 1][V] = {};
      const int64_t pause = min(index + together, end);
      for (; index < pause; ++index) {
        const Window w = window_at<B>(index, c0, p.blocks);
        __syncthreads();  // the window before may still be read
        stage_window<T, B, threads>(static_cast<const T*>(p.x), w, p.channels, shared);
        finish_copies();
        for (int place = warp; place < w.count; place += warps) {
          const int strip = w.first + place;
          const Neighbors<T, B> neighbors(p.neighbors, strip, w);
          const T* from = static_cast<const T*>(p.grad) + int64_t{strip} * S::kSites * p.channels + c0 + c;
          float grad[S::kSites][V];
#pragma unroll
          for (int i = 0; i < S::kSites; ++i, from += p.channels) {
            load(from, V, true, grad[i]);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[kTapCount][v] += grad[i][v];
          }
          for_sites_around<T, B>(static_cast<const T*>(p.x) + c0 + c, shared + c, row_bytes, neighbors,
                                 [&](int row, int column, const float (&x)[V]) {
                                   for_taps<B>(row, column, [&](int site, int tap) {
#pragma unroll
                                     for (int v = 0; v < V; ++v) sum[tap][v] += grad[site][v] * x[v];
                                   });
                                 });
        }
      }
#pragma unroll 1
      for (int turn = 0; turn < warps; ++turn) {
        if (turn == warp) {
#pragma unroll
          for (int k = 0; k <= kTapCount; ++k) {
            float* total = totals + k * S::kGroup + lane * V;
            if (!first || turn > 0) {
              float before[V];
              load(total, V, true, before);
#pragma unroll
              for (int v = 0; v < V; ++v) sum[k][v] += before[v];
            }
            *reinterpret_cast<Bits<float, V>*>(total) = narrow_all<float>(sum[k]);
          }
        }
        __syncthreads();
      }
    }
    float* to = static_cast<float*>(p.workspace) + part * (kTapCount + 1) * row_size + c0;
    constexpr int vectors = S::kGroup / 4;
    for (int i = threadIdx.x; i < (kTapCount + 1) * vectors; i += threads) {
      const int k = i / vectors, column = i % vectors * 4;
      if (column < left) put<4>(to + k * row_size + column, fetch<4>(totals + i * 4));
    }
  }
}

}  // namespace
}  // namespace convdit::cuda
