// What the fused ConvNeXt V2 block (Woo et al. 2023, figure 5) needs beside its two matrix products, the depthwise
// convolution with LayerNorm, and the response normalisation: the end of the block, and the folding of the normalisation
// into the second product.
//
//   out = x + (g * scale + grn_bias) W^T + b  =  x + g (W * scale)^T + (W grn_bias + b)
//
// `scale` differs from image to image. Arrays are contiguous; W and the products are in `branch_dtype`, x and out in
// `dtype`, vectors in accum_t of both (which is one type). The caller owns every array. Any alignment.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

struct FoldScale {  // folded = weight * scale
  int64_t outputs, inputs;
  DType dtype;
  const void *weight, *scale;  // (outputs, inputs), (inputs)
  void* folded;
};

struct FoldBias {  // folded = weight * vector + bias
  int64_t outputs, inputs;
  DType dtype;
  const void *weight, *vector, *bias;  // (outputs, inputs), (inputs), (outputs) or null: 0
  void* folded;
};

struct AddResidual {  // out = x + product + bias
  int64_t rows, channels;
  DType dtype, branch_dtype;
  const void *x, *product, *bias;  // bias may be null: 0
  void* out;
};

struct ConvnextBlockKernels {
  void (*fold_scale)(const FoldScale&, const Runner&);
  void (*fold_bias)(const FoldBias&, const Runner&);
  void (*add_residual)(const AddResidual&, const Runner&);
};
CONVDIT_CPU_TABLE(ConvnextBlockKernels, convnext_block)

}  // namespace convdit
