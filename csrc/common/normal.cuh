// The standard normal distribution and its density, for the exact GELU.
#pragma once
#include "common/pair.cuh"

namespace convdit::cuda {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Absolute error below 1.5e-7. log2 of the lower tail is close to a polynomial in |x|: a minimax fit of degree 8, weighted by the
// tail itself. It falls for ever beyond the fit, so the tail becomes exactly 0, and x * normal_cdf(x) is right for huge x.
__device__ __forceinline__ float normal_cdf(float x) {
  const float t = fabsf(x);
  float p = -0x1.15e272p-19f;
  p = fmaf(p, t, 0x1.fb802p-16f);
  p = fmaf(p, t, -0x1.2ba9bap-13f);
  p = fmaf(p, t, -0x1.fa9ed6p-13f);
  p = fmaf(p, t, 0x1.d7eba8p-8f);
  p = fmaf(p, t, -0x1.aed78ep-5f);
  p = fmaf(p, t, -0x1.d631e8p-2f);
  p = fmaf(p, t, -0x1.26af2p+0f);
  p = fmaf(p, t, -1.f);
  const float tail = exp2_fast(p);
  return x < 0 ? tail : 1.f - tail;
}
__device__ __forceinline__ float normal_pdf(float x) { return exp2_fast(x * x * -0.721347520f) * 0.398942280f; }

// The same of two.
__device__ __forceinline__ Pair normal_cdf(Pair x) {
  const Pair t{fabsf(x.x), fabsf(x.y)};
  Pair p = both(-0x1.15e272p-19f);
  p = fma(p, t, both(0x1.fb802p-16f));
  p = fma(p, t, both(-0x1.2ba9bap-13f));
  p = fma(p, t, both(-0x1.fa9ed6p-13f));
  p = fma(p, t, both(0x1.d7eba8p-8f));
  p = fma(p, t, both(-0x1.aed78ep-5f));
  p = fma(p, t, both(-0x1.d631e8p-2f));
  p = fma(p, t, both(-0x1.26af2p+0f));
  p = fma(p, t, both(-1.f));
  const Pair tail{exp2_fast(p.x), exp2_fast(p.y)}, rest = fma(tail, both(-1.f), both(1.f));
  return {x.x < 0 ? tail.x : rest.x, x.y < 0 ? tail.y : rest.y};
}
__device__ __forceinline__ Pair normal_pdf(Pair x) {
  const Pair power = mul(mul(x, x), both(-0.721347520f));
  return mul(Pair{exp2_fast(power.x), exp2_fast(power.y)}, both(0.398942280f));
}

__device__ __forceinline__ double normal_cdf(double x) { return 0.5 * erfc(x * -0.70710678118654752440); }
__device__ __forceinline__ double normal_pdf(double x) { return exp(x * x * -0.5) * 0.39894228040143267794; }

}  // namespace convdit::cuda
