// CUDA kernels of the global response normalisation; see grn.h for the formulas.
//
// Forward: (1) sums over tiles of rows, (2) their sum for each image and channel, (3) the result. The backward is the same three
// with other sums, and (4) the sum over images for the parameters' gradients. Step 2 is a launch of its own because step 3 needs
// the mean over all channels: each of its blocks would have to read every tile's sums. No atomics; orders are fixed.
#include "grn/grn.h"

#include <type_traits>

#include "common/launch.cuh"
#include "common/normal.cuh"
#include "common/pair.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace convdit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostWidth = kWarp;  // a warp reads one row or several whole ones, from shared memory too without bank conflicts
constexpr int kAhead = 4;       // rows that a thread loads before it works on them
constexpr int64_t kLeastTileRows = 64, kMostTileRows = 1024, kEnoughBlocks = 2048;

// A block takes a tile of rows and a chunk of channels: `width` threads of one vector each along the channels, and as many
// such groups, one row each, as it has threads for.
struct Plan {
  int64_t slots, chunks, tile_rows;
  int width, groups;
};

// Tiles are numbered without counting those before: an image's are floor(first row / tile_rows) + image and those after it. Some
// numbers are left out; none is used twice.
struct Tile {
  int64_t image, first, last;  // rows
};
__device__ __forceinline__ int64_t first_row(const GrnShape& p, int64_t image) {
  return p.offsets ? p.offsets[image] : p.rows / p.images * image;
}
__device__ __forceinline__ int64_t first_slot(const GrnShape& p, const Plan& plan, int64_t image) {
  return first_row(p, image) / plan.tile_rows + image;
}
__device__ __forceinline__ Tile find_tile(const GrnShape& p, const Plan& plan, int64_t slot) {
  int64_t image = 0, end = p.images;
  while (end - image > 1) {
    const int64_t middle = (image + end) / 2;
    (first_slot(p, plan, middle) <= slot ? image : end) = middle;
  }
  const int64_t first = first_row(p, image), last = first_row(p, image + 1);
  const int64_t begin = first + (slot - first_slot(p, plan, image)) * plan.tile_rows;
  return {image, begin, begin + plan.tile_rows < last ? begin + plan.tile_rows : last};
}

template <bool Gelu, class A>
__device__ __forceinline__ A activate(A x) {
  if constexpr (Gelu) return mul(x, normal_cdf(x));
  return x;
}

// Calls f(row, values of x, values of grad) on the rows of a tile that belong to this thread's group; grad may be null.
template <int V, class T, class F>
__device__ __forceinline__ void for_rows(const Tile& tile, const Plan& plan, int64_t channels, int64_t c, const T* x, const T* grad,
                                         const F& f) {
  const int64_t group = threadIdx.x / plan.width;
  for (int64_t row = tile.first + group; row < tile.last; row += kAhead * plan.groups) {
    Bits<T, V> x_bits[kAhead] = {}, grad_bits[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i * plan.groups >= tile.last) continue;
      const int64_t at = (row + i * plan.groups) * channels + c;
      x_bits[i] = fetch<V>(x + at);
      if (grad) grad_bits[i] = fetch<V>(grad + at);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i * plan.groups >= tile.last) continue;
      accum_t<T> v[V], g[V];
      widen<V, T>(x_bits[i], v);
      widen<V, T>(grad_bits[i], g);
      f(row + i * plan.groups, v, g);
    }
  }
}

