// CUDA kernels of the sparse depthwise convolution; see sparse_depthwise_conv.h for the formulas.
//
// K = 7 in float32 and the halves, blocks of 8, 4, 2 or 1 sites a side: a thread block takes a window of consecutive blocks, which
// are consecutive rows, for some channels. It copies them to shared memory; since blocks come in the order of the map, most neighbours
// lie in the window too, and the others are read from global memory. Blocks of 2 and 1: small_blocks.cuh. Of 8 and 4: a warp has one
// channel a lane and a strip of a block, so a neighbouring block that is absent is skipped by the whole warp. Its row of the table is
// read once, into registers. Everything else (other K and blocks, float64, channels that do not fill vectors) takes a thread an output.
#include "sparse_depthwise_conv/sparse_depthwise_conv.h"

#include "sparse_depthwise_conv/small_blocks.cuh"

namespace convdit::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// One block's row of the table, spread over the lanes of a warp.
template <int B>
struct Table {
  static constexpr int kSide = Blocks<B>::kSide, kEntries = kSide * kSide;
  static_assert(kEntries <= kWarp);
  int32_t entry;
  __device__ __forceinline__ Table(const int32_t* neighbors, int64_t block) {
    const int lane = threadIdx.x % kWarp;
    entry = lane < kEntries ? neighbors[block * kEntries + lane] : -1;
  }
  __device__ __forceinline__ int32_t at(int row, int column) const {  // the same place in all lanes
    return __shfl_sync(0xffffffffu, entry, row * kSide + column);
  }
};

// Calls f(column, value) for x in row y of a block's surroundings, from column -3 to B + 2, absent blocks left out. y and the
// columns count from the block's first site; `c` is this lane's channel in the window.
template <int B, class T, class F>
__device__ __forceinline__ void for_row(const T* x, const T* shared, const Window& w, int64_t channels, const Table<B>& table, int y, int c,
                                        const F& f) {
  using S = Blocks<B>;
  const int down = (y + S::kReach * B) / B, inner = (y + S::kReach * B) % B;  // row of the table, row in the block
#pragma unroll
  for (int right = 0; right < S::kSide; ++right) {
    const int32_t q = table.at(down, right);
    if (q < 0) continue;
    const int place = q - w.first;
    float v[B][1];
    if (place >= 0 && place < w.count) {
      const T* from = shared + (place * S::kSites + inner * B) * kChannels + c;
#pragma unroll
      for (int i = 0; i < B; ++i) v[i][0] = widen(from[i * kChannels]);
    } else {
      const T* from = x + (static_cast<int64_t>(q) * S::kSites + inner * B) * channels + w.c0 + c;
#pragma unroll
      for (int i = 0; i < B; ++i) {
        const int column = (right - S::kReach) * B + i;
        if (column >= -kRadius && column < B + kRadius) v[i][0] = widen(from[i * channels]);
      }
    }
#pragma unroll
    for (int i = 0; i < B; ++i) {
      const int column = (right - S::kReach) * B + i;
      if (column >= -kRadius && column < B + kRadius) f(column, v[i]);
    }
  }
}

