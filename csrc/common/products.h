// Matrix products on the CPU: ours (linear/linear.h) where it is the quicker one (cpu_level.h), else PyTorch's.
#pragma once
#include <array>

#include "common/checks.h"
#include "common/cpu_level.h"
#include "common/matrix.h"
#include "linear/linear.h"

namespace convdit {

// Smaller ones are not worth packing, and a product with a vector is a sum that MKL cuts finer.
constexpr int64_t kLargeProduct = 1 << 16, kFewestRows = 16;  // multiply-adds; rows and columns of the result
// On any processor ours takes less time than the way to PyTorch's.
constexpr int64_t kTinyProduct = 1 << 14;

// (M, K) times (K, N), on a CPU.
inline bool by_our_product(ScalarType dtype, int64_t m, int64_t n, int64_t k) {
  if (dtype != ScalarType::Float) return false;
  if (m * n * k < kTinyProduct && k <= kProductDepth) return true;
  return m >= kFewestRows && n >= kFewestRows && m * n * k >= kLargeProduct && own_products();
}

// out (M, N), rows without gaps, = a (M, K) times b (K, N), plus bias (N,), by our own product.
inline void multiply_here(const Matrix& a, const Matrix& b, const std::optional<Tensor>& bias, const Matrix& out) {
  Product p{a.rows, b.columns, a.columns};
  p.a = static_cast<const float*>(a.values()), p.a_row = a.row_stride, p.a_column = a.column_stride;
  p.b = static_cast<const float*>(b.values()), p.b_row = b.row_stride, p.b_column = b.column_stride;
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr, p.c = static_cast<float*>(out.place()), p.c_row = out.row_stride;
  Workspace packed(product_scratch(p.m, p.n, p.k), ScalarType::Float);
  p.packed = static_cast<float*>(packed.data());
  linear_table().multiply(p, torch_runner());
}

inline void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
  if (by_our_product(a.dtype, a.rows, b.columns, a.columns)) return multiply_here(a, b, std::nullopt, out);
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a.tensor()), from(b.tensor()), from(out.tensor())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is `out` once more: drop that reference
}

// out (M, N) = a (M, K) weight^T + bias, weight (N, K).
inline void multiply_linear(const Matrix& a, const Matrix& weight, const std::optional<Tensor>& bias, const Matrix& out) {
  if (by_our_product(a.dtype, a.rows, weight.rows, a.columns)) return multiply_here(a, weight.transposed(), bias, out);
  using torch::stable::detail::from;
  const std::optional<Tensor> plain_bias = bias ? std::optional<Tensor>(Matrix(*bias, 1, out.columns).first_row()) : bias;
  std::array<StableIValue, 4> stack{from(a.tensor()), from(weight.tensor()), from(plain_bias), from(out.tensor())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace convdit
