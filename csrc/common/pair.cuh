// Two floats in neighbouring registers. GPUs from Blackwell on add, multiply and multiply-add both in one instruction, rounding as for
// one; for others, two instructions.
#pragma once

namespace convdit::cuda {

struct alignas(8) Pair {
  float x, y;
};
__device__ __forceinline__ Pair both(float a) { return {a, a}; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
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
__device__ __forceinline__ Pair fma(Pair a, Pair b, Pair c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
__device__ __forceinline__ Pair mul(Pair a, Pair b) { return {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)}; }
__device__ __forceinline__ Pair add(Pair a, Pair b) { return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)}; }
#endif

}  // namespace convdit::cuda
