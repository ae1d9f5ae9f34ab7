// CUDA kernels of the depthwise convolution and the LayerNorm after it; see depthwise_conv.h for the formulas.
//
// K = 7 in float32 and the halves: a block computes 8x8 sites of a group of channels from a tile with its halo in shared
// memory, each thread a row of 8 columns of 2 channels in registers. Other kernel sizes and float64 take a thread an output.
// Sums over the map are taken in parts, and the parts added in order by a second launch: no atomics.
#include "depthwise_conv/depthwise_conv.h"

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace convdit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTaps = 7, kRadius = 3, kTile = 8, kHalo = kTile + kTaps - 1;
constexpr int kPair = 2;  // channels of a thread

__host__ __device__ int64_t padded_channels(int64_t channels) {
  return (channels + kChannelMultiple - 1) / kChannelMultiple * kChannelMultiple;
}

// ---- forward, K = 7 ----------------------------------------------------------------------------------------------
template <class T>
constexpr int kTileChannels = sizeof(T) == 2 ? 64 : 32;  // 128 bytes of a site: a row of 32 banks
template <class T>
constexpr int kTileThreads = kTileChannels<T> / kPair * kTile;

struct TileGrid {
  int64_t rows, columns, groups;  // of tiles, of tiles, of channels
};

// `flip` turns the taps. `whole`: channels come in whole, aligned vectors of 16 bytes.
template <class T>
__global__ void __launch_bounds__(kTileThreads<T>) forward_tiles(DepthwiseConv p, TileGrid tiles, bool whole) {
  constexpr int channels = kTileChannels<T>, vector = kVector<T>;
  __shared__ __align__(16) T x_tile[kHalo * kHalo * channels];
  __shared__ __align__(16) float weights[kTaps * kTaps * channels];
  const T* x = static_cast<const T*>(p.x);
  const float *weight = static_cast<const float*>(p.weight), *bias = static_cast<const float*>(p.bias);
  const int pair = threadIdx.x % (channels / kPair) * kPair, row = threadIdx.x / (channels / kPair);
  const int64_t tasks = p.batch * tiles.rows * tiles.columns * tiles.groups;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t c0 = task % tiles.groups * channels, tile = task / tiles.groups;
    const int64_t w0 = tile % tiles.columns * kTile, h0 = tile / tiles.columns % tiles.rows * kTile;
    const int64_t image = tile / tiles.columns / tiles.rows;
    __syncthreads();  // the tile before may still be read
    for (int i = threadIdx.x; i < kTaps * kTaps * channels; i += kTileThreads<T>) {
      const int c = i / (kTaps * kTaps), tap = i % (kTaps * kTaps);
      weights[(p.flip ? kTaps * kTaps - 1 - tap : tap) * channels + c] =
          c0 + c < p.channels ? weight[(c0 + c) * kTaps * kTaps + tap] : 0.f;
    }
    for (int i = threadIdx.x; i < kHalo * kHalo * channels / vector; i += kTileThreads<T>) {
      const int site = i / (channels / vector), c = i % (channels / vector) * vector;
      const int64_t h = h0 + site / kHalo - kRadius, w = w0 + site % kHalo - kRadius;
      Pack<T, vector> pack{};
      if (h >= 0 && h < p.height && w >= 0 && w < p.width && c0 + c < p.channels) {
        const T* from = x + ((image * p.height + h) * p.width + w) * p.channels + c0 + c;
        if (whole) {
          pack = *reinterpret_cast<const Pack<T, vector>*>(from);
        } else {
#pragma unroll
          for (int k = 0; k < vector; ++k)
            if (c0 + c + k < p.channels) pack.values[k] = from[k];
        }
      }
      *reinterpret_cast<Pack<T, vector>*>(x_tile + site * channels + c) = pack;
    }
    __syncthreads();
    float sum[kTile][kPair], start[kPair] = {};
    if (bias) load(bias + c0 + pair, p.channels - c0 - pair, false, start);
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int k = 0; k < kPair; ++k) sum[i][k] = start[k];
#pragma unroll 1
    for (int tap_row = 0; tap_row < kTaps; ++tap_row) {
      const T* from = x_tile + (row + tap_row) * kHalo * channels + pair;
      float taps[kTaps][kPair], v[kPair];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) load(weights + (tap_row * kTaps + k) * channels + pair, kPair, true, taps[k]);
