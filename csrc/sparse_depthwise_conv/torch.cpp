// Schemas, checks and allocation of the sparse depthwise convolution; see sparse_depthwise_conv.h for the formulas.
#include "sparse_depthwise_conv/sparse_depthwise_conv.h"

#include <limits>

#include "common/checks.h"

namespace convdit {
namespace {

// features (M, C) against the table of neighbouring blocks; returns the number of blocks.
int64_t check_features(const char* name, const Tensor& features, const Tensor& neighbors, int64_t block, int64_t kernel) {
  dtype_of(name, features);
  check_dim(name, features, 2, "(M, C)");
  CONVDIT_CHECK(block >= 1, "block: expected at least 1 site a side, got ", block);
  CONVDIT_CHECK(kernel % 2 == 1 && kernel <= kSparseDepthwiseMaxKernel, "weight: expected an odd kernel size of at most ",
                kSparseDepthwiseMaxKernel, ", got ", kernel);
  const int64_t sites = block * block, blocks = features.size(0) / sites;
  CONVDIT_CHECK(features.size(0) % sites == 0, name, ": expected a multiple of ", sites, " rows (blocks of ", block, "x", block,
                " sites), got ", features.size(0));
  CONVDIT_CHECK(features.size(0) <= std::numeric_limits<int32_t>::max(), name, ": expected fewer than 2^31 rows, got ", features.size(0));
  const int64_t side = 2 * ((kernel / 2 + block - 1) / block) + 1;
  check_same_device("neighbors", neighbors, name, features);
  check_dtype("neighbors", neighbors, ScalarType::Int);
  check_shape("neighbors", neighbors, {blocks, side * side});
  return blocks;
}

// weight (C, 1, K, K) in the dtype that kernels take it in; contiguous on return.
Tensor check_weight(const Tensor& weight, const char* name, const Tensor& features) {
  CONVDIT_CHECK(features.dim() == 2, name, ": expected 2 dimensions (M, C), got shape ", describe(features));
  check_dim("weight", weight, 4, "(C, 1, K, K)");
  return check_parameter("weight", weight, {features.size(1), 1, weight.size(2), weight.size(2)}, features);
}

int64_t padded(int64_t channels) { return (channels + kSparseDepthwisePadding - 1) / kSparseDepthwisePadding * kSparseDepthwisePadding; }

// Room for a copy in float32 of features in halves: the CPU kernels read each about ten times, and convert it once.
std::optional<Tensor> wide_copy(const Tensor& features) {
#ifndef CONVDIT_DEVICE_CUDA
  if (features.element_size() == 2) return allocate({features.numel()}, ScalarType::Float, features);
#endif
  return std::nullopt;
}
float* room(const std::optional<Tensor>& copy) { return copy ? static_cast<float*>(copy->mutable_data_ptr()) : nullptr; }

Tensor convolve(const char* name, const Tensor& features_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                const Tensor& neighbors_in, int64_t block, bool flip) {
  const Tensor weight = check_weight(weight_in, name, features_in);
  const int64_t kernel = weight.size(2), blocks = check_features(name, features_in, neighbors_in, block, kernel);
  const int64_t channels = features_in.size(1);
  const std::optional<Tensor> bias = optional_vector("bias", bias_in, channels, features_in);
  const Tensor features = dense(features_in), neighbors = dense(neighbors_in), y = allocate_like(features);
  if (features.numel() == 0) return y;
  Workspace work(kernel * kernel * padded(channels), accumulate_dtype(features), features);
  const std::optional<Tensor> wide_x = wide_copy(features), wide_y = wide_copy(features);
  SparseDepthwise p{};
  p.blocks = blocks, p.block = block, p.kernel = kernel, p.channels = channels, p.dtype = dtype_of(name, features), p.flip = flip;
  p.neighbors = static_cast<const int32_t*>(neighbors.const_data_ptr());
  p.x = features.const_data_ptr(), p.weight = weight.const_data_ptr(), p.bias = data(bias);
  p.y = y.mutable_data_ptr(), p.workspace = work.data();
  p.wide_x = room(wide_x), p.wide_y = room(wide_y);
  CONVDIT_RUN(sparse_depthwise, forward, features, p);
  return y;
}

Tensor sparse_depthwise_conv2d_fwd(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& neighbors,
                                   int64_t block) {
  return convolve("features", features, weight, bias, neighbors, block, false);
}

Tensor sparse_depthwise_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& neighbors, int64_t block) {
  return convolve("grad", grad, weight, std::nullopt, neighbors, block, true);
}

std::tuple<Tensor, Tensor> sparse_depthwise_conv2d_weight_grad(const Tensor& grad_in, const Tensor& features_in, const Tensor& neighbors_in,
                                                               int64_t block, int64_t kernel) {
  const int64_t blocks = check_features("features", features_in, neighbors_in, block, kernel), channels = features_in.size(1);
  check_same_device("grad", grad_in, "features", features_in);
  check_shape("grad", grad_in, {features_in.size(0), channels});
  check_dtype("grad", grad_in, features_in.scalar_type());
  const ScalarType wide = accumulate_dtype(features_in);
  if (features_in.numel() == 0)
    return {allocate_zeros({channels, 1, kernel, kernel}, wide, features_in), allocate_zeros({channels}, wide, features_in)};
  const Tensor grad = dense(grad_in), features = dense(features_in), neighbors = dense(neighbors_in);
  const Tensor grad_weight = allocate({channels, 1, kernel, kernel}, wide, features), grad_bias = allocate({channels}, wide, features);
#ifdef CONVDIT_DEVICE_CUDA
  const int64_t parts = cuda::sparse_depthwise_parts(blocks, block, channels);
#else
  const int64_t parts = sparse_depthwise_chunks(blocks, block);
#endif
  Workspace work(parts * (kernel * kernel + 1) * padded(channels), wide, features);
  const std::optional<Tensor> wide_grad = wide_copy(grad), wide_x = wide_copy(features);
  SparseDepthwiseWeightGrad p{};
  p.blocks = blocks, p.block = block, p.kernel = kernel, p.channels = channels, p.dtype = dtype_of("features", features);
  p.neighbors = static_cast<const int32_t*>(neighbors.const_data_ptr());
  p.grad = grad.const_data_ptr(), p.x = features.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr(), p.grad_bias = grad_bias.mutable_data_ptr(), p.workspace = work.data();
  p.wide_grad = room(wide_grad), p.wide_x = room(wide_x);
  CONVDIT_RUN(sparse_depthwise, weight_grad, features, p);
  return {grad_weight, grad_bias};
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def("sparse_depthwise_conv2d_fwd(Tensor features, Tensor weight, Tensor? bias, Tensor neighbors, int block) -> Tensor");
  m.def("sparse_depthwise_conv2d_input_grad(Tensor grad, Tensor weight, Tensor neighbors, int block) -> Tensor");
  m.def(
      "sparse_depthwise_conv2d_weight_grad(Tensor grad, Tensor features, Tensor neighbors, int block, int kernel_size)"
      " -> (Tensor, Tensor)");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("sparse_depthwise_conv2d_fwd", TORCH_BOX(&sparse_depthwise_conv2d_fwd));
  m.impl("sparse_depthwise_conv2d_input_grad", TORCH_BOX(&sparse_depthwise_conv2d_input_grad));
  m.impl("sparse_depthwise_conv2d_weight_grad", TORCH_BOX(&sparse_depthwise_conv2d_weight_grad));
}

}  // namespace
}  // namespace convdit