// ---- forward and input gradient, K = 7, blocks of 8 and 4 ----------------------------------------------------------------
template <class T, int B>
__global__ void __launch_bounds__(kThreads, 3) forward_windows(SparseDepthwise p, int64_t groups) {
  using S = Blocks<B>;
  constexpr int rows = 2, strips = B / rows;  // output rows of a strip; strips of a block
  __shared__ __align__(16) T shared[kWindow * kChannels];
  __shared__ float weights[kTapCount * kWeightRow];
  const T* x = static_cast<const T*>(p.x);
  const float* bias = static_cast<const float*>(p.bias);
  const int lane = threadIdx.x % kWarp;
  const int64_t windows = (p.blocks + S::kCount - 1) / S::kCount;
  for (int64_t task = blockIdx.x; task < windows * groups; task += gridDim.x) {
    const Window w = window_at<B>(task / groups, task % groups * kChannels, p.blocks);
    const bool exists = lane < p.channels - w.c0;
    const int c = exists ? lane : 0;
    __syncthreads();  // the window before may still be read
    stage_weights<kThreads>(static_cast<const float*>(p.weight), w.c0, p.channels, p.flip, weights);
    stage_window<T, B, kThreads, kChannels>(x, w, p.channels, shared);
    finish_copies();
    for (int strip = threadIdx.x / kWarp; strip < w.count * strips; strip += kWarps) {
      const int64_t block = int64_t{w.first} + strip / strips;
      const int row = strip % strips * rows;
      const Table<B> table(p.neighbors, block);
      float sum[rows][B][1];
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < B; ++j) sum[i][j][0] = bias ? bias[w.c0 + c] : 0.f;
      float taps[rows][kTaps][1];  // output row i takes kernel row `kernel_row` - i: what row i - 1 took one input row ago
      const auto add_row = [&](int kernel_row, auto first, auto last) {
#pragma unroll
        for (int k = 0; k < kTaps; ++k) taps[1][k][0] = taps[0][k][0];
        if constexpr (decltype(first)::value) {
#pragma unroll
          for (int k = 0; k < kTaps; ++k) taps[0][k][0] = weights[(kernel_row * kTaps + k) * kWeightRow + c];
        }
        for_row<B>(x, shared, w, p.channels, table, row + kernel_row - kRadius, c, [&](int column, const float (&v)[1]) {
          if constexpr (decltype(first)::value) add_taps(column, v, taps[0], sum[0]);
          if constexpr (decltype(last)::value) add_taps(column, v, taps[1], sum[1]);
        });
      };
      add_row(0, std::true_type{}, std::false_type{});
#pragma unroll 1
      for (int kernel_row = 1; kernel_row < kTaps; ++kernel_row) add_row(kernel_row, std::true_type{}, std::true_type{});
      add_row(kTaps, std::false_type{}, std::true_type{});
      if (!exists) continue;
      T* y = static_cast<T*>(p.y) + (block * S::kSites + row * B) * p.channels + w.c0 + c;
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < B; ++j) y[(i * B + j) * p.channels] = narrow<T>(sum[i][j][0]);
    }
  }
}

// ---- weight gradient, K = 7, blocks of 8 and 4: a warp a row of the kernel -----------------------------------------------
// Sums lie as (parts, 50, padded C); a part is a run of windows.
template <class T, int B>
__global__ void __launch_bounds__(kWarp* kTaps, 3) weight_windows(SparseDepthwiseWeightGrad p, int64_t groups, int64_t parts) {
  using S = Blocks<B>;
  constexpr int threads = kWarp * kTaps;
  __shared__ __align__(16) T x_shared[kWindow * kChannels], grad_shared[kWindow * kChannels];
  const int lane = threadIdx.x % kWarp, kernel_row = threadIdx.x / kWarp;
  const int64_t windows = (p.blocks + S::kCount - 1) / S::kCount, row = padded(p.channels, kSparseDepthwisePadding);
  for (int64_t task = blockIdx.x; task < parts * groups; task += gridDim.x) {
    const int64_t part = task / groups, c0 = task % groups * kChannels;
    const bool exists = lane < p.channels - c0;
    const int c = exists ? lane : 0;
    float sum[kTaps] = {}, bias = 0;
    for (int64_t index = windows * part / parts; index < windows * (part + 1) / parts; ++index) {
      const Window w = window_at<B>(index, c0, p.blocks);
      __syncthreads();  // the window before may still be read
      stage_window<T, B, threads, kChannels>(static_cast<const T*>(p.x), w, p.channels, x_shared);
      stage_window<T, B, threads, kChannels>(static_cast<const T*>(p.grad), w, p.channels, grad_shared);
      finish_copies();
      for (int block = 0; block < w.count; ++block) {
        const Table<B> table(p.neighbors, w.first + block);
#pragma unroll 1
        for (int y = 0; y < B; ++y) {
          float grad[B];
#pragma unroll
          for (int j = 0; j < B; ++j) {
            grad[j] = widen(grad_shared[(block * S::kSites + y * B + j) * kChannels + c]);
            bias += grad[j];
          }
          for_row<B>(static_cast<const T*>(p.x), x_shared, w, p.channels, table, y + kernel_row - kRadius, c,
                     [&](int column, const float (&v)[1]) {
#pragma unroll
                       for (int j = 0; j < B; ++j) {
                         const int tap = column - j + kRadius;
                         if (tap >= 0 && tap < kTaps) sum[tap] += grad[j] * v[0];
                       }
                     });
        }
      }
    }
    if (!exists) continue;
    float* to = static_cast<float*>(p.workspace) + part * (kTapCount + 1) * row + c0 + c;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) to[(kernel_row * kTaps + k) * row] = sum[k];
    if (kernel_row == 0) to[kTapCount * row] = bias;
  }
}