// ---- (1) sums of a tile: of g^2 (Count = 1), or of grad * g and of grad (Count = 2) ----------------------------------------
// Sums lie as (Count, slots, C).
template <class T, int V, bool Gelu, int Count>
__global__ void __launch_bounds__(kThreads, kNoSpills) sum_tiles(GrnShape p, Plan plan, const T* x, const T* grad, accum_t<T>* parts) {
  using A = accum_t<T>;
  __shared__ A scratch[Count * V * kThreads];
  __shared__ Tile shared_tile;
  const int group = threadIdx.x / plan.width;
  for (int64_t task = blockIdx.x; task < plan.slots * plan.chunks; task += gridDim.x) {
    const int64_t slot = task / plan.chunks, c = (task % plan.chunks * plan.width + threadIdx.x % plan.width) * V;
    __syncthreads();  // the tile before may still be read
    if (threadIdx.x == 0) shared_tile = find_tile(p, plan, slot);
    __syncthreads();
    const Tile tile = shared_tile;
    if (tile.first >= tile.last) continue;
    const bool active = group < plan.groups && c < p.channels;
    A sum[Count * V] = {};
    if (active)
      for_rows<V>(tile, plan, p.channels, c, x, grad, [&](int64_t, const A(&v)[V], const A(&g)[V]) {
        for_values<A, V>([&](int k, auto value) {
          using U = decltype(value);
          const U a = activate<Gelu>(get<U>(v, k));
          if constexpr (Count == 1) {
            put(sum, k, fma(a, a, get<U>(sum, k)));
          } else {
            put(sum, k, fma(a, get<U>(g, k), get<U>(sum, k)));
            put(sum, V + k, add(get<U>(sum, V + k), get<U>(g, k)));
          }
        });
      });
    sum_groups(sum, plan.width, plan.groups, scratch);
    if (active && group == 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        A part[V];
#pragma unroll
        for (int k = 0; k < V; ++k) part[k] = sum[i * V + k];
        store(parts + (i * plan.slots + slot) * p.channels + c, V, true, part);
      }
    }
  }
}

// ---- (2) sums of an image, for 32 channels a block --------------------------------------------------------------------
constexpr int kGroups = kThreads / kWarp;

// Calls f(image, channel, whether it exists, sums over the image's tiles) on warp 0 of each block; see sum_tiles for `parts`.
template <int Count, class A, class F>
__device__ __forceinline__ void for_images(const GrnShape& p, const Plan& plan, const A* parts, const F& f) {
  __shared__ double scratch[Count * kThreads];
  const int64_t blocks = (p.channels + kWarp - 1) / kWarp;
  for (int64_t task = blockIdx.x; task < p.images * blocks; task += gridDim.x) {
    const int64_t image = task / blocks, c = task % blocks * kWarp + threadIdx.x % kWarp;
    const int64_t rows = first_row(p, image + 1) - first_row(p, image), slot = first_slot(p, plan, image);
    const int64_t tiles = (rows + plan.tile_rows - 1) / plan.tile_rows;
    double sum[Count] = {};
    if (c < p.channels)
      for (int64_t tile = threadIdx.x / kWarp; tile < tiles; tile += kGroups)
#pragma unroll
        for (int i = 0; i < Count; ++i) sum[i] += parts[(i * plan.slots + slot + tile) * p.channels + c];
    sum_groups(sum, kWarp, kGroups, scratch);
    if (threadIdx.x < kWarp) f(image, task % blocks, c, c < p.channels, sum);
  }
}

// `means`: (images, C / 32 rounded up), sums of 32 norms.
template <class A>
__global__ void __launch_bounds__(kThreads, kNoSpills) finish_norms(GrnShape p, Plan plan, const A* parts, A* norm, A* means) {
  for_images<1>(p, plan, parts, [&](int64_t image, int64_t block, int64_t c, bool exists, const double (&sum)[1]) {
    const double root = sqrt(sum[0]), total = warp_sum(root);
    if (exists) norm[image * p.channels + c] = static_cast<A>(root);
    if (threadIdx.x == 0) means[image * p.channels + block] = static_cast<A>(total);
  });
}

// What the backward keeps for each image: (4, images, C). Of `means` and `dots` each image uses C / 32 rounded up.
template <class A>
struct Sums {
  A *grad_g, *grad, *means, *dots;
};
template <class A>
__global__ void __launch_bounds__(kThreads, kNoSpills)
    finish_sums(GrnShape p, Plan plan, const A* parts, const A* norm, const A* weight, Sums<A> sums) {
  for_images<2>(p, plan, parts, [&](int64_t image, int64_t block, int64_t c, bool exists, const double (&sum)[2]) {
    const double root = exists ? norm[image * p.channels + c] : A(0);
    const double total = warp_sum(root), dot = warp_sum(exists ? weight[c] * sum[0] * root : 0.0);
    if (exists) {
      sums.grad_g[image * p.channels + c] = static_cast<A>(sum[0]);
      sums.grad[image * p.channels + c] = static_cast<A>(sum[1]);
    }
    if (threadIdx.x == 0) {
      sums.means[image * p.channels + block] = static_cast<A>(total);
      sums.dots[image * p.channels + block] = static_cast<A>(dot);
    }
  });
}

