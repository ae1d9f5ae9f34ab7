// Schemas, checks and allocation of the depthwise convolution and the LayerNorm after it; see depthwise_conv.h for the formulas.
#include "depthwise_conv/depthwise_conv.h"

#include <algorithm>

#include "common/checks.h"

namespace convdit {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded_channels(int64_t channels) { return ceil_div(channels, kChannelMultiple) * kChannelMultiple; }

void check_map(const char* name, const Tensor& x) {
  dtype_of(name, x);
  check_dim(name, x, 4, "(N, H, W, C)");
}

void check_kernel_size(const char* name, int64_t kernel) {
  CONVDIT_CHECK(kernel % 2 == 1 && kernel >= 1 && kernel <= kMaxKernel, name, ": expected an odd kernel size from 1 to ", kMaxKernel,
                ", got ", kernel);
}

Tensor check_weight(const Tensor& weight, const Tensor& x) {
  check_dim("weight", weight, 4, "(C, 1, K, K)");
  const int64_t kernel = weight.size(3);
  CONVDIT_CHECK(weight.size(0) == x.size(3) && weight.size(1) == 1 && weight.size(2) == kernel, "weight: expected shape (", x.size(3),
                ", 1, K, K), got ", describe(weight));
  check_kernel_size("weight", kernel);
  return check_parameter("weight", weight, {x.size(3), 1, kernel, kernel}, x);
}

std::optional<Tensor> check_bias(const std::optional<Tensor>& bias, const Tensor& x) {
  if (!bias) return bias;
  return check_parameter("bias", *bias, {x.size(3)}, x);
}

// Without the result, which the callers allocate last: glibc gives the place of a freed aligned block to one of the same size
// only where it can grow into what lies behind, else it takes new pages at every call.
struct Convolution {
  DepthwiseConv params{};
  Workspace<> packed;

  Convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool flip)
      : packed(weight.size(3) * weight.size(3) * padded_channels(x.size(3)), accumulate_dtype(x), x) {
    params.batch = x.size(0), params.height = x.size(1), params.width = x.size(2), params.channels = x.size(3);
    params.kernel = weight.size(3), params.dtype = dtype_of("x", x), params.flip = flip;
    params.x = x.const_data_ptr(), params.weight = weight.const_data_ptr(), params.bias = data(bias);
    params.packed = packed.data();
  }
};

Tensor depthwise_conv2d_fwd(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
  check_map("x", x_in);
  const Tensor weight = check_weight(weight_in, x_in);
  const std::optional<Tensor> bias = check_bias(bias_in, x_in);
  const Tensor x = dense(x_in);
  Convolution c(x, weight, bias, false);
  const Tensor y = allocate_like(x);
  c.params.y = y.mutable_data_ptr();
  if (x.numel() > 0) CONVDIT_RUN(depthwise_conv, forward, x, c.params);
  return y;
}

Tensor depthwise_conv2d_input_grad(const Tensor& grad_in, const Tensor& weight_in) {
  check_map("grad", grad_in);
  const Tensor weight = check_weight(weight_in, grad_in);
  const Tensor grad = dense(grad_in);
  Convolution c(grad, weight, std::nullopt, true);
  const Tensor grad_x = allocate_like(grad);
  c.params.y = grad_x.mutable_data_ptr();
  if (grad.numel() > 0) CONVDIT_RUN(depthwise_conv, forward, grad, c.params);
  return grad_x;
}

// Into how many parts a sum over `rows` rows is cut: enough for every thread or multiprocessor, and on a CPU, where a part is one sum
// after another, none of more than `longest` rows: it would lose digits. It must not depend on the number of threads.
int64_t sum_parts(int64_t rows, int64_t longest, int64_t tasks_per_part) {
#ifdef CONVDIT_DEVICE_CUDA
  constexpr int64_t kTasks = 1024;
  longest = rows;
#else
  constexpr int64_t kTasks = 48;
#endif
  return std::max<int64_t>(1, std::min(rows, std::max(ceil_div(kTasks, tasks_per_part), ceil_div(rows, longest))));
}
constexpr int64_t kPartSites = 32 * 49;  // of a weight gradient

