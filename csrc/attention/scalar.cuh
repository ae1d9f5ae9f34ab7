// Attention of any dtype, head width and alignment, a warp a row and 256 columns of the result: right, not fast. Serves
// float64, heads wider than 128, and rows that do not start on 16 bytes.
#pragma once
#include "attention/tile.cuh"
#include "common/vector.cuh"

namespace convdit::cuda {

constexpr int kLaneColumns = 8, kTaskColumns = kLaneColumns * kWarp;

// A warp's task: a row of one head, and columns from some on. Warps loop over the tasks.
struct RowTask {
  int64_t head, row, column;  // head: sample * heads + head
};
__host__ __device__ inline int64_t row_tasks(const Attention& p) {
  return p.batch * p.heads * p.tokens * ((p.head_dim + kTaskColumns - 1) / kTaskColumns);
}
__device__ __forceinline__ RowTask row_task(const Attention& p, int64_t task) {
  const int64_t groups = (p.head_dim + kTaskColumns - 1) / kTaskColumns;
  return {task / groups / p.tokens, task / groups % p.tokens, task % groups * kTaskColumns};
}
__device__ __forceinline__ int64_t first_task() { return (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarp; }
__device__ __forceinline__ int64_t task_step() { return int64_t{gridDim.x} * kWarps; }

template <class T>
__device__ __forceinline__ accum_t<T> dot(const T* a, const T* b, int width) {
  accum_t<T> sum = 0;
  for (int i = threadIdx.x % kWarp; i < width; i += kWarp) sum += widen(a[i]) * widen(b[i]);
  return warp_sum(sum);
}

// sums[j] = keep * sums[j] + weight * row[column + lane + 32 j], and back to memory.
template <class T, class A>
__device__ __forceinline__ void add_row(A (&sums)[kLaneColumns], A keep, A weight, const T* row, int64_t column, int width) {
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
    const int64_t i = column + threadIdx.x % kWarp + kWarp * j;
    if (i < width) sums[j] = keep * sums[j] + weight * widen(row[i]);
  }
}
template <class T, class A>
__device__ __forceinline__ void store_row(const A (&sums)[kLaneColumns], A factor, T* row, int64_t column, int width) {
#pragma unroll
  for (int j = 0; j < kLaneColumns; ++j) {
    const int64_t i = column + threadIdx.x % kWarp + kWarp * j;
    if (i < width) row[i] = narrow<T>(sums[j] * factor);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_scalar(Attention p) {
  using A = accum_t<T>;
  const A scale = static_cast<A>(p.scale);
  for (int64_t index = first_task(); index < row_tasks(p); index += task_step()) {
    const RowTask task = row_task(p, index);
    const Head<T> head = head_of<T>(p, task.head);
    const T* q = head.q.from(task.row).first;
    A sums[kLaneColumns] = {}, total = 0, largest = -INFINITY;
    for (int64_t key = 0; key < p.tokens; ++key) {
      const A score = dot(q, head.k.from(key).first, head.width) * scale, top = fmax(largest, score);
      // Where all scores so far are -inf, a weight is exp(-inf) and not exp(-inf + inf).
      const A from = top == -INFINITY ? A(0) : top, shrink = exp(largest - from), weight = exp(score - from);
      largest = top;
      total = shrink * total + weight;
      add_row(sums, shrink, weight, head.v.from(key).first, task.column, head.width);
    }
    store_row(sums, 1 / total, head.out.from(task.row).first, task.column, head.width);
    if (task.column == 0 && threadIdx.x % kWarp == 0) *head.log_sum_exp.from(task.row).first = largest + log(total);
  }
}

// The gradient of q; leaves the statistics of its rows for the next launch.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_queries_scalar(AttentionBackward p) {
  using A = accum_t<T>;
  const A scale = static_cast<A>(p.forward.scale);
  for (int64_t index = first_task(); index < row_tasks(p.forward); index += task_step()) {
    const RowTask task = row_task(p.forward, index);
    const HeadBackward<T> back = head_of<T>(p, task.head);
    const Head<T>& head = back.forward;
    const T *q = head.q.from(task.row).first, *grad = back.grad.from(task.row).first;
    const A log_sum_exp = *head.log_sum_exp.from(task.row).first;
    const A delta = dot<T>(grad, head.out.from(task.row).first, head.width);
    if (task.column == 0 && threadIdx.x % kWarp == 0)
      back.statistics[2 * task.row] = log_sum_exp, back.statistics[2 * task.row + 1] = delta;
    A sums[kLaneColumns] = {};
    for (int64_t key = 0; key < p.forward.tokens; ++key) {
      const T* k = head.k.from(key).first;
      const A weight = exp(dot(q, k, head.width) * scale - log_sum_exp);
      add_row(sums, A(1), weight * (dot(grad, head.v.from(key).first, head.width) - delta), k, task.column, head.width);
    }
    store_row(sums, scale, back.grad_q.from(task.row).first, task.column, head.width);
  }
}

// The gradients of k and v.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_keys_scalar(AttentionBackward p) {
  using A = accum_t<T>;
  const A scale = static_cast<A>(p.forward.scale);
  for (int64_t index = first_task(); index < row_tasks(p.forward); index += task_step()) {
    const RowTask task = row_task(p.forward, index);
    const HeadBackward<T> back = head_of<T>(p, task.head);
    const Head<T>& head = back.forward;
    const T *k = head.k.from(task.row).first, *v = head.v.from(task.row).first;
    A grad_k[kLaneColumns] = {}, grad_v[kLaneColumns] = {};
    for (int64_t query = 0; query < p.forward.tokens; ++query) {
      const T *q = head.q.from(query).first, *grad = back.grad.from(query).first;
      const A weight = exp(dot(k, q, head.width) * scale - back.statistics[2 * query]);
      add_row(grad_v, A(1), weight, grad, task.column, head.width);
      add_row(grad_k, A(1), weight * (dot(v, grad, head.width) - back.statistics[2 * query + 1]), q, task.column, head.width);
    }
    store_row(grad_k, scale, back.grad_k.from(task.row).first, task.column, head.width);
    store_row(grad_v, A(1), back.grad_v.from(task.row).first, task.column, head.width);
  }
}

}  // namespace convdit::cuda
