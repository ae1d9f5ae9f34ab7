// CPU kernels of the sparse depthwise convolution: dtypes in, float or double kernels behind.
#include "sparse_depthwise_conv/cpu_forward.h"
#include "sparse_depthwise_conv/cpu_weight_grad.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

template <class H>
void forward_halves(const SparseDepthwise& p, const Runner& run) {
  const int64_t count = p.blocks * p.block * p.block * p.channels;
  convert_all(static_cast<const H*>(p.x), p.wide_x, count, run);
  forward<float>(p, p.wide_x, p.wide_y, run);
  convert_all(p.wide_y, static_cast<H*>(p.y), count, run);
}

template <class H>
void weight_grad_halves(const SparseDepthwiseWeightGrad& p, const Runner& run) {
  const int64_t count = p.blocks * p.block * p.block * p.channels;
  convert_all(static_cast<const H*>(p.grad), p.wide_grad, count, run);
  convert_all(static_cast<const H*>(p.x), p.wide_x, count, run);
  weight_grad<float>(p, p.wide_grad, p.wide_x, run);
}

void dispatch_forward(const SparseDepthwise& p, const Runner& run) {
  switch (p.dtype) {
    case DType::f32: return forward(p, static_cast<const float*>(p.x), static_cast<float*>(p.y), run);
    case DType::f64: return forward(p, static_cast<const double*>(p.x), static_cast<double*>(p.y), run);
    case DType::bf16: return forward_halves<bf16>(p, run);
    case DType::f16: return forward_halves<f16>(p, run);
  }
}

void dispatch_weight_grad(const SparseDepthwiseWeightGrad& p, const Runner& run) {
  switch (p.dtype) {
    case DType::f32: return weight_grad(p, static_cast<const float*>(p.grad), static_cast<const float*>(p.x), run);
    case DType::f64: return weight_grad(p, static_cast<const double*>(p.grad), static_cast<const double*>(p.x), run);
    case DType::bf16: return weight_grad_halves<bf16>(p, run);
    case DType::f16: return weight_grad_halves<f16>(p, run);
  }
}

}  // namespace

extern const SparseDepthwiseKernels sparse_depthwise = {dispatch_forward, dispatch_weight_grad};

}  // namespace convdit::CONVDIT_LEVEL
