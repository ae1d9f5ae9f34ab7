// The ConvNeXt V2 block on the CPU: a few images at a time through one set of scratch tensors, so that the hidden tensor, four
// times as wide as the map, stays in cache. Without gradients the batch's is never allocated; with them it is, once, as the
// first matrix product leaves it: the backward computes the rest again. The matrix products are PyTorch's. See
// convnext_block.h for the formulas, reference/convnext_block.py for the whole.
#include "convnext_block/convnext_block.h"

#include <algorithm>

#include "common/products.h"
#include "depthwise_conv/depthwise_conv.h"
#include "grn/grn.h"

namespace convdit {
namespace {

// Small images go through together, as many as have this many sites: a product with few rows is slow. In the backward, as many
// as have this many hidden values: there nothing is gained by going image by image, as the forward does where it folds.
constexpr int64_t kSites = 800, kHiddenValues = 5 << 18;

// Of a contiguous matrix.
Tensor row_range(const Tensor& matrix, int64_t first, int64_t count) {
  const int64_t width = matrix.size(1);
  return view_of(matrix, {count, width}, {width, 1}, first * width);
}

Tensor pointwise_weight(const char* name, const Tensor& w, int64_t outputs, int64_t inputs, ScalarType dtype, const Tensor& x) {
  check_same_device(name, w, "x", x);
  check_shape(name, w, {outputs, inputs});
  check_dtype(name, w, dtype);
  return row_range(dense(w), 0, outputs);  // without its gradient, which out= refuses
}

std::optional<Tensor> optional_vector(const char* name, const std::optional<Tensor>& t, int64_t size, const Tensor& x) {
  if (!t) return t;
  return check_parameter(name, *t, {size}, x);
}
const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// What follows the normalised map: its arguments, checked; its sizes; and the steps on a few images. Maps are matrices of one
// row a site; a `part` of one is the rows of a few images.
struct Mlp {
  Tensor weight1, bias1, grn_weight, grn_bias, weight2;
  std::optional<Tensor> bias2;
  double eps;
  int64_t batch, sites, channels, hidden, images;  // sites of an image; images that go through together
  ScalarType branch;
  bool fold;  // the response normalisation into weight2
  Tensor scale, grn_work, tiles, folded, shift;

  // u has the shape of the map and its device; the branch may have another dtype.
  Mlp(const Tensor& u, ScalarType branch, const Tensor& pwconv1_weight, const std::optional<Tensor>& pwconv1_bias,
      const Tensor& grn_weight_in, const Tensor& grn_bias_in, const Tensor& pwconv2_weight, const std::optional<Tensor>& pwconv2_bias,
      double eps, bool backward = false)
      : eps(eps), batch(u.size(0)), sites(u.size(1) * u.size(2)), channels(u.size(3)), hidden(pwconv1_weight.size(0)), branch(branch) {
    weight1 = pointwise_weight("pwconv1_weight", pwconv1_weight, hidden, channels, branch, u);
    // The folding and the differentiated forms of GRN take one in any case.
    bias1 = pwconv1_bias ? check_parameter("pwconv1_bias", *pwconv1_bias, {hidden}, u) : allocate_zeros({hidden}, accumulate_dtype(u), u);
    grn_weight = check_parameter("grn_weight", grn_weight_in, {hidden}, u),
    grn_bias = check_parameter("grn_bias", grn_bias_in, {hidden}, u);
    weight2 = pointwise_weight("pwconv2_weight", pwconv2_weight, channels, hidden, branch, u);
    if (pwconv2_bias) bias2 = check_parameter("pwconv2_bias", *pwconv2_bias, {channels}, u);
    const int64_t wanted = backward ? kHiddenValues / std::max<int64_t>(hidden, 1) : kSites;
    const int64_t fitting = std::max<int64_t>(wanted / std::max<int64_t>(sites, 1), 1);
    const int64_t parts = std::max<int64_t>((batch + fitting - 1) / fitting, 1);
    images = (batch + parts - 1) / parts;
    fold = images == 1 && sites > channels;  // else scaling the hidden tensor is less work than scaling the weight
  }