std::tuple<Tensor, Tensor> depthwise_conv2d_weight_grad(const Tensor& grad_in, const Tensor& x_in, int64_t kernel) {
  check_map("x", x_in);
  check_kernel_size("kernel_size", kernel);
  check_same_device("grad", grad_in, "x", x_in);
  check_shape("grad", grad_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  check_dtype("grad", grad_in, x_in.scalar_type());
  const Tensor grad = dense(grad_in), x = dense(x_in);
  const int64_t channels = x.size(3);
  const auto dtype = accumulate_dtype(x);
  if (x.numel() == 0) return {allocate_zeros({channels, 1, kernel, kernel}, dtype, x), allocate_zeros({channels}, dtype, x)};
  const Tensor grad_weight = allocate({channels, 1, kernel, kernel}, dtype, x), grad_bias = allocate({channels}, dtype, x);
  DepthwiseConvWeightGrad p{};
  p.batch = x.size(0), p.height = x.size(1), p.width = x.size(2), p.channels = channels, p.kernel = kernel;
  p.dtype = dtype_of("x", x);
  p.grad = grad.const_data_ptr(), p.x = x.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr(), p.grad_bias = grad_bias.mutable_data_ptr();
  p.parts = sum_parts(p.batch * p.height, std::max<int64_t>(1, kPartSites / p.width), padded_channels(channels) / kChannelMultiple);
  Workspace work(p.parts * (kernel * kernel + 1) * padded_channels(channels), dtype, x);
  p.workspace = work.data();
  CONVDIT_RUN(depthwise_conv, weight_grad, x, p);
  return {grad_weight, grad_bias};
}

// What the backward needs: the convolution's output and each site's mean and 1/deviation.
struct Kept {
  Tensor mean, rstd, conv;

  explicit Kept(const Tensor& x)
      : mean(allocate({x.size(0), x.size(1), x.size(2)}, accumulate_dtype(x), x)), rstd(allocate_like(mean)), conv(allocate_like(x)) {}
};

Tensor convolve_and_normalise(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in, const Tensor& ln_weight_in,
                              const Tensor& ln_bias_in, double eps, std::optional<Kept>* kept = nullptr) {
  check_map("x", x_in);
  const Tensor weight = check_weight(weight_in, x_in);
  const std::optional<Tensor> bias = check_bias(bias_in, x_in);
  const Tensor ln_weight = check_parameter("ln_weight", ln_weight_in, {x_in.size(3)}, x_in);
  const Tensor ln_bias = check_parameter("ln_bias", ln_bias_in, {x_in.size(3)}, x_in);
  const Tensor x = dense(x_in);
  const Convolution c(x, weight, bias, false);
  if (kept) kept->emplace(x);
  const Tensor out = allocate_like(x);
  DepthwiseConvLayerNorm p{};
  p.conv = c.params, p.eps = eps;
  p.conv.y = (kept ? (*kept)->conv : out).mutable_data_ptr();
  p.ln_weight = ln_weight.const_data_ptr(), p.ln_bias = ln_bias.const_data_ptr(), p.out = out.mutable_data_ptr();
  if (kept) p.mean = (*kept)->mean.mutable_data_ptr(), p.rstd = (*kept)->rstd.mutable_data_ptr();
  if (x.numel() > 0) CONVDIT_RUN(depthwise_conv, forward_layer_norm, x, p);
  return out;
}
Tensor depthwise_conv2d_layer_norm_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& ln_weight,
                                       const Tensor& ln_bias, double eps) {
  return convolve_and_normalise(x, weight, bias, ln_weight, ln_bias, eps);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_conv2d_layer_norm_fwd_save(const Tensor& x, const Tensor& weight,
                                                                                const std::optional<Tensor>& bias, const Tensor& ln_weight,
                                                                                const Tensor& ln_bias, double eps) {
  std::optional<Kept> kept;
  const Tensor out = convolve_and_normalise(x, weight, bias, ln_weight, ln_bias, eps, &kept);
  return {out, kept->conv, kept->mean, kept->rstd};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_layer_norm_bwd(const Tensor& grad_in, const Tensor& conv_in, const Tensor& ln_weight_in,
                                                                   const Tensor& mean_in, const Tensor& rstd_in) {
  check_map("conv", conv_in);
  const int64_t n = conv_in.size(0), h = conv_in.size(1), w = conv_in.size(2), channels = conv_in.size(3);
  check_same_device("grad", grad_in, "conv", conv_in);
  check_shape("grad", grad_in, {n, h, w, channels});
  check_dtype("grad", grad_in, conv_in.scalar_type());
  const Tensor ln_weight = check_parameter("ln_weight", ln_weight_in, {channels}, conv_in);
  const Tensor mean = check_parameter("mean", mean_in, {n, h, w}, conv_in), rstd = check_parameter("rstd", rstd_in, {n, h, w}, conv_in);
  const Tensor grad = dense(grad_in), conv = dense(conv_in);
  const auto dtype = accumulate_dtype(conv);
  if (conv.numel() == 0) return {allocate_like(conv), allocate_zeros({channels}, dtype, conv), allocate_zeros({channels}, dtype, conv)};
  const Tensor grad_weight = allocate({channels}, dtype, conv), grad_bias = allocate({channels}, dtype, conv);
  LayerNormBackward p{};
  p.rows = n * h * w, p.channels = channels, p.dtype = dtype_of("conv", conv);
  p.grad = grad.const_data_ptr(), p.x = conv.const_data_ptr(), p.weight = ln_weight.const_data_ptr();
  p.mean = mean.const_data_ptr(), p.rstd = rstd.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr(), p.grad_bias = grad_bias.mutable_data_ptr();
  p.parts = sum_parts(ceil_div(p.rows, 16), p.rows, 1);
  Workspace work(p.parts * 2 * channels, dtype, conv);
  const Tensor grad_conv = allocate_like(conv);
  p.grad_x = grad_conv.mutable_data_ptr();
  p.workspace = work.data();
  CONVDIT_RUN(depthwise_conv, layer_norm_backward, conv, p);
  return {grad_conv, grad_weight, grad_bias};
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def("depthwise_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("depthwise_conv2d_input_grad(Tensor grad, Tensor weight) -> Tensor");
  m.def("depthwise_conv2d_weight_grad(Tensor grad, Tensor x, int kernel_size) -> (Tensor, Tensor)");
  m.def("depthwise_conv2d_layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor ln_weight, Tensor ln_bias, float eps) -> Tensor");
  m.def(
      "depthwise_conv2d_layer_norm_fwd_save(Tensor x, Tensor weight, Tensor? bias, Tensor ln_weight, Tensor ln_bias, float eps)"
      " -> (Tensor out, Tensor conv, Tensor mean, Tensor rstd)");
  m.def(
      "depthwise_conv2d_layer_norm_bwd(Tensor grad, Tensor conv, Tensor ln_weight, Tensor mean, Tensor rstd)"
      " -> (Tensor, Tensor, Tensor)");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("depthwise_conv2d_fwd", TORCH_BOX(&depthwise_conv2d_fwd));
  m.impl("depthwise_conv2d_input_grad", TORCH_BOX(&depthwise_conv2d_input_grad));
  m.impl("depthwise_conv2d_weight_grad", TORCH_BOX(&depthwise_conv2d_weight_grad));
  m.impl("depthwise_conv2d_layer_norm_fwd", TORCH_BOX(&depthwise_conv2d_layer_norm_fwd));
  m.impl("depthwise_conv2d_layer_norm_fwd_save", TORCH_BOX(&depthwise_conv2d_layer_norm_fwd_save));
  m.impl("depthwise_conv2d_layer_norm_bwd", TORCH_BOX(&depthwise_conv2d_layer_norm_bwd));
}

}  // namespace
}  // namespace convdit
