// What the CUDA kernels of the dense and the sparse depthwise convolution share: the 7x7 fast paths' inner step, and the kernels
// around any convolution that pack its weights and add up the parts of its weight gradient.
#pragma once
#include "common/copy.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace convdit::cuda {

constexpr int kTaps = 7, kRadius = 3, kTapCount = kTaps * kTaps;  // of the fast paths
constexpr int kChannels = 32;                                     // that a block of theirs works on
constexpr int kWeightRow = kChannels + 2;  // spaced in shared memory: writing a channel's taps has at most two-way bank conflicts

// weight (C, 49) of the channels from c0 on to (49, kWeightRow) in shared memory, turned by 180 degrees for `flip`; 0 beyond C.
template <int Threads>
__device__ __forceinline__ void stage_weights(const float* weight, int64_t c0, int64_t channels, bool flip, float* shared) {
  const int count = static_cast<int>(channels - c0 < kChannels ? channels - c0 : kChannels) * kTapCount;
  for (int i = threadIdx.x; i < kChannels * kTapCount; i += Threads) {
    const int c = i / kTapCount, tap = i % kTapCount;
    shared[(flip ? kTapCount - 1 - tap : tap) * kWeightRow + c] = i < count ? weight[c0 * kTapCount + i] : 0.f;
  }
}

// One input value's share of the outputs in its row: output column j, at offset j from the first, takes tap `column` - j + 3 of
// `taps`, the input's row of the kernel. All indices are constants once the loops around are unrolled.
template <int Outputs, int V>
__device__ __forceinline__ void add_taps(int column, const float (&value)[V], const float (&taps)[kTaps][V], float (&sum)[Outputs][V]) {
#pragma unroll
  for (int j = 0; j < Outputs; ++j) {
    const int tap = column - j + kRadius;
    if (tap < 0 || tap >= kTaps) continue;
#pragma unroll
    for (int k = 0; k < V; ++k) sum[j][k] += value[k] * taps[tap][k];
  }
}

__host__ __device__ inline int64_t padded(int64_t channels, int64_t multiple) { return (channels + multiple - 1) / multiple * multiple; }

constexpr int kSumThreads = 256;

namespace {  // kernels of their own for each file that includes this

// (C, taps) to (taps, row), so that neighbouring threads, which are neighbouring channels, read neighbouring weights.
template <class A>
__global__ void pack_weights(const A* weight, int64_t taps, int64_t channels, int64_t row, bool flip, A* packed) {
  for (int64_t i = blockIdx.x * int64_t{kSumThreads} + threadIdx.x; i < taps * channels; i += int64_t{gridDim.x} * kSumThreads) {
    const int64_t c = i % channels, tap = i / channels;
    packed[(flip ? taps - 1 - tap : tap) * row + c] = weight[c * taps + tap];
  }
}

// parts (count, taps + 1, row), the last row of each for the bias, to grad_weight (C, taps) and grad_bias (C): 32 channels of a few
// taps a block, a warp every eighth part. Results go through shared memory, so that a warp writes runs of neighbouring taps.
constexpr int kTapsTogether = 7;
template <class A>
__global__ void __launch_bounds__(kSumThreads, kNoSpills)
    add_weight_parts(const A* parts, int64_t count, int64_t taps, int64_t channels, int64_t row, A* grad_weight, A* grad_bias) {
  constexpr int warps = kSumThreads / kWarp;
  constexpr int n = kTapsTogether;
  __shared__ A scratch[n * kSumThreads];
  __shared__ A sums[kWarp * n];
  const int64_t groups = (channels + kWarp - 1) / kWarp;
  for (int64_t task = blockIdx.x; task < (taps + n) / n * groups; task += gridDim.x) {
    const int64_t first = task / groups * n, c0 = task % groups * kWarp, c = c0 + threadIdx.x % kWarp;
    A sum[n] = {};
    if (c < channels)
      for (int64_t part = threadIdx.x / kWarp; part < count; part += warps)
#pragma unroll
        for (int i = 0; i < n; ++i)
          if (first + i <= taps) sum[i] += parts[(part * (taps + 1) + first + i) * row + c];
    sum_groups(sum, kWarp, warps, scratch);
    if (threadIdx.x < kWarp) {
#pragma unroll
      for (int i = 0; i < n; ++i) sums[threadIdx.x * n + i] = sum[i];
    }
    __syncthreads();
    const int64_t channel = c0 + threadIdx.x / n, tap = first + threadIdx.x % n;
    if (threadIdx.x < kWarp * n && channel < channels) {
      if (tap < taps) grad_weight[channel * taps + tap] = sums[threadIdx.x];
      if (tap == taps) grad_bias[channel] = sums[threadIdx.x];
    }
  }
}

template <class A>
int launch_add_weight_parts(const void* parts, int64_t count, int64_t taps, int64_t channels, int64_t row, void* grad_weight,
                            void* grad_bias, cudaStream_t stream) {
  add_weight_parts<A><<<grid(ceil_div(taps + 1, kTapsTogether) * ceil_div(channels, kWarp)), kSumThreads, 0, stream>>>(
      static_cast<const A*>(parts), count, taps, channels, row, static_cast<A*>(grad_weight), static_cast<A*>(grad_bias));
  return launch_status();
}
template <class A>
int launch_pack_weights(const void* weight, int64_t taps, int64_t channels, int64_t row, bool flip, void* packed, cudaStream_t stream) {
  pack_weights<A><<<grid(ceil_div(taps * channels, kSumThreads)), kSumThreads, 0, stream>>>(static_cast<const A*>(weight), taps, channels,
                                                                                            row, flip, static_cast<A*>(packed));
  return launch_status();
}

}  // namespace

}  // namespace convdit::cuda
