// LayerNorm over rows with a scale and shift for each sample, and a gated residual before it: the forward. The adaptive LayerNorm
// of DiT is all of it (adaln.h has the formulas); the LayerNorm after a convolution is one sample without a residual, whose scale
// is the weight itself (`unit` 0).
//
// Fast: a block goes down a run of a sample's rows with its columns in registers, so that parameters are read and sums over the
// rows written once a run. Rows that are too wide or do not fill aligned vectors, and float64, take slower kernels.
#pragma once
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace convdit::cuda {
namespace {

constexpr int kNormThreads = 256;

struct NormForward {
  int64_t batch, tokens, width;
  double eps, unit;                         // out = normalised * (unit + scale) + shift
  const void *x, *y, *gate, *shift, *scale;  // y and gate may be null: no residual
  void *residual, *out, *mean, *rstd;        // out may be null: the residual alone. mean and rstd may be null
};

// ---- forward --------------------------------------------------------------------------------------------------------------
// N vectors of a row a thread, R rows at once, `run` rows a block.
template <class T, class Y, int N, int R>
__global__ void __launch_bounds__(kNormThreads) norm_runs(NormForward p, int64_t run) {
  constexpr int V = kVector<T>;
  __shared__ float scratch[2 * R * kNormThreads / kWarp];
  const int64_t runs = (p.tokens + run - 1) / run, width = p.width;
  const auto column = [&](int n) { return (n * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V; };
  for (int64_t task = blockIdx.x; task < p.batch * runs; task += gridDim.x) {
    const int64_t sample = task / runs, first = sample * p.tokens + task % runs * run;
    const int64_t end = (sample + 1) * p.tokens, last = first + run < end ? first + run : end;
    float shift[N][V] = {}, scale[N][V] = {}, gate[N][V] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t begin = sample * width;
      if (p.y) load_row(static_cast<const float*>(p.gate) + begin, column(n), width, gate[n]);
      if (!p.out) continue;
      load_row(static_cast<const float*>(p.shift) + begin, column(n), width, shift[n]);
      load_row(static_cast<const float*>(p.scale) + begin, column(n), width, scale[n]);
#pragma unroll
      for (int k = 0; k < V; ++k) scale[n][k] += static_cast<float>(p.unit);
    }
    for (int64_t row = first; row < last; row += R) {
      float v[R][N][V] = {}, total[R] = {}, mean[R];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < N; ++n)
          if (row + r < last && column(n) < width) load(static_cast<const T*>(p.x) + (row + r) * width + column(n), V, true, v[r][n]);
      if (p.y) {
        float y[R][N][V];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int n = 0; n < N; ++n)
            if (row + r < last && column(n) < width) load(static_cast<const Y*>(p.y) + (row + r) * width + column(n), V, true, y[r][n]);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int n = 0; n < N; ++n) {
            if (row + r >= last || column(n) >= width) continue;
#pragma unroll
            for (int k = 0; k < V; ++k) v[r][n][k] += gate[n][k] * y[r][n][k];
            const Bits<T, V> bits = narrow_all<T>(v[r][n]);
            put<V>(static_cast<T*>(p.residual) + (row + r) * width + column(n), bits);
            widen<V, T>(bits, v[r][n]);  // the norm is of what was written
          }
      }
      if (!p.out) continue;
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int k = 0; k < V; ++k) total[r] += v[r][n][k];
      block_sums(total, scratch);
      // Then about that mean, whose rounding the sum of what is left corrects: right for rows with a large mean.
      float about[2 * R] = {};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        mean[r] = total[r] / static_cast<float>(width);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          if (column(n) >= width) continue;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            v[r][n][k] -= mean[r];
            about[2 * r] += v[r][n][k];
            about[2 * r + 1] += v[r][n][k] * v[r][n][k];
          }
        }
      }
      block_sums(about, scratch);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (row + r >= last) continue;
        const float rest = about[2 * r] / static_cast<float>(width), variance = about[2 * r + 1] / static_cast<float>(width) - rest * rest;
        const float rstd = 1.f / sqrtf(variance + static_cast<float>(p.eps));
        if (threadIdx.x == 0 && p.mean) {
          static_cast<float*>(p.mean)[row + r] = mean[r] + rest;
          static_cast<float*>(p.rstd)[row + r] = rstd;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
          if (column(n) >= width) continue;
#pragma unroll
          for (int k = 0; k < V; ++k) v[r][n][k] = (v[r][n][k] - rest) * rstd * scale[n][k] + shift[n][k];
          store(static_cast<T*>(p.out) + (row + r) * width + column(n), V, true, v[r][n]);
        }
      }
    }
  }
}

