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

Tensor pointwise_weight(const char* name, const Tensor& w, int64_t outputs, int64_t inputs, ScalarType dtype, const Tensor& x) {
  check_same_device(name, w, "x", x);
  check_shape(name, w, {outputs, inputs});
  check_dtype(name, w, dtype);
  return dense(w);
}

// What follows the normalised map: its arguments, checked; its sizes; and the steps on a few images. Maps are matrices of one
// row a site; a `part` of one is the rows of a few images.
struct Mlp {
  double eps;
  int64_t batch, sites, channels, hidden, images;  // sites of an image; images that go through together
  ScalarType branch, wide;                         // of the branch; of vectors and sums
  Tensor weight1, bias1, grn_weight, grn_bias, weight2;
  std::optional<Tensor> bias2;
  bool fold;  // the response normalisation into weight2
  Scratch maps, vectors;
  int64_t grn_work = 0, tiles = 0, scale = 0, folded = 0, shift = 0;  // places

  // u has the shape of the map and its device; the branch may have another dtype.
  Mlp(const Tensor& u, ScalarType branch, const Tensor& pwconv1_weight, const std::optional<Tensor>& pwconv1_bias,
      const Tensor& grn_weight_in, const Tensor& grn_bias_in, const Tensor& pwconv2_weight, const std::optional<Tensor>& pwconv2_bias,
      double eps, bool backward = false)
      : eps(eps),
        batch(u.size(0)),
        sites(u.size(1) * u.size(2)),
        channels(u.size(3)),
        hidden(pwconv1_weight.size(0)),
        branch(branch),
        wide(accumulate_dtype(u)),
        weight1(pointwise_weight("pwconv1_weight", pwconv1_weight, hidden, channels, branch, u)),
        // The folding and the differentiated forms of GRN take one in any case.
        bias1(pwconv1_bias ? check_parameter("pwconv1_bias", *pwconv1_bias, {hidden}, u) : allocate_zeros({hidden}, wide, u)),
        grn_weight(check_parameter("grn_weight", grn_weight_in, {hidden}, u)),
        grn_bias(check_parameter("grn_bias", grn_bias_in, {hidden}, u)),
        weight2(pointwise_weight("pwconv2_weight", pwconv2_weight, channels, hidden, branch, u)),
        bias2(optional_vector("pwconv2_bias", pwconv2_bias, channels, u)) {
    const int64_t wanted = backward ? kHiddenValues / std::max<int64_t>(hidden, 1) : kSites;
    const int64_t fitting = std::max<int64_t>(wanted / std::max<int64_t>(sites, 1), 1);
    const int64_t parts = std::max<int64_t>((batch + fitting - 1) / fitting, 1);
    images = (batch + parts - 1) / parts;
    fold = !backward && images == 1 && sites > channels;  // else scaling the hidden tensor is less work than scaling the weight
    const int64_t per_tile = backward ? 2 : 1, per_image = backward ? 4 : 1;
    grn_work = vectors.reserve((per_tile * grn_max_tiles(images, images * sites, hidden) + per_image * images) * hidden);
    tiles = vectors.reserve(2 * (images + 1));  // int64
    if (!fold) return;
    scale = vectors.reserve(hidden), shift = vectors.reserve(channels), folded = maps.reserve(channels * hidden);
  }

  DType dtype() const { return dtype_of("pwconv1_weight", weight1); }
  int64_t reserve_map(int64_t width) { return maps.reserve(images * sites * width); }
  void allocate_scratch() { maps.allocate(branch, weight1), vectors.allocate(wide, weight1); }
  Matrix scratch_map(int64_t at, int64_t width) const { return maps.matrix(at, images * sites, width); }
  Matrix part(const Matrix& map, int64_t first, int64_t count) const { return map.row_range(first * sites, count * sites); }
  // f(first image, images) for a few images at a time, in order.
  template <class F>
  void for_parts(const F& f) const {
    for (int64_t first = 0; first < batch; first += images) f(first, std::min(images, batch - first));
  }

  GrnShape grn_shape(int64_t count) const { return {count, count * sites, hidden, nullptr, dtype(), true, eps}; }

  void prepare_forward() const {
    if (!fold) return;
    FoldBias p{channels, hidden, dtype(), weight2.const_data_ptr(), grn_bias.const_data_ptr(), data(bias2), vectors.place(shift)};
    CONVDIT_RUN(convnext_block, fold_bias, weight1, p);
  }

