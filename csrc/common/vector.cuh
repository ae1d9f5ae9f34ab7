// Short vectors in CUDA kernels: loads and stores of N neighbouring elements, converted to and from the accumulate dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Elements of T in 16 bytes, the widest access.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

// N elements as they lie in memory: one aligned access of up to 16 bytes, or several. Halves are kept as words of two, since the
// compiler would move an array of them one by one.
template <class T, int N>
using Bits = std::conditional_t<sizeof(T) == 2 && N % 2 == 0, Pack<uint32_t, (N + 1) / 2>, Pack<T, N>>;

template <int N, class T>
__device__ __forceinline__ Bits<T, N> fetch(const T* p) {
  return *reinterpret_cast<const Bits<T, N>*>(p);
}
// To global memory. Written as instructions: the compiler splits the stores of such a struct.
template <int N, class T>
__device__ __forceinline__ void put(T* p, const Bits<T, N>& bits) {
  if constexpr (sizeof(bits) % 8 == 0) {
    uint32_t words[sizeof(bits) / 4];
    memcpy(words, &bits, sizeof(bits));
    if constexpr (sizeof(bits) == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(words[0]), "r"(words[1]) : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(bits)) / 4; i += 4)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint32_t*>(p) + i), "r"(words[i]), "r"(words[i + 1]),
                     "r"(words[i + 2]), "r"(words[i + 3])
                     : "memory");
    }
  } else {
    *reinterpret_cast<Bits<T, N>*>(p) = bits;
  }
}

template <int N, class T>
__device__ __forceinline__ void widen(const Bits<T, N>& bits, accum_t<T> (&to)[N]) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t word = bits.values[i];
      if constexpr (std::is_same_v<T, bf16>) {
        to[2 * i] = __uint_as_float(word << 16), to[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
      } else {
        to[2 * i] = widen(f16{static_cast<uint16_t>(word)}), to[2 * i + 1] = widen(f16{static_cast<uint16_t>(word >> 16)});
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(bits.values[i]);
  }
}
template <class T, int N>
__device__ __forceinline__ Bits<T, N> narrow_all(const accum_t<T> (&from)[N]) {
  Bits<T, N> bits;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, bf16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
        bits.values[i] = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
        bits.values[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) bits.values[i] = narrow<T>(from[i]);
  }
  return bits;
}

// N elements from p on. `whole`: all N exist and p is aligned for them; otherwise one by one, the first n of them, 0 for the rest.
template <int N, class T>
__device__ __forceinline__ void load(const T* p, int64_t n, bool whole, accum_t<T> (&to)[N]) {
  if (whole) {
    widen<N, T>(fetch<N>(p), to);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < n ? widen(p[i]) : accum_t<T>(0);
  }
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, int64_t n, bool whole, const accum_t<T> (&from)[N]) {
  if (whole) {
    put<N>(p, narrow_all<T>(from));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) p[i] = narrow<T>(from[i]);
  }
}

// The same of a row of float whose length is a multiple of N, N = 4 or 8; `column` is N times the thread's place in it. With N = 8
// two neighbouring lanes take each half of their 64 bytes together, so that no request takes half a sector. All lanes of a warp must
// call these; beyond the row they give 0 and write nothing.
__device__ __forceinline__ void swap_halves(const float (&a)[4], const float (&b)[4], float (&first)[4], float (&second)[4]) {
  const bool odd = threadIdx.x % 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float got = __shfl_xor_sync(0xffffffffu, odd ? a[i] : b[i], 1);
    first[i] = odd ? got : a[i], second[i] = odd ? b[i] : got;
  }
}
struct PairOfLanes {  // where this lane's two accesses of 4 lie, and whether
  int64_t first, second;
  bool has_first, has_second;
  __device__ __forceinline__ PairOfLanes(int64_t column, int64_t width) {
    const int odd = threadIdx.x % 2;
    first = column - 4 * odd, second = first + 8;
    has_first = column - 8 * odd < width, has_second = column - 8 * odd + 8 < width;
  }
};
template <int N>
__device__ __forceinline__ void load_row(const float* row, int64_t column, int64_t width, float (&to)[N]) {
  static_assert(N == 4 || N == 8);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = 0;
  if constexpr (N == 4) {
    if (column < width) load(row + column, N, true, to);
  } else {
    const PairOfLanes at(column, width);
    float a[4] = {}, b[4] = {}, low[4], high[4];
    if (at.has_first) load(row + at.first, 4, true, a);
    if (at.has_second) load(row + at.second, 4, true, b);
    swap_halves(a, b, low, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = low[i], to[4 + i] = high[i];
  }
}
template <int N>
__device__ __forceinline__ void store_row(float* row, int64_t column, int64_t width, const float (&from)[N]) {
  static_assert(N == 4 || N == 8);
  if constexpr (N == 4) {
    if (column < width) store(row + column, N, true, from);
  } else {
    const PairOfLanes at(column, width);
    float low[4], high[4], a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = from[i], high[i] = from[4 + i];
    swap_halves(low, high, a, b);
    if (at.has_first) store(row + at.first, 4, true, a);
    if (at.has_second) store(row + at.second, 4, true, b);
  }
}

}  // namespace convdit::cuda
