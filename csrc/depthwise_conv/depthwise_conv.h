// The depthwise convolution of ConvNeXt (Liu et al. 2022, section 2.4; 7x7), forward and backward, and the LayerNorm after it.
//
//   y[n,h,w,c]         = bias[c] + sum over i, j < K of weight[c,i,j] * x[n, h+i-r, w+j-r, c],   r = (K-1)/2
//   grad_x             = the same sum over grad_y, with the taps turned by 180 degrees (`flip`) and without bias
//   grad_weight[c,i,j] = sum over n, h, w of grad_y[n,h,w,c] * x[n, h+i-r, w+j-r, c];   grad_bias[c] = sum of grad_y
//   out[n,h,w,:]       = (y - mean) * rstd * ln_weight + ln_bias       mean and biased variance over the channels
//
// x outside the map counts as zero. x, y and out are contiguous (N, H, W, C) in `dtype`; weight (C, K, K) and everything of
// (C,) is in accum_t<dtype>, contiguous. K is odd, 1 to kMaxKernel. Any sizes above 0; any alignment. The caller owns every array.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

constexpr int64_t kMaxKernel = 31;
// Packed weights hold a multiple of this many channels (the lanes of the widest vector).
constexpr int64_t kChannelMultiple = 16;

struct DepthwiseConv {
  int64_t batch, height, width, channels, kernel;
  DType dtype;
  bool flip;
  const void *x, *weight, *bias;  // bias may be null: 0
  void* y;
  void* packed;  // workspace: K*K * (C rounded up to kChannelMultiple) of accum_t<dtype>
};

// The convolution, then the LayerNorm of each site while it is in cache. `conv.y` may be `out` where y is not wanted.
struct DepthwiseConvLayerNorm {
  DepthwiseConv conv;
  double eps;
  const void *ln_weight, *ln_bias;
  void* out;
  void *mean, *rstd;  // (N, H, W) of accum_t<dtype>; both may be null
};

struct DepthwiseConvWeightGrad {
  int64_t batch, height, width, channels, kernel;
  DType dtype;
  const void *grad, *x;
  void *grad_weight, *grad_bias;
  // Sums are taken in `parts` parts of the list of (image, row) and added up in order, so they do not depend on threads.
  int64_t parts;
  void* workspace;  // parts * (K*K + 1) * (C rounded up to kChannelMultiple) of accum_t<dtype>
};

struct LayerNormBackward {
  int64_t rows, channels;
  DType dtype;
  const void *grad, *x, *weight, *mean, *rstd;
  void *grad_x, *grad_weight, *grad_bias;
  int64_t parts;    // as above, of the list of rows
  void* workspace;  // (parts, 2, C) of accum_t<dtype>
};

struct DepthwiseConvKernels {
  void (*forward)(const DepthwiseConv&, const Runner&);
  void (*forward_layer_norm)(const DepthwiseConvLayerNorm&, const Runner&);
  void (*weight_grad)(const DepthwiseConvWeightGrad&, const Runner&);
  void (*layer_norm_backward)(const LayerNormBackward&, const Runner&);
};
CONVDIT_CPU_TABLE(DepthwiseConvKernels, depthwise_conv)

namespace cuda {
// Enqueue on `stream`; return cudaError_t.
int depthwise_conv_forward(const DepthwiseConv&, void* stream);
int depthwise_conv_forward_layer_norm(const DepthwiseConvLayerNorm&, void* stream);
int depthwise_conv_weight_grad(const DepthwiseConvWeightGrad&, void* stream);
int depthwise_conv_layer_norm_backward(const LayerNormBackward&, void* stream);
}  // namespace cuda

}  // namespace convdit
