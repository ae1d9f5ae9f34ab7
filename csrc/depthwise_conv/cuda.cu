// CUDA kernels of the depthwise convolution and the LayerNorm after it; see depthwise_conv.h for the formulas.
//
// K = 7 in float32 and the halves: strips.cuh, and with the LayerNorm in the same launch strips_layer_norm.cuh. Everything else (other
// kernel sizes, float64, channels that do not fill vectors) takes a thread an output. Sums over the map are taken in parts, and the
// parts added in order by a second launch: no atomics.
#include "depthwise_conv/depthwise_conv.h"

#include "common/layer_norm_backward.cuh"
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

// Calls f(Tile) where the fast kernels know the kernel size and whole vectors of T fit the channels, else returns -1.
template <class T, class P, class F>
int with_tile(const P& p, bool aligned, const F& f) {
  if constexpr (sizeof(T) <= 4) {
    if (p.kernel == kTaps && p.channels % kVector<T> == 0 && aligned) return p.width <= 7 ? f(Tile<T, 1, 4>{}) : f(Tile<T, 2, 7>{});
  }
  return -1;
}

template <class T>
int forward(const DepthwiseConv& p, cudaStream_t stream) {
  const int fast = with_tile<T>(p, aligned(16, p.x, p.y), [&](auto tile) {
    using Tile = decltype(tile);
    const Tiles tiles = tiles_of<Tile>(p.height, p.width, p.channels);
    // A run loads the weights and the halo above it once: long where there are strips enough for every multiprocessor.
    const int64_t strips = p.batch * tiles.columns * tiles.groups, run = ceil_div(tiles.rows * strips, kEnoughBlocks);
    const int64_t length = run < 2 ? 2 : run < tiles.rows ? run : tiles.rows;
    constexpr int bytes = kForwardBytes<T, Tile>;
    if (const int status = allow_shared_bytes(forward_strips<T, Tile>, bytes)) return status;
    forward_strips<T, Tile><<<grid(strips * ceil_div(tiles.rows, length)), kForwardThreads<T, Tile>, bytes, stream>>>(p, tiles, length);
    return launch_status();
  });
  if (fast >= 0) return fast;
  const int64_t taps = p.kernel * p.kernel, row = padded(p.channels, kChannelMultiple);
  if (const int status = launch_pack_weights<accum_t<T>>(p.weight, taps, p.channels, row, p.flip, p.packed, stream)) return status;
  forward_sites<T><<<grid(ceil_div(p.batch * p.height * p.width * p.channels, kThreads)), kThreads, 0, stream>>>(p);
  return launch_status();
}

