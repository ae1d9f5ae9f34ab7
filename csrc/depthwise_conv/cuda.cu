// CUDA kernels of the depthwise convolution and the LayerNorm after it; see depthwise_conv.h for the formulas.
//
// K = 7 in float32 and the halves: a block goes down a strip of the map, tile by tile, for 32 channels. The tile's rows of x and the
// halo around them lie in a ring in shared memory, so that going on to the next tile loads new rows only. Everything else (other
// kernel sizes, float64, channels that do not fill vectors) takes a thread an output. Sums over the map are taken in parts, and the
// parts added in order by a second launch: no atomics.
#include "depthwise_conv/depthwise_conv.h"

#include "common/depthwise.cuh"
#include "common/layer_norm_backward.cuh"

namespace convdit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kEnoughBlocks = 1024;

// ---- tiles, K = 7 ---------------------------------------------------------------------------------------------------------
// A unit is 2 rows of 7 columns (maps of ImageNet's networks are 56, 28, 14 and 7 wide); a tile is `Across` x `Down` units.
template <class T, int Across, int Down>
struct Tile {
  static constexpr int kUnitRows = 2, kUnitColumns = 7;
  static constexpr int kRows = kUnitRows * Down, kColumns = kUnitColumns * Across;
  static constexpr int kRing = kRows + 2 * kRadius, kWidth = kColumns + 2 * kRadius;  // of x, with the halo
  // In elements of T. One unit across: the two units of a warp are two rows apart, and must not meet in the same banks.
  static constexpr int kRingRow = kWidth * kChannels + (Across == 1 && sizeof(T) == 2 ? 16 : 0);
  static constexpr int kRingSize = kRing * kRingRow, kSize = kRows * kColumns * kChannels;

  // Copies `rows` rows of a map from row `first` on, Width columns from `column` on, zeros outside the map, to a ring of `slots` rows of
  // `shared_row` elements, the first into slot `slot`. A thread keeps its column and channels and goes down.
  template <int Threads, int Width>
  static __device__ __forceinline__ void stage(const T* map, int64_t height, int64_t map_width, int64_t channels, int64_t c0, int64_t first,
                                               int rows, int64_t column, int slot, int slots, int shared_row, T* shared) {
    constexpr int vector = kVector<T>, vectors = kChannels / vector, places = Width * vectors;
    constexpr int lanes = places < Threads ? Threads / places : 1;  // rows at once
    for (int i = threadIdx.x; i < places * lanes; i += Threads) {
      const int c = i % vectors * vector, x = i / vectors % Width;
      const int64_t w = column + x, top = first < 0 ? 0 : first;
      const bool inside = w >= 0 && w < map_width && c0 + c < channels;
      const T* from = inside ? map + w * channels + c0 + c : map;
      // Rows `begin` to `end` - 1 lie in the map.
      const int begin = inside ? static_cast<int>(top - first) : rows, end = height - first < rows ? static_cast<int>(height - first) : rows;
      const int64_t step = lanes * map_width * channels;
      const unsigned count = end > begin ? end - begin : 0;
      int y = i / places;
      from += (first + y) * map_width * channels;
      const unsigned row = shared_row * sizeof(T), ring = slots * row, base = shared_address(shared + x * kChannels + c), end_of_ring = base + ring;
      unsigned to = base + (slot + y) % slots * row;
      for (; y < rows; y += lanes, from += step) {
        copy_async<16>(to, from, static_cast<unsigned>(y - begin) < count);
        to += lanes * row;
        if (to >= end_of_ring) to -= ring;
      }
    }
  }
};

// The tiles of all maps: down a strip first.
struct Tiles {
  int64_t rows, columns, groups;  // tiles of a map, and groups of channels
};
template <class Tile>
Tiles tiles_of(int64_t height, int64_t width, int64_t channels) {
  return {ceil_div(height, Tile::kRows), ceil_div(width, Tile::kColumns), ceil_div(channels, kChannels)};
}

// ---- forward and input gradient, K = 7 --------------------------------------------------------------------------------------
// A half warp has a unit, two channels a lane. `run`: how many tiles of a strip a block does.
template <class T, class Tile>
constexpr int kForwardThreads = Tile::kRows / Tile::kUnitRows * (Tile::kColumns / Tile::kUnitColumns) * kChannels / 2;
template <class T, class Tile>
constexpr int kForwardBytes = Tile::kRingSize * sizeof(T) + kTapCount * kWeightRow * sizeof(float);

