// The attention half of an adaLN-Zero block (Peebles & Xie 2023, section 3.2) on the CPU, in float32: the kernels of its parts, on a
// few sequences at a time through one set of scratch, so that what the qkv Linear writes, three times as wide as the residual
// stream, stays in cache. With gradients it is kept, and all sequences go through at once. Other dtypes and devices take the parts.
//
//   out = x + gate * proj(attention(qkv(LN(x) * (1 + scale) + shift)))        modulation (B, 3, D) = shift, scale, gate
#include <algorithm>
#include <cmath>
#include <cstring>

#include "adaln/adaln.h"
#include "attention/attention.h"
#include "common/products.h"

namespace convdit {
namespace {

constexpr int64_t kRows = 800;  // tokens that go through together, in whole sequences: a product with few rows is slow

// Without a cast: PyTorch's linear, which the parts take, has none.
Tensor exact_parameter(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const Tensor& x) {
  check_dtype(name, t, ScalarType::Float);
  return check_parameter(name, t, shape, x);
}
std::optional<Tensor> exact_bias(const char* name, const std::optional<Tensor>& t, int64_t size, const Tensor& x) {
  if (!t) return t;
  return exact_parameter(name, *t, {size}, x);
}

// What the steps write: matrices of a row a token, and vectors of the LayerNorm and the attention, or null.
struct Steps {
  Matrix modulated, qkv, attended, y;
  void *mean, *rstd, *log_sum_exp;
};

struct HalfBlock {
  int64_t batch, tokens, width, heads, sequences;  // those that go through together
  double eps;
  Tensor x, modulation, qkv_weight, proj_weight;
  std::optional<Tensor> qkv_bias, proj_bias;
  Scratch scratch;
  int64_t vectors, attention;  // places: shift, scale and gate, (3, B, D); what the attention needs

  HalfBlock(const Tensor& x_in, const Tensor& modulation, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias,
            const Tensor& proj_weight, const std::optional<Tensor>& proj_bias, int64_t heads, double eps, bool save)
      : batch((check_dim("x", x_in, 3, "(B, T, D)"), x_in.size(0))),
        tokens(x_in.size(1)),
        width(x_in.size(2)),
        heads(heads),
        sequences(save ? batch : std::clamp<int64_t>(kRows / std::max<int64_t>(tokens, 1), 1, std::max<int64_t>(batch, 1))),
        eps(eps),
        x((check_dtype("x", x_in, ScalarType::Float), dense(x_in))),
        modulation(exact_parameter("modulation", modulation, {batch, 3, width}, x)),
        qkv_weight(exact_parameter("qkv_weight", qkv_weight, {3 * width, width}, x)),
        proj_weight(exact_parameter("proj_weight", proj_weight, {width, width}, x)),
        qkv_bias(exact_bias("qkv_bias", qkv_bias, 3 * width, x)),
        proj_bias(exact_bias("proj_bias", proj_bias, width, x)) {
    CONVDIT_CHECK(heads >= 1 && width % heads == 0, "num_heads: expected a number of heads that divides D = ", width, ", got ", heads);
    if (x.numel() == 0) return;
    vectors = scratch.reserve(3 * batch * width);
    attention = scratch.reserve(attention_table().forward_scratch(attention_params(sequences), torch::stable::get_num_threads()));
  }

  Attention attention_params(int64_t count) const {
    Attention p{};
    p.batch = count, p.tokens = tokens, p.heads = heads, p.head_dim = width / heads;
    p.token_stride = 3 * width, p.batch_stride = tokens * p.token_stride;
    p.scale = 1 / std::sqrt(static_cast<double>(p.head_dim));
    p.dtype = DType::f32;
    return p;
  }
  float* vector(int64_t i, int64_t sequence) const { return static_cast<float*>(scratch.place(vectors)) + (i * batch + sequence) * width; }

  void allocate_scratch() {
    scratch.allocate(ScalarType::Float, x);
    const float* rows = modulation.const_data_ptr<float>();
    for (int64_t sequence = 0; sequence < batch; ++sequence)
      for (int64_t i = 0; i < 3; ++i, rows += width) std::memcpy(vector(i, sequence), rows, sizeof(float) * width);
  }

