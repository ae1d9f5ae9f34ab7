// The adaptive LayerNorm of DiT (Peebles & Xie 2023, section 3.2, adaLN-Zero), forward and backward.
//
//   residual = x + gate * y                                   (B, T, D); only where `branch` is given
//   out      = (residual - mean) * rstd * (1 + scale) + shift        only where `out` is given
//   mean, rstd over D, biased variance, rstd = 1/sqrt(var + eps)     the forward's may be null
//
// Tensors of (B, T, D) are contiguous, in `dtype`; y and its gradient in `branch_dtype`, which is `dtype`, or bf16 or f16
// beside a float32 x. gate, shift, scale and their gradients (B, D), mean and rstd (B, T) are contiguous and in
// accum_t<dtype>; where `narrow_gate`, gate and its gradient are in `dtype`. The caller owns every array. Any sizes, including 0;
// any alignment.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

// Rows of T that one task of the backward reduces; sums over T are added up in chunk order.
constexpr int64_t kAdalnChunk = 32;

struct Adaln {
  int64_t batch, tokens, width;
  double eps;
  DType dtype, branch_dtype;
  bool narrow_gate;
  // Inputs of the forward. Without `y`, residual is x itself and is not written.
  const void *x, *y, *gate, *shift, *scale;
  // Outputs of the forward; inputs of the backward (residual = x where there is no branch).
  void *residual, *out, *mean, *rstd;
};

struct AdalnBackward {
  int64_t batch, tokens, width;
  DType dtype, branch_dtype;
  bool narrow_gate;
  const void* grad_residual;  // gradient of residual, or null where y is
  const void* grad_out;       // gradient of out, or null: only the gated residual is differentiated
  const void *residual, *y, *gate, *scale, *mean, *rstd;
  void *grad_x, *grad_y;      // grad_x is null where grad_out is (it would be a copy of grad_residual)
  void *grad_gate, *grad_shift, *grad_scale;
  void* workspace;            // (B, ceil(T / kAdalnChunk), 3, D) of accum_t<dtype>
};

struct AdalnKernels {
  void (*forward)(const Adaln&, const Runner&);
  void (*backward)(const AdalnBackward&, const Runner&);
};
CONVDIT_CPU_TABLE(AdalnKernels, adaln)

namespace cuda {
// Enqueue on `stream`; return cudaError_t.
int adaln_forward(const Adaln&, void* stream);
int adaln_backward(const AdalnBackward&, void* stream);
}  // namespace cuda

}  // namespace convdit