#pragma unroll
      for (int column = 0; column < kHalo; ++column) {
        load(from + column * channels, kPair, true, v);
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          if (column - k < 0 || column - k >= kTile) continue;
          sum[column - k][0] += v[0] * taps[k][0];
          sum[column - k][1] += v[1] * taps[k][1];
        }
      }
    }
    if (h0 + row < p.height) {
      T* to = static_cast<T*>(p.y) + ((image * p.height + h0 + row) * p.width + w0) * p.channels + c0 + pair;
#pragma unroll
      for (int column = 0; column < kTile; ++column) {
        if (w0 + column >= p.width) break;
        store(to + column * p.channels, p.channels - c0 - pair, whole && c0 + pair < p.channels, sum[column]);
      }
    }
  }
}

// ---- forward, any K ----------------------------------------------------------------------------------------------
// (C, taps) to (taps, padded C), so that neighbouring threads, which are neighbouring channels, read neighbouring weights.
template <class A>
__global__ void pack_weights(DepthwiseConv p) {
  const int64_t taps = p.kernel * p.kernel, total = taps * p.channels, padded = padded_channels(p.channels);
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total; i += int64_t{gridDim.x} * kThreads) {
    const int64_t c = i % p.channels, tap = i / p.channels;
    static_cast<A*>(p.packed)[(p.flip ? taps - 1 - tap : tap) * padded + c] = static_cast<const A*>(p.weight)[c * taps + tap];
  }
}

template <class T>
__global__ void forward_sites(DepthwiseConv p) {
  using A = accum_t<T>;
  const int64_t total = p.batch * p.height * p.width * p.channels, radius = p.kernel / 2, padded = padded_channels(p.channels);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x; index < total; index += int64_t{gridDim.x} * kThreads) {
    const int64_t c = index % p.channels, site = index / p.channels, w = site % p.width, h = site / p.width % p.height;
    const int64_t first_row = site / p.width - h;
    A sum = p.bias ? static_cast<const A*>(p.bias)[c] : A(0);
    for (int64_t i = h < radius ? radius - h : 0; i < p.kernel && h + i - radius < p.height; ++i) {
      const T* row = x + (first_row + h + i - radius) * p.width * p.channels + c;
      const A* weight = static_cast<const A*>(p.packed) + i * p.kernel * padded + c;
      for (int64_t j = w < radius ? radius - w : 0; j < p.kernel && w + j - radius < p.width; ++j)
        sum += widen(row[(w + j - radius) * p.channels]) * weight[j * padded];
    }
    static_cast<T*>(p.y)[index] = narrow<T>(sum);
  }
}

template <class T>
int forward(const DepthwiseConv& p, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4) {
    if (p.kernel == kTaps) {
      const TileGrid tiles{ceil_div(p.height, kTile), ceil_div(p.width, kTile), ceil_div(p.channels, kTileChannels<T>)};
      const bool whole = p.channels % kVector<T> == 0 && aligned(16, p.x, p.y);
      forward_tiles<T><<<grid(p.batch * tiles.rows * tiles.columns * tiles.groups), kTileThreads<T>, 0, stream>>>(p, tiles, whole);
      return launch_status();
    }
  }
  pack_weights<accum_t<T>><<<grid(ceil_div(p.kernel * p.kernel * p.channels, kThreads)), kThreads, 0, stream>>>(p);
  if (const int status = launch_status()) return status;
  forward_sites<T><<<grid(ceil_div(p.batch * p.height * p.width * p.channels, kThreads)), kThreads, 0, stream>>>(p);
  return launch_status();
}

