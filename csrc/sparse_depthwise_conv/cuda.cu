// CUDA kernels of the sparse depthwise convolution; see sparse_depthwise_conv.h for the formulas.
//
// K = 7 in float32 and the halves, blocks of 8, 4, 2 or 1 sites a side: strips.cuh. A thread block takes a window of consecutive
// blocks, which are consecutive rows, for some channels. It copies them to shared memory; since blocks come in the order of the map,
// most neighbours lie in the window too, and the others are read from global memory. Everything else (other K and blocks, float64,
// channels that do not fill vectors) takes a thread an output.
#include "sparse_depthwise_conv/sparse_depthwise_conv.h"

#include "sparse_depthwise_conv/strips.cuh"

namespace convdit::cuda {
namespace {

constexpr int kThreads = 256;

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

// A thread a part, tap and channel; sums lie as in weight_strips, and are as long.
template <class T>
__global__ void weight_taps(SparseDepthwiseWeightGrad p, int64_t parts) {
  using A = accum_t<T>;
  const Neighbourhood around(p.kernel, p.block);
  const int64_t sites = p.block * p.block, radius = p.kernel / 2, taps = p.kernel * p.kernel;
  const int64_t row = padded(p.channels, kSparseDepthwisePadding), total = parts * (taps + 1) * p.channels, all = p.blocks * sites;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total; i += int64_t{gridDim.x} * kThreads) {
    const int64_t c = i % p.channels, tap = i / p.channels % (taps + 1), part = i / p.channels / (taps + 1);
    const int64_t end = all * (part + 1) / parts;
    A part_sum = 0;
    for (int64_t site = all * part / parts; site < end;) {
      A sum = 0;
      for (const int64_t pause = min(site + kLongestSum, end); site < pause; ++site) {
        const A grad = widen(static_cast<const T*>(p.grad)[site * p.channels + c]);
        if (tap == taps) {
          sum += grad;
          continue;
        }
        const int64_t y = site % sites / p.block + tap / p.kernel - radius, x = site % p.block + tap % p.kernel - radius;
        const int64_t from = around.site(p.neighbors, site / sites, y, x);
        if (from >= 0) sum += grad * widen(static_cast<const T*>(p.x)[from * p.channels + c]);
      }
      part_sum += sum;
    }
    static_cast<A*>(p.workspace)[(part * (taps + 1) + tap) * row + c] = part_sum;
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
    using S = Strips<B>;
    const int64_t windows = ceil_div(p.blocks * S::kOfBlock, S::kOfWindow), groups = ceil_div(p.channels, S::kGroup);
    forward_strips<T, B><<<grid(windows * groups), kForwardThreads, 0, stream>>>(p, groups);
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
  const int64_t taps = p.kernel * p.kernel;
  // Where tests limit grids, a part is many windows, as on large inputs.
  const int64_t parts = grid(sparse_depthwise_parts(p.blocks, p.block, p.channels));
  const int fast = with_block<T>(p, aligned(16, p.x, p.grad), [&](auto block) {
    constexpr int B = decltype(block)::value;
    const int64_t groups = ceil_div(p.channels, Strips<B>::kGroup);
    weight_strips<T, B><<<grid(parts * groups), kWeightThreads<B>, 0, stream>>>(p, groups, parts);
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
