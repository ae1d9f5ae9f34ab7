// Two floats in neighbouring registers, and formulas that serve one value and two. GPUs of compute capability 10 add, multiply and
// multiply-add both in one instruction, rounding as for one; elsewhere (12, too) values are worked on one by one: pairs would only cost
// registers.
#pragma once
#include <type_traits>

namespace convdit::cuda {

struct alignas(8) Pair {
  float x, y;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr bool kHasPairs = true;
__device__ __forceinline__ unsigned long long bits_of(Pair a) {
  unsigned long long bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "f"(a.x), "f"(a.y));
  return bits;
}
__device__ __forceinline__ Pair pair_of(unsigned long long bits) {
  Pair a;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(a.x), "=f"(a.y) : "l"(bits));
  return a;
}
__device__ __forceinline__ Pair fma(Pair a, Pair b, Pair c) {
  unsigned long long d;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(d) : "l"(bits_of(a)), "l"(bits_of(b)), "l"(bits_of(c)));
  return pair_of(d);
}
__device__ __forceinline__ Pair mul(Pair a, Pair b) {
  unsigned long long d;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(d) : "l"(bits_of(a)), "l"(bits_of(b)));
  return pair_of(d);
}
__device__ __forceinline__ Pair add(Pair a, Pair b) {
  unsigned long long d;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(d) : "l"(bits_of(a)), "l"(bits_of(b)));
  return pair_of(d);
}
#else
constexpr bool kHasPairs = false;
__device__ __forceinline__ Pair fma(Pair a, Pair b, Pair c) { return {a.x * b.x + c.x, a.y * b.y + c.y}; }
__device__ __forceinline__ Pair mul(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
__device__ __forceinline__ Pair add(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
#endif

__device__ __forceinline__ float fma(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma(double a, double b, double c) { return ::fma(a, b, c); }
template <class A>
__device__ __forceinline__ A mul(A a, A b) {
  return a * b;
}
template <class A>
__device__ __forceinline__ A add(A a, A b) {
  return a + b;
}

template <class U>
__device__ __forceinline__ U both(float a) {
  if constexpr (std::is_same_v<U, Pair>) return {a, a};
  else return a;
}

// Value k of an array in registers, and where U is a pair, the next.
template <class U, class A, int N>
__device__ __forceinline__ U get(const A (&x)[N], int k) {
  if constexpr (std::is_same_v<U, Pair>) return {x[k], x[k + 1]};
  else return x[k];
}
template <class U, class A, int N>
__device__ __forceinline__ void put(A (&x)[N], int k, U a) {
  if constexpr (std::is_same_v<U, Pair>) x[k] = a.x, x[k + 1] = a.y;
  else x[k] = a;
}

// f(k, A()) for each of V values of type A, or f(k, Pair()) for each two.
template <class A, int V, class F>
__device__ __forceinline__ void for_values(const F& f) {
  constexpr bool kByTwo = kHasPairs && std::is_same_v<A, float> && V % 2 == 0;
#pragma unroll
  for (int k = 0; k < V; k += kByTwo ? 2 : 1) f(k, std::conditional_t<kByTwo, Pair, A>());
}

}  // namespace convdit::cuda