// ---- LayerNorm of a site, one warp a site --------------------------------------------------------------------------
template <class T>
__global__ void normalise_sites(DepthwiseConvLayerNorm p, bool whole) {
  using A = accum_t<T>;
  constexpr int vector = kVector<T>;
  const int64_t channels = p.conv.channels, sites = p.conv.batch * p.conv.height * p.conv.width;
  const int lane = threadIdx.x % kWarp;
  const A *weight = static_cast<const A*>(p.ln_weight), *bias = static_cast<const A*>(p.ln_bias);
  const int64_t first = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarp, step = int64_t{gridDim.x} * kThreads / kWarp;
  for (int64_t site = first; site < sites; site += step) {
    const T* y = static_cast<const T*>(p.conv.y) + site * channels;
    T* out = static_cast<T*>(p.out) + site * channels;
    A mean, rstd;
    warp_row_statistics<vector>(
        channels, static_cast<A>(p.eps), [&](int64_t i, A(&v)[vector]) { load(y + i, channels - i, whole, v); }, mean, rstd);
    if (lane == 0 && p.mean) {
      static_cast<A*>(p.mean)[site] = mean;
      static_cast<A*>(p.rstd)[site] = rstd;
    }
    for (int64_t i = lane * vector; i < channels; i += kWarp * vector) {
      A v[vector], w[vector], b[vector];
      load(y + i, channels - i, whole, v);
      load(weight + i, channels - i, whole, w);
      load(bias + i, channels - i, whole, b);
#pragma unroll
      for (int k = 0; k < vector; ++k) v[k] = (v[k] - mean) * rstd * w[k] + b[k];
      store(out + i, channels - i, whole, v);
    }
  }
}

template <class T>
int forward_layer_norm(const DepthwiseConvLayerNorm& p, cudaStream_t stream) {
  if (const int status = forward<T>(p.conv, stream)) return status;
  const bool whole = p.conv.channels % kVector<T> == 0 && aligned(16, p.conv.y, p.out, p.ln_weight, p.ln_bias);
  const int64_t sites = p.conv.batch * p.conv.height * p.conv.width;
  normalise_sites<T><<<grid(ceil_div(sites, kThreads / kWarp)), kThreads, 0, stream>>>(p, whole);
  return launch_status();
}

// ---- weight gradient, K = 7 --------------------------------------------------------------------------------------
// A warp holds the sums of one kernel row for 32 or 64 channels and goes along the rows of its part, 8 columns at a time.
// Sums lie as (parts, K*K + 1, padded C), the last row for the bias.
template <class T>
__global__ void __launch_bounds__(kWarp* kTaps) weight_rows(DepthwiseConvWeightGrad p, int64_t groups, bool whole) {
  using A = accum_t<T>;
  constexpr int vector = sizeof(T) == 2 ? 2 : 1, chunk = 8;
  const int tap_row = threadIdx.x / kWarp;
  const int64_t padded = padded_channels(p.channels), rows = p.batch * p.height;
  for (int64_t task = blockIdx.x; task < p.parts * groups; task += gridDim.x) {
    const int64_t part = task / groups, c = (task % groups * kWarp + threadIdx.x % kWarp) * vector;
    if (c >= p.channels) continue;
    const bool full = whole && c + vector <= p.channels;
    A sum[kTaps][vector] = {}, bias[vector] = {};
    for (int64_t row = rows * part / p.parts; row < rows * (part + 1) / p.parts; ++row) {
      const int64_t h = row % p.height + tap_row - kRadius;
      if (h < 0 || h >= p.height) continue;
      const T* grad = static_cast<const T*>(p.grad) + row * p.width * p.channels + c;
      const T* x = static_cast<const T*>(p.x) + (row + tap_row - kRadius) * p.width * p.channels + c;
      A seen[chunk + kTaps - 1][vector] = {};  // x from 3 columns before the chunk to 3 after
#pragma unroll
      for (int i = kRadius; i < kTaps - 1; ++i)
        if (i - kRadius < p.width) load(x + (i - kRadius) * p.channels, p.channels - c, full, seen[i]);
      for (int64_t w = 0; w < p.width; w += chunk) {
#pragma unroll
        for (int i = 0; i < chunk; ++i) {
          const int64_t column = w + i + kRadius;
#pragma unroll
          for (int v = 0; v < vector; ++v) seen[i + kTaps - 1][v] = 0;
          if (column < p.width) load(x + column * p.channels, p.channels - c, full, seen[i + kTaps - 1]);
        }
#pragma unroll
        for (int i = 0; i < chunk; ++i) {
          if (w + i >= p.width) break;
          A g[vector];
          load(grad + (w + i) * p.channels, p.channels - c, full, g);
#pragma unroll
          for (int v = 0; v < vector; ++v) {
            bias[v] += g[v];
#pragma unroll
            for (int k = 0; k < kTaps; ++k) sum[k][v] += g[v] * seen[i + k][v];
          }
        }
#pragma unroll
        for (int i = 0; i < kTaps - 1; ++i)
#pragma unroll
          for (int v = 0; v < vector; ++v) seen[i][v] = seen[i + chunk][v];
      }
    }
    A* to = static_cast<A*>(p.workspace) + part * (kTaps * kTaps + 1) * padded + c;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) store(to + (tap_row * kTaps + k) * padded, p.channels - c, false, sum[k]);
    if (tap_row == kRadius) store(to + kTaps * kTaps * padded, p.channels - c, false, bias);  // this row is never outside
  }
}