// ---- any kernel and block ------------------------------------------------------------------------------------------------
// The row of the site at (y, x), counted from the first site of the block with this row of the table, or -1.
struct Neighbourhood {
  int64_t block, reach, side;
  __device__ __forceinline__ explicit Neighbourhood(int64_t kernel, int64_t block)
      : block(block), reach((kernel / 2 + block - 1) / block), side(2 * reach + 1) {}
  __device__ __forceinline__ int64_t site(const int32_t* neighbors, int64_t of, int64_t y, int64_t x) const {
    const int64_t down = y + reach * block, right = x + reach * block;  // at least 0
    const int64_t q = neighbors[(of * side + down / block) * side + right / block];
    return q < 0 ? -1 : (q * block + down % block) * block + right % block;
  }
};

// `packed`: the weight as (K^2, padded C), turned where the input gradient wants it.
template <class T>
__global__ void forward_sites(SparseDepthwise p, const accum_t<T>* packed) {
  using A = accum_t<T>;
  const Neighbourhood around(p.kernel, p.block);
  const int64_t sites = p.block * p.block, radius = p.kernel / 2, row = padded(p.channels, kSparseDepthwisePadding);
  const int64_t total = p.blocks * sites * p.channels;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total; i += int64_t{gridDim.x} * kThreads) {
    const int64_t c = i % p.channels, site = i / p.channels, block = site / sites;
    const int64_t y = site % sites / p.block - radius, x = site % p.block - radius;
    A sum = p.bias ? static_cast<const A*>(p.bias)[c] : A(0);
    for (int64_t tap = 0; tap < p.kernel * p.kernel; ++tap) {
      const int64_t from = around.site(p.neighbors, block, y + tap / p.kernel, x + tap % p.kernel);
      if (from >= 0) sum += widen(static_cast<const T*>(p.x)[from * p.channels + c]) * packed[tap * row + c];
    }
    static_cast<T*>(p.y)[i] = narrow<T>(sum);
  }
}

// A thread a part, tap and channel; sums lie as in weight_windows.
template <class T>
__global__ void weight_taps(SparseDepthwiseWeightGrad p, int64_t parts) {
  using A = accum_t<T>;
  const Neighbourhood around(p.kernel, p.block);
  const int64_t sites = p.block * p.block, radius = p.kernel / 2, taps = p.kernel * p.kernel;
  const int64_t row = padded(p.channels, kSparseDepthwisePadding), total = parts * (taps + 1) * p.channels, all = p.blocks * sites;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total; i += int64_t{gridDim.x} * kThreads) {
    const int64_t c = i % p.channels, tap = i / p.channels % (taps + 1), part = i / p.channels / (taps + 1);
    A sum = 0;
    for (int64_t site = all * part / parts; site < all * (part + 1) / parts; ++site) {
      const A grad = widen(static_cast<const T*>(p.grad)[site * p.channels + c]);
      if (tap == taps) {
        sum += grad;
        continue;
      }
      const int64_t y = site % sites / p.block + tap / p.kernel - radius, x = site % p.block + tap % p.kernel - radius;
      const int64_t from = around.site(p.neighbors, site / sites, y, x);
      if (from >= 0) sum += grad * widen(static_cast<const T*>(p.x)[from * p.channels + c]);
    }
    static_cast<A*>(p.workspace)[(part * (taps + 1) + tap) * row + c] = sum;
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------------
// Calls f(B) where the fast kernels know the block and whole vectors of T fit the channels, else returns -1.
template <class T, class P, class F>
int with_block(const P& p, bool aligned, const F& f) {
  if constexpr (sizeof(T) <= 4) {
    if (p.kernel != kTaps || p.channels % kVector<T> != 0 || !aligned) return -1;
    switch (p.block) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 4: return f(std::integral_constant<int, 4>{});
      case 8: return f(std::integral_constant<int, 8>{});
    }
  }
  return -1;
}

