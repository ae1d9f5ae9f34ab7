// CUDA kernels of the depthwise convolution and the LayerNorm after it; see depthwise_conv.h for the formulas.
//
// K = 7 in float32 and the halves: columns.cuh, and with the LayerNorm in the same launch strips_layer_norm.cuh. Everything else (other
// kernel sizes, float64, channels that do not fill vectors) takes a thread an output. Sums over the map are taken in parts, and the
// parts added in order by a second launch: no atomics.
#include "depthwise_conv/depthwise_conv.h"

#include <algorithm>

#include "common/layer_norm_backward.cuh"
#include "depthwise_conv/columns.cuh"
#include "depthwise_conv/strips_layer_norm.cuh"

namespace convdit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kEnoughBlocks = 1024;

// ---- forward, any K ------------------------------------------------------------------------------------------------------
template <class T>
__global__ void forward_sites(DepthwiseConv p) {
  using A = accum_t<T>;
  const int64_t total = p.batch * p.height * p.width * p.channels, radius = p.kernel / 2, row_size = padded(p.channels, kChannelMultiple);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x; index < total; index += int64_t{gridDim.x} * kThreads) {
    const int64_t c = index % p.channels, site = index / p.channels, w = site % p.width, h = site / p.width % p.height;
    const int64_t first_row = site / p.width - h;
    A sum = p.bias ? static_cast<const A*>(p.bias)[c] : A(0);
    for (int64_t i = h < radius ? radius - h : 0; i < p.kernel && h + i - radius < p.height; ++i) {
      const T* row = x + (first_row + h + i - radius) * p.width * p.channels + c;
      const A* weight = static_cast<const A*>(p.packed) + i * p.kernel * row_size + c;
      A row_sum = 0;  // one long sum over a large kernel would round worse
      for (int64_t j = w < radius ? radius - w : 0; j < p.kernel && w + j - radius < p.width; ++j)
        row_sum += widen(row[(w + j - radius) * p.channels]) * weight[j * row_size];
      sum += row_sum;
    }
    static_cast<T*>(p.y)[index] = narrow<T>(sum);
  }
}

// Whether the kernels for K = 7 fit: whole vectors of T.
template <class T, class P, class... Pointers>
bool fast(const P& p, const Pointers*... pointers) {
  return sizeof(T) <= 4 && p.kernel == kTaps && p.channels % kVector<T> == 0 && aligned(16, pointers...);
}
// Calls f(Strip) with that for the map.
template <class T, class P, class F>
int with_strip(const P& p, const F& f) {
  return p.width <= 14 ? f(Strip<T, true>{}) : f(Strip<T, false>{});
}

template <class T>
int forward(const DepthwiseConv& p, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4)
    if (fast<T>(p, p.x, p.y, p.weight))
      return with_strip<T>(p, [&](auto strip) {
        using Strip = decltype(strip);
        // A run loads the halo above it once: long where there are strips enough for every multiprocessor.
        const int64_t strips = strips_of<Strip>(p) * ceil_div(p.channels, kChannels), run = ceil_div(p.height * strips, kEnoughBlocks);
        const int64_t length = std::min(std::clamp<int64_t>(run, 14, 1024), p.height);
        constexpr int bytes = kStripBytes<T, Strip>;
        if (const int status = allow_shared_bytes(forward_strips<T, Strip>, bytes)) return status;
        forward_strips<T, Strip>
            <<<grid(strips * ceil_div(p.height, length)), Strip::kThreads, bytes, stream>>>(p, steps_of<T, Strip>(p), length);
        return launch_status();
      });
  const int64_t taps = p.kernel * p.kernel, row = padded(p.channels, kChannelMultiple);
  if (const int status = launch_pack_weights<accum_t<T>>(p.weight, taps, p.channels, row, p.flip, p.packed, stream)) return status;
  forward_sites<T><<<grid(ceil_div(p.batch * p.height * p.width * p.channels, kThreads)), kThreads, 0, stream>>>(p);
  return launch_status();
}

