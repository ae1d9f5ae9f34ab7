// Schemas, checks and allocation of the adaptive LayerNorm; see adaln.h for the formulas.
#include "adaln/adaln.h"

#include "common/checks.h"

namespace convdit {
namespace {

void check_x(const Tensor& x) {
  dtype_of("x", x);
  check_dim("x", x, 3, "(B, T, D)");
}

DType check_branch(const Tensor& x, const Tensor& y) {
  check_same_device("y", y, "x", x);
  check_shape("y", y, {x.size(0), x.size(1), x.size(2)});
  const DType x_type = dtype_of("x", x), y_type = dtype_of("y", y);
  CONVDIT_CHECK(y_type == x_type || (x_type == DType::f32 && y_type != DType::f64), "y: expected the dtype of x (",
                dtype_name(x.scalar_type()), "), or bfloat16 or float16 beside a float32 x, got ", dtype_name(y.scalar_type()));
  return y_type;
}

// The gate of x + gate * y, in the accumulate dtype or in x's.
Tensor check_gate(const Tensor& gate, const Tensor& x, bool& narrow) {
  narrow = gate.scalar_type() == x.scalar_type() && x.element_size() == 2;
  if (!narrow) return check_parameter("gate", gate, {x.size(0), x.size(2)}, x);
  check_same_device("gate", gate, "x", x);
  check_shape("gate", gate, {x.size(0), x.size(2)});
#ifdef CONVDIT_DEVICE_CUDA
  narrow = false;  // no kernel of ours takes it
  return torch::stable::to(dense(gate), accumulate_dtype(x));
#else
  return dense(gate);
#endif
}

Adaln params(const Tensor& x) {
  Adaln p{};
  p.batch = x.size(0), p.tokens = x.size(1), p.width = x.size(2);
  p.dtype = p.branch_dtype = dtype_of("x", x);
  p.x = x.const_data_ptr();
  return p;
}

// Large results are allocated after small ones, here and below: glibc gives the place of a freed aligned block to one of
// the same size only where it can grow into what lies behind, else it takes new pages at every call.
// `save`: with what the backward needs. Each tensor, and each more result of an operator, takes as long as a small kernel.
struct Normalised {
  std::optional<Tensor> mean, rstd;
  Tensor out;

