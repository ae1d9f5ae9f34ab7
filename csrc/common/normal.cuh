// The standard normal distribution and its density, for the exact GELU.
#pragma once
#include "common/pair.cuh"

namespace convdit::cuda {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ Pair exp2_fast(Pair x) { return {exp2_fast(x.x), exp2_fast(x.y)}; }

// The tail beyond t >= 0, absolute error below 1.5e-7. Its log2 is close to a polynomial in t: a minimax fit of degree 8, weighted by
// the tail itself. It falls for ever beyond the fit, so the tail becomes exactly 0, and x * normal_cdf(x) is right for huge x.
template <class U>
__device__ __forceinline__ U normal_tail(U t) {
  U p = both<U>(-0x1.15e272p-19f);
  p = fma(p, t, both<U>(0x1.fb802p-16f));
  p = fma(p, t, both<U>(-0x1.2ba9bap-13f));
  p = fma(p, t, both<U>(-0x1.fa9ed6p-13f));
  p = fma(p, t, both<U>(0x1.d7eba8p-8f));
  p = fma(p, t, both<U>(-0x1.aed78ep-5f));
  p = fma(p, t, both<U>(-0x1.d631e8p-2f));
  p = fma(p, t, both<U>(-0x1.26af2p+0f));
  return exp2_fast(fma(p, t, both<U>(-1.f)));
}
__device__ __forceinline__ float normal_cdf(float x) {
  const float tail = normal_tail(fabsf(x));
  return x < 0 ? tail : 1.f - tail;
}
__device__ __forceinline__ Pair normal_cdf(Pair x) {
  const Pair tail = normal_tail(Pair{fabsf(x.x), fabsf(x.y)}), rest = fma(tail, both<Pair>(-1.f), both<Pair>(1.f));
  return {x.x < 0 ? tail.x : rest.x, x.y < 0 ? tail.y : rest.y};
}
template <class U>
__device__ __forceinline__ U normal_pdf(U x) {
  return mul(exp2_fast(mul(mul(x, x), both<U>(-0.721347520f))), both<U>(0.398942280f));
}

__device__ __forceinline__ double normal_cdf(double x) { return 0.5 * erfc(x * -0.70710678118654752440); }
__device__ __forceinline__ double normal_pdf(double x) { return exp(x * x * -0.5) * 0.39894228040143267794; }

}  // namespace convdit::cuda
