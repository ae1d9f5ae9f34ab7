// The ConvNeXt V2 block on the CPU: a few images at a time through one set of scratch tensors, or one set a thread, so that the
// hidden tensor, four times as wide as the map, stays in cache. Without gradients the batch's is never allocated; with them it
// is, once, as the first matrix product leaves it: the backward computes the rest again. See convnext_block.h for the formulas,
// reference/convnext_block.py for the whole.
#include "convnext_block/convnext_block.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/products.h"
#include "depthwise_conv/depthwise_conv.h"
#include "grn/grn.h"

namespace convdit {
namespace {

// Small images go through together, as many as have this many sites: a product with few rows is slow. In the backward, as many
// as have this many hidden values: there nothing is gained by going image by image, as the forward does where it folds.
constexpr int64_t kSites = 800, kHiddenValues = 5 << 18;

// Where each thread takes images through by itself, no more are on their way than the batch over this, or than would go together; and
// a product has so many multiply-adds at least that it is worth a meeting of the threads.
constexpr int64_t kShareInFlight = 4, kWorthSharing = 1 << 20;

int64_t in_parts(int64_t images, int64_t most) {  // of equal parts of at most so many: the largest
  const int64_t parts = std::max<int64_t>((images + most - 1) / most, 1);
  return (images + parts - 1) / parts;
}

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
  int64_t at_once = 1;                             // threads that each take images through by themselves, in scratch of their own
  ScalarType branch, wide;                         // of the branch; of vectors and sums
  Tensor weight1, bias1, grn_weight, grn_bias, weight2;
  std::optional<Tensor> bias2;
  bool fold;  // the response normalisation into weight2
  Scratch maps, vectors;
  int64_t grn_work = 0, tiles = 0, scale = 0, folded = 0, shift_at = 0;  // places
  const void* shift = nullptr;                                         // the second Linear's bias, with the folded normalisation's

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
    images = in_parts(batch, fitting);
    fold = !backward && images == 1 && sites > channels;  // else scaling the hidden tensor is less work than scaling the weight
    share_out(backward, fitting);
    const int64_t per_tile = backward ? 2 : 1, per_image = backward ? 4 : 1;
    grn_work = vectors.reserve((per_tile * grn_max_tiles(images, images * sites, hidden) + per_image * images) * hidden);
    tiles = vectors.reserve(2 * (images + 1));  // int64
    if (!fold) return;
    scale = vectors.reserve(hidden), shift_at = vectors.reserve(channels), folded = maps.reserve(channels * hidden);
  }

  // Whether each thread takes images through by itself, fewer together then, and meets the others at the end only. Else all threads share
  // each step on a few images: PyTorch's products go hardly faster so where columns or sums are few.
  void share_out(bool backward, int64_t fitting) {
    const int64_t threads = torch::stable::get_num_threads(), rows = batch * sites;
    if (threads == 1 || batch < threads || rows * hidden * channels < kWorthSharing) return;
    // Each thread then has its own sums for the weights' gradients: they must be few beside what they are sums of.
    if (backward && threads * hidden > rows) return;
    const int64_t alone = in_parts(batch, std::max<int64_t>(std::min(fitting, batch) / threads, 1)), together = alone * threads;
    const int64_t rounds = (batch + together - 1) / together;
    const bool few = together <= std::max(images, batch / kShareInFlight), busy = 5 * batch >= 4 * rounds * together;
    if (few && busy) at_once = threads, images = alone;
  }