// The sum of an image's C / 32 partial sums, by one warp.
template <class A>
__device__ __forceinline__ A warp_total(const GrnShape& p, const A* parts, int64_t image) {
  A total = 0;
  for (int64_t i = threadIdx.x % kWarp; i * kWarp < p.channels; i += kWarp) total += parts[image * p.channels + i];
  return warp_sum(total);
}

// Parameters of a block's channels in shared memory, so that each is read from global memory once a block: channel i of the chunk,
// the i % V-th of thread i / V, lies in row i % V. Rows are spaced so that neither writing nor reading has bank conflicts.
template <int V, class A>
struct Parameters {
  static constexpr int kRow = kMostWidth + kWarp / V;
  A values[V * kRow];
  __device__ __forceinline__ void write(int i, A value) { values[i % V * kRow + i / V] = value; }
  __device__ __forceinline__ void read(int thread, A (&to)[V]) const {
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] = values[k * kRow + thread];
  }
};

// ---- (3) results, from the last tile to the first: step 1 read the last ones last, so they may still be in cache --------
template <class T, int V, bool Gelu>
__global__ void __launch_bounds__(kThreads, kNoSpills) apply_forward(Grn p, Plan plan, const accum_t<T>* means) {
  using A = accum_t<T>;
  __shared__ Tile shared_tile;
  __shared__ A shared_mean;
  __shared__ Parameters<V, A> factors, biases;
  const int thread = threadIdx.x % plan.width;
  const A *weight = static_cast<const A*>(p.weight), *norm = static_cast<const A*>(p.norm);
  for (int64_t task = blockIdx.x; task < plan.slots * plan.chunks; task += gridDim.x) {
    const int64_t slot = plan.slots - 1 - task / plan.chunks, c0 = task % plan.chunks * plan.width * V, c = c0 + thread * V;
    if (threadIdx.x < kWarp) {  // the tile before has been read: all threads have met since, before its rows
      const Tile tile = find_tile(p, plan, slot);
      const A total = warp_total(p, means, tile.image);
      if (threadIdx.x == 0) shared_tile = tile, shared_mean = total / static_cast<A>(p.channels);
    }
    __syncthreads();
    const Tile tile = shared_tile;
    const A scale = 1 / (shared_mean + static_cast<A>(p.eps));
    for (int i = threadIdx.x; i < plan.width * V && c0 + i < p.channels; i += kThreads) {
      factors.write(i, 1 + weight[c0 + i] * norm[tile.image * p.channels + c0 + i] * scale);
      biases.write(i, static_cast<const A*>(p.bias)[c0 + i]);
    }
    __syncthreads();
    if (threadIdx.x >= plan.width * plan.groups || c >= p.channels) continue;
    A factor[V], bias[V];
    factors.read(thread, factor);
    biases.read(thread, bias);
    T* y = static_cast<T*>(p.y) + c;
    for_rows<V>(tile, plan, p.channels, c, static_cast<const T*>(p.x), static_cast<const T*>(nullptr),
                [&](int64_t row, A(&v)[V], const A(&)[V]) {
                  for_values<A, V>([&](int k, auto value) {
                    using U = decltype(value);
                    put(v, k, fma(activate<Gelu>(get<U>(v, k)), get<U>(factor, k), get<U>(bias, k)));
                  });
                  store(y + row * p.channels, V, true, v);
                });
  }
}

