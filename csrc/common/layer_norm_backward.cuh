// The backward of layer_norm.cuh, in the same two ways. No atomics: a block sums over a chunk of rows, a second launch over the chunks.
#pragma once
#include "common/layer_norm.cuh"

namespace convdit::cuda {
namespace {

struct NormBackward {
  int64_t batch, tokens, width, chunk;  // rows that one block sums over
  double unit;
  const void *grad_residual, *grad_out, *residual, *y, *gate, *scale, *mean, *rstd;
  void *grad_x, *grad_y, *grad_gate, *grad_shift, *grad_scale;  // all but one of the first two may be null
  void* workspace;                                              // (batch, ceil(tokens / chunk), sums, width)
  int sums;                                                     // shift and scale: 2; with the gate: 3
};

// With n the normalised row and g = grad_out * (unit + scale): grad = grad_residual + rstd * (g - mean(g) - n * mean(g * n)).
// Sums over the rows of a chunk lie in the order shift, scale, gate.
template <class T, class Y, int N, int R>
__global__ void __launch_bounds__(kNormThreads) norm_runs_backward(NormBackward p) {
  constexpr int V = kVector<T>;
  __shared__ float scratch[2 * R * kNormThreads / kWarp];
  const int64_t chunks = (p.tokens + p.chunk - 1) / p.chunk, width = p.width;
  const auto column = [&](int n) { return (n * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V; };
  for (int64_t task = blockIdx.x; task < p.batch * chunks; task += gridDim.x) {
    const int64_t sample = task / chunks, first = sample * p.tokens + task % chunks * p.chunk;
    const int64_t end = (sample + 1) * p.tokens, last = first + p.chunk < end ? first + p.chunk : end;
    float sum[3][N][V] = {}, scale[N][V] = {}, gate[N][V] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (p.y) load_row(static_cast<const float*>(p.gate) + sample * width, column(n), width, gate[n]);
      if (!p.grad_out) continue;
      load_row(static_cast<const float*>(p.scale) + sample * width, column(n), width, scale[n]);
#pragma unroll
      for (int k = 0; k < V; ++k) scale[n][k] += static_cast<float>(p.unit);
    }
    for (int64_t row = first; row < last; row += R) {
      float grad[R][N][V] = {}, normalised[R][N][V] = {}, mean[2 * R] = {}, rstd[R] = {};
      if (p.grad_out) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (row + r >= last) continue;
          const float row_mean = static_cast<const float*>(p.mean)[row + r];
          rstd[r] = static_cast<const float*>(p.rstd)[row + r];
#pragma unroll
          for (int n = 0; n < N; ++n) {
            if (column(n) >= width) continue;
            load(static_cast<const T*>(p.grad_out) + (row + r) * width + column(n), V, true, grad[r][n]);
            load(static_cast<const T*>(p.residual) + (row + r) * width + column(n), V, true, normalised[r][n]);
#pragma unroll
            for (int k = 0; k < V; ++k) {
              const float d = grad[r][n][k], g = d * scale[n][k], norm = (normalised[r][n][k] - row_mean) * rstd[r];
              sum[0][n][k] += d;
              sum[1][n][k] += d * norm;
              mean[2 * r] += g;
              mean[2 * r + 1] += g * norm;
              grad[r][n][k] = g, normalised[r][n][k] = norm;
            }
          }
        }
        block_sums(mean, scratch);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float mean_g = mean[2 * r] / static_cast<float>(width), mean_gn = mean[2 * r + 1] / static_cast<float>(width);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          if (row + r >= last || column(n) >= width) continue;
          const int64_t at = (row + r) * width + column(n);
          float other[V] = {};
          if (p.grad_residual) load(static_cast<const T*>(p.grad_residual) + at, V, true, other);
#pragma unroll
          for (int k = 0; k < V; ++k) other[k] += rstd[r] * (grad[r][n][k] - mean_g - normalised[r][n][k] * mean_gn);
          if (p.grad_x) store(static_cast<T*>(p.grad_x) + at, V, true, other);
          if (!p.y) continue;
          float y[V];
          load(static_cast<const Y*>(p.y) + at, V, true, y);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            sum[2][n][k] += other[k] * y[k];
            other[k] *= gate[n][k];
          }
          store(static_cast<Y*>(p.grad_y) + at, V, true, other);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (i < p.sums) store_row(static_cast<float*>(p.workspace) + (task * p.sums + i) * width, column(n), width, sum[i][n]);
  }
}

// The same for any row: each thread has its own columns throughout, whose sums are kept in shared memory (`in_shared`), or in the
// workspace where the row is too wide.
template <class T, class Y>
__global__ void norm_chunks_backward(NormBackward p, bool in_shared, bool whole) {
  using A = accum_t<T>;
  constexpr int vector = kVector<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ A scratch[2 * kNormThreads / kWarp];
  const int64_t width = p.width, chunks = (p.tokens + p.chunk - 1) / p.chunk;
  const int64_t first = threadIdx.x * vector, step = blockDim.x * vector;
  for (int64_t task = blockIdx.x; task < p.batch * chunks; task += gridDim.x) {
    const int64_t sample = task / chunks, chunk = task % chunks;
    A* const result = static_cast<A*>(p.workspace) + task * p.sums * width;
    A *const shift_sum = in_shared ? reinterpret_cast<A*>(shared) : result, *const scale_sum = shift_sum + width;
    A* const gate_sum = scale_sum + width;  // only where there are three sums
    for (int64_t i = first; i < width; i += step)
      for (int64_t k = i; k < i + vector && k < width; ++k)
        for (int s = 0; s < p.sums; ++s) shift_sum[s * width + k] = 0;
    const A *gate = static_cast<const A*>(p.gate) + sample * width, *scale = static_cast<const A*>(p.scale) + sample * width;
    for (int64_t token = chunk * p.chunk; token < (chunk + 1) * p.chunk && token < p.tokens; ++token) {
      const int64_t row = sample * p.tokens + token, begin = row * width;
      const T *grad_out = static_cast<const T*>(p.grad_out) + begin, *residual = static_cast<const T*>(p.residual) + begin;
      A mean = 0, rstd = 0, means[2] = {};
      if (p.grad_out) {
        mean = static_cast<const A*>(p.mean)[row], rstd = static_cast<const A*>(p.rstd)[row];
        for (int64_t i = first; i < width; i += step) {
          A d[vector], v[vector], s[vector];
          load(grad_out + i, width - i, whole, d);
          load(residual + i, width - i, whole, v);
          load(scale + i, width - i, whole, s);
#pragma unroll
          for (int k = 0; k < vector; ++k) {
            const A g = d[k] * (static_cast<A>(p.unit) + s[k]);
            means[0] += g;
            means[1] += g * ((v[k] - mean) * rstd);
          }
        }
        block_sums(means, scratch);
        means[0] /= static_cast<A>(width), means[1] /= static_cast<A>(width);
      }
      for (int64_t i = first; i < width; i += step) {
        A grad[vector] = {}, d[vector], v[vector], s[vector];
        if (p.grad_residual) load(static_cast<const T*>(p.grad_residual) + begin + i, width - i, whole, grad);
        if (p.grad_out) {
          load(grad_out + i, width - i, whole, d);
          load(residual + i, width - i, whole, v);
          load(scale + i, width - i, whole, s);
#pragma unroll
          for (int k = 0; k < vector; ++k) {
            const A normalised = (v[k] - mean) * rstd;
            if (i + k < width) shift_sum[i + k] += d[k], scale_sum[i + k] += d[k] * normalised;
            grad[k] += rstd * (d[k] * (static_cast<A>(p.unit) + s[k]) - means[0] - normalised * means[1]);
          }
        }
        if (p.grad_x) store(static_cast<T*>(p.grad_x) + begin + i, width - i, whole, grad);
        if (p.y) {
          load(static_cast<const Y*>(p.y) + begin + i, width - i, whole, v);
          load(gate + i, width - i, whole, s);
#pragma unroll
          for (int k = 0; k < vector; ++k) {
            if (i + k < width) gate_sum[i + k] += grad[k] * v[k];
            grad[k] *= s[k];
          }
          store(static_cast<Y*>(p.grad_y) + begin + i, width - i, whole, grad);
        }
      }
    }
    if (!in_shared) continue;
    for (int64_t i = first; i < width; i += step)
      for (int64_t k = i; k < i + vector && k < width; ++k)
        for (int s = 0; s < p.sums; ++s) result[s * width + k] = shift_sum[s * width + k];
  }
}

// The sums over a sample's chunks, in order: 32 columns of one sum a block, a warp every eighth chunk.
template <class A>
__global__ void __launch_bounds__(kNormThreads) add_chunks(NormBackward p) {
  constexpr int warps = kNormThreads / kWarp;
  __shared__ A scratch[kNormThreads];
  const int64_t chunks = (p.tokens + p.chunk - 1) / p.chunk, groups = (p.width + kWarp - 1) / kWarp;
  for (int64_t task = blockIdx.x; task < p.batch * p.sums * groups; task += gridDim.x) {
    const int64_t c = task % groups * kWarp + threadIdx.x % kWarp, which = task / groups % p.sums, sample = task / groups / p.sums;
    A* const result = static_cast<A*>(which == 0 ? p.grad_shift : which == 1 ? p.grad_scale : p.grad_gate);
    if (!result) continue;
    A sum[1] = {};
    if (c < p.width)
      for (int64_t chunk = threadIdx.x / kWarp; chunk < chunks; chunk += warps)
        sum[0] += static_cast<const A*>(p.workspace)[((sample * chunks + chunk) * p.sums + which) * p.width + c];
    sum_groups(sum, kWarp, warps, scratch);
    if (threadIdx.x < kWarp && c < p.width) result[sample * p.width + c] = sum[0];
  }
}

template <class T, class Y>
int norm_backward(const NormBackward& p, cudaStream_t stream) {
  using A = accum_t<T>;
  const bool whole = p.width % kVector<T> == 0 &&
                     aligned(16, p.grad_residual, p.grad_out, p.residual, p.gate, p.scale, p.grad_x, p.workspace) &&
                     branch_aligned<T, Y>(p.y, p.grad_y);
  const unsigned blocks = grid(p.batch * ceil_div(p.tokens, p.chunk));
  int status = -1;
  if constexpr (sizeof(T) <= 4)
    if (whole)
      status = with_vectors<16 / kVector<T>, T>(p.width, [&](auto n, unsigned threads) {
        constexpr int N = decltype(n)::value;
        norm_runs_backward<T, Y, N, N * kVector<T> <= 8 ? 2 : 1><<<blocks, threads, 0, stream>>>(p);
        return launch_status();
      });
  if (status < 0) {
    const int64_t bytes = p.sums * p.width * static_cast<int64_t>(sizeof(A));
    const bool in_shared = bytes <= kSharedBytes;
    norm_chunks_backward<T, Y>
        <<<blocks, row_threads(p.width, kVector<T>, kNormThreads), in_shared ? bytes : 0, stream>>>(p, in_shared, whole);
    status = launch_status();
  }
  if (status != 0) return status;
  add_chunks<A><<<grid(p.batch * p.sums * ceil_div(p.width, kWarp)), kNormThreads, 0, stream>>>(p);
  return launch_status();
}

}  // namespace
}  // namespace convdit::cuda
