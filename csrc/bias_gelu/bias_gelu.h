// x <- gelu(x + bias), in place: the tanh form of GELU (Hendrycks & Gimpel 2016, section 2), after a matrix product that
// left its bias out. For inference, on a CPU.
//
// x (rows, columns) is contiguous and in `dtype`; bias (columns) is contiguous, in accum_t<dtype>. The caller owns both. Any
// sizes, including 0; any alignment.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

struct BiasGelu {
  int64_t rows, columns;
  DType dtype;
  void* x;
  const void* bias;
};

struct BiasGeluKernels {
  void (*forward)(const BiasGelu&, const Runner&);
};
CONVDIT_CPU_TABLE(BiasGeluKernels, bias_gelu)

}  // namespace convdit