  DType dtype() const { return dtype_of("pwconv1_weight", weight1); }
  int64_t reserve_map(int64_t width) { return maps.reserve(images * sites * width); }
  void allocate_scratch() { maps.allocate(branch, weight1, at_once), vectors.allocate(wide, weight1, at_once); }
  Matrix scratch_map(int64_t at, int64_t count, int64_t width) const { return maps.matrix(at, count * sites, width); }
  Matrix part(const Matrix& map, int64_t first, int64_t count) const { return map.row_range(first * sites, count * sites); }
  // f(this with a copy of the scratch, its number) on as many threads as go at once.
  template <class F>
  void share(const F& f) const {
    if (at_once == 1) return f(*this, 0);
    torch_runner()(at_once, [&](int64_t copy) {
      const OneOfSeveral alone;
      Mlp own = *this;
      own.maps.take_copy(copy), own.vectors.take_copy(copy);
      f(own, copy);
    });
  }
  // f(this with a copy of the scratch, first image, images) for a few images at a time.
  template <class F>
  void for_parts(const F& f) const {
    std::atomic<int64_t> next{0};
    share([&](const Mlp& own, int64_t) {
      for (int64_t first = next.fetch_add(images); first < batch; first = next.fetch_add(images))
        f(own, first, std::min(images, batch - first));
    });
  }

  // The same where sums are taken, in an order that repeats: f(..., the copy's number, whether it is not the copy's first part).
  template <class F>
  void for_shares(const F& f) const {
    const int64_t parts = (batch + images - 1) / images;
    share([&](const Mlp& own, int64_t copy) {
      const int64_t begin = parts * copy / at_once, end = parts * (copy + 1) / at_once;
      for (int64_t part = begin; part < end; ++part) f(own, part * images, std::min(images, batch - part * images), copy, part > begin);
    });
  }

  GrnShape grn_shape(int64_t count) const { return {count, count * sites, hidden, nullptr, dtype(), true, eps}; }

