// Schemas, checks and allocation of the tanh form of GELU; see gelu_tanh.h for the formulas. Other devices have PyTorch's.
#include "gelu_tanh/gelu_tanh.h"

#include "common/checks.h"

namespace convdit {
namespace {

// The last size of x and, if given, its bias (contiguous on return), in the accumulate dtype or in x's.
int64_t check_bias(std::optional<Tensor>& bias, const Tensor& x, bool& narrow) {
  narrow = bias && bias->scalar_type() == x.scalar_type() && x.element_size() == 2;
  if (!bias) return 0;
  CONVDIT_CHECK(x.dim() >= 1, "x: expected at least 1 dimension beside a bias, got shape ", describe(x));
  const int64_t width = x.size(x.dim() - 1);
  if (!narrow) {
    bias = check_parameter("bias", *bias, {width}, x);
    return width;
  }
  check_same_device("bias", *bias, "x", x);
  check_shape("bias", *bias, {width});
  bias = dense(*bias);
  return width;
}
const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

void run_forward(const Tensor& x, const std::optional<Tensor>& bias_in, const Tensor& y) {
  const DType dtype = dtype_of("x", x);
  std::optional<Tensor> bias = bias_in;
  bool narrow = false;
  const int64_t width = check_bias(bias, x, narrow);
  const GeluTanh p{x.numel(), width, dtype, narrow, x.const_data_ptr(), data(bias), y.mutable_data_ptr()};
  if (x.numel() > 0) CONVDIT_RUN(gelu_tanh, forward, x, p);
}

Tensor gelu_tanh_fwd(const Tensor& x_in, const std::optional<Tensor>& bias) {
  const Tensor x = dense(x_in), y = allocate_like(x);
  run_forward(x, bias, y);
  return y;
}

void gelu_tanh_(const Tensor& x, const std::optional<Tensor>& bias) {
  CONVDIT_CHECK(x.is_contiguous(), "x: expected a contiguous tensor to overwrite, got strides of another");
  run_forward(x, bias, x);
}

Tensor gelu_tanh_bwd(const Tensor& grad_in, const Tensor& x_in, const std::optional<Tensor>& bias_in) {
  const DType dtype = dtype_of("x", x_in);
  CONVDIT_CHECK(grad_in.sizes() == x_in.sizes(), "grad: expected the shape of x, ", describe(x_in), ", got ", describe(grad_in));
  check_dtype("grad", grad_in, x_in.scalar_type());
  check_same_device("grad", grad_in, "x", x_in);
  std::optional<Tensor> bias = bias_in;
  bool narrow = false;
  const int64_t width = check_bias(bias, x_in, narrow);
  const Tensor grad = dense(grad_in), x = dense(x_in), grad_x = allocate_like(x);
  const GeluTanhBackward p{
      x.numel(), width, dtype, narrow, grad.const_data_ptr(), x.const_data_ptr(), data(bias), grad_x.mutable_data_ptr()};
  if (x.numel() > 0) CONVDIT_RUN(gelu_tanh, backward, x, p);
  return grad_x;
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def("gelu_tanh_fwd(Tensor x, Tensor? bias) -> Tensor");
  m.def("gelu_tanh_(Tensor(a!) x, Tensor? bias) -> ()");
  m.def("gelu_tanh_bwd(Tensor grad, Tensor x, Tensor? bias) -> Tensor");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("gelu_tanh_fwd", TORCH_BOX(&gelu_tanh_fwd));
  m.impl("gelu_tanh_", TORCH_BOX(&gelu_tanh_));
  m.impl("gelu_tanh_bwd", TORCH_BOX(&gelu_tanh_bwd));
}

}  // namespace
}  // namespace convdit
