// Short vectors in CUDA kernels: loads and stores of N neighbouring elements, converted to and from the accumulate dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/types.h"

namespace convdit::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Round to nearest, ties to even, as PyTorch does.
template <class T>
__device__ __forceinline__ T narrow(accum_t<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ double narrow<double>(double x) { return x; }
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }

// Elements of T in 16 bytes, the widest access.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

// N elements from p on. `whole`: all N exist and p is aligned for them; otherwise one by one, the first n of them, 0 for the rest.
template <int N, class T>
__device__ __forceinline__ void load(const T* p, int64_t n, bool whole, accum_t<T> (&to)[N]) {
  if (whole) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < n ? widen(p[i]) : accum_t<T>(0);
  }
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, int64_t n, bool whole, const accum_t<T> (&from)[N]) {
  if (whole) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = narrow<T>(from[i]);
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) p[i] = narrow<T>(from[i]);
  }
}

}  // namespace convdit::cuda