// ---- weight gradient, any K: a thread a channel and tap ------------------------------------------------------------
template <class T>
__global__ void weight_taps(DepthwiseConvWeightGrad p) {
  using A = accum_t<T>;
  const int64_t taps = p.kernel * p.kernel, radius = p.kernel / 2, padded = padded_channels(p.channels), rows = p.batch * p.height;
  const int64_t total = p.parts * (taps + 1) * p.channels;
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
    static_cast<A*>(p.workspace)[(part * (taps + 1) + tap) * padded + c] = sum;
  }
}

template <class A>
__global__ void add_weight_parts(DepthwiseConvWeightGrad p) {
  const int64_t taps = p.kernel * p.kernel, padded = padded_channels(p.channels), total = (taps + 1) * p.channels;
  for (int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x; index < total; index += int64_t{gridDim.x} * kThreads) {
    const int64_t c = index % p.channels, tap = index / p.channels;
    const A* from = static_cast<const A*>(p.workspace) + tap * padded + c;
    A sum = 0;
    for (int64_t part = 0; part < p.parts; ++part) sum += from[part * (taps + 1) * padded];
    if (tap < taps) static_cast<A*>(p.grad_weight)[c * taps + tap] = sum;
    else static_cast<A*>(p.grad_bias)[c] = sum;
  }
}

template <class T>
int weight_grad(const DepthwiseConvWeightGrad& p, cudaStream_t stream) {
  const int64_t taps = p.kernel * p.kernel;
  if (p.kernel == kTaps) {
    constexpr int vector = sizeof(T) == 2 ? 2 : 1;
    const int64_t groups = ceil_div(p.channels, kWarp * vector);
    const bool whole = p.channels % vector == 0 && aligned(sizeof(T) * vector, p.x, p.grad);
    weight_rows<T><<<grid(p.parts * groups), kWarp * kTaps, 0, stream>>>(p, groups, whole);
  } else {
    weight_taps<T><<<grid(ceil_div(p.parts * (taps + 1) * p.channels, kThreads)), kThreads, 0, stream>>>(p);
  }
  if (const int status = launch_status()) return status;
  add_weight_parts<accum_t<T>><<<grid(ceil_div((taps + 1) * p.channels, kThreads)), kThreads, 0, stream>>>(p);
  return launch_status();
}