// ---- weight gradient, K = 7: a warp a row of the kernel, a channel a lane ----------------------------------------------------
// Sums lie as (parts, 50, padded C), the last row for the bias; a part is a run of tiles.
template <class T, class Tile>
__global__ void __launch_bounds__(kWarp* kTaps) weight_tiles(DepthwiseConvWeightGrad p, Tiles tiles) {
  constexpr int threads = kWarp * kTaps;
  extern __shared__ __align__(16) unsigned char bytes[];
  T *const ring = reinterpret_cast<T*>(bytes), *const grad_tile = ring + Tile::kRingSize;
  const int c = threadIdx.x % kWarp, kernel_row = threadIdx.x / kWarp;
  const int64_t row = padded(p.channels, kChannelMultiple), count = p.batch * tiles.columns * tiles.rows;
  for (int64_t task = blockIdx.x; task < p.parts * tiles.groups; task += gridDim.x) {
    const int64_t part = task / tiles.groups, c0 = task % tiles.groups * kChannels, begin = count * part / p.parts;
    float sum[kTaps] = {}, bias = 0;
    int slot = 0;
    for (int64_t index = begin; index < count * (part + 1) / p.parts; ++index) {
      const int64_t image = index / tiles.rows / tiles.columns, w0 = index / tiles.rows % tiles.columns * Tile::kColumns;
      const int64_t h0 = index % tiles.rows * Tile::kRows, map = image * p.height * p.width * p.channels;
      const int kept = index == begin || h0 == 0 ? 0 : 2 * kRadius;  // rows of the halo that the tile before has loaded
      slot = kept > 0 ? (slot + Tile::kRows) % Tile::kRing : 0;
      __syncthreads();  // the tile before may still be read
      Tile::template stage<threads, Tile::kWidth>(static_cast<const T*>(p.x) + map, p.height, p.width, p.channels, c0, h0 - kRadius + kept,
                                                  Tile::kRing - kept, w0 - kRadius, (slot + kept) % Tile::kRing, Tile::kRing,
                                                  Tile::kRingRow, ring);
      Tile::template stage<threads, Tile::kColumns>(static_cast<const T*>(p.grad) + map, p.height, p.width, p.channels, c0, h0, Tile::kRows,
                                                    w0, 0, Tile::kRows, Tile::kColumns * kChannels, grad_tile);
      finish_copies();
      const int rows = p.height - h0 < Tile::kRows ? static_cast<int>(p.height - h0) : Tile::kRows;
#pragma unroll 1
      for (int y = 0; y < rows; ++y) {
        float grad[Tile::kColumns], row_sum[kTaps] = {};  // a row at a time: one long sum would round two or three times as badly
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) grad[j] = widen(grad_tile[(y * Tile::kColumns + j) * kChannels + c]);
        if (kernel_row == 0) {  // one warp's work, and the sum of no other is written
#pragma unroll
          for (int j = 0; j < Tile::kColumns; ++j) bias += grad[j];
        }
        const int place = (slot + y + kernel_row) % Tile::kRing;
        const T* from = ring + place * Tile::kRingRow + c;
#pragma unroll
        for (int column = 0; column < Tile::kWidth; ++column) {
          const float v = widen(from[column * kChannels]);
#pragma unroll
          for (int k = 0; k < kTaps; ++k)
            if (column - k >= 0 && column - k < Tile::kColumns) row_sum[k] += grad[column - k] * v;
        }
#pragma unroll
        for (int k = 0; k < kTaps; ++k) sum[k] += row_sum[k];
      }
    }
    if (c0 + c >= p.channels) continue;
    float* to = static_cast<float*>(p.workspace) + part * (kTapCount + 1) * row + c0 + c;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) to[(kernel_row * kTaps + k) * row] = sum[k];
    if (kernel_row == 0) to[kTapCount * row] = bias;
  }
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
  const int fast = with_tile<T>(p, aligned(16, p.x, p.grad), [&](auto tile) {
    using Tile = decltype(tile);
    const Tiles tiles = tiles_of<Tile>(p.height, p.width, p.channels);
    constexpr int bytes = (Tile::kRingSize + Tile::kSize) * sizeof(T);
    if (const int status = allow_shared_bytes(weight_tiles<T, Tile>, bytes)) return status;
    weight_tiles<T, Tile><<<grid(p.parts * tiles.groups), kWarp * kTaps, bytes, stream>>>(p, tiles);
    return launch_status();
  });
  if (fast > 0) return fast;
  if (fast < 0) {
    weight_taps<T><<<grid(ceil_div(p.parts * (taps + 1) * p.channels, kThreads)), kThreads, 0, stream>>>(p);
    if (const int status = launch_status()) return status;
  }
  return launch_add_weight_parts<accum_t<T>>(p.workspace, p.parts, taps, p.channels, padded(p.channels, kChannelMultiple), p.grad_weight,
                                             p.grad_bias, stream);
}

// ---- the LayerNorm of each site's channels: one sample of as many tokens as there are sites -----------------------------------
template <class T>
int forward_layer_norm(const DepthwiseConvLayerNorm& p, cudaStream_t stream) {
  const int fast = with_tile<T>(p.conv, aligned(16, p.conv.x, p.conv.y, p.out, p.ln_weight, p.ln_bias),
                                [&](auto tile) { return launch_norm_strips<T, decltype(tile)>(p, stream); });
  if (fast >= 0) return fast;
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
