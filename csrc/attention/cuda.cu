// CUDA attention; see attention.h for the formulas. Which kernel: bf16 and f16 by mma.sync (forward.cuh, backward.cuh),
// float32 by fused multiply-adds (fma.cuh, fma_backward.cuh), both on rows of whole 16-byte vectors up to 128 wide; all else scalar.cuh.
#include "attention/attention.h"

#include <algorithm>

#include "attention/backward.cuh"
#include "attention/fma_backward.cuh"
#include "attention/forward.cuh"
#include "attention/scalar.cuh"
#include "common/launch.cuh"

namespace convdit::cuda {
namespace {

constexpr int64_t kWidest = 128, kMostTokens = 0x7fffff00;  // of tiles: they count tokens in 32 bits

template <int kWidth>
using Width = std::integral_constant<int, kWidth>;

// f(Width<w>) with the narrowest w of the tiles that a head fits.
template <class T, class F>
int dispatch_width(int64_t head_dim, const F& f) {
  if (head_dim <= 32) return f(Width<32>{});
  if (head_dim <= 64) return f(Width<64>{});
  if (head_dim <= 72) return f(Width<72>{});
  if (head_dim <= 80) return f(Width<80>{});
  if (head_dim <= 96) return f(Width<96>{});
  return f(Width<kWidest>{});
}

template <class T>
bool fits_tiles(const Attention& p) {
  const bool whole = p.head_dim % kVector<T> == 0 && p.batch_stride % kVector<T> == 0 && p.token_stride % kVector<T> == 0;
  return sizeof(T) <= 4 && p.head_dim <= kWidest && p.tokens <= kMostTokens && whole && aligned(16, p.qkv, p.out, p.rest);
}

// `a_head` blocks for each head of each sample.
template <class P>
int launch_tiles(void (*kernel)(P, Blocks), const P& params, const Attention& p, int64_t a_head, int shared_bytes, cudaStream_t stream) {
  if (shared_bytes > kSharedBytes)  // no more than the 99 KiB that every GPU from sm_80 on has for a block that asks
    if (const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return static_cast<int>(status);
  const int64_t blocks = p.batch * p.heads * a_head;
  int status = 0;
  for (int64_t first = 0; first < blocks && status == 0; first += grid(blocks)) {
    kernel<<<grid(blocks - first), kThreads, shared_bytes, stream>>>(params, {a_head, first});
    status = launch_status();
  }
  return status;
}

template <class P>
int launch_rows(void (*kernel)(P), const P& params, const Attention& p, cudaStream_t stream) {
  kernel<<<grid(ceil_div(row_tasks(p), kWarps)), kThreads, 0, stream>>>(params);
  return launch_status();
}

template <class T>
int forward(const Attention& p, cudaStream_t stream) {
  if (!fits_tiles<T>(p)) return launch_rows(forward_scalar<T>, p, p, stream);
  return dispatch_width<T>(p.head_dim, [&](auto width) {
    if constexpr (sizeof(T) == 2) {
      using Plan = ForwardPlan<T, width.value>;
      return launch_tiles(forward_mma<T, width.value>, p, p, ceil_div(p.tokens, Plan::kRows), Plan::kSharedBytes, stream);
    } else {
      using Plan = FmaForward<width.value>;
      return launch_tiles(forward_fma<width.value>, p, p, ceil_div(p.tokens, Plan::kRows), Plan::kBytes, stream);
    }
  });
}

template <class T>
bool fits_tiles(const AttentionBackward& b) {
  return fits_tiles<T>(b.forward) && aligned(16, b.grad, b.grad_qkv);
}

// Into how many parts a head's keys go in the backward of float32: as many as keep a GPU busy, each of some tiles.
#ifndef CONVDIT_ENOUGH_BLOCKS
#define CONVDIT_ENOUGH_BLOCKS 256
#endif
int64_t key_parts(const Attention& p) {
  constexpr int64_t most = 16;  // workspaces as large as the gradient of q
  return dispatch_width<float>(p.head_dim, [&](auto width) {
    const int64_t tiles = ceil_div(p.tokens, FmaBackward<width.value>::kRows);
    return static_cast<int>(std::min({tiles, most, ceil_div(CONVDIT_ENOUGH_BLOCKS, p.batch * p.heads)}));
  });
}

template <class T>
int64_t backward_workspace(const AttentionBackward& b) {
  const Attention& p = b.forward;
  if (!fits_tiles<T>(b)) return p.batch * p.heads * p.tokens * 2;  // statistics
  if (sizeof(T) == 2) return 0;
  const int64_t parts = key_parts(p), gradients = parts > 1 ? parts * p.batch * p.tokens * p.heads * p.head_dim : 0;
  return 2 * (part_statistics(p, parts) + 1) + gradients;
}

template <class T>
int backward(const AttentionBackward& b, cudaStream_t stream) {
  const Attention& p = b.forward;
  const auto both = [](int first, const auto& second) { return first ? first : second(); };
  if (!fits_tiles<T>(b))
    return both(launch_rows(backward_queries_scalar<T>, b, p, stream), [&] { return launch_rows(backward_keys_scalar<T>, b, p, stream); });
  return dispatch_width<T>(p.head_dim, [&](auto width) {
    if constexpr (sizeof(T) == 2) {
      using Plan = BackwardPlan<T, width.value>;
      const int64_t a_head = ceil_div(p.tokens, Plan::kOwnKeys) + ceil_div(p.tokens, Plan::kQueries);
      return launch_tiles(backward_mma<T, width.value>, b, p, a_head, Plan::kSharedBytes, stream);
    } else {
      const int64_t parts = key_parts(p);
      constexpr int bytes = kFmaBackwardBytes<FmaBackward<width.value>>;
      const int status = launch_tiles(backward_fma<width.value>, b, p, parts, bytes, stream);
      if (status) return status;
      finish_queries<<<grid(ceil_div(p.batch * p.tokens * p.heads * p.head_dim / 4, kThreads)), kThreads, 0, stream>>>(b, parts);
      return launch_status();
    }
  });
}

}  // namespace

int attention_forward(const Attention& p, void* stream) {
  return dispatch(p.dtype, [&](auto x) { return forward<decltype(x)>(p, stream_of(stream)); });
}
int64_t attention_backward_workspace(const AttentionBackward& p) {
  return dispatch(p.forward.dtype, [&](auto x) { return backward_workspace<decltype(x)>(p); });
}
int attention_backward(const AttentionBackward& p, void* stream) {
  return dispatch(p.forward.dtype, [&](auto x) { return backward<decltype(x)>(p, stream_of(stream)); });
}

}  // namespace convdit::cuda