// ---- backward of the LayerNorm: a block a part of the rows ----------------------------------------------------------
// Each thread has its own channels throughout, so the sums over rows need no synchronisation. They are kept in shared memory
// (`in_shared`), or in the workspace where the channels are too many.
template <class T>
__global__ void layer_norm_backward_rows(LayerNormBackward p, bool in_shared, bool whole) {
  using A = accum_t<T>;
  constexpr int vector = kVector<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ A scratch[2 * kThreads / kWarp];
  const int64_t channels = p.channels;
  const A* weight = static_cast<const A*>(p.weight);
  for (int64_t part = blockIdx.x; part < p.parts; part += gridDim.x) {
    A* const result = static_cast<A*>(p.workspace) + part * 2 * channels;
    A *const weight_sum = in_shared ? reinterpret_cast<A*>(shared) : result, *const bias_sum = weight_sum + channels;
    for (int64_t i = threadIdx.x * vector; i < channels; i += blockDim.x * vector)
      for (int64_t k = i; k < i + vector && k < channels; ++k) weight_sum[k] = bias_sum[k] = 0;
    for (int64_t row = p.rows * part / p.parts; row < p.rows * (part + 1) / p.parts; ++row) {
      const T *grad = static_cast<const T*>(p.grad) + row * channels, *x = static_cast<const T*>(p.x) + row * channels;
      T* grad_x = static_cast<T*>(p.grad_x) + row * channels;
      const A mean = static_cast<const A*>(p.mean)[row], rstd = static_cast<const A*>(p.rstd)[row];
      // With n the normalised row and g = grad * weight: grad_x = rstd * (g - mean(g) - n * mean(g * n)).
      A mean_g = 0, mean_gn = 0, d[vector], v[vector], w[vector];
      for (int64_t i = threadIdx.x * vector; i < channels; i += blockDim.x * vector) {
        load(grad + i, channels - i, whole, d);
        load(x + i, channels - i, whole, v);
        load(weight + i, channels - i, whole, w);
#pragma unroll
        for (int k = 0; k < vector; ++k) {
          mean_g += d[k] * w[k];
          mean_gn += d[k] * w[k] * ((v[k] - mean) * rstd);
        }
      }
      block_sum(mean_g, mean_gn, scratch);
      mean_g /= static_cast<A>(channels), mean_gn /= static_cast<A>(channels);
      for (int64_t i = threadIdx.x * vector; i < channels; i += blockDim.x * vector) {
        load(grad + i, channels - i, whole, d);
        load(x + i, channels - i, whole, v);
        load(weight + i, channels - i, whole, w);
#pragma unroll
        for (int k = 0; k < vector; ++k) {
          const A normalised = (v[k] - mean) * rstd;
          if (i + k < channels) weight_sum[i + k] += d[k] * normalised, bias_sum[i + k] += d[k];
          v[k] = rstd * (d[k] * w[k] - mean_g - normalised * mean_gn);
        }
        store(grad_x + i, channels - i, whole, v);
      }
    }
    if (!in_shared) continue;
    for (int64_t i = threadIdx.x * vector; i < channels; i += blockDim.x * vector)
      for (int64_t k = i; k < i + vector && k < channels; ++k) result[k] = weight_sum[k], result[channels + k] = bias_sum[k];
  }
}

template <class A>
__global__ void add_layer_norm_parts(LayerNormBackward p) {
  const int64_t total = 2 * p.channels;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total; i += int64_t{gridDim.x} * kThreads) {
    A sum = 0;
    for (int64_t part = 0; part < p.parts; ++part) sum += static_cast<const A*>(p.workspace)[part * total + i];
    if (i < p.channels) static_cast<A*>(p.grad_weight)[i] = sum;
    else static_cast<A*>(p.grad_bias)[i - p.channels] = sum;
  }
}

template <class T>
int layer_norm_backward(const LayerNormBackward& p, cudaStream_t stream) {
  using A = accum_t<T>;
  const int64_t bytes = 2 * p.channels * static_cast<int64_t>(sizeof(A));
  const bool in_shared = bytes <= kSharedBytes, whole = p.channels % kVector<T> == 0 && aligned(16, p.grad, p.x, p.grad_x, p.weight);
  layer_norm_backward_rows<T>
      <<<grid(p.parts), row_threads(p.channels, kVector<T>, kThreads), in_shared ? bytes : 0, stream>>>(p, in_shared, whole);
  if (const int status = launch_status()) return status;
  add_layer_norm_parts<A><<<grid(ceil_div(2 * p.channels, kThreads)), kThreads, 0, stream>>>(p);
  return launch_status();
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