  Normalised(Adaln& p, const Tensor& x, double eps, bool save) : mean(statistic(x, save)), rstd(statistic(x, save)), out(allocate_like(x)) {
    p.eps = eps, p.out = out.mutable_data_ptr();
    if (save) p.mean = mean->mutable_data_ptr(), p.rstd = rstd->mutable_data_ptr();
  }
  static std::optional<Tensor> statistic(const Tensor& x, bool save) {
    if (!save) return std::nullopt;
    return allocate({x.size(0), x.size(1)}, accumulate_dtype(x), x);
  }
};

Normalised layer_norm_modulate(const Tensor& x_in, const Tensor& shift_in, const Tensor& scale_in, double eps, bool save) {
  check_x(x_in);
  const Tensor shift = check_parameter("shift", shift_in, {x_in.size(0), x_in.size(2)}, x_in);
  const Tensor scale = check_parameter("scale", scale_in, {x_in.size(0), x_in.size(2)}, x_in);
  const Tensor x = dense(x_in);
  Adaln p = params(x);
  Normalised n(p, x, eps, save);
  p.shift = shift.const_data_ptr(), p.scale = scale.const_data_ptr();
  if (x.numel() > 0) CONVDIT_RUN(adaln, forward, x, p);
  return n;
}
Tensor layer_norm_modulate_fwd(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  return layer_norm_modulate(x, shift, scale, eps, false).out;
}
std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_fwd_save(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Normalised n = layer_norm_modulate(x, shift, scale, eps, true);
  return {n.out, *n.mean, *n.rstd};
}

Tensor gated_residual_fwd(const Tensor& x_in, const Tensor& y_in, const Tensor& gate_in) {
  check_x(x_in);
  const DType branch = check_branch(x_in, y_in);
  bool narrow = false;
  const Tensor gate = check_gate(gate_in, x_in, narrow);
  const Tensor x = dense(x_in), y = dense(y_in), residual = allocate_like(x);
  Adaln p = params(x);
  p.branch_dtype = branch, p.narrow_gate = narrow;
  p.y = y.const_data_ptr(), p.gate = gate.const_data_ptr(), p.residual = residual.mutable_data_ptr();
  if (x.numel() > 0) CONVDIT_RUN(adaln, forward, x, p);
  return residual;
}

std::tuple<Tensor, Normalised> gated_residual_layer_norm_modulate(const Tensor& x_in, const Tensor& y_in, const Tensor& gate_in,
                                                                  const Tensor& shift_in, const Tensor& scale_in, double eps, bool save) {
  check_x(x_in);
  const DType branch = check_branch(x_in, y_in);
  const Tensor gate = check_parameter("gate", gate_in, {x_in.size(0), x_in.size(2)}, x_in);
  const Tensor shift = check_parameter("shift", shift_in, {x_in.size(0), x_in.size(2)}, x_in);
  const Tensor scale = check_parameter("scale", scale_in, {x_in.size(0), x_in.size(2)}, x_in);
  const Tensor x = dense(x_in), y = dense(y_in);
  Adaln p = params(x);
  Normalised n(p, x, eps, save);
  const Tensor residual = allocate_like(x);
  p.branch_dtype = branch;
  p.y = y.const_data_ptr(), p.gate = gate.const_data_ptr(), p.residual = residual.mutable_data_ptr();
  p.shift = shift.const_data_ptr(), p.scale = scale.const_data_ptr();
  if (x.numel() > 0) CONVDIT_RUN(adaln, forward, x, p);
  return {residual, std::move(n)};
}
std::tuple<Tensor, Tensor> gated_residual_layer_norm_modulate_fwd(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift,
                                                                  const Tensor& scale, double eps) {
  const auto [residual, n] = gated_residual_layer_norm_modulate(x, y, gate, shift, scale, eps, false);
  return {residual, n.out};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm_modulate_fwd_save(const Tensor& x, const Tensor& y, const Tensor& gate,
                                                                                       const Tensor& shift, const Tensor& scale,
                                                                                       double eps) {
  const auto [residual, n] = gated_residual_layer_norm_modulate(x, y, gate, shift, scale, eps, true);
  return {residual, n.out, *n.mean, *n.rstd};
}

// The gradients of the three; `like` gives shape, dtype and device of x.
AdalnBackward backward_params(const Tensor& like) {
  AdalnBackward p{};
  p.batch = like.size(0), p.tokens = like.size(1), p.width = like.size(2);
  p.dtype = p.branch_dtype = dtype_of("x", like);
  return p;
}
int64_t workspace_size(const Tensor& x) { return x.size(0) * ((x.size(1) + kAdalnChunk - 1) / kAdalnChunk) * 3 * x.size(2); }
Tensor parameter_gradient(const Tensor& x, ScalarType dtype) {  // zero where there is no token to sum over
  const auto shape = {x.size(0), x.size(2)};
  return x.numel() > 0 ? allocate(shape, dtype, x) : allocate_zeros(shape, dtype, x);
}
Tensor parameter_gradient(const Tensor& x) { return parameter_gradient(x, accumulate_dtype(x)); }

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_bwd(const Tensor& grad_in, const Tensor& x_in, const Tensor& scale_in,
                                                           const Tensor& mean_in, const Tensor& rstd_in) {
  check_x(x_in);
  check_shape("grad", grad_in, {x_in.size(0), x_in.size(1), x_in.size(2)});
  check_dtype("grad", grad_in, x_in.scalar_type());
  const Tensor grad = dense(grad_in), x = dense(x_in), scale = dense(scale_in);
  Workspace work(workspace_size(x), accumulate_dtype(x), x);
  const Tensor grad_shift = parameter_gradient(x), grad_scale = parameter_gradient(x), grad_x = allocate_like(x);
  const Tensor mean = check_parameter("mean", mean_in, {x.size(0), x.size(1)}, x),
               rstd = check_parameter("rstd", rstd_in, {x.size(0), x.size(1)}, x);
  AdalnBackward p = backward_params(x);
  p.grad_out = grad.const_data_ptr(), p.residual = x.const_data_ptr(), p.scale = scale.const_data_ptr();
  p.mean = mean.const_data_ptr(), p.rstd = rstd.const_data_ptr(), p.grad_x = grad_x.mutable_data_ptr();
  p.grad_shift = grad_shift.mutable_data_ptr(), p.grad_scale = grad_scale.mutable_data_ptr(), p.workspace = work.data();
  if (x.numel() > 0) CONVDIT_RUN(adaln, backward, x, p);
  return {grad_x, grad_shift, grad_scale};
}

std::tuple<Tensor, Tensor> gated_residual_bwd(const Tensor& grad_in, const Tensor& y_in, const Tensor& gate_in) {
  check_x(grad_in);
  const DType branch = check_branch(grad_in, y_in);
  bool narrow = false;
  const Tensor gate = check_gate(gate_in, grad_in, narrow);
  const Tensor grad = dense(grad_in), y = dense(y_in);
  Workspace work(workspace_size(grad), accumulate_dtype(grad), grad);
  const Tensor grad_gate = narrow ? parameter_gradient(grad, grad.scalar_type()) : parameter_gradient(grad), grad_y = allocate_like(y);
  AdalnBackward p = backward_params(grad);
  p.branch_dtype = branch, p.narrow_gate = narrow;
  p.grad_residual = grad.const_data_ptr(), p.y = y.const_data_ptr(), p.gate = gate.const_data_ptr();
  p.grad_y = grad_y.mutable_data_ptr(), p.grad_gate = grad_gate.mutable_data_ptr(), p.workspace = work.data();
  if (grad.numel() > 0) CONVDIT_RUN(adaln, backward, grad, p);
  if (grad_gate.scalar_type() != gate_in.scalar_type()) return {grad_y, torch::stable::to(grad_gate, gate_in.scalar_type())};
  return {grad_y, grad_gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm_modulate_bwd(const Tensor& grad_residual_in,
                                                                                          const Tensor& grad_out_in,
                                                                                          const Tensor& residual_in, const Tensor& y_in,
                                                                                          const Tensor& gate_in, const Tensor& scale_in,
                                                                                          const Tensor& mean_in, const Tensor& rstd_in) {
  check_x(residual_in);
  const DType branch = check_branch(residual_in, y_in);
  const Tensor grad_residual = dense(grad_residual_in), grad_out = dense(grad_out_in), residual = dense(residual_in);
  const Tensor y = dense(y_in), gate = dense(gate_in), scale = dense(scale_in);
  Workspace work(workspace_size(residual), accumulate_dtype(residual), residual);
  const Tensor grad_gate = parameter_gradient(residual), grad_shift = parameter_gradient(residual);
  const Tensor grad_scale = parameter_gradient(residual), grad_x = allocate_like(residual), grad_y = allocate_like(y);
  const Tensor mean = check_parameter("mean", mean_in, {residual.size(0), residual.size(1)}, residual);
  const Tensor rstd = check_parameter("rstd", rstd_in, {residual.size(0), residual.size(1)}, residual);
  AdalnBackward p = backward_params(residual);
  p.branch_dtype = branch;
  p.grad_residual = grad_residual.const_data_ptr(), p.grad_out = grad_out.const_data_ptr(), p.residual = residual.const_data_ptr();
  p.y = y.const_data_ptr(), p.gate = gate.const_data_ptr(), p.scale = scale.const_data_ptr();
  p.mean = mean.const_data_ptr(), p.rstd = rstd.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr(), p.grad_y = grad_y.mutable_data_ptr(), p.grad_gate = grad_gate.mutable_data_ptr();
  p.grad_shift = grad_shift.mutable_data_ptr(), p.grad_scale = grad_scale.mutable_data_ptr(), p.workspace = work.data();
  if (residual.numel() > 0) CONVDIT_RUN(adaln, backward, residual, p);
  return {grad_x, grad_y, grad_gate, grad_shift, grad_scale};
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def("layer_norm_modulate_fwd(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor");
  m.def("layer_norm_modulate_fwd_save(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor out, Tensor mean, Tensor rstd)");
  m.def("layer_norm_modulate_bwd(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)");
  m.def("gated_residual_fwd(Tensor x, Tensor y, Tensor gate) -> Tensor");
  m.def("gated_residual_bwd(Tensor grad, Tensor y, Tensor gate) -> (Tensor, Tensor)");
  m.def(
      "gated_residual_layer_norm_modulate_fwd(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps)"
      " -> (Tensor residual, Tensor out)");
  m.def(
      "gated_residual_layer_norm_modulate_fwd_save(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps)"
      " -> (Tensor residual, Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "gated_residual_layer_norm_modulate_bwd(Tensor grad_residual, Tensor grad_out, Tensor residual, Tensor y, Tensor gate,"
      " Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("layer_norm_modulate_fwd", TORCH_BOX(&layer_norm_modulate_fwd));
  m.impl("layer_norm_modulate_fwd_save", TORCH_BOX(&layer_norm_modulate_fwd_save));
  m.impl("layer_norm_modulate_bwd", TORCH_BOX(&layer_norm_modulate_bwd));
  m.impl("gated_residual_fwd", TORCH_BOX(&gated_residual_fwd));
  m.impl("gated_residual_bwd", TORCH_BOX(&gated_residual_bwd));
  m.impl("gated_residual_layer_norm_modulate_fwd", TORCH_BOX(&gated_residual_layer_norm_modulate_fwd));
  m.impl("gated_residual_layer_norm_modulate_fwd_save", TORCH_BOX(&gated_residual_layer_norm_modulate_fwd_save));
  m.impl("gated_residual_layer_norm_modulate_bwd", TORCH_BOX(&gated_residual_layer_norm_modulate_bwd));
}

}  // namespace
}  // namespace convdit
