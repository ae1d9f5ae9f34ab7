// CUDA kernels of the adaptive LayerNorm; see adaln.h for the formulas. Forward: one warp a row. Backward: one block a chunk of
// rows of one sample, whose sums over the rows a second launch adds up in chunk order: no atomics.
#include "adaln/adaln.h"

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace convdit::cuda {
namespace {

constexpr int kThreads = 256;

// `whole`: rows come in whole, aligned vectors of 16 bytes of T.
template <class T, class Y>
__global__ void forward_rows(Adaln p, bool whole) {
  using A = accum_t<T>;
  constexpr int vector = kVector<T>;
  const int64_t width = p.width, rows = p.batch * p.tokens;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarp, step = int64_t{gridDim.x} * kThreads / kWarp;
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
    if (lane == 0) static_cast<A*>(p.mean)[row] = mean, static_cast<A*>(p.rstd)[row] = rstd;
    const A *shift = static_cast<const A*>(p.shift) + parameters, *scale = static_cast<const A*>(p.scale) + parameters;
    T* out = static_cast<T*>(p.out) + row * width;
    for (int64_t i = lane * vector; i < width; i += kWarp * vector) {
      A v[vector], add[vector], multiply[vector];
      load(residual + i, width - i, whole, v);
      load(shift + i, width - i, whole, add);
      load(scale + i, width - i, whole, multiply);
#pragma unroll
      for (int k = 0; k < vector; ++k) v[k] = (v[k] - mean) * rstd * (1 + multiply[k]) + add[k];
      store(out + i, width - i, whole, v);
    }
  }
}

// Each thread has its own columns throughout, so the sums over rows need no synchronisation. They are kept in shared memory
// (`in_shared`), or in the workspace where the row is too wide.
template <class T, class Y>
__global__ void backward_chunks(AdalnBackward p, bool in_shared, bool whole) {
  using A = accum_t<T>;
  constexpr int vector = kVector<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ A scratch[2 * kThreads / kWarp];
  const int64_t width = p.width, chunks = (p.tokens + kAdalnChunk - 1) / kAdalnChunk;
  const int64_t first = threadIdx.x * vector, step = blockDim.x * vector;
  for (int64_t task = blockIdx.x; task < p.batch * chunks; task += gridDim.x) {
    const int64_t sample = task / chunks, chunk = task % chunks;
    A* const result = static_cast<A*>(p.workspace) + task * 3 * width;
    A *const gate_sum = in_shared ? reinterpret_cast<A*>(shared) : result, *const shift_sum = gate_sum + width;
    A* const scale_sum = shift_sum + width;
    for (int64_t i = first; i < width; i += step)
      for (int64_t k = i; k < i + vector && k < width; ++k) gate_sum[k] = shift_sum[k] = scale_sum[k] = 0;
    const A *gate = static_cast<const A*>(p.gate) + sample * width, *scale = static_cast<const A*>(p.scale) + sample * width;
    for (int64_t token = chunk * kAdalnChunk; token < (chunk + 1) * kAdalnChunk && token < p.tokens; ++token) {
      const int64_t row = sample * p.tokens + token, begin = row * width;
      const T *grad_out = static_cast<const T*>(p.grad_out) + begin, *residual = static_cast<const T*>(p.residual) + begin;
      A mean = 0, rstd = 0, mean_g = 0, mean_gn = 0;
      if (p.grad_out) {
        mean = static_cast<const A*>(p.mean)[row], rstd = static_cast<const A*>(p.rstd)[row];
        // With n the normalised row and g = grad_out * (1 + scale): grad = rstd * (g - mean(g) - n * mean(g * n)).
        for (int64_t i = first; i < width; i += step) {
          A d[vector], v[vector], s[vector];
          load(grad_out + i, width - i, whole, d);
          load(residual + i, width - i, whole, v);
          load(scale + i, width - i, whole, s);
#pragma unroll
          for (int k = 0; k < vector; ++k) {
            const A g = d[k] * (1 + s[k]);
            mean_g += g;
            mean_gn += g * ((v[k] - mean) * rstd);
          }
        }
        block_sum(mean_g, mean_gn, scratch);
        mean_g /= static_cast<A>(width), mean_gn /= static_cast<A>(width);
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
            grad[k] += rstd * (d[k] * (1 + s[k]) - mean_g - normalised * mean_gn);
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
        result[k] = gate_sum[k], result[width + k] = shift_sum[k], result[2 * width + k] = scale_sum[k];
  }
}

template <class A>
__global__ void add_chunks(AdalnBackward p) {
  const int64_t chunks = (p.tokens + kAdalnChunk - 1) / kAdalnChunk, total = p.batch * 3 * p.width;
  A* const results[3] = {static_cast<A*>(p.grad_gate), static_cast<A*>(p.grad_shift), static_cast<A*>(p.grad_scale)};
  for (int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x; index < total; index += int64_t{gridDim.x} * kThreads) {
    const int64_t i = index % p.width, which = index / p.width % 3, sample = index / p.width / 3;
    A* const result = which == 0 ? results[0] : which == 1 ? results[1] : results[2];
    if (!result) continue;
    const A* parts = static_cast<const A*>(p.workspace) + (sample * chunks * 3 + which) * p.width + i;
    A sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk * 3 * p.width];
    result[sample * p.width + i] = sum;
  }
}

template <class T, class Y>
int forward(const Adaln& p, cudaStream_t stream) {
  const bool whole = p.width % kVector<T> == 0 && aligned(16, p.x, p.gate, p.shift, p.scale, p.residual, p.out) &&
                     aligned(sizeof(Pack<Y, kVector<T>>) < 16 ? sizeof(Pack<Y, kVector<T>>) : 16, p.y);
  forward_rows<T, Y><<<grid(ceil_div(p.batch * p.tokens, kThreads / kWarp)), kThreads, 0, stream>>>(p, whole);
  return launch_status();
}

template <class T, class Y>
int backward(const AdalnBackward& p, cudaStream_t stream) {
  using A = accum_t<T>;
  const bool whole = p.width % kVector<T> == 0 &&
                     aligned(16, p.grad_residual, p.grad_out, p.residual, p.gate, p.scale, p.grad_x) &&
                     aligned(sizeof(Pack<Y, kVector<T>>) < 16 ? sizeof(Pack<Y, kVector<T>>) : 16, p.y, p.grad_y);
  const int64_t bytes = 3 * p.width * static_cast<int64_t>(sizeof(A)), chunks = ceil_div(p.tokens, kAdalnChunk);
  const bool in_shared = bytes <= kSharedBytes;
  backward_chunks<T, Y><<<grid(p.batch * chunks), row_threads(p.width, kVector<T>, kThreads), in_shared ? bytes : 0, stream>>>(
      p, in_shared, whole);
  if (const int status = launch_status()) return status;
  add_chunks<A><<<grid(ceil_div(p.batch * 3 * p.width, kThreads)), kThreads, 0, stream>>>(p);
  return launch_status();
}

// x and the branch have one dtype, or a float32 x takes a branch of halves.
template <class Params, class F>
int dispatch_both(const Params& p, const F& f) {
  if (p.dtype == DType::f32 && p.branch_dtype == DType::bf16) return f(float{}, bf16{});
  if (p.dtype == DType::f32 && p.branch_dtype == DType::f16) return f(float{}, f16{});
  return dispatch(p.dtype, [&](auto x) { return f(x, x); });
}

}  // namespace

int adaln_forward(const Adaln& p, void* stream) {
  return dispatch_both(p, [&](auto x, auto y) { return forward<decltype(x), decltype(y)>(p, stream_of(stream)); });
}
int adaln_backward(const AdalnBackward& p, void* stream) {
  return dispatch_both(p, [&](auto x, auto y) { return backward<decltype(x), decltype(y)>(p, stream_of(stream)); });
}

}  // namespace convdit::cuda