  DType dtype() const { return dtype_of("pwconv1_weight", weight1); }
  Tensor scratch(int64_t width) const { return allocate({images * sites, width}, branch, weight1); }
  Tensor part(const Tensor& matrix, int64_t first, int64_t count) const { return row_range(matrix, first * sites, count * sites); }
  // f(first image, images) for a few images at a time, in order.
  template <class F>
  void for_parts(const F& f) const {
    for (int64_t first = 0; first < batch; first += images) f(first, std::min(images, batch - first));
  }

  void allocate_grn(int64_t per_tile, int64_t per_image) {
    const int64_t rows = per_tile * grn_max_tiles(images, images * sites, hidden) + per_image * images;
    grn_work = allocate({rows, hidden}, accumulate_dtype(weight1), weight1), tiles = allocate({images + 1}, ScalarType::Long, weight1);
  }
  GrnShape grn_shape(int64_t count) const { return {count, count * sites, hidden, nullptr, dtype(), true, eps}; }

  void prepare_forward() {
    allocate_grn(1, 1);
    if (!fold) return;
    const ScalarType wide_type = accumulate_dtype(weight1);
    scale = allocate({1, hidden}, wide_type, weight1), folded = allocate({channels, hidden}, branch, weight1);
    shift = allocate({channels}, wide_type, weight1);
    FoldBias p{channels, hidden, dtype(), weight2.const_data_ptr(), grn_bias.const_data_ptr(), data(bias2), shift.mutable_data_ptr()};
    CONVDIT_RUN(convnext_block, fold_bias, weight1, p);
  }

