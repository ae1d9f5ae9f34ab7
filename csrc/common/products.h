// Matrix products on the CPU: ours (linear/linear.h) where it is the quicker one (cpu_level.h), else PyTorch's.
#pragma once
#include <array>

#include "common/checks.h"
#include "common/cpu_level.h"
#include "linear/linear.h"

namespace convdit {

// Smaller ones are not worth packing, and a product with a vector is a sum that MKL cuts finer.
constexpr int64_t kLargeProduct = 1 << 16, kFewestRows = 16;  // multiply-adds; rows and columns of the result

// (M, K) times (K, N), the first like x.
inline bool by_our_product(const Tensor& x, int64_t m, int64_t n, int64_t k) {
  const bool large = m >= kFewestRows && n >= kFewestRows && m * n * k >= kLargeProduct;
  return large && x.is_cpu() && x.scalar_type() == ScalarType::Float && own_products();
}

// Of a matrix.
inline Tensor transposed(const Tensor& t) { return view_of(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }

// out (M, N), rows without gaps, = a (M, K) times b (K, N), any strides, plus bias (N,), which only our own product takes.
inline void multiply_here(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, const Tensor& out) {
  Product p{a.size(0), b.size(1), a.size(1)};
  p.a = a.const_data_ptr<float>(), p.a_row = a.stride(0), p.a_column = a.stride(1);
  p.b = b.const_data_ptr<float>(), p.b_row = b.stride(0), p.b_column = b.stride(1);
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr, p.c = out.mutable_data_ptr<float>(), p.c_row = out.stride(0);
  const Tensor packed = allocate({product_scratch(p.n, p.k)}, ScalarType::Float, a);
  p.packed = packed.mutable_data_ptr<float>();
  CONVDIT_RUN(linear, multiply, a, p);
}

inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (by_our_product(a, a.size(0), b.size(1), a.size(1))) return multiply_here(a, b, std::nullopt, out);
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is `out` once more: drop that reference
}

}  // namespace convdit