  // One part. Where nothing is kept for a backward, `wide_part` may be hidden_part and `product` may be u.
  void forward(int64_t count, const Matrix& x, const Matrix& u, const Matrix& hidden_part, const Matrix& wide_part, void* norm,
               const Matrix& product, const Matrix& out) const {
    multiply(u, Matrix(weight1).transposed(), hidden_part);
    Grn p{grn_shape(count)};
    p.x = hidden_part.values(), p.y = wide_part.place(), p.shift = bias1.const_data_ptr();
    p.weight = grn_weight.const_data_ptr(), p.bias = grn_bias.const_data_ptr(), p.norm = norm;
    if (fold) p.scale = vectors.place(scale);
    p.workspace = vectors.place(grn_work), p.first_tile = static_cast<int64_t*>(vectors.place(tiles));
    CONVDIT_RUN(grn, forward, weight1, p);
    if (fold) {
      FoldScale s{channels, hidden, dtype(), weight2.const_data_ptr(), vectors.place(scale), maps.matrix(folded, 0, 0).place()};
      CONVDIT_RUN(convnext_block, fold_scale, weight1, s);
    }
    multiply(wide_part, (fold ? maps.matrix(folded, channels, hidden) : Matrix(weight2)).transposed(), product);
    AddResidual r{
        count * sites, channels, dtype_of("x", x.dtype), dtype(), x.values(), product.values(), fold ? vectors.place(shift) : data(bias2),
        out.place()};
    CONVDIT_RUN(convnext_block, add_residual, weight1, r);
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
Matrix rows_of(const Tensor& map) {  // of a contiguous one: a site each
  return {map, map.size(0) * map.size(1) * map.size(2), map.size(3)};
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
  const ScalarType branch = pwconv1_weight.scalar_type();
  const bool casts = branch != x_in.scalar_type();
  Mlp mlp(x_in, branch, pwconv1_weight, pwconv1_bias, grn_weight, grn_bias, pwconv2_weight, pwconv2_bias, eps);
  const Tensor out = allocate_like(x_in);
  if (x_in.numel() == 0) return out;
  const Tensor x_map = dense(x_in);
  const Matrix x = rows_of(x_map), out_rows = rows_of(out);
  const int64_t map_at = mlp.reserve_map(channels), wide_at = mlp.reserve_map(mlp.hidden),
                branch_at = mlp.reserve_map(casts ? channels : 0);
  const int64_t norm_at = mlp.vectors.reserve(mlp.images * mlp.hidden);
  const int64_t packed_at =
      mlp.vectors.reserve(kernel * kernel * ((channels + kChannelMultiple - 1) / kChannelMultiple * kChannelMultiple));
  mlp.allocate_scratch();
  mlp.prepare_forward();
  const Matrix map = mlp.scratch_map(map_at, channels), wide = mlp.scratch_map(wide_at, mlp.hidden);
  const Matrix branch_x = mlp.scratch_map(branch_at, channels);
  void* const norm = mlp.vectors.place(norm_at);
  mlp.for_parts([&](int64_t first, int64_t count) {
    const Matrix x_part = mlp.part(x, first, count), conv_x = casts ? mlp.part(branch_x, 0, count) : x_part;
    if (casts) {
      Tensor to = conv_x.tensor();
      torch::stable::copy_(to, x_part.tensor());
    }
    const Matrix u = mlp.part(map, 0, count), hidden = mlp.part(wide, 0, count);
    DepthwiseConvLayerNorm p{};
    p.conv.batch = count, p.conv.height = x_in.size(1), p.conv.width = x_in.size(2), p.conv.channels = channels, p.conv.kernel = kernel;
    p.conv.dtype = mlp.dtype();
    p.conv.x = conv_x.values(), p.conv.weight = conv_weight.const_data_ptr(), p.conv.bias = data(conv_bias);
    p.conv.y = u.place(), p.conv.packed = mlp.vectors.place(packed_at);
    p.eps = eps, p.ln_weight = ln_weight.const_data_ptr(), p.ln_bias = ln_bias.const_data_ptr(), p.out = u.place();
    CONVDIT_RUN(depthwise_conv, forward_layer_norm, x_in, p);
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
  const Tensor x_map = dense(x_in), u_map = dense(u_in), out = allocate_like(x_map);
  const Tensor hidden = allocate({mlp.batch * mlp.sites, mlp.hidden}, mlp.branch, x_map);
  if (x_map.numel() == 0) return {out, hidden, allocate_zeros({mlp.batch, mlp.hidden}, mlp.wide, x_map)};
  const Tensor norm = allocate({mlp.batch, mlp.hidden}, mlp.wide, x_map);
  const Matrix x = rows_of(x_map), u = rows_of(u_map), out_rows = rows_of(out), hidden_rows(hidden), norm_rows(norm);
  const int64_t wide_at = mlp.reserve_map(mlp.hidden), product_at = mlp.reserve_map(mlp.channels);
  mlp.allocate_scratch();
  mlp.prepare_forward();
  const Matrix wide = mlp.scratch_map(wide_at, mlp.hidden), product = mlp.scratch_map(product_at, mlp.channels);
  mlp.for_parts([&](int64_t first, int64_t count) {
    mlp.forward(count, mlp.part(x, first, count), mlp.part(u, first, count), mlp.part(hidden_rows, first, count), mlp.part(wide, 0, count),
                norm_rows.row_range(first, count).place(), mlp.part(product, 0, count), mlp.part(out_rows, first, count));
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
  void add(const Matrix& grad, const Matrix& input) {
    if (!wanted) return;
    multiply(grad.transposed(), input, Matrix(direct ? sum : product));
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
  const Tensor u_map = dense(u_in), grad_u = need_u ? allocate_like(u_map) : allocate({0}, mlp.branch, u_map);
  const auto vector = [&] { return allocate_zeros({mlp.hidden}, mlp.wide, u_map); };
  const Tensor grad_bias1 = vector(), grad_grn_weight = vector(), grad_grn_bias = vector();
  const bool several = mlp.images < mlp.batch;
  WeightGrad grad1(need_weight1, mlp.weight1, several), grad2(need_weight2, mlp.weight2, several);
  if (u_map.numel() == 0) {
    torch::stable::zero_(grad1.sum), torch::stable::zero_(grad2.sum);
    return {grad_u, grad1.result(mlp.weight1), grad_bias1, grad_grn_weight, grad_grn_bias, grad2.result(mlp.weight2)};
  }
  const Tensor grad_map = dense(grad_in), all_hidden = dense(hidden_in);
  const Matrix u = rows_of(u_map), grad = rows_of(grad_map), hidden(all_hidden), norms(all_norms);
  const int64_t wide_at = mlp.reserve_map(mlp.hidden), wide_grad_at = mlp.reserve_map(mlp.hidden);
  mlp.allocate_scratch();
  const Matrix wide = mlp.scratch_map(wide_at, mlp.hidden), wide_grad = mlp.scratch_map(wide_grad_at, mlp.hidden);
  mlp.for_parts([&](int64_t first, int64_t count) {
    const Matrix grad_part = mlp.part(grad, first, count), u_part = mlp.part(u, first, count);
    const Matrix y = mlp.part(wide, 0, count), grad_y = mlp.part(wide_grad, 0, count);
    multiply(grad_part, Matrix(mlp.weight2), grad_y);
    GrnBackward p{mlp.grn_shape(count)};
    p.grad = grad_y.values(), p.grad_x = grad_y.place(), p.x = mlp.part(hidden, first, count).values();
    p.norm = norms.row_range(first, count).values(), p.weight = mlp.grn_weight.const_data_ptr();
    p.bias = mlp.grn_bias.const_data_ptr(), p.shift = mlp.bias1.const_data_ptr(), p.y = y.place(), p.add = first > 0;
    p.grad_shift = grad_bias1.mutable_data_ptr(), p.grad_weight = grad_grn_weight.mutable_data_ptr();
    p.grad_bias = grad_grn_bias.mutable_data_ptr();
    p.workspace = mlp.vectors.place(mlp.grn_work), p.first_tile = static_cast<int64_t*>(mlp.vectors.place(mlp.tiles));
    CONVDIT_RUN(grn, backward, u_map, p);  // grad_y is the gradient of the first product now
    grad2.add(grad_part, y);
    grad1.add(grad_y, u_part);
    if (need_u) multiply(grad_y, Matrix(mlp.weight1), mlp.part(rows_of(grad_u), first, count));
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
