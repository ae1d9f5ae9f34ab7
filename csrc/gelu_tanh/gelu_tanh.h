// The tanh form of GELU (Hendrycks & Gimpel 2016) of x + bias, forward and backward: the middle of DiT's MLP.
//
//   v = x + bias                                         (rows, width); only where `bias` is given
//   y = v / 2 * (1 + tanh(u)) = v * s,   u = sqrt(2/pi) * (v + 0.044715 v^3),   s = 1 / (1 + e^-2u)
//   dy/dv = s + v * s * (1 - s) * 2 du/dv
//
// Arrays are contiguous, in `dtype`; bias (width) in accum_t<dtype> or, `narrow_bias`, in `dtype`. The caller owns them; y may be x.
// Any sizes, including 0; any alignment.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

struct GeluTanh {
  int64_t count, width;  // elements in all; of a row, where there is a bias
  DType dtype;
  bool narrow_bias;
  const void *x, *bias;
  void* y;
};

struct GeluTanhBackward {
  int64_t count, width;
  DType dtype;
  bool narrow_bias;
  const void *grad, *x, *bias;
  void* grad_x;
};

struct GeluTanhKernels {
  void (*forward)(const GeluTanh&, const Runner&);
  void (*backward)(const GeluTanhBackward&, const Runner&);
};
CONVDIT_CPU_TABLE(GeluTanhKernels, gelu_tanh)

}  // namespace convdit