// One warp a row, which is read from memory, or from cache, for each step. `whole`: rows come in whole, aligned vectors.
template <class T, class Y>
__global__ void norm_rows(NormForward p, bool whole) {
  using A = accum_t<T>;
  constexpr int vector = kVector<T>;
  const int64_t width = p.width, rows = p.batch * p.tokens;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (blockIdx.x * int64_t{kNormThreads} + threadIdx.x) / kWarp, step = int64_t{gridDim.x} * kNormThreads / kWarp;
  for (int64_t row = first; row < rows; row += step) {
    const int64_t parameters = row / p.tokens * width;
    const T* residual = static_cast<const T*>(p.x) + row * width;
    if (p.y) {
      const T* x = residual;
      T* sum = static_cast<T*>(p.residual) + row * width;
      const Y* y = static_cast<const Y*>(p.y) + row * width;
      const A* gate = static_cast<const A*>(p.gate) + parameters;
      for (int64_t i = lane * vector; i < width; i += kWarp * vector) {
        A v[vector], branch[vector], g[vector];
        load(x + i, width - i, whole, v);
        load(y + i, width - i, whole, branch);
        load(gate + i, width - i, whole, g);
#pragma unroll
        for (int k = 0; k < vector; ++k) v[k] += g[k] * branch[k];
        store(sum + i, width - i, whole, v);
      }
      residual = sum;  // below, every thread reads what it has written itself
    }
    if (!p.out) continue;
    A mean, rstd;
    warp_row_statistics<vector>(
        width, static_cast<A>(p.eps), [&](int64_t i, A(&v)[vector]) { load(residual + i, width - i, whole, v); }, mean, rstd);
    if (lane == 0 && p.mean) static_cast<A*>(p.mean)[row] = mean, static_cast<A*>(p.rstd)[row] = rstd;
    const A *shift = static_cast<const A*>(p.shift) + parameters, *scale = static_cast<const A*>(p.scale) + parameters;
    T* out = static_cast<T*>(p.out) + row * width;
    for (int64_t i = lane * vector; i < width; i += kWarp * vector) {
      A v[vector], add[vector], multiply[vector];
      load(residual + i, width - i, whole, v);
      load(shift + i, width - i, whole, add);
      load(scale + i, width - i, whole, multiply);
#pragma unroll
      for (int k = 0; k < vector; ++k) v[k] = (v[k] - mean) * rstd * (static_cast<A>(p.unit) + multiply[k]) + add[k];
      store(out + i, width - i, whole, v);
    }
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------------
// Calls f(N) with the vectors a thread takes of a row of `width`, at most Most, and the threads; or returns -1.
template <int Most, class T, class F>
int with_vectors(int64_t width, const F& f) {
  const int64_t vectors = ceil_div(width, kVector<T>);
  const auto threads = [&](int64_t n) { return static_cast<unsigned>(ceil_div(ceil_div(vectors, n), kWarp) * kWarp); };
  if (vectors <= kNormThreads) return f(std::integral_constant<int, 1>{}, threads(1));
  if constexpr (Most >= 2)
    if (vectors <= 2 * kNormThreads) return f(std::integral_constant<int, 2>{}, threads(2));
  if constexpr (Most >= 4)
    if (vectors <= 4 * kNormThreads) return f(std::integral_constant<int, 4>{}, threads(4));
  if constexpr (Most >= 8)
    if (vectors <= 8 * kNormThreads) return f(std::integral_constant<int, 8>{}, threads(8));
  return -1;
}

// Whether y and its gradient are aligned for as many elements as a vector of T has.
template <class T, class Y, class... P>
bool branch_aligned(const P*... pointers) {
  constexpr int bytes = kVector<T> * static_cast<int>(sizeof(Y));
  return aligned(bytes < 16 ? bytes : 16, pointers...);
}

constexpr int64_t kEnoughRuns = 1024;

template <class T, class Y>
int norm_forward(const NormForward& p, cudaStream_t stream) {
  const bool whole =
      p.width % kVector<T> == 0 && aligned(16, p.x, p.gate, p.shift, p.scale, p.residual, p.out) && branch_aligned<T, Y>(p.y);
  if constexpr (sizeof(T) <= 4) {
    const int64_t run = p.batch * ceil_div(p.tokens, 64) >= kEnoughRuns ? 64 : 16;
    const int status = !whole ? -1 : with_vectors<32 / kVector<T>, T>(p.width, [&](auto n, unsigned threads) {
      constexpr int N = decltype(n)::value, R = N * kVector<T> <= 4 ? 4 : N * kVector<T> <= 16 ? 2 : 1;
      norm_runs<T, Y, N, R><<<grid(p.batch * ceil_div(p.tokens, run)), threads, 0, stream>>>(p, run);
      return launch_status();
    });
    if (status >= 0) return status;
  }
  norm_rows<T, Y><<<grid(ceil_div(p.batch * p.tokens, kNormThreads / kWarp)), kNormThreads, 0, stream>>>(p, whole);
  return launch_status();
}

}  // namespace
}  // namespace convdit::cuda