template <class T>
int forward(const SparseDepthwise& p, cudaStream_t stream) {
  using A = accum_t<T>;
  const int fast = with_block<T>(p, aligned(16, p.x, p.y), [&](auto block) {
    constexpr int B = decltype(block)::value;
    const int64_t windows = ceil_div(p.blocks, Blocks<B>::kCount), groups = ceil_div(p.channels, B > 2 ? kChannels : kPairedChannels);
    if constexpr (B > 2) forward_windows<T, B><<<grid(windows * groups), kThreads, 0, stream>>>(p, groups);
    else forward_pairs<T, B><<<grid(windows * groups), kPairedThreads, 0, stream>>>(p, groups);
    return launch_status();
  });
  if (fast >= 0) return fast;
  const int64_t taps = p.kernel * p.kernel, row = padded(p.channels, kSparseDepthwisePadding);
  if (const int status = launch_pack_weights<A>(p.weight, taps, p.channels, row, p.flip, p.workspace, stream)) return status;
  forward_sites<T>
      <<<grid(ceil_div(p.blocks * p.block * p.block * p.channels, kThreads)), kThreads, 0, stream>>>(p, static_cast<const A*>(p.workspace));
  return launch_status();
}

template <class T>
int weight_grad(const SparseDepthwiseWeightGrad& p, cudaStream_t stream) {
  using A = accum_t<T>;
  const int64_t taps = p.kernel * p.kernel, most = sparse_depthwise_parts(p.blocks, p.block, p.channels);
  const int64_t parts = p.block > 2 ? most : grid(most);  // where tests limit grids, a part is several windows, as on large inputs
  const int fast = with_block<T>(p, aligned(16, p.x, p.grad), [&](auto block) {
    constexpr int B = decltype(block)::value;
    const int64_t groups = ceil_div(p.channels, B > 2 ? kChannels : kPairedChannels);
    if constexpr (B > 2) weight_windows<T, B><<<grid(parts * groups), kWarp * kTaps, 0, stream>>>(p, groups, parts);
    else weight_pairs<T, B><<<grid(parts * groups), kPairedThreads, 0, stream>>>(p, groups, parts);
    return launch_status();
  });
  if (fast > 0) return fast;
  if (fast < 0) {
    weight_taps<T><<<grid(ceil_div(parts * (taps + 1) * p.channels, kThreads)), kThreads, 0, stream>>>(p, parts);
    if (const int status = launch_status()) return status;
  }
  return launch_add_weight_parts<A>(p.workspace, parts, taps, p.channels, padded(p.channels, kSparseDepthwisePadding), p.grad_weight,
                                    p.grad_bias, stream);
}

}  // namespace

int sparse_depthwise_forward(const SparseDepthwise& p, void* stream) {
  return dispatch(p.dtype, [&](auto x) { return forward<decltype(x)>(p, stream_of(stream)); });
}
int sparse_depthwise_weight_grad(const SparseDepthwiseWeightGrad& p, void* stream) {
  return dispatch(p.dtype, [&](auto x) { return weight_grad<decltype(x)>(p, stream_of(stream)); });
}

}  // namespace convdit::cuda
