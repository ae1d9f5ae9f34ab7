// Self-attention on the packed output of a qkv Linear, forward and backward.
//
//   q, k, v (B, T, heads, d) = the thirds of qkv (B, T, 3D), D = heads * d
//   out (B, T, D) = softmax(scale * q k^T) v, head by head          log_sum_exp (B, T, heads) over the keys
//   rest (B, T, D) = what rounding out to 16 bits took from it: what the CUDA kernels keep for the backward; else (B, 0, D)
//
// The kernels are ours (attention.h), but for what by_pytorch() leaves to PyTorch's flash kernel on the CPU. That one is called through
// the dispatcher on strided views of qkv, so that nothing is copied on the way in or out but its three gradients.
#include "attention/attention.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "common/checks.h"
#include "common/matrix.h"

namespace convdit {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

struct Shape {
  int64_t batch, tokens, heads, head_dim;
};

Shape shape_of(const Tensor& qkv, int64_t heads) {
  dtype_of("qkv", qkv);
  check_dim("qkv", qkv, 3, "(B, T, 3D)");
  CONVDIT_CHECK(heads >= 1, "num_heads: expected at least 1, got ", heads);
  CONVDIT_CHECK(qkv.size(2) % (3 * heads) == 0, "qkv: expected a last size that 3 * num_heads = ", 3 * heads, " divides, got shape ",
                describe(qkv));
  return {qkv.size(0), qkv.size(1), heads, qkv.size(2) / (3 * heads)};
}

// What a forward gives; but for `out`, only where the backward is to have it.
struct Results {
  Tensor out;
  std::optional<Tensor> log_sum_exp, rest;
};

Attention params(const Tensor& qkv, const Shape& s, double scale) {
  Attention p{};
  p.batch = s.batch, p.tokens = s.tokens, p.heads = s.heads, p.head_dim = s.head_dim;
  p.batch_stride = qkv.stride(0), p.token_stride = qkv.stride(1);
  p.scale = scale;
  p.dtype = dtype_of("qkv", qkv);
  p.qkv = qkv.const_data_ptr();
  return p;
}

#ifdef CONVDIT_DEVICE_CUDA

// The kernels read a head's rows 16 bytes at a time where its width allows it. One copy of rows that start elsewhere, or have
// gaps, costs far less than reading them by the element.
Tensor in_vectors(const Tensor& t, const Shape& s) {
  const int64_t vector = 16 / t.element_size();
  const bool starts = t.stride(0) % vector == 0 && t.stride(1) % vector == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  if (t.stride(2) == 1 && (starts || s.head_dim % vector != 0)) return t;
  Tensor copy = allocate_like(t);
  torch::stable::copy_(copy, t);
  return copy;
}

Results forward(const Tensor& qkv_in, const Shape& s, double scale, bool save) {
  const Tensor qkv = in_vectors(qkv_in, s);
  const bool rounds = qkv.element_size() == 2;
  const Tensor out = allocate({s.batch, s.tokens, s.heads * s.head_dim}, qkv.scalar_type(), qkv);
  const Tensor log_sum_exp = allocate({s.batch, s.tokens, s.heads}, accumulate_dtype(qkv), qkv);  // the kernels write it always
  std::optional<Tensor> rest;
  if (save && rounds) rest = allocate_like(out);
  Attention p = params(qkv, s, scale);
  p.out = out.mutable_data_ptr(), p.log_sum_exp = log_sum_exp.mutable_data_ptr();
  if (rest) p.rest = rest->mutable_data_ptr();
  CONVDIT_RUN(attention, forward, qkv, p);
  return {out, log_sum_exp, rest};
}

void backward(const Tensor& grad_in, const Tensor& qkv_in, const Tensor& out_in, const Tensor& log_sum_exp_in, const Tensor& rest_in,
              const Tensor& grad_qkv, const Shape& s, double scale) {
  const Tensor qkv = in_vectors(qkv_in, s), grad = in_vectors(dense(grad_in), s), out = in_vectors(dense(out_in), s);
  const Tensor rest = in_vectors(dense(rest_in), s);
  const Tensor log_sum_exp = dense(log_sum_exp_in);
  AttentionBackward p{params(qkv, s, scale), grad.const_data_ptr(), grad_qkv.mutable_data_ptr(), nullptr};
  p.forward.out = out.mutable_data_ptr(), p.forward.log_sum_exp = log_sum_exp.mutable_data_ptr();
  if (rest.numel() > 0) p.forward.rest = rest.mutable_data_ptr();
  const Tensor workspace = allocate({cuda::attention_backward_workspace(p)}, accumulate_dtype(qkv), qkv);
  p.workspace = workspace.mutable_data_ptr();
  CONVDIT_RUN(attention, backward, qkv, p);
}

#else

// (B, heads, T, d) of rows of at least heads * d, from `offset` elements on.
Tensor by_heads(const Tensor& t, const Shape& s, int64_t offset = 0) {
  return view_of(t, {s.batch, s.heads, s.tokens, s.head_dim}, {t.stride(0), s.head_dim, t.stride(1), 1}, offset);
}

// The i-th third of qkv, or of its gradient.
Tensor third(const Tensor& qkv, const Shape& s, int64_t i) { return by_heads(qkv, s, i * s.heads * s.head_dim); }

// (B, T, size) of t, (B, heads, T, ...), whose memory lies in that order; not a view in autograd's eyes, which would forbid changing
// it in place.
Tensor heads_together(const Tensor& t, const Shape& s, int64_t size) {
  const bool in_order = t.stride(0) == s.tokens * size && t.stride(1) == size / s.heads && t.stride(2) == size;
  const Tensor result = in_order ? t : torch::stable::contiguous(torch::stable::transpose(t, 1, 2));  // not today
  return view_of(result, {s.batch, s.tokens, size}, {s.tokens * size, size, 1});
}

// The kernels read rows of d without gaps.
Tensor rows_without_gaps(const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

Results forward_by_pytorch(const Tensor& qkv, const Shape& s, double scale) {
  StableIValue stack[7] = {from(third(qkv, s, 0)),
                           from(third(qkv, s, 1)),
                           from(third(qkv, s, 2)),
                           from(0.0),
                           from(false),
                           from(std::nullopt),
                           from(std::optional<double>(scale))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu", "", stack, TORCH_ABI_VERSION));
  const Tensor out = to<Tensor>(stack[0]), log_sum_exp = to<Tensor>(stack[1]);
  return {heads_together(out, s, s.heads * s.head_dim), heads_together(log_sum_exp, s, s.heads), std::nullopt};
}

void backward_by_pytorch(const Tensor& grad_in, const Tensor& qkv, const Tensor& out_in, const Tensor& log_sum_exp, const Tensor& grad_qkv,
                         const Shape& s, double scale) {
  const Tensor grad = rows_without_gaps(grad_in), out = rows_without_gaps(out_in);
  StableIValue stack[10] = {from(by_heads(grad, s)),
                            from(third(qkv, s, 0)),
                            from(third(qkv, s, 1)),
                            from(third(qkv, s, 2)),
                            from(by_heads(out, s)),
                            from(torch::stable::transpose(log_sum_exp, 1, 2)),
                            from(0.0),
                            from(false),
                            from(std::nullopt),
                            from(std::optional<double>(scale))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "", stack, TORCH_ABI_VERSION));
  for (int64_t i = 0; i < 3; ++i) {
    Tensor part = third(grad_qkv, s, i);
    torch::stable::copy_(part, to<Tensor>(stack[i]));
  }
}

// Instructions for products of whole tiles of bfloat16, which PyTorch's kernels take.
bool multiplies_tiles() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  static const bool found = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0;
  return found;
#else
  return false;
#endif
}

// Whether PyTorch's kernel does the arithmetic: of float64, which is for checking gradients; and of bfloat16 where those instructions
// outrun ours, by measurement on an Intel Xeon, and the choice of products (cpu_level.h) is left to the processor.
bool by_pytorch(const Tensor& qkv, const Shape& s, bool backward) {
  if (qkv.scalar_type() != ScalarType::BFloat16) return qkv.scalar_type() == ScalarType::Double;
  const bool large = backward ? s.tokens >= 512 && s.head_dim >= 72 : s.tokens * s.head_dim >= 8192;
  return large && multiplies_tiles() && !own_products();
}

constexpr int64_t kFewBytes = 1 << 16;  // of scratch, on the stack

Results forward(const Tensor& qkv_in, const Shape& s, double scale, bool save) {
  const Tensor qkv = rows_without_gaps(qkv_in);
  if (by_pytorch(qkv, s, false)) return forward_by_pytorch(qkv, s, scale);
  const Tensor out = allocate({s.batch, s.tokens, s.heads * s.head_dim}, qkv.scalar_type(), qkv);
  Attention p = params(qkv, s, scale);
  p.out = out.mutable_data_ptr();
  std::optional<Tensor> log_sum_exp;
  if (save) log_sum_exp = allocate({s.batch, s.tokens, s.heads}, ScalarType::Float, qkv), p.log_sum_exp = log_sum_exp->mutable_data_ptr();
  Workspace<kFewBytes> scratch(attention_table().forward_scratch(p, torch::stable::get_num_threads()), ScalarType::Float, qkv);
  p.scratch = static_cast<float*>(scratch.data());
  CONVDIT_RUN(attention, forward, qkv, p);
  return {out, log_sum_exp, std::nullopt};
}

void backward(const Tensor& grad_in, const Tensor& qkv_in, const Tensor& out_in, const Tensor& log_sum_exp_in, const Tensor&,
              const Tensor& grad_qkv, const Shape& s, double scale) {
  const Tensor qkv = rows_without_gaps(qkv_in);
  if (by_pytorch(qkv, s, true)) return backward_by_pytorch(grad_in, qkv, out_in, log_sum_exp_in, grad_qkv, s, scale);
  const Tensor grad = dense(grad_in), out = dense(out_in), log_sum_exp = dense(log_sum_exp_in);
  AttentionBackward b{params(qkv, s, scale), grad.const_data_ptr(), grad_qkv.mutable_data_ptr()};
  b.forward.out = out.mutable_data_ptr(), b.forward.log_sum_exp = log_sum_exp.mutable_data_ptr();
  Workspace<kFewBytes> scratch(attention_table().backward_scratch(b.forward, torch::stable::get_num_threads()), ScalarType::Float, qkv);
  b.forward.scratch = static_cast<float*>(scratch.data());
  CONVDIT_RUN(attention, backward, qkv, b);
}

#endif

Tensor packed_attention_fwd(const Tensor& qkv, int64_t num_heads, double scale) {
  const Shape s = shape_of(qkv, num_heads);
  if (qkv.numel() == 0) return allocate({s.batch, s.tokens, s.heads * s.head_dim}, qkv.scalar_type(), qkv);
  return forward(qkv, s, scale, false).out;
}

// And what the backward needs.
std::tuple<Tensor, Tensor, Tensor> packed_attention_fwd_save(const Tensor& qkv, int64_t num_heads, double scale) {
  const Shape s = shape_of(qkv, num_heads);
  const Tensor no_rest = allocate({s.batch, 0, s.heads * s.head_dim}, qkv.scalar_type(), qkv);
  if (qkv.numel() == 0)
    return {allocate({s.batch, s.tokens, s.heads * s.head_dim}, qkv.scalar_type(), qkv),
            allocate_zeros({s.batch, s.tokens, s.heads}, accumulate_dtype(qkv), qkv), no_rest};
  const Results r = forward(qkv, s, scale, true);
  return {r.out, *r.log_sum_exp, r.rest.value_or(no_rest)};
}

Tensor packed_attention_bwd(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& log_sum_exp, const Tensor& rest,
                            int64_t num_heads, double scale) {
  const Shape s = shape_of(qkv, num_heads);
  for (const auto& [name, t] : {std::tuple("grad", &grad), std::tuple("out", &out)}) {
    check_same_device(name, *t, "qkv", qkv);
    check_shape(name, *t, {s.batch, s.tokens, s.heads * s.head_dim});
    check_dtype(name, *t, qkv.scalar_type());
  }
  check_same_device("log_sum_exp", log_sum_exp, "qkv", qkv);
  check_shape("log_sum_exp", log_sum_exp, {s.batch, s.tokens, s.heads});
  check_dtype("log_sum_exp", log_sum_exp, accumulate_dtype(qkv));
  check_same_device("rest", rest, "qkv", qkv);
  check_shape("rest", rest, {s.batch, rest.numel() > 0 ? s.tokens : 0, s.heads * s.head_dim});
  check_dtype("rest", rest, qkv.scalar_type());
  const Tensor grad_qkv = allocate_like(qkv);
  if (qkv.numel() == 0) return grad_qkv;
  backward(grad, qkv, out, log_sum_exp, rest, grad_qkv, s, scale);
  return grad_qkv;
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) {
  m.def("packed_attention_fwd(Tensor qkv, int num_heads, float scale) -> Tensor");
  m.def("packed_attention_fwd_save(Tensor qkv, int num_heads, float scale) -> (Tensor out, Tensor log_sum_exp, Tensor rest)");
  m.def(
      "packed_attention_bwd(Tensor grad, Tensor qkv, Tensor out, Tensor log_sum_exp, Tensor rest, int num_heads, float scale)"
      " -> Tensor");
}
#endif

CONVDIT_KERNELS(m) {
  m.impl("packed_attention_fwd", TORCH_BOX(&packed_attention_fwd));
  m.impl("packed_attention_fwd_save", TORCH_BOX(&packed_attention_fwd_save));
  m.impl("packed_attention_bwd", TORCH_BOX(&packed_attention_bwd));
}

}  // namespace
}  // namespace convdit