  // One part. Where nothing is kept for a backward, `wide` may be hidden_part and `product` may be u.
  void forward(int64_t count, const Tensor& x, const Tensor& u, const Tensor& hidden_part, const Tensor& wide, const Tensor& norm,
               const Tensor& product, const Tensor& out) const {
    multiply(u, transposed(weight1), hidden_part);
    Grn p{grn_shape(count)};
    p.x = hidden_part.const_data_ptr(), p.y = wide.mutable_data_ptr(), p.shift = bias1.const_data_ptr();
    p.weight = grn_weight.const_data_ptr(), p.bias = grn_bias.const_data_ptr(), p.norm = norm.mutable_data_ptr();
    if (fold) p.scale = scale.mutable_data_ptr();
    p.workspace = grn_work.mutable_data_ptr(), p.first_tile = tiles.mutable_data_ptr<int64_t>();
    CONVDIT_RUN(grn, forward, x, p);
    if (fold) {
      FoldScale s{channels, hidden, dtype(), weight2.const_data_ptr(), scale.const_data_ptr(), folded.mutable_data_ptr()};
      CONVDIT_RUN(convnext_block, fold_scale, x, s);
    }
    multiply(wide, transposed(fold ? folded : weight2), product);
    AddResidual r{count * sites,
                  channels,
                  dtype_of("x", x),
                  dtype(),
                  x.const_data_ptr(),
                  product.const_data_ptr(),
                  fold ? shift.const_data_ptr() : data(bias2),
                  out.mutable_data_ptr()};
    CONVDIT_RUN(convnext_block, add_residual, x, r);
  }
};

void check_map(const char* name, const Tensor& x) {
  dtype_of(name, x);
  check_dim(name, x, 4, "(N, H, W, C)");
}
// The branch is computed in its parameter's dtype: that of x, a half beside a float32 x, or float32 beside a half.
void check_branch(const Tensor& x, const char* name, const Tensor& t) {
  const DType dtype = dtype_of("x", x), branch = dtype_of(name, t);
  CONVDIT_CHECK(branch == dtype || (dtype == DType::f32 && branch != DType::f64) || (dtype != DType::f64 && branch == DType::f32), name,
                ": expected the dtype of x (", dtype_name(x.scalar_type()), "), or float32 beside a half and a half beside float32, got ",
                dtype_name(t.scalar_type()));
}
Tensor rows_of(const Tensor& map) {  // of a contiguous one: a site each
  return view_of(map, {map.size(0) * map.size(1) * map.size(2), map.size(3)}, {map.size(3), 1});
}

// The whole block, without gradients.
Tensor convnext_block_fwd(const Tensor& x_in, const Tensor& dwconv_weight, const std::optional<Tensor>& dwconv_bias,
                          const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& pwconv1_weight,
                          const std::optional<Tensor>& pwconv1_bias, const Tensor& grn_weight, const Tensor& grn_bias,
                          const Tensor& pwconv2_weight, const std::optional<Tensor>& pwconv2_bias, double eps) {
  check_map("x", x_in);
  check_dim("dwconv_weight", dwconv_weight, 4, "(C, 1, K, K)");
  check_dim("pwconv1_weight", pwconv1_weight, 2, "(D, C)");
  check_branch(x_in, "pwconv1_weight", pwconv1_weight);
  const int64_t channels = x_in.size(3), kernel = dwconv_weight.size(3);
  CONVDIT_CHECK(kernel % 2 == 1 && kernel <= kMaxKernel, "dwconv_weight: expected an odd kernel size from 1 to ", kMaxKernel, ", got ",
                kernel);
  const Tensor conv_weight = check_parameter("dwconv_weight", dwconv_weight, {channels, 1, kernel, kernel}, x_in);
  const std::optional<Tensor> conv_bias = optional_vector("dwconv_bias", dwconv_bias, channels, x_in);
  const Tensor ln_weight = check_parameter("norm_weight", norm_weight, {channels}, x_in);
  const Tensor ln_bias = check_parameter("norm_bias", norm_bias, {channels}, x_in);
  const ScalarType branch = pwconv1_weight.scalar_type(), wide_type = accumulate_dtype(x_in);
  Mlp mlp(x_in, branch, pwconv1_weight, pwconv1_bias, grn_weight, grn_bias, pwconv2_weight, pwconv2_bias, eps);
  const Tensor out = allocate_like(x_in);
  if (x_in.numel() == 0) return out;
  const Tensor x_map = dense(x_in), x = rows_of(x_map), out_rows = rows_of(out);
  const Tensor map = mlp.scratch(channels), wide = mlp.scratch(mlp.hidden);
  Tensor branch_x;
  if (branch != x.scalar_type()) branch_x = mlp.scratch(channels);
  const Tensor norm = allocate({mlp.images, mlp.hidden}, wide_type, x);
  const Tensor packed = allocate({kernel * kernel, (channels + kChannelMultiple - 1) / kChannelMultiple * kChannelMultiple}, wide_type, x);
  mlp.prepare_forward();
  mlp.for_parts([&](int64_t first, int64_t count) {
    const Tensor x_part = mlp.part(x, first, count);
    Tensor conv_x = x_part;
    if (branch != x.scalar_type()) {
      conv_x = mlp.part(branch_x, 0, count);
      torch::stable::copy_(conv_x, x_part);
    }
    DepthwiseConvLayerNorm p{};
    p.conv.batch = count, p.conv.height = x_in.size(1), p.conv.width = x_in.size(2), p.conv.channels = channels, p.conv.kernel = kernel;
    p.conv.dtype = mlp.dtype();
    p.conv.x = conv_x.const_data_ptr(), p.conv.weight = conv_weight.const_data_ptr(), p.conv.bias = data(conv_bias);
    p.conv.y = map.mutable_data_ptr(), p.conv.packed = packed.mutable_data_ptr();
    p.eps = eps, p.ln_weight = ln_weight.const_data_ptr(), p.ln_bias = ln_bias.const_data_ptr(), p.out = map.mutable_data_ptr();
    CONVDIT_RUN(depthwise_conv, forward_layer_norm, x, p);
    const Tensor u = mlp.part(map, 0, count), hidden = mlp.part(wide, 0, count);
    mlp.forward(count, x_part, u, hidden, hidden, norm, u, mlp.part(out_rows, first, count));
  });
  return out;
}

// The block after its LayerNorm, u, and what the backward needs: the first product and the response norms.
std::tuple<Tensor, Tensor, Tensor> convnext_mlp_fwd(const Tensor& x_in, const Tensor& u_in, const Tensor& pwconv1_weight,
                                                    const std::optional<Tensor>& pwconv1_bias, const Tensor& grn_weight,
                                                    const Tensor& grn_bias, const Tensor& pwconv2_weight,
                                                    const std::optional<Tensor>& pwconv2_bias, double eps) {
  check_map("x", x_in);
  check_map("u", u_in);
  check_same_device("u", u_in, "x", x_in);
  check_shape("u", u_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  check_branch(x_in, "u", u_in);
  check_dim("pwconv1_weight", pwconv1_weight, 2, "(D, C)");
  Mlp mlp(u_in, u_in.scalar_type(), pwconv1_weight, pwconv1_bias, grn_weight, grn_bias, pwconv2_weight, pwconv2_bias, eps);
  const Tensor x_map = dense(x_in), x = rows_of(x_map), out = allocate_like(x_map),
               hidden = allocate({mlp.batch * mlp.sites, mlp.hidden}, mlp.branch, x);
  if (x.numel() == 0) return {out, hidden, allocate_zeros({mlp.batch, mlp.hidden}, accumulate_dtype(x), x)};
  const Tensor norm = allocate({mlp.batch, mlp.hidden}, accumulate_dtype(x), x);
  const Tensor u = rows_of(dense(u_in)), out_rows = rows_of(out);
  const Tensor wide = mlp.scratch(mlp.hidden), product = mlp.scratch(mlp.channels);
  mlp.prepare_forward();
  mlp.for_parts([&](int64_t first, int64_t count) {
    mlp.forward(count, mlp.part(x, first, count), mlp.part(u, first, count), mlp.part(hidden, first, count), mlp.part(wide, 0, count),
                row_range(norm, first, count), mlp.part(product, 0, count), mlp.part(out_rows, first, count));
  });
  return {out, hidden, norm};
}

// The gradient of a weight, a sum over parts in order: each part's product is added to float sums, or is the sum if it is alone.
struct WeightGrad {
  Tensor sum, product;
  bool wanted, direct = true;

  WeightGrad(bool wanted, const Tensor& weight, bool several) : wanted(wanted) {
    const bool halves = weight.scalar_type() != accumulate_dtype(weight);
    if (!wanted) sum = allocate({0}, weight.scalar_type(), weight);
    else if (several && halves) sum = allocate_zeros({weight.size(0), weight.size(1)}, ScalarType::Float, weight), direct = false;
    else sum = allocate_like(weight);
    if (wanted && several) product = allocate_like(weight);
  }
  void add(const Tensor& grad, const Tensor& input) {
    if (!wanted) return;
    multiply(transposed(grad), input, direct ? sum : product);
    if (!direct) {
      AddResidual p{sum.size(0),
                    sum.size(1),
                    dtype_of("sum", sum),
                    dtype_of("product", product),
                    sum.const_data_ptr(),
                    product.const_data_ptr(),
                    nullptr,
                    sum.mutable_data_ptr()};
      CONVDIT_RUN(convnext_block, add_residual, sum, p);
    }
    direct = false;
  }
  Tensor result(const Tensor& weight) {
    if (!wanted || sum.scalar_type() == weight.scalar_type()) return sum;
    torch::stable::copy_(product, sum);
    return product;
  }
};

// Gradients of u and of the parameters but pwconv2_bias; a matrix where it is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> convnext_mlp_bwd(
    const Tensor& grad_in, const Tensor& u_in, const Tensor& hidden_in, const Tensor& norm_in, const Tensor& pwconv1_weight,
    const std::optional<Tensor>& pwconv1_bias, const Tensor& grn_weight, const Tensor& grn_bias, const Tensor& pwconv2_weight, double eps,
    bool need_u, bool need_weight1, bool need_weight2) {
  check_map("u", u_in);
  check_same_device("grad", grad_in, "u", u_in);
  check_shape("grad", grad_in, {u_in.size(0), u_in.size(1), u_in.size(2), u_in.size(3)});
  check_dtype("grad", grad_in, u_in.scalar_type());
  check_dim("pwconv1_weight", pwconv1_weight, 2, "(D, C)");
  Mlp mlp(u_in, u_in.scalar_type(), pwconv1_weight, pwconv1_bias, grn_weight, grn_bias, pwconv2_weight, std::nullopt, eps, true);
  const int64_t rows = mlp.batch * mlp.sites;
  check_shape("hidden", hidden_in, {rows, mlp.hidden});
  check_dtype("hidden", hidden_in, mlp.branch);
  check_same_device("hidden", hidden_in, "u", u_in);
  const Tensor all_norms = check_parameter("norm", norm_in, {mlp.batch, mlp.hidden}, u_in);
  const Tensor u_map = dense(u_in), u = rows_of(u_map), grad = rows_of(dense(grad_in)), hidden = dense(hidden_in);
  const Tensor grad_u = need_u ? allocate_like(u_map) : allocate({0}, mlp.branch, u);
  const auto vector = [&] { return allocate_zeros({mlp.hidden}, accumulate_dtype(u), u); };
  const Tensor grad_bias1 = vector(), grad_grn_weight = vector(), grad_grn_bias = vector();
  const bool several = mlp.images < mlp.batch;
  WeightGrad grad1(need_weight1, mlp.weight1, several), grad2(need_weight2, mlp.weight2, several);
  if (u.numel() == 0) {
    torch::stable::zero_(grad1.sum), torch::stable::zero_(grad2.sum);
    return {grad_u, grad1.result(mlp.weight1), grad_bias1, grad_grn_weight, grad_grn_bias, grad2.result(mlp.weight2)};
  }
  const Tensor wide = mlp.scratch(mlp.hidden), wide_grad = mlp.scratch(mlp.hidden);
  mlp.allocate_grn(2, 4);
  mlp.for_parts([&](int64_t first, int64_t count) {
    const Tensor grad_part = mlp.part(grad, first, count), u_part = mlp.part(u, first, count);
    const Tensor y = mlp.part(wide, 0, count), grad_y = mlp.part(wide_grad, 0, count);
    multiply(grad_part, mlp.weight2, grad_y);
    GrnBackward p{mlp.grn_shape(count)};
    p.grad = grad_y.const_data_ptr(), p.grad_x = grad_y.mutable_data_ptr(), p.x = mlp.part(hidden, first, count).const_data_ptr();
    p.norm = row_range(all_norms, first, count).const_data_ptr(), p.weight = mlp.grn_weight.const_data_ptr();
    p.bias = mlp.grn_bias.const_data_ptr(), p.shift = mlp.bias1.const_data_ptr(), p.y = y.mutable_data_ptr(), p.add = first > 0;
    p.grad_shift = grad_bias1.mutable_data_ptr(), p.grad_weight = grad_grn_weight.mutable_data_ptr();
    p.grad_bias = grad_grn_bias.mutable_data_ptr();
    p.workspace = mlp.grn_work.mutable_data_ptr(), p.first_tile = mlp.tiles.mutable_data_ptr<int64_t>();
    CONVDIT_RUN(grn, backward, u, p);  // grad_y is the gradient of the first product now
    grad2.add(grad_part, y);
    grad1.add(grad_y, u_part);
    if (need_u) multiply(grad_y, mlp.weight1, mlp.part(rows_of(grad_u), first, count));
  });
  return {grad_u, grad1.result(mlp.weight1), grad_bias1, grad_grn_weight, grad_grn_bias, grad2.result(mlp.weight2)};
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def(
      "convnext_block_fwd(Tensor x, Tensor dwconv_weight, Tensor? dwconv_bias, Tensor norm_weight, Tensor norm_bias, Tensor pwconv1_weight,"
      " Tensor? pwconv1_bias, Tensor grn_weight, Tensor grn_bias, Tensor pwconv2_weight, Tensor? pwconv2_bias, float eps) -> Tensor");
  m.def(
      "convnext_mlp_fwd(Tensor x, Tensor u, Tensor pwconv1_weight, Tensor? pwconv1_bias, Tensor grn_weight, Tensor grn_bias,"
      " Tensor pwconv2_weight, Tensor? pwconv2_bias, float eps) -> (Tensor out, Tensor hidden, Tensor norm)");
  m.def(
      "convnext_mlp_bwd(Tensor grad, Tensor u, Tensor hidden, Tensor norm, Tensor pwconv1_weight, Tensor? pwconv1_bias, Tensor grn_weight,"
      " Tensor grn_bias, Tensor pwconv2_weight, float eps, bool need_u, bool need_weight1, bool need_weight2)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("convnext_block_fwd", TORCH_BOX(&convnext_block_fwd));
  m.impl("convnext_mlp_fwd", TORCH_BOX(&convnext_mlp_fwd));
  m.impl("convnext_mlp_bwd", TORCH_BOX(&convnext_mlp_bwd));
}

}  // namespace
}  // namespace convdit