template <class T, class Tile>
__global__ void __launch_bounds__(kForwardThreads<T, Tile>, kNoSpills) forward_strips(DepthwiseConv p, Tiles tiles, int64_t run) {
  constexpr int threads = kForwardThreads<T, Tile>, rows = Tile::kUnitRows, columns = Tile::kUnitColumns, across = Tile::kColumns / columns;
  extern __shared__ __align__(16) unsigned char bytes[];
  T* const ring = reinterpret_cast<T*>(bytes);
  float* const weights = reinterpret_cast<float*>(bytes + Tile::kRingSize * sizeof(T));
  const float* bias = static_cast<const float*>(p.bias);
  const int c = threadIdx.x % (kChannels / 2) * 2, unit = threadIdx.x / (kChannels / 2);
  const int unit_column = unit % across * columns, unit_row = unit / across * rows;
  const int64_t runs = (tiles.rows + run - 1) / run, tasks = p.batch * tiles.columns * runs * tiles.groups;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t c0 = task % tiles.groups * kChannels, strip = task / tiles.groups;
    const int64_t image = strip / runs / tiles.columns, w0 = strip / runs % tiles.columns * Tile::kColumns;
    const int64_t first = strip % runs * run * Tile::kRows, last = first + run * Tile::kRows < p.height ? first + run * Tile::kRows : p.height;
    const T* map = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels;
    const bool exists = c0 + c < p.channels;
    __syncthreads();  // the strip before may still be read
    stage_weights<threads>(static_cast<const float*>(p.weight), c0, p.channels, p.flip, weights);
    int slot = 0;  // of the tile's first row of x
    for (int64_t h0 = first; h0 < last; h0 += Tile::kRows) {
      const int kept = h0 == first ? 0 : 2 * kRadius;  // rows of the halo that the tile before has loaded
      if (kept > 0) {
        __syncthreads();  // it may still read the others
        slot = (slot + Tile::kRows) % Tile::kRing;
      }
      Tile::template stage<threads, Tile::kWidth>(map, p.height, p.width, p.channels, c0, h0 - kRadius + kept, Tile::kRing - kept,
                                                  w0 - kRadius, (slot + kept) % Tile::kRing, Tile::kRing, Tile::kRingRow, ring);
      finish_copies();
      float sum[rows][columns][2], start[2] = {};
      if (bias && exists) load(bias + c0 + c, 2, false, start);
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < columns; ++j) sum[i][j][0] = start[0], sum[i][j][1] = start[1];
      float taps[rows][kTaps][2];  // output row 1 takes the kernel row that row 0 took one row of x ago
      const auto add_row = [&](int kernel_row, auto first_row, auto second_row) {
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          taps[1][k][0] = taps[0][k][0], taps[1][k][1] = taps[0][k][1];
          if constexpr (decltype(first_row)::value) load(weights + (kernel_row * kTaps + k) * kWeightRow + c, 2, true, taps[0][k]);
        }
        const int row = slot + unit_row + kernel_row, place = row < Tile::kRing ? row : row - Tile::kRing;
        const T* from = ring + place * Tile::kRingRow + unit_column * kChannels + c;
#pragma unroll
        for (int column = 0; column < columns + 2 * kRadius; ++column) {
          float v[2];
          load(from + column * kChannels, 2, true, v);
          if constexpr (decltype(first_row)::value) add_taps(column - kRadius, v, taps[0], sum[0]);
          if constexpr (decltype(second_row)::value) add_taps(column - kRadius, v, taps[1], sum[1]);
        }
      };
      add_row(0, std::true_type{}, std::false_type{});
#pragma unroll 2  // the taps change places by name
      for (int kernel_row = 1; kernel_row < kTaps; ++kernel_row) add_row(kernel_row, std::true_type{}, std::true_type{});
      add_row(kTaps, std::false_type{}, std::true_type{});
      if (!exists) continue;
      const int64_t h = h0 + unit_row, w = w0 + unit_column;
      const int inside = p.width - w < columns ? static_cast<int>(p.width - w) : columns;
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        if (h + i >= p.height) break;
        T* y = static_cast<T*>(p.y) + ((image * p.height + h + i) * p.width + w) * p.channels + c0 + c;
#pragma unroll
        for (int j = 0; j < columns; ++j, y += p.channels)
          if (j < inside) store(y, 2, true, sum[i][j]);
      }
    }
  }
}

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
      Tile::template stage<threads, Tile::kColumns>(static_cast<const T*>(p.grad) + map, p.height, p.width, p.channels, c0, h0,
                                                    Tile::kRows, w0, 0, Tile::kRows, Tile::kColumns * kChannels, grad_tile);
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
