// The ConvNeXt V2 block without gradients, on the CPU: a few images at a time through one set of scratch tensors, so that the
// hidden tensor, four times as wide as the map, stays in cache and the batch's is never allocated. The matrix products are
// PyTorch's. See convnext_block.h for the formulas, reference/convnext_block.py for the whole.
#include "convnext_block/convnext_block.h"

#include <algorithm>
#include <array>

#include "common/checks.h"
#include "depthwise_conv/depthwise_conv.h"
#include "grn/grn.h"

namespace convdit {
namespace {

// Small images go through together, as many as have this many sites: a product with few rows is slow.
constexpr int64_t kSites = 800;

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is `out` once more: drop that reference
}

Tensor detach(const Tensor& t) {  // out= refuses factors that require gradients
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor pointwise_weight(const char* name, const Tensor& w, int64_t outputs, int64_t inputs, ScalarType dtype, const Tensor& x) {
  check_same_device(name, w, "x", x);
  check_shape(name, w, {outputs, inputs});
  check_dtype(name, w, dtype);
  return dense(detach(w));
}

std::optional<Tensor> optional_vector(const char* name, const std::optional<Tensor>& t, int64_t size, const Tensor& x) {
  if (!t) return t;
  return check_parameter(name, *t, {size}, x);
}
const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// The block's arguments, checked; its sizes; and the steps on a few images, whose arrays are in one set of scratch tensors.
struct Block {
  Tensor x, conv_weight, norm_weight, norm_bias, weight1, grn_weight, grn_bias, weight2;
  std::optional<Tensor> conv_bias, bias1, bias2;
  double eps;
  int64_t sites, channels, hidden, images;  // sites of an image; images that go through together
  ScalarType branch;
  bool fold;  // the response normalisation into weight2
  Tensor out, narrow_x, map, wide, packed, norm, scale, grn_work, tiles, folded, shift;

  void allocate_scratch() {
    const ScalarType wide_type = accumulate_dtype(x);
    const int64_t kernel = conv_weight.size(3), rows = images * sites;
    out = allocate_like(x);
    if (branch != x.scalar_type()) narrow_x = allocate({images, x.size(1), x.size(2), channels}, branch, x);
    map = allocate({rows, channels}, branch, x), wide = allocate({rows, hidden}, branch, x);
    packed = allocate({kernel * kernel, (channels + kChannelMultiple - 1) / kChannelMultiple * kChannelMultiple}, wide_type, x);
    norm = allocate({images, hidden}, wide_type, x), tiles = allocate({images + 1}, ScalarType::Long, x);
    grn_work = allocate({grn_max_tiles(images, rows, hidden) + images, hidden}, wide_type, x);
    if (fold) {
      scale = allocate({1, hidden}, wide_type, x), folded = allocate({channels, hidden}, branch, x);
      shift = allocate({channels}, wide_type, x);
      FoldBias p{channels, hidden, dtype_of("pwconv2_weight", weight2), weight2.const_data_ptr(), grn_bias.const_data_ptr(), data(bias2),
                 shift.mutable_data_ptr()};
      CONVDIT_RUN(convnext_block, fold_bias, x, p);
    }
  }

  void convolve_and_normalise(const Tensor& x_part, int64_t count) const {
    DepthwiseConvLayerNorm p{};
    p.conv.batch = count, p.conv.height = x.size(1), p.conv.width = x.size(2), p.conv.channels = channels, p.conv.kernel = conv_weight.size(3);
    p.conv.dtype = dtype_of("pwconv1_weight", weight1);
    p.conv.x = x_part.const_data_ptr(), p.conv.weight = conv_weight.const_data_ptr(), p.conv.bias = data(conv_bias);
    p.conv.y = map.mutable_data_ptr(), p.conv.packed = packed.mutable_data_ptr();
    p.eps = eps, p.ln_weight = norm_weight.const_data_ptr(), p.ln_bias = norm_bias.const_data_ptr(), p.out = map.mutable_data_ptr();
    CONVDIT_RUN(depthwise_conv, forward_layer_norm, x, p);
  }

  void activate(int64_t count) const {
    Grn p{};
    p.images = count, p.rows = count * sites, p.channels = hidden, p.dtype = dtype_of("pwconv1_weight", weight1);
    p.gelu = true, p.eps = eps, p.x = p.y = wide.mutable_data_ptr(), p.shift = data(bias1);
    p.weight = grn_weight.const_data_ptr(), p.bias = grn_bias.const_data_ptr(), p.norm = norm.mutable_data_ptr();
    if (fold) p.scale = scale.mutable_data_ptr();
    p.workspace = grn_work.mutable_data_ptr(), p.first_tile = tiles.mutable_data_ptr<int64_t>();
    CONVDIT_RUN(grn, forward, x, p);
  }

  void run() {
    const Tensor w1 = torch::stable::transpose(weight1, 0, 1), w2 = torch::stable::transpose(fold ? folded : weight2, 0, 1);
    for (int64_t first = 0; first < x.size(0); first += images) {
      const int64_t count = std::min(images, x.size(0) - first), rows = count * sites;
      Tensor x_part = torch::stable::narrow(x, 0, first, count);
      const Tensor out_part = torch::stable::narrow(out, 0, first, count);
      Tensor map_part = torch::stable::narrow(map, 0, 0, rows), wide_part = torch::stable::narrow(wide, 0, 0, rows);
      Tensor conv_x = x_part;
      if (branch != x.scalar_type()) {
        conv_x = torch::stable::narrow(narrow_x, 0, 0, count);
        torch::stable::copy_(conv_x, x_part);
      }
      convolve_and_normalise(conv_x, count);
      multiply(map_part, w1, wide_part);
      activate(count);
      if (fold) {
        FoldScale p{channels, hidden, dtype_of("pwconv2_weight", weight2), weight2.const_data_ptr(), scale.const_data_ptr(),
                    folded.mutable_data_ptr()};
        CONVDIT_RUN(convnext_block, fold_scale, x, p);
      }
      multiply(wide_part, w2, map_part);  // the normalised map has served
      AddResidual p{rows, channels, dtype_of("x", x), dtype_of("pwconv1_weight", weight1), x_part.const_data_ptr(), map.const_data_ptr(),
                    fold ? shift.const_data_ptr() : data(bias2), out_part.mutable_data_ptr()};
      CONVDIT_RUN(convnext_block, add_residual, x, p);
    }
  }
};

Tensor convnext_block_fwd(const Tensor& x, const Tensor& dwconv_weight, const std::optional<Tensor>& dwconv_bias, const Tensor& norm_weight,
                          const Tensor& norm_bias, const Tensor& pwconv1_weight, const std::optional<Tensor>& pwconv1_bias,
                          const Tensor& grn_weight, const Tensor& grn_bias, const Tensor& pwconv2_weight,
                          const std::optional<Tensor>& pwconv2_bias, double eps) {
  const DType dtype = dtype_of("x", x), branch = dtype_of("pwconv1_weight", pwconv1_weight);
  check_dim("x", x, 4, "(N, H, W, C)");
  check_dim("dwconv_weight", dwconv_weight, 4, "(C, 1, K, K)");
  check_dim("pwconv1_weight", pwconv1_weight, 2, "(D, C)");
  CONVDIT_CHECK(branch == dtype || (dtype == DType::f32 && branch != DType::f64), "pwconv1_weight: expected the dtype of x (",
                dtype_name(x.scalar_type()), "), or bfloat16 or float16 beside a float32 x, got ", dtype_name(pwconv1_weight.scalar_type()));
  const int64_t channels = x.size(3), hidden = pwconv1_weight.size(0), kernel = dwconv_weight.size(3);
  CONVDIT_CHECK(kernel % 2 == 1 && kernel <= kMaxKernel, "dwconv_weight: expected an odd kernel size from 1 to ", kMaxKernel, ", got ", kernel);
  Block b{};
  b.branch = pwconv1_weight.scalar_type(), b.eps = eps;
  b.conv_weight = check_parameter("dwconv_weight", dwconv_weight, {channels, 1, kernel, kernel}, x);
  b.conv_bias = optional_vector("dwconv_bias", dwconv_bias, channels, x);
  b.norm_weight = check_parameter("norm_weight", norm_weight, {channels}, x);
  b.norm_bias = check_parameter("norm_bias", norm_bias, {channels}, x);
  b.weight1 = pointwise_weight("pwconv1_weight", pwconv1_weight, hidden, channels, b.branch, x);
  b.bias1 = optional_vector("pwconv1_bias", pwconv1_bias, hidden, x);
  b.grn_weight = check_parameter("grn_weight", grn_weight, {hidden}, x);
  b.grn_bias = check_parameter("grn_bias", grn_bias, {hidden}, x);
  b.weight2 = pointwise_weight("pwconv2_weight", pwconv2_weight, channels, hidden, b.branch, x);
  b.bias2 = optional_vector("pwconv2_bias", pwconv2_bias, channels, x);
  if (x.numel() == 0) return allocate_like(x);
  if (!b.bias1) b.bias1 = allocate_zeros({hidden}, accumulate_dtype(x), x);  // the folding form of GRN takes one
  b.x = dense(x), b.channels = channels, b.hidden = hidden, b.sites = x.size(1) * x.size(2);
  const int64_t fitting = std::max<int64_t>(kSites / b.sites, 1), parts = (x.size(0) + fitting - 1) / fitting;
  b.images = (x.size(0) + parts - 1) / parts;
  b.fold = b.images == 1 && b.sites > channels;  // else scaling the hidden tensor is less work than scaling the weight
  b.allocate_scratch();
  b.run();
  return b.out;
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def(
      "convnext_block_fwd(Tensor x, Tensor dwconv_weight, Tensor? dwconv_bias, Tensor norm_weight, Tensor norm_bias, Tensor pwconv1_weight,"
      " Tensor? pwconv1_bias, Tensor grn_weight, Tensor grn_bias, Tensor pwconv2_weight, Tensor? pwconv2_bias, float eps) -> Tensor");
}
#endif

CONVDIT_KERNELS(m) { m.impl("convnext_block_fwd", TORCH_BOX(&convnext_block_fwd)); }

}  // namespace
}  // namespace convdit