template <class T, int V, bool Gelu>
__global__ void __launch_bounds__(kThreads, kNoSpills) apply_backward(GrnBackward p, Plan plan, Sums<accum_t<T>> sums) {
  using A = accum_t<T>;
  __shared__ Tile shared_tile;
  __shared__ A shared_mean, shared_dot;
  __shared__ Parameters<V, A> of_grad, of_g;
  const int thread = threadIdx.x % plan.width;
  const A *weight = static_cast<const A*>(p.weight), *norm = static_cast<const A*>(p.norm);
  for (int64_t task = blockIdx.x; task < plan.slots * plan.chunks; task += gridDim.x) {
    const int64_t slot = plan.slots - 1 - task / plan.chunks, c0 = task % plan.chunks * plan.width * V, c = c0 + thread * V;
    if (threadIdx.x < kWarp) {  // the tile before has been read: all threads have met since, before its rows
      const Tile tile = find_tile(p, plan, slot);
      const A total = warp_total(p, sums.means, tile.image), dot = warp_total(p, sums.dots, tile.image);
      if (threadIdx.x == 0)
        shared_tile = tile, shared_mean = total / static_cast<A>(p.channels), shared_dot = dot / static_cast<A>(p.channels);
    }
    __syncthreads();
    const Tile tile = shared_tile;
    // With m = mean of G + eps and S = sum of grad * g, the gradient of G is weight * S / m - mean(weight * S * G) / m^2, and that
    // of g is grad * (1 + weight * G / m) + g / G times it.
    const A scale = 1 / (shared_mean + static_cast<A>(p.eps)), shift = shared_dot * scale;
    for (int i = threadIdx.x; i < plan.width * V && c0 + i < p.channels; i += kThreads) {
      const int64_t at = tile.image * p.channels + c0 + i;
      const A w = weight[c0 + i], g_norm = norm[at];
      of_grad.write(i, 1 + w * g_norm * scale);
      of_g.write(i, g_norm > 0 ? (w * sums.grad_g[at] - shift) * scale / g_norm : A(0));
    }
    __syncthreads();
    if (threadIdx.x >= plan.width * plan.groups || c >= p.channels) continue;
    A by_grad[V], by_g[V];
    of_grad.read(thread, by_grad);
    of_g.read(thread, by_g);
    T* grad_x = static_cast<T*>(p.grad_x) + c;
    for_rows<V>(tile, plan, p.channels, c, static_cast<const T*>(p.x), static_cast<const T*>(p.grad),
                [&](int64_t row, A(&v)[V], const A(&g)[V]) {
                  for_values<A, V>([&](int k, auto value) {
                    using U = decltype(value);
                    const U x = get<U>(v, k);
                    U act = x, slope = both<U>(1);
                    if constexpr (Gelu) {
                      const U cdf = normal_cdf(x);
                      act = mul(x, cdf), slope = fma(x, normal_pdf(x), cdf);
                    }
                    const U grad_g = fma(get<U>(g, k), get<U>(by_grad, k), mul(act, get<U>(by_g, k)));
                    if constexpr (Gelu) put(v, k, mul(grad_g, slope));
                    else put(v, k, grad_g);
                  });
                  store(grad_x + row * p.channels, V, true, v);
                });
  }
}