  void prepare_forward() {
    shift = data(bias2);
    if (!fold) return;
    FoldBias p{channels, hidden, dtype(), weight2.const_data_ptr(), grn_bias.const_data_ptr(), shift, vectors.place(shift_at)};
    CONVDIT_RUN(convnext_block, fold_bias, weight1, p);
    shift = p.folded;
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
    AddResidual r{count * sites, channels, dtype_of("x", x.dtype), dtype(), x.values(), product.values(), shift, out.place()};
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
  mlp.for_parts([&](const Mlp& own, int64_t first, int64_t count) {
    const Matrix x_part = own.part(x, first, count), conv_x = casts ? own.scratch_map(branch_at, count, channels) : x_part;
    if (casts) {
      Tensor to = conv_x.tensor();
      torch::stable::copy_(to, x_part.tensor());
    }
    const Matrix u = own.scratch_map(map_at, count, channels), hidden = own.scratch_map(wide_at, count, own.hidden);
    DepthwiseConvLayerNorm p{};
    p.conv.batch = count, p.conv.height = x_in.size(1), p.conv.width = x_in.size(2), p.conv.channels = channels, p.conv.kernel = kernel;
    p.conv.dtype = own.dtype();
    p.conv.x = conv_x.values(), p.conv.weight = conv_weight.const_data_ptr(), p.conv.bias = data(conv_bias);
    p.conv.y = u.place(), p.conv.packed = own.vectors.place(packed_at);
    p.eps = eps, p.ln_weight = ln_weight.const_data_ptr(), p.ln_bias = ln_bias.const_data_ptr(), p.out = u.place();
    CONVDIT_RUN(depthwise_conv, forward_layer_norm, x_in, p);
    own.forward(count, x_part, u, hidden, hidden, own.vectors.place(norm_at), u, own.part(out_rows, first, count));
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
  mlp.for_parts([&](const Mlp& own, int64_t first, int64_t count) {
    own.forward(count, own.part(x, first, count), own.part(u, first, count), own.part(hidden_rows, first, count),
                own.scratch_map(wide_at, count, own.hidden), norm_rows.row_range(first, count).place(),
                own.scratch_map(product_at, count, own.channels), own.part(out_rows, first, count));
  });
  return {out, hidden, norm};
}

void add_to(const Tensor& sum, const Tensor& more) {
  AddResidual p{1, sum.numel(), dtype_of("sum", sum), dtype_of("more", more)};
  if (sum.dim() == 2) p.rows = sum.size(0), p.channels = sum.size(1);
  p.x = sum.const_data_ptr(), p.product = more.const_data_ptr(), p.out = sum.mutable_data_ptr();
  CONVDIT_RUN(convnext_block, add_residual, sum, p);
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
    if (!direct) add_to(sum, product);
    direct = false;
  }
  Tensor result(const Tensor& weight) {
    if (!wanted || sum.scalar_type() == weight.scalar_type()) return sum;
    torch::stable::copy_(product, sum);
    return product;
  }
};

// The gradients of the parameters that one thread, or all together, have summed.
struct Grads {
  Tensor bias1, grn_weight, grn_bias;
  WeightGrad weight1, weight2;

  Grads(const Mlp& mlp, bool need_weight1, bool need_weight2)
      : bias1(allocate_zeros({mlp.hidden}, mlp.wide, mlp.weight1)),
        grn_weight(allocate_zeros({mlp.hidden}, mlp.wide, mlp.weight1)),
        grn_bias(allocate_zeros({mlp.hidden}, mlp.wide, mlp.weight1)),
        weight1(need_weight1, mlp.weight1, mlp.images < mlp.batch),
        weight2(need_weight2, mlp.weight2, mlp.images < mlp.batch) {}
  void add(const Grads& other) {
    add_to(bias1, other.bias1), add_to(grn_weight, other.grn_weight), add_to(grn_bias, other.grn_bias);
    if (weight1.wanted) add_to(weight1.sum, other.weight1.sum);
    if (weight2.wanted) add_to(weight2.sum, other.weight2.sum);
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
  std::vector<Grads> grads;
  for (int64_t copy = 0; copy < mlp.at_once; ++copy) grads.emplace_back(mlp, need_weight1, need_weight2);
  Grads& all = grads[0];
  const auto results = [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    return {grad_u, all.weight1.result(mlp.weight1), all.bias1, all.grn_weight, all.grn_bias, all.weight2.result(mlp.weight2)};
  };
  if (u_map.numel() == 0) {
    torch::stable::zero_(all.weight1.sum), torch::stable::zero_(all.weight2.sum);
    return results();
  }
  const Tensor grad_map = dense(grad_in), all_hidden = dense(hidden_in);
  const Matrix u = rows_of(u_map), grad = rows_of(grad_map), hidden(all_hidden), norms(all_norms);
  const int64_t wide_at = mlp.reserve_map(mlp.hidden), wide_grad_at = mlp.reserve_map(mlp.hidden);
  mlp.allocate_scratch();
  mlp.for_shares([&](const Mlp& own, int64_t first, int64_t count, int64_t copy, bool add) {
    const Matrix grad_part = own.part(grad, first, count), u_part = own.part(u, first, count);
    const Matrix y = own.scratch_map(wide_at, count, own.hidden), grad_y = own.scratch_map(wide_grad_at, count, own.hidden);
    Grads& to = grads[copy];
    multiply(grad_part, Matrix(own.weight2), grad_y);
    GrnBackward p{own.grn_shape(count)};
    p.grad = grad_y.values(), p.grad_x = grad_y.place(), p.x = own.part(hidden, first, count).values();
    p.norm = norms.row_range(first, count).values(), p.weight = own.grn_weight.const_data_ptr();
    p.bias = own.grn_bias.const_data_ptr(), p.shift = own.bias1.const_data_ptr(), p.y = y.place(), p.add = add;
    p.grad_shift = to.bias1.mutable_data_ptr(), p.grad_weight = to.grn_weight.mutable_data_ptr();
    p.grad_bias = to.grn_bias.mutable_data_ptr();
    p.workspace = own.vectors.place(own.grn_work), p.first_tile = static_cast<int64_t*>(own.vectors.place(own.tiles));
    CONVDIT_RUN(grn, backward, u_map, p);  // grad_y is the gradient of the first product now
    to.weight2.add(grad_part, y);
    to.weight1.add(grad_y, u_part);
    if (need_u) multiply(grad_y, Matrix(own.weight1), own.part(rows_of(grad_u), first, count));
  });
  for (size_t copy = 1; copy < grads.size(); ++copy) all.add(grads[copy]);
  return results();
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
