// Self-attention on the packed output of a qkv Linear, forward and backward.
//
//   q, k, v (B, T, heads, d) = the thirds of qkv (B, T, 3D), D = heads * d
//   weights     = softmax(scale * q k^T) over the keys, head by head
//   out         = weights v                                              (B, T, D)
//   log_sum_exp = log(sum(exp(scale * q k^T))) over the keys             (B, T, heads)
//
//   grad_v = weights^T grad,   grad_q = scale * g k,   grad_k = scale * g^T q,
//   with g = weights * (grad v^T - delta), delta = sum(grad * (out + rest)) over d; weights are computed again from log_sum_exp
//
// Where a weight is nearly 1, g is the difference of two numbers that are nearly the same: what rounding `out` to 16 bits does to delta
// is then all of it. `rest` is what that rounding took.
//
// qkv has the given strides and no gaps inside (3D); everything else is contiguous. Tensors are in `dtype`; log_sum_exp and
// the workspace in accum_t<dtype>. The caller owns every array. No size is 0; any alignment; any scale. The CPU kernels are not for float64.
// A row of scores with a NaN or +inf among them, or with -inf alone, gives NaN, as softmax does.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

struct Attention {
  int64_t batch, tokens, heads, head_dim;
  int64_t batch_stride, token_stride;  // of qkv, in elements
  double scale;
  DType dtype;
  const void* qkv;
  void *out, *log_sum_exp;  // outputs of the forward, inputs of the backward; the CPU's forward takes a null log_sum_exp
  void* rest;  // the same, as out, of bf16 and f16; may be null
  float* scratch;  // on the CPU: as many values as the kernels' table says
};

struct AttentionBackward {
  Attention forward;
  const void* grad;  // of out
  void* grad_qkv;  // (B, T, 3D)
  void* workspace;  // on CUDA: of as many elements as attention_backward_workspace says; null where that is 0
};

struct AttentionKernels {
  void (*forward)(const Attention&, const Runner&);
  void (*backward)(const AttentionBackward&, const Runner&);
  int64_t (*forward_scratch)(const Attention&, int64_t threads);
  int64_t (*backward_scratch)(const Attention&, int64_t threads);
};
CONVDIT_CPU_TABLE(AttentionKernels, attention)

namespace cuda {
// Looks at the pointers' alignment, not at the workspace.
int64_t attention_backward_workspace(const AttentionBackward&);
// Enqueue on `stream`; return cudaError_t.
int attention_forward(const Attention&, void* stream);
int attention_backward(const AttentionBackward&, void* stream);
}  // namespace cuda

}  // namespace convdit
