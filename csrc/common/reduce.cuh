// Sums over a warp and over a block, in a fixed order, and the largest of a warp; every thread gets the same result.
#pragma once
#include <cstdint>

namespace convdit::cuda {

constexpr int kWarp = 32;

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <class A>
__device__ __forceinline__ A warp_max(A x) {  // passes over NaN
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Sums of N values over the block; `scratch` is shared memory for N values a warp. All threads must call it.
template <int N, class A>
__device__ __forceinline__ void block_sums(A (&values)[N], A* scratch) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = warp_sum(values[k]);
  __syncthreads();  // the sums before may still be read
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < N; ++k) scratch[N * warp + k] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = 0;
  for (int i = 0; i < warps; ++i)
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] += scratch[N * i + k];
}

// Threads of a block as `groups` groups of `width` threads: adds up what the threads of the same place in each group hold. The
// result is right in group 0. `scratch` is shared memory for N values a thread. All threads must call it. With one group, or more
// than two, no step writes what another thread may still read: the last one reads the second group's values alone.
template <int N, class A>
__device__ __forceinline__ void sum_groups(A (&values)[N], int width, int groups, A* scratch) {
  const int group = threadIdx.x / width, stride = blockDim.x;
  for (int count = groups, half; count > 1; count = half) {
    half = (count + 1) / 2;
    if (group >= half && group < count) {
#pragma unroll
      for (int k = 0; k < N; ++k) scratch[k * stride + threadIdx.x] = values[k];
    }
    __syncthreads();
    if (group + half < count) {
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] += scratch[k * stride + threadIdx.x + half * width];
    }
  }
}

// Mean and 1/sqrt(variance + eps) of a row of `width` elements by one warp. load(i, values) gives the N elements from i on,
// 0 beyond the end. The variance is taken about the mean, in a second pass, which also finds what the mean is off by: right for
// rows with a large mean.
template <int N, class A, class F>
__device__ __forceinline__ void warp_row_statistics(int64_t width, A eps, const F& load, A& mean, A& rstd) {
  const int lane = threadIdx.x % kWarp;
  A values[N], total = 0, off = 0;
  for (int64_t i = lane * N; i < width; i += kWarp * N) {
    load(i, values);
#pragma unroll
    for (int k = 0; k < N; ++k) total += values[k];
  }
  mean = warp_sum(total) / static_cast<A>(width);
  total = 0;
  for (int64_t i = lane * N; i < width; i += kWarp * N) {
    load(i, values);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A d = i + k < width ? values[k] - mean : A(0);
      total += d * d;
      off += d;
    }
  }
  off = warp_sum(off) / static_cast<A>(width);
  mean += off;
  rstd = A(1) / sqrt(warp_sum(total) / static_cast<A>(width) - off * off + eps);
}

}  // namespace convdit::cuda
