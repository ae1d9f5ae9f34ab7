// Schemas, checks and allocation of the global response normalisation; see grn.h for the formulas.
#include "grn/grn.h"

#include "common/checks.h"

namespace convdit {
namespace {

// Dense maps: images along the first axis, channels along the last.
GrnShape dense_shape(const Tensor& x, double eps, bool gelu) {
  check_dim("x", x, 4, "(N, H, W, C)");
  return {x.size(0), x.size(0) * x.size(1) * x.size(2), x.size(3), nullptr, dtype_of("x", x), gelu, eps};
}

// Packed rows: (M, C) and the first row of each image.
GrnShape packed_shape(const Tensor& features, const Tensor& offsets, double eps, bool gelu) {
  check_dim("features", features, 2, "(M, C)");
  check_same_device("offsets", offsets, "features", features);
  check_dtype("offsets", offsets, ScalarType::Long);
  CONVDIT_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.is_contiguous(),
                "offsets: expected a contiguous tensor of shape (N + 1), got ", describe(offsets));
  const int64_t images = offsets.size(0) - 1, rows = features.size(0);
  const int64_t* first = offsets.const_data_ptr<int64_t>();
#ifndef CONVDIT_DEVICE_CUDA  // there, looking would wait for the device
  bool rising = first[0] == 0 && first[images] == rows;
  for (int64_t i = 0; i < images; ++i) rising = rising && first[i] <= first[i + 1];
  CONVDIT_CHECK(rising, "offsets: expected rising row numbers from 0 to the ", rows, " rows of features");
#endif
  return {images, rows, features.size(1), first, dtype_of("features", features), gelu, eps};
}

// What a kernel needs for itself, in one piece: the numbers of its tiles, its sums and, last, norms that nobody keeps.
struct Sizes {
  int64_t tiles, sums, norms;
  ScalarType dtype;