// ---- (4) gradients of weight and bias: sums over images, for 32 channels a block ----------------------------------------
template <class A>
__global__ void __launch_bounds__(kThreads, kNoSpills) add_images(GrnBackward p, Sums<A> sums) {
  __shared__ double scratch[2 * kThreads];
  for (int64_t block = blockIdx.x; block * kWarp < p.channels; block += gridDim.x) {
    const int64_t c = block * kWarp + threadIdx.x % kWarp;
    double sum[2] = {};
    for (int64_t image = threadIdx.x / kWarp; image < p.images; image += kGroups) {
      const A mean = warp_total(p, sums.means, image) / static_cast<A>(p.channels);
      if (c >= p.channels) continue;
      const int64_t at = image * p.channels + c;
      sum[0] += static_cast<const A*>(p.norm)[at] / (mean + static_cast<A>(p.eps)) * sums.grad_g[at];
      sum[1] += sums.grad[at];
    }
    sum_groups(sum, kWarp, kGroups, scratch);
    if (threadIdx.x < kWarp && c < p.channels) {
      static_cast<A*>(p.grad_weight)[c] = static_cast<A>(sum[0]);
      static_cast<A*>(p.grad_bias)[c] = static_cast<A>(sum[1]);
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------------------------------
Plan plan_for(const GrnShape& p, int vector) {
  Plan plan{};
  const int64_t vectors = ceil_div(p.channels, vector);
  plan.chunks = ceil_div(vectors, kMostWidth);
  plan.width = static_cast<int>(ceil_div(vectors, plan.chunks));
  plan.groups = kThreads / plan.width;
  plan.tile_rows = kLeastTileRows;  // at least grn_tile_rows: the workspace is large enough
  while (plan.tile_rows < kMostTileRows && p.rows / plan.tile_rows * plan.chunks > kEnoughBlocks) plan.tile_rows *= 2;
  plan.slots = p.rows / plan.tile_rows + p.images;
  return plan;
}

template <class T, int V, bool Gelu>
int forward(const Grn& p, cudaStream_t stream) {
  using A = accum_t<T>;
  const Plan plan = plan_for(p, V);
  A *parts = static_cast<A*>(p.workspace), *means = parts + plan.slots * p.channels;
  const unsigned tiles = grid(plan.slots * plan.chunks);
  sum_tiles<T, V, Gelu, 1><<<tiles, kThreads, 0, stream>>>(p, plan, static_cast<const T*>(p.x), nullptr, parts);
  if (const int status = launch_status()) return status;
  finish_norms<A><<<grid(p.images * ceil_div(p.channels, kWarp)), kThreads, 0, stream>>>(p, plan, parts, static_cast<A*>(p.norm), means);
  if (const int status = launch_status()) return status;
  apply_forward<T, V, Gelu><<<tiles, kThreads, 0, stream>>>(p, plan, means);
  return launch_status();
}

template <class T, int V, bool Gelu>
int backward(const GrnBackward& p, cudaStream_t stream) {
  using A = accum_t<T>;
  const Plan plan = plan_for(p, V);
  A *parts = static_cast<A*>(p.workspace), *of_images = parts + 2 * plan.slots * p.channels;
  const int64_t size = p.images * p.channels;
  const Sums<A> sums{of_images, of_images + size, of_images + 2 * size, of_images + 3 * size};
  const unsigned tiles = grid(plan.slots * plan.chunks);
  sum_tiles<T, V, Gelu, 2><<<tiles, kThreads, 0, stream>>>(p, plan, static_cast<const T*>(p.x), static_cast<const T*>(p.grad), parts);
  if (const int status = launch_status()) return status;
  finish_sums<A><<<grid(p.images * ceil_div(p.channels, kWarp)), kThreads, 0, stream>>>(p, plan, parts, static_cast<const A*>(p.norm),
                                                                                        static_cast<const A*>(p.weight), sums);
  if (const int status = launch_status()) return status;
  apply_backward<T, V, Gelu><<<tiles, kThreads, 0, stream>>>(p, plan, sums);
  if (const int status = launch_status()) return status;
  add_images<A><<<grid(ceil_div(p.channels, kWarp)), kThreads, 0, stream>>>(p, sums);
  return launch_status();
}

// Calls f(T, whole vectors of 16 bytes or single elements, gelu). float64 takes single elements always.
template <class F, class... P>
int dispatch_layout(const GrnShape& p, const F& f, const P*... pointers) {
  return dispatch(p.dtype, [&](auto x) {
    using T = decltype(x);
    constexpr int vector = sizeof(T) <= 4 ? kVector<T> : 1;
    const bool whole = p.channels % vector == 0 && aligned(16, pointers...);
    const auto with_gelu = [&](auto v) { return p.gelu ? f(x, v, std::true_type{}) : f(x, v, std::false_type{}); };
    return whole ? with_gelu(std::integral_constant<int, vector>{}) : with_gelu(std::integral_constant<int, 1>{});
  });
}

}  // namespace

int grn_forward(const Grn& p, void* stream) {
  if (p.shift || p.scale) return cudaErrorNotSupported;  // forms of the fused block, which runs on the CPU alone
  return dispatch_layout(
      p, [&](auto x, auto v, auto gelu) { return forward<decltype(x), decltype(v)::value, decltype(gelu)::value>(p, stream_of(stream)); },
      p.x, p.y, p.weight, p.bias, p.norm, p.workspace);
}
int grn_backward(const GrnBackward& p, void* stream) {
  return dispatch_layout(
      p, [&](auto x, auto v, auto gelu) { return backward<decltype(x), decltype(v)::value, decltype(gelu)::value>(p, stream_of(stream)); },
      p.x, p.grad, p.grad_x, p.weight, p.norm, p.workspace);
}

}  // namespace convdit::cuda
