// A Linear layer, its large float32 products by the quicker of two ways (common/products.h); other devices have PyTorch's.
//
//   y (..., N) = x (..., K) weight^T + bias,  weight (N, K), bias (N,) or none
#include <vector>

#include "common/products.h"

namespace convdit {
namespace {

// The leading axes of a contiguous x as one.
Matrix matrix_of(const Tensor& x) {
  const int64_t width = x.size(x.dim() - 1);
  return {x, width > 0 ? x.numel() / width : 0, width};
}

// Of x's shape but for the last axis.
Tensor allocate_last(const Tensor& x, int64_t width) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = width;
  return allocate_sizes({sizes.data(), sizes.size()}, x.scalar_type(), x);
}

void check_linear(const Tensor& x, const Tensor& weight) {
  dtype_of("x", x);
  CONVDIT_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, got shape ", describe(x));
  check_dim("weight", weight, 2, "(N, K)");
  check_same_device("weight", weight, "x", x);
  check_shape("weight", weight, {weight.size(0), x.size(x.dim() - 1)});
  check_dtype("weight", weight, x.scalar_type());
}

void check_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_linear(x, weight);
  if (!bias) return;
  check_same_device("bias", *bias, "x", x);
  check_shape("bias", *bias, {weight.size(0)});
  check_dtype("bias", *bias, x.scalar_type());
}

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_linear(x, weight, bias);
  const int64_t n = weight.size(0), k = weight.size(1);
  if (k > 0 && by_our_product(x.scalar_type(), x.numel() / k, n, k)) {
    const Tensor rows = dense(x), out = allocate_last(x, n);
    multiply_here(matrix_of(rows), Matrix(weight).transposed(), bias ? std::optional<Tensor>(dense(*bias)) : bias, matrix_of(out));
    return out;
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The results of three Linears of one x, side by side in the last axis, as packed_attention takes them. Without gradients.
Tensor packed_qkv(const Tensor& x, const Tensor& q_weight, const std::optional<Tensor>& q_bias, const Tensor& k_weight,
                  const std::optional<Tensor>& k_bias, const Tensor& v_weight, const std::optional<Tensor>& v_bias) {
  const std::array<std::pair<const Tensor&, const std::optional<Tensor>&>, 3> layers{
      {{q_weight, q_bias}, {k_weight, k_bias}, {v_weight, v_bias}}};
  int64_t width = 0, column = 0;
  for (const auto& [weight, bias] : layers) check_linear(x, weight, bias), width += weight.size(0);
  const Tensor out = allocate_last(x, width);
  if (x.numel() == 0) {
    if (out.numel() > 0) fail("x: expected a last size of at least 1, got shape ", describe(x));
    return out;
  }
  const Tensor x_rows = dense(x);
  const Matrix rows = matrix_of(x_rows), all = matrix_of(out);
  for (const auto& [weight, bias] : layers) {
    multiply_linear(rows, Matrix(weight), bias ? std::optional<Tensor>(dense(*bias)) : bias, all.column_range(column, weight.size(0)));
    column += weight.size(0);
  }
  return out;
}

// Gradients of x and weight; one that is not needed is empty.
std::tuple<Tensor, Tensor> linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight) {
  check_linear(x, weight);
  CONVDIT_CHECK(grad.dim() == x.dim() && grad.size(grad.dim() - 1) == weight.size(0) &&
                    grad.numel() * x.size(x.dim() - 1) == x.numel() * weight.size(0),
                "grad: expected the shape of the result, got ", describe(grad));
  check_same_device("grad", grad, "x", x);
  check_dtype("grad", grad, x.scalar_type());
  const Tensor grad_x = need_x ? allocate_like(x) : allocate({0}, x.scalar_type(), x);
  const Tensor grad_weight = need_weight ? allocate_like(weight) : allocate({0}, x.scalar_type(), x);
  const Tensor grad_rows = dense(grad), x_rows = dense(x);
  const Matrix rows = matrix_of(grad_rows);
  if (need_x) multiply(rows, Matrix(weight), matrix_of(grad_x));
  if (need_weight) multiply(rows.transposed(), matrix_of(x_rows), Matrix(grad_weight));
  return {grad_x, grad_weight};
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def("linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "packed_qkv(Tensor x, Tensor q_weight, Tensor? q_bias, Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias) -> Tensor");
  m.def("linear_bwd(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight) -> (Tensor, Tensor)");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("packed_qkv", TORCH_BOX(&packed_qkv));
  m.impl("linear_bwd", TORCH_BOX(&linear_bwd));
}

}  // namespace
}  // namespace convdit
