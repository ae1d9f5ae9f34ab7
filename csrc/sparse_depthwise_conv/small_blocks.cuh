// The 7x7 sparse convolution on blocks of 2 x 2 sites and on single sites, where finding a neighbour costs more than its few products.
//
// A warp has two channels a lane and takes one block after the other. The 49 taps of its channels, or the sums for their gradient, stay
// in registers, so that the places of the table are constants; which of them are taken are bits of a word, the same in all lanes, and an
// absent block costs one test.
#pragma once
#include "sparse_depthwise_conv/windows.cuh"

namespace convdit::cuda {
namespace {

constexpr int kPairs = 2, kPairedChannels = kWarp * kPairs;  // channels of a lane, and of a block of threads
constexpr int kPairedThreads = 128, kPairedWarps = kPairedThreads / kWarp;

// The row of the table of one block, spread over the lanes of a warp: entry `lane` + 32 k is in word k.
template <int B>
struct Neighbors {
  static constexpr int kEntries = Blocks<B>::kSide * Blocks<B>::kSide, kWords = (kEntries + kWarp - 1) / kWarp;
  int32_t at[kWords];                    // where the block starts in shared memory, if in the window; else the block
  uint32_t near[kWords], there[kWords];  // bits of the entries: in the window; not absent
  __device__ __forceinline__ Neighbors(const int32_t* table, int64_t block, const Window& w) {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const int entry = threadIdx.x % kWarp + k * kWarp;
      const int32_t q = entry < kEntries ? table[block * kEntries + entry] : -1, place = q - w.first;
      const bool inside = place >= 0 && place < w.count;
      at[k] = inside ? place * Blocks<B>::kSites * kPairedChannels : q;
      near[k] = __ballot_sync(0xffffffffu, inside);
      there[k] = __ballot_sync(0xffffffffu, q >= 0);
    }
  }
};

// Calls f(row, column, values) for every site of the blocks around that the kernel reaches; rows and columns count from the block's
// first site. `x` and `shared`: from this lane's first channel on.
template <class T, int B, class F>
__device__ __forceinline__ void for_sites_around(const T* x, const T* shared, int64_t channels, const Neighbors<B>& neighbors, const F& f) {
  using S = Blocks<B>;
#pragma unroll
  for (int entry = 0; entry < Neighbors<B>::kEntries; ++entry) {
    const int word = entry / kWarp, row = (entry / S::kSide - S::kReach) * B, column = (entry % S::kSide - S::kReach) * B;
    const uint32_t bit = 1u << entry % kWarp;
    if (!(neighbors.there[word] & bit)) continue;
    const int at = __shfl_sync(0xffffffffu, neighbors.at[word], entry % kWarp);
    const auto reached = [](int place) { return place >= -kRadius && place < B + kRadius; };
    float values[S::kSites][kPairs];
    if (neighbors.near[word] & bit) {
      const T* from = shared + at;
#pragma unroll
      for (int i = 0; i < S::kSites; ++i)
        if (reached(row + i / B) && reached(column + i % B)) load(from + i * kPairedChannels, kPairs, true, values[i]);
    } else {
      const T* from = x + int64_t{at} * S::kSites * channels;
#pragma unroll
      for (int i = 0; i < S::kSites; ++i)
        if (reached(row + i / B) && reached(column + i % B)) load(from + i * channels, kPairs, true, values[i]);
    }
#pragma unroll
    for (int i = 0; i < S::kSites; ++i)
      if (reached(row + i / B) && reached(column + i % B)) f(row + i / B, column + i % B, values[i]);
  }
}

// Calls f(site, tap) for the sites of a block which take the site at (row, column) by some tap.
template <int B, class F>
__device__ __forceinline__ void for_taps(int row, int column, const F& f) {
#pragma unroll
  for (int site = 0; site < B * B; ++site) {
    const int down = row - site / B + kRadius, right = column - site % B + kRadius;
    if (down >= 0 && down < kTaps && right >= 0 && right < kTaps) f(site, down * kTaps + right);
  }
}

// ---- forward and input gradient --------------------------------------------------------------------------------------------
template <class T, int B>
__global__ void __launch_bounds__(kPairedThreads, 3) forward_pairs(SparseDepthwise p, int64_t groups) {
  using S = Blocks<B>;
  // Of the second half of the channels the weights lie one place further: lanes that are 16 apart would else meet in the same banks.
  constexpr int half = kPairedChannels / 2 * kTapCount;
  __shared__ __align__(16) T shared[kWindow * kPairedChannels];
  __shared__ float weights[2 * half + 1];
  const float *weight = static_cast<const float*>(p.weight), *bias = static_cast<const float*>(p.bias);
  const int warp = threadIdx.x / kWarp;
  const int64_t windows = ceil_div(p.blocks, S::kCount);
  for (int64_t task = blockIdx.x; task < windows * groups; task += gridDim.x) {
    const Window w = window_at<B>(task / groups, task % groups * kPairedChannels, p.blocks);
    const int64_t left = p.channels - w.c0;
    const bool exists = threadIdx.x % kWarp * kPairs < left;
    const int c = exists ? threadIdx.x % kWarp * kPairs : 0;
    const int count = static_cast<int>(min(left, int64_t{kPairedChannels})) * kTapCount;
    __syncthreads();  // the window before may still be read
    for (int i = threadIdx.x; i < count; i += kPairedThreads) weights[i + i / half] = weight[w.c0 * kTapCount + i];
    stage_window<T, B, kPairedThreads, kPairedChannels>(static_cast<const T*>(p.x), w, p.channels, shared);
    finish_copies();
    float taps[kTapCount][kPairs], start[kPairs] = {};
    const float* own = weights + c * kTapCount + c * kTapCount / half + (p.flip ? kTapCount - 1 : 0);
#pragma unroll
    for (int k = 0; k < kTapCount; ++k, own += p.flip ? -1 : 1) taps[k][0] = own[0], taps[k][1] = own[kTapCount];
    if (bias) load(bias + w.c0 + c, kPairs, false, start);
    for (int block = warp; block < w.count; block += kPairedWarps) {
      const Neighbors<B> neighbors(p.neighbors, int64_t{w.first} + block, w);
      float sum[S::kSites][kPairs];
#pragma unroll
      for (int i = 0; i < S::kSites; ++i) sum[i][0] = start[0], sum[i][1] = start[1];
      for_sites_around<T, B>(
          static_cast<const T*>(p.x) + w.c0 + c, shared + c, p.channels, neighbors, [&](int row, int column, const float (&v)[kPairs]) {
            for_taps<B>(row, column, [&](int site, int tap) { sum[site][0] += v[0] * taps[tap][0], sum[site][1] += v[1] * taps[tap][1]; });
          });
      if (!exists) continue;
      T* y = static_cast<T*>(p.y) + (int64_t{w.first} + block) * S::kSites * p.channels + w.c0 + c;
#pragma unroll
      for (int i = 0; i < S::kSites; ++i) store(y + i * p.channels, kPairs, true, sum[i]);
    }
  }
}

// ---- weight gradient ---------------------------------------------------------------------------------------------------------
// Sums lie as (parts, 50, padded C), the last row for the bias; a part is a run of windows. The warps add theirs up in turn.
template <class T, int B>
__global__ void __launch_bounds__(kPairedThreads, 2) weight_pairs(SparseDepthwiseWeightGrad p, int64_t groups, int64_t parts) {
  using S = Blocks<B>;
  __shared__ __align__(16) T shared[kWindow * kPairedChannels];
  __shared__ float2 totals[(kTapCount + 1) * kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t windows = ceil_div(p.blocks, S::kCount), row_size = padded(p.channels, kSparseDepthwisePadding);
  for (int64_t task = blockIdx.x; task < parts * groups; task += gridDim.x) {
    const int64_t part = task / groups, c0 = task % groups * kPairedChannels;
    const bool exists = lane * kPairs < p.channels - c0;
    const int c = exists ? lane * kPairs : 0;
    float sum[kTapCount + 1][kPairs] = {};
    for (int64_t index = windows * part / parts; index < windows * (part + 1) / parts; ++index) {
      const Window w = window_at<B>(index, c0, p.blocks);
      __syncthreads();  // the window before may still be read
      stage_window<T, B, kPairedThreads, kPairedChannels>(static_cast<const T*>(p.x), w, p.channels, shared);
      finish_copies();
      for (int block = warp; block < w.count; block += kPairedWarps) {
        const Neighbors<B> neighbors(p.neighbors, int64_t{w.first} + block, w);
        const T* from = static_cast<const T*>(p.grad) + (int64_t{w.first} + block) * S::kSites * p.channels + c0 + c;
        float grad[S::kSites][kPairs];
#pragma unroll
        for (int i = 0; i < S::kSites; ++i) {
          load(from + i * p.channels, kPairs, true, grad[i]);
          sum[kTapCount][0] += grad[i][0], sum[kTapCount][1] += grad[i][1];
        }
        for_sites_around<T, B>(
            static_cast<const T*>(p.x) + c0 + c, shared + c, p.channels, neighbors, [&](int row, int column, const float (&v)[kPairs]) {
              for_taps<B>(row, column,
                          [&](int site, int tap) { sum[tap][0] += grad[site][0] * v[0], sum[tap][1] += grad[site][1] * v[1]; });
            });
      }
    }
    float* to = static_cast<float*>(p.workspace) + part * (kTapCount + 1) * row_size + c0 + c;
#pragma unroll 1
    for (int turn = 0; turn < kPairedWarps; ++turn) {
      if (turn == warp) {
#pragma unroll
        for (int k = 0; k <= kTapCount; ++k) {
          float2& total = totals[k * kWarp + lane];
          if (turn > 0) sum[k][0] += total.x, sum[k][1] += total.y;
          if (turn < kPairedWarps - 1) total = make_float2(sum[k][0], sum[k][1]);
          else if (exists) store(to + k * row_size, kPairs, true, sum[k]);
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace convdit::cuda