// ---- weight gradient, any K: a thread a channel and tap ------------------------------------------------------------
template <class T>
__global__ void weight_taps(DepthwiseConvWeightGrad p) {
  using A = accum_t<T>;
  const int64_t taps = p.kernel * p.kernel, radius = p.kernel / 2, rows = p.batch * p.height;
  const int64_t total = p.parts * (taps + 1) * p.channels, row_size = padded(p.channels, kChannelMultiple);
  for (int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x; index < total; index += int64_t{gridDim.x} * kThreads) {
    const int64_t c = index % p.channels, tap = index / p.channels % (taps + 1), part = index / p.channels / (taps + 1);
    const bool is_bias = tap == taps;
    const int64_t dh = is_bias ? 0 : tap / p.kernel - radius, dw = is_bias ? 0 : tap % p.kernel - radius;
    A sum = 0;
    for (int64_t row = rows * part / p.parts; row < rows * (part + 1) / p.parts; ++row) {
      const int64_t h = row % p.height + dh;
      if (h < 0 || h >= p.height) continue;
      const T* grad = static_cast<const T*>(p.grad) + row * p.width * p.channels + c;
      const T* x = static_cast<const T*>(p.x) + (row + dh) * p.width * p.channels + c;
      for (int64_t w = dw < 0 ? -dw : 0; w < p.width && w + dw < p.width; ++w) {
        const A g = widen(grad[w * p.channels]);
        sum += is_bias ? g : g * widen(x[(w + dw) * p.channels]);
      }
    }
    static_cast<A*>(p.workspace)[(part * (taps + 1) + tap) * row_size + c] = sum;
  }
}

template <class T>
int weight_grad(const DepthwiseConvWeightGrad& p, cudaStream_t stream) {
  const int64_t taps = p.kernel * p.kernel;
  int status = -1;
  if constexpr (sizeof(T) <= 4)
    if (fast<T>(p, p.x, p.grad))
      status = with_strip<T>(p, [&](auto strip) {
        using Strip = decltype(strip);
        constexpr int bytes = kWeightBytes<T, Strip>;
        if (const int status = allow_shared_bytes(weight_tiles<T, Strip>, bytes)) return status;
        weight_tiles<T, Strip>
            <<<grid(p.parts * ceil_div(p.channels, kChannels)), Strip::kThreads, bytes, stream>>>(p, steps_of<T, Strip>(p));
        return launch_status();
      });
  if (status < 0) {
    weight_taps<T><<<grid(ceil_div(p.parts * (taps + 1) * p.channels, kThreads)), kThreads, 0, stream>>>(p);
    status = launch_status();
  }
  if (status) return status;
  return launch_add_weight_parts<accum_t<T>>(p.workspace, p.parts, taps, p.channels, padded(p.channels, kChannelMultiple), p.grad_weight,
                                             p.grad_bias, stream);
}

// ---- the LayerNorm of each site's channels: one sample of as many tokens as there are sites -----------------------------------
template <class T>
int forward_layer_norm(const DepthwiseConvLayerNorm& p, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4)
    if (fast<T>(p.conv, p.conv.x, p.conv.y, p.out, p.ln_weight, p.ln_bias)) {
      const int status =
          p.conv.width <= 7 ? launch_norm_strips<T, Tile<T, 1, 4>>(p, stream) : launch_norm_strips<T, Tile<T, 2, 7>>(p, stream);
      if (status >= 0) return status;
    }
  if (const int status = forward<T>(p.conv, stream)) return status;
  NormForward n{};
  n.batch = 1, n.tokens = p.conv.batch * p.conv.height * p.conv.width, n.width = p.conv.channels, n.eps = p.eps;
  n.x = p.conv.y, n.scale = p.ln_weight, n.shift = p.ln_bias, n.out = p.out, n.mean = p.mean, n.rstd = p.rstd;
  return norm_forward<T, T>(n, stream);
}

template <class T>
int layer_norm_backward(const LayerNormBackward& p, cudaStream_t stream) {
  NormBackward n{};
  n.batch = 1, n.tokens = p.rows, n.width = p.channels, n.chunk = ceil_div(p.rows, p.parts), n.sums = 2;
  n.grad_out = p.grad, n.residual = p.x, n.scale = p.weight, n.mean = p.mean, n.rstd = p.rstd;
  n.grad_x = p.grad_x, n.grad_scale = p.grad_weight, n.grad_shift = p.grad_bias, n.workspace = p.workspace;
  return norm_backward<T, T>(n, stream);
}

}  // namespace

int depthwise_conv_forward(const DepthwiseConv& p, void* stream) {
  return dispatch(p.dtype, [&](auto x) { return forward<decltype(x)>(p, stream_of(stream)); });
}
int depthwise_conv_forward_layer_norm(const DepthwiseConvLayerNorm& p, void* stream) {
  return dispatch(p.conv.dtype, [&](auto x) { return forward_layer_norm<decltype(x)>(p, stream_of(stream)); });
}
int depthwise_conv_weight_grad(const DepthwiseConvWeightGrad& p, void* stream) {
  return dispatch(p.dtype, [&](auto x) { return weight_grad<decltype(x)>(p, stream_of(stream)); });
}
int depthwise_conv_layer_norm_backward(const LayerNormBackward& p, void* stream) {
  return dispatch(p.dtype, [&](auto x) { return layer_norm_backward<decltype(x)>(p, stream_of(stream)); });
}

}  // namespace convdit::cuda
