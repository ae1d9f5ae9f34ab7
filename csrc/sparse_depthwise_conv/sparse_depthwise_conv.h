// Submanifold depthwise convolution over the visible sites of a batch of maps (ConvNeXt V2, Woo et al. 2023, section 3),
// forward, input gradient and weight gradient. Absent sites count as zero and stay absent.
//
//   y[s, c] = bias[c] + sum over taps (i, j), 0 <= i, j < K, of weight[c, i, j] * x[site at s + (i - K/2, j - K/2), c]
//   grad_x:  the same with grad_y for x, no bias, and weight[c, K-1-i, K-1-j], as being neighbours is mutual
//   grad_weight[c, i, j] = sum over s of grad_y[s, c] * x[site at s + (i - K/2, j - K/2), c];  grad_bias[c] = sum of grad_y[s, c]
//
// Sites come in square blocks of `block` x `block`, row-major inside a block: the feature row of site (i, j) of block p
// is p * block^2 + i * block + j. neighbors (blocks, (2r+1)^2), r = ceil((K/2) / block), holds for each block the rows of
// the blocks around it, row-major from (-r, -r), -1 where absent; every other entry must be a row below `blocks`.
//
// x, y and their gradients are (blocks * block^2, C), contiguous, in `dtype`; weight (C, K, K), bias (C,) and their
// gradients are contiguous, in accum_t<dtype>. The caller owns every array. Any sizes, including 0; any alignment;
// fewer than 2^31 sites.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

constexpr int64_t kSparseDepthwiseMaxKernel = 45;
constexpr int64_t kSparseDepthwisePadding = 16;  // channels of workspaces are rounded up to a multiple of this

struct SparseDepthwise {
  int64_t blocks, block, kernel, channels;
  DType dtype;
  bool flip;                   // take the weight turned by 180 degrees: the input gradient
  const int32_t* neighbors;
  const void *x, *weight, *bias;  // bias may be null: 0
  void* y;
  void* workspace;             // K^2 * C rounded up, of accum_t<dtype>
  float *wide_x, *wide_y;      // copies of x and y in float32 where they are halves, else null
};

struct SparseDepthwiseWeightGrad {
  int64_t blocks, block, kernel, channels;
  DType dtype;
  const int32_t* neighbors;
  const void *grad, *x;
  void *grad_weight, *grad_bias;
  void* workspace;             // sparse_depthwise_chunks() * (K^2 + 1) * C rounded up, of accum_t<dtype>
  float *wide_grad, *wide_x;   // copies of grad and x in float32 where they are halves, else null
};

// Parts that the sum over sites is cut into: it depends on the sizes alone, so that results do not depend on threads.
inline int64_t sparse_depthwise_chunks(int64_t blocks, int64_t block) {
  const int64_t chunks = blocks * block * block / 256;
  return chunks < 1 ? 1 : chunks > 16 ? 16 : chunks;
}

struct SparseDepthwiseKernels {
  void (*forward)(const SparseDepthwise&, const Runner&);
  void (*weight_grad)(const SparseDepthwiseWeightGrad&, const Runner&);
};
CONVDIT_CPU_TABLE(SparseDepthwiseKernels, sparse_depthwise)

namespace cuda {
// The same for the CUDA kernels: enough blocks of 32 channels for every multiprocessor, at least 256 sites a part, the longest window of
// the kernels, so that no part is empty.
inline int64_t sparse_depthwise_parts(int64_t blocks, int64_t block, int64_t channels) {
  const int64_t most = (blocks * block * block + 255) / 256, wanted = 1024 / ((channels + 31) / 32);
  return most < wanted ? most : wanted < 1 ? 1 : wanted;
}
// Enqueue on `stream`; return cudaError_t.
int sparse_depthwise_forward(const SparseDepthwise&, void* stream);
int sparse_depthwise_weight_grad(const SparseDepthwiseWeightGrad&, void* stream);
}  // namespace cuda

}  // namespace convdit