  void run(int64_t first, int64_t count, const Steps& to, const Matrix& out) const {
    const Matrix stream = Matrix(x, batch * tokens, width).row_range(first * tokens, count * tokens);
    Adaln norm{count, tokens, width, eps, DType::f32, DType::f32};
    Adaln add = norm;
    norm.x = stream.values(), norm.shift = vector(0, first), norm.scale = vector(1, first);
    norm.out = to.modulated.place(), norm.mean = to.mean, norm.rstd = to.rstd;
    CONVDIT_RUN(adaln, forward, x, norm);
    multiply_linear(to.modulated, Matrix(qkv_weight), qkv_bias, to.qkv);
    Attention p = attention_params(count);
    p.qkv = to.qkv.values(), p.out = to.attended.place(), p.log_sum_exp = to.log_sum_exp;
    p.scratch = static_cast<float*>(scratch.place(attention));
    CONVDIT_RUN(attention, forward, x, p);
    multiply_linear(to.attended, Matrix(proj_weight), proj_bias, to.y);
    add.x = stream.values(), add.y = to.y.values(), add.gate = vector(2, first), add.residual = out.place();
    CONVDIT_RUN(adaln, forward, x, add);
  }
};

// Without gradients.
Tensor adaln_zero_attention_fwd(const Tensor& x, const Tensor& modulation, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias,
                                const Tensor& proj_weight, const std::optional<Tensor>& proj_bias, int64_t num_heads, double eps) {
  HalfBlock block(x, modulation, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, eps, false);
  const Tensor out = allocate_like(x);
  if (x.numel() == 0) return out;
  const int64_t rows = block.sequences * block.tokens, width = block.width;
  const int64_t narrow = block.scratch.reserve(rows * width), wide = block.scratch.reserve(rows * 3 * width);
  block.allocate_scratch();
  const Matrix all(out, block.batch * block.tokens, width);
  for (int64_t first = 0; first < block.batch; first += block.sequences) {
    const int64_t count = std::min(block.sequences, block.batch - first), here = count * block.tokens;
    // A step may write over what only the step before its own has read.
    const Matrix in = block.scratch.matrix(narrow, here, width), qkv = block.scratch.matrix(wide, here, 3 * width);
    block.run(first, count, {in, qkv, in, block.scratch.matrix(wide, here, width), nullptr, nullptr, nullptr},
              all.row_range(first * block.tokens, here));
  }
  return out;
}

// And what the backwards of the parts need.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_zero_attention_fwd_save(
    const Tensor& x, const Tensor& modulation, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias, const Tensor& proj_weight,
    const std::optional<Tensor>& proj_bias, int64_t num_heads, double eps) {
  HalfBlock block(x, modulation, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, eps, true);
  const int64_t batch = block.batch, tokens = block.tokens, width = block.width, rows = batch * tokens;
  const auto wide = [&](int64_t columns) { return allocate({batch, tokens, columns}, ScalarType::Float, x); };
  const Tensor mean = allocate({batch, tokens}, ScalarType::Float, x), rstd = allocate_like(mean), log_sum_exp = wide(num_heads);
  const Tensor out = wide(width), modulated = wide(width), qkv = wide(3 * width), attended = wide(width), y = wide(width);
  if (x.numel() > 0) {
    block.allocate_scratch();
    block.run(0, batch,
              {{modulated, rows, width},
               {qkv, rows, 3 * width},
               {attended, rows, width},
               {y, rows, width},
               mean.mutable_data_ptr(),
               rstd.mutable_data_ptr(),
               log_sum_exp.mutable_data_ptr()},
              {out, rows, width});
  }
  return {out, mean, rstd, modulated, qkv, attended, log_sum_exp, y};
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def(
      "adaln_zero_attention_fwd(Tensor x, Tensor modulation, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias,"
      " int num_heads, float eps) -> Tensor");
  m.def(
      "adaln_zero_attention_fwd_save(Tensor x, Tensor modulation, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight,"
      " Tensor? proj_bias, int num_heads, float eps) -> (Tensor out, Tensor mean, Tensor rstd, Tensor modulated, Tensor qkv,"
      " Tensor attended, Tensor log_sum_exp, Tensor y)");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("adaln_zero_attention_fwd", TORCH_BOX(&adaln_zero_attention_fwd));
  m.impl("adaln_zero_attention_fwd_save", TORCH_BOX(&adaln_zero_attention_fwd_save));
}

}  // namespace
}  // namespace convdit