  Sizes(const GrnShape& s, int64_t per_tile, int64_t per_image, const Tensor& x, bool norms)
      : tiles((s.images + 8) / 8 * 8),  // images + 1 numbers, in whole cache lines
        sums(((per_tile * grn_max_tiles(s.images, s.rows, s.channels) + per_image * s.images) * s.channels + 31) / 32 * 32),
        norms(norms ? s.images * s.channels : 0),
        dtype(accumulate_dtype(x)) {}
  int64_t total() const { return tiles * 8 / bytes_of(dtype) + sums + norms; }
  template <class Params>
  void* place(Params& p, void* work) const {  // returns where the norms are
    p.first_tile = static_cast<int64_t*>(work), p.workspace = p.first_tile + tiles;
    return static_cast<char*>(p.workspace) + sums * bytes_of(dtype);
  }
};

// y; and for the backward, where it is wanted, `norm`.
Tensor forward(const GrnShape& shape, const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in,
               std::optional<Tensor>* norm = nullptr) {
  const Tensor weight = check_parameter("weight", weight_in, {shape.channels}, x_in);
  const Tensor bias = check_parameter("bias", bias_in, {shape.channels}, x_in);
  const Tensor x = dense(x_in);
  if (norm != nullptr && x.numel() == 0) *norm = allocate_zeros({shape.images, shape.channels}, accumulate_dtype(x), x);
  if (x.numel() == 0) return allocate_like(x);
  Grn p{shape};
  const Sizes sizes(shape, 1, 1, x, norm == nullptr);
  Workspace work(sizes.total(), sizes.dtype, x);
  p.norm = sizes.place(p, work.data());
  if (norm != nullptr) *norm = allocate({shape.images, shape.channels}, accumulate_dtype(x), x), p.norm = (*norm)->mutable_data_ptr();
  const Tensor y = allocate_like(x);  // after the small ones: see adaln/torch.cpp
  p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.bias = bias.const_data_ptr();
  p.y = y.mutable_data_ptr();
  CONVDIT_RUN(grn, forward, x, p);
  return y;
}
std::tuple<Tensor, Tensor> forward_save(const GrnShape& shape, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  std::optional<Tensor> norm;
  const Tensor y = forward(shape, x, weight, bias, &norm);
  return {y, *norm};
}

std::tuple<Tensor, Tensor, Tensor> backward(const GrnShape& shape, const Tensor& grad_in, const Tensor& x_in, const Tensor& norm_in,
                                            const Tensor& weight_in) {
  CONVDIT_CHECK(grad_in.sizes() == x_in.sizes(), "grad: expected shape ", describe(x_in), ", got ", describe(grad_in));
  check_dtype("grad", grad_in, x_in.scalar_type());
  check_same_device("grad", grad_in, "x", x_in);
  const Tensor norm = check_parameter("norm", norm_in, {shape.images, shape.channels}, x_in);
  const Tensor weight = check_parameter("weight", weight_in, {shape.channels}, x_in);
  const Tensor grad = dense(grad_in), x = dense(x_in);
  if (x.numel() == 0) {
    const auto none = [&] { return allocate_zeros({shape.channels}, accumulate_dtype(x), x); };
    return {allocate_like(x), none(), none()};
  }
  const Tensor grad_weight = allocate({shape.channels}, accumulate_dtype(x), x);
  const Tensor grad_bias = allocate({shape.channels}, accumulate_dtype(x), x);
  GrnBackward p{shape};
  const Sizes sizes(shape, 2, 4, x, false);
  Workspace work(sizes.total(), sizes.dtype, x);
  sizes.place(p, work.data());
  const Tensor grad_x = allocate_like(x);
  p.grad = grad.const_data_ptr(), p.x = x.const_data_ptr(), p.norm = norm.const_data_ptr(), p.weight = weight.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr(), p.grad_weight = grad_weight.mutable_data_ptr(), p.grad_bias = grad_bias.mutable_data_ptr();
  CONVDIT_RUN(grn, backward, x, p);
  return {grad_x, grad_weight, grad_bias};
}

Tensor grn_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool gelu) {
  return forward(dense_shape(x, eps, gelu), x, weight, bias);
}
std::tuple<Tensor, Tensor> grn_fwd_save(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool gelu) {
  return forward_save(dense_shape(x, eps, gelu), x, weight, bias);
}
std::tuple<Tensor, Tensor, Tensor> grn_bwd(const Tensor& grad, const Tensor& x, const Tensor& norm, const Tensor& weight, double eps,
                                           bool gelu) {
  return backward(dense_shape(x, eps, gelu), grad, x, norm, weight);
}
Tensor sparse_grn_fwd(const Tensor& features, const Tensor& weight, const Tensor& bias, const Tensor& offsets, double eps, bool gelu) {
  return forward(packed_shape(features, offsets, eps, gelu), features, weight, bias);
}
std::tuple<Tensor, Tensor> sparse_grn_fwd_save(const Tensor& features, const Tensor& weight, const Tensor& bias, const Tensor& offsets,
                                               double eps, bool gelu) {
  return forward_save(packed_shape(features, offsets, eps, gelu), features, weight, bias);
}
std::tuple<Tensor, Tensor, Tensor> sparse_grn_bwd(const Tensor& grad, const Tensor& features, const Tensor& norm, const Tensor& weight,
                                                  const Tensor& offsets, double eps, bool gelu) {
  return backward(packed_shape(features, offsets, eps, gelu), grad, features, norm, weight);
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def("grn_fwd(Tensor x, Tensor weight, Tensor bias, float eps, bool gelu) -> Tensor");
  m.def("grn_fwd_save(Tensor x, Tensor weight, Tensor bias, float eps, bool gelu) -> (Tensor y, Tensor norm)");
  m.def("grn_bwd(Tensor grad, Tensor x, Tensor norm, Tensor weight, float eps, bool gelu) -> (Tensor, Tensor, Tensor)");
  m.def("sparse_grn_fwd(Tensor features, Tensor weight, Tensor bias, Tensor offsets, float eps, bool gelu) -> Tensor");
  m.def(
      "sparse_grn_fwd_save(Tensor features, Tensor weight, Tensor bias, Tensor offsets, float eps, bool gelu)"
      " -> (Tensor y, Tensor norm)");
  m.def(
      "sparse_grn_bwd(Tensor grad, Tensor features, Tensor norm, Tensor weight, Tensor offsets, float eps, bool gelu)"
      " -> (Tensor, Tensor, Tensor)");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("grn_fwd", TORCH_BOX(&grn_fwd));
  m.impl("grn_fwd_save", TORCH_BOX(&grn_fwd_save));
  m.impl("grn_bwd", TORCH_BOX(&grn_bwd));
  m.impl("sparse_grn_fwd", TORCH_BOX(&sparse_grn_fwd));
  m.impl("sparse_grn_fwd_save", TORCH_BOX(&sparse_grn_fwd_save));
  m.impl("sparse_grn_bwd", TORCH_BOX(&sparse_grn_bwd));
}

}  // namespace
}  // namespace convdit
