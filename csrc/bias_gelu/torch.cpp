// Schema and checks of GELU with a bias, in place; see bias_gelu.h. It exists on the CPU only.
#include "bias_gelu/bias_gelu.h"

#include "common/checks.h"

namespace convdit {
namespace {

void bias_gelu_(const Tensor& x, const Tensor& bias_in) {
  const DType dtype = dtype_of("x", x);
  CONVDIT_CHECK(x.dim() >= 1 && x.is_contiguous(), "x: expected a contiguous tensor (..., C), got shape ", describe(x));
  const int64_t columns = x.size(x.dim() - 1);
  const Tensor bias = check_parameter("bias", bias_in, {columns}, x);
  if (x.numel() == 0) return;
  CONVDIT_RUN(bias_gelu, forward, x,
              (BiasGelu{x.numel() / columns, columns, dtype, x.mutable_data_ptr(), bias.const_data_ptr()}));
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) { m.def("bias_gelu_(Tensor(a!) x, Tensor bias) -> ()"); }
#endif

CONVDIT_KERNELS(m) { m.impl("bias_gelu_", TORCH_BOX(&bias_gelu_)); }

}  // namespace
}  // namespace convdit
