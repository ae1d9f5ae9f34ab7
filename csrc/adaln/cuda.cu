// CUDA kernels of the adaptive LayerNorm; see adaln.h for the formulas, common/layer_norm.cuh and common/layer_norm_backward.cuh for the kernels.
#include "adaln/adaln.h"

#include "common/layer_norm_backward.cuh"

namespace convdit::cuda {
namespace {

// x and the branch have one dtype, or a float32 x takes a branch of halves.
template <class Params, class F>
int dispatch_both(const Params& p, const F& f) {
  if (p.dtype == DType::f32 && p.branch_dtype == DType::bf16) return f(float{}, bf16{});
  if (p.dtype == DType::f32 && p.branch_dtype == DType::f16) return f(float{}, f16{});
  return dispatch(p.dtype, [&](auto x) { return f(x, x); });
}

}  // namespace

int adaln_forward(const Adaln& p, void* stream) {
  const NormForward n{p.batch, p.tokens, p.width, p.eps, 1, p.x, p.y, p.gate, p.shift, p.scale, p.residual, p.out, p.mean, p.rstd};
  return dispatch_both(p, [&](auto x, auto y) { return norm_forward<decltype(x), decltype(y)>(n, stream_of(stream)); });
}

int adaln_backward(const AdalnBackward& p, void* stream) {
  // Long chunks write fewer sums; short ones keep more multiprocessors busy. The workspace is for the short ones.
  const int64_t chunk = p.batch * ceil_div(p.tokens, 2 * kAdalnChunk) >= kEnoughRuns / 2 ? 2 * kAdalnChunk : kAdalnChunk;
  const NormBackward n{p.batch, p.tokens, p.width, chunk,    1,        p.grad_residual, p.grad_out,   p.residual,   p.y,         p.gate,
                       p.scale, p.mean,   p.rstd,  p.grad_x, p.grad_y, p.grad_gate,     p.grad_shift, p.grad_scale, p.workspace, 3};
  return dispatch_both(p, [&](auto x, auto y) { return norm_backward<decltype(x), decltype(y)>(n, stream_of(stream)); });
}

}  // namespace convdit::cuda
