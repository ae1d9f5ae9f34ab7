// Global response normalisation (Woo et al. 2023, ConvNeXt V2, section 4), alone or after the exact GELU, forward and
// backward. With g = x, or x * normal_cdf(x) where `gelu`, over the rows of one image:
//
//   G[c] = sqrt(sum over rows of g^2)      N[c] = G[c] / (mean over c of G + eps)      y = g + weight * (g * N) + bias
//
// Tensors of (rows, C) are contiguous and in `dtype`: image after image, rows / images rows each, or as `offsets` says.
// weight, bias, norm (images, C) = G and the parameters' gradients are contiguous and in accum_t<dtype>. The gradient of G
// at zero is zero. The caller owns every array. Any sizes, including 0; any alignment.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/types.h"

namespace convdit {

struct GrnShape {
  int64_t images, rows, channels;  // rows of all images together
  const int64_t* offsets;          // (images + 1): first row of each image, then `rows`; or null: all images alike
  DType dtype;
  bool gelu;
  double eps;
};

// Sums over the rows of an image are taken by tiles of rows, then added up in the order of the tiles. A tile is short, so
// that rounding errors of its sums stay small, and shorter where rows are long, so that small maps still make several.
constexpr int64_t grn_tile_rows(int64_t channels) {
  const int64_t rows = 65536 / (channels > 0 ? channels : 1);
  return rows < 8 ? 8 : rows > 64 ? 64 : rows;
}
// No fewer tiles than there are, whatever the offsets.
constexpr int64_t grn_max_tiles(int64_t images, int64_t rows, int64_t channels) { return rows / grn_tile_rows(channels) + images; }

struct Grn : GrnShape {
  const void *x, *weight, *bias;
  const void* shift;    // (C): g is the GELU of x + shift; or null. Needs `gelu`
  void *y, *norm;       // y may be x
  void* scale;          // (images, C): gets the factor 1 + weight * N, and y is left at g; or null. Needs `shift`
  void* workspace;      // (grn_max_tiles + images, C) of accum_t<dtype>
  int64_t* first_tile;  // (images + 1)
};

struct GrnBackward : GrnShape {
  const void *grad, *x, *norm, *weight;
  void *grad_x, *grad_weight, *grad_bias;
  // With a shift the forward's y is computed once more, and so grad_x may be grad. Else all four are null. CPU only.
  const void *shift, *bias;
  void *y, *grad_shift;
  bool add;             // grad_weight, grad_bias and grad_shift are added to, not written
  void* workspace;      // (2 grn_max_tiles + 4 images, C) of accum_t<dtype>
  int64_t* first_tile;  // (images + 1)
};

struct GrnKernels {
  void (*forward)(const Grn&, const Runner&);
  void (*backward)(const GrnBackward&, const Runner&);
};
CONVDIT_CPU_TABLE(GrnKernels, grn)

namespace cuda {
// Enqueue on `stream`; return cudaError_t.
int grn_forward(const Grn&, void* stream);
int grn_backward(const GrnBackward&, void* stream);
}  // namespace cuda

}  // namespace convdit
