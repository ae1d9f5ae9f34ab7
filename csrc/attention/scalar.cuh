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

// By one lane, which has a row of its own.
template <class T>
__device__ __forceinline__ accum_t<T> dot(const T* a, const T* b, int width) {
  accum_t<T> sum = 0;
  for (int i = 0; i < width; ++i) sum += widen(a[i]) * widen(b[i]);
  return sum;
}

// sums[j] += the lanes' weights times column `column` + lane + 32 j of the lanes' rows, of which there are `count`.
template <class T, class A>
__device__ __forceinline__ void add_weighted_rows(A (&sums)[kLaneColumns], A weight, Rows<const T> rows, int64_t count, int64_t column,
                                                  int width) {
  __shared__ A shared[kThreads];
  A* const weights = shared + threadIdx.x / kWarp * kWarp;
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // those before may still be read
  weights[lane] = weight;
  __syncwarp();
  for (int r = 0; r < kWarp && r < count; ++r) {
    const A w = weights[r];
    const T* row = rows.from(r).first;
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      const int64_t i = column + lane + kWarp * j;
      if (i < width) sums[j] += w * widen(row[i]);
    }
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
  const int lane = threadIdx.x % kWarp;
  for (int64_t index = first_task(); index < row_tasks(p); index += task_step()) {
    const RowTask task = row_task(p, index);
    const Head<T> head = head_of<T>(p, task.head);
    const T* q = head.q.from(task.row).first;
    A sums[kLaneColumns] = {}, total = 0, largest = -INFINITY;
    for (int64_t begin = 0; begin < p.tokens; begin += kWarp) {
      const int64_t key = begin + lane, left = p.tokens - begin;
      const A score = lane < left ? dot(q, head.k.from(key).first, head.width) * scale : A(-INFINITY);
      const A top = fmax(largest, warp_max(score));
      // Where all scores so far are -inf, a weight is exp(-inf) and not exp(-inf + inf).
      const A from = top == -INFINITY ? A(0) : top, shrink = exp(largest - from), weight = exp(score - from);
      largest = top;
      total = shrink * total + weight;
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) sums[j] *= shrink;
      add_weighted_rows(sums, weight, head.v.from(begin), left, task.column, head.width);
    }
    total = warp_sum(total);
    store_row(sums, 1 / total, head.out.from(task.row).first, task.column, head.width);
    if (head.rest.first) {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) sums[j] = sums[j] * (1 / total) - widen(narrow<T>(sums[j] * (1 / total)));
      store_row(sums, A(1), head.rest.from(task.row).first, task.column, head.width);
    }
    if (task.column == 0 && lane == 0) *head.log_sum_exp.from(task.row).first = largest + log(total);
  }
}

// The gradient of q; leaves the statistics of its rows for the next launch.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_queries_scalar(AttentionBackward p) {
  using A = accum_t<T>;
  const A scale = static_cast<A>(p.forward.scale);
  const int lane = threadIdx.x % kWarp;
  for (int64_t index = first_task(); index < row_tasks(p.forward); index += task_step()) {
    const RowTask task = row_task(p.forward, index);
    const HeadBackward<T> back = head_of<T>(p, task.head);
    const Head<T>& head = back.forward;
    const T *q = head.q.from(task.row).first, *grad = back.grad.from(task.row).first, *out = head.out.from(task.row).first;
    const A log_sum_exp = *head.log_sum_exp.from(task.row).first;
    A delta = 0, sums[kLaneColumns] = {};
    for (int i = lane; i < head.width; i += kWarp) delta += widen(grad[i]) * widen(out[i]);
    if (head.rest.first)
      for (int i = lane; i < head.width; i += kWarp) delta += widen(grad[i]) * widen(head.rest.from(task.row).first[i]);
    delta = warp_sum(delta);
    if (task.column == 0 && lane == 0) back.statistics[2 * task.row] = log_sum_exp, back.statistics[2 * task.row + 1] = delta;
    for (int64_t begin = 0; begin < p.forward.tokens; begin += kWarp) {
      const int64_t key = begin + lane, left = p.forward.tokens - begin;
      A weight = 0;
      if (lane < left)
        weight =
            exp(dot(q, head.k.from(key).first, head.width) * scale - log_sum_exp) * (dot(grad, head.v.from(key).first, head.width) - delta);
      add_weighted_rows(sums, weight, head.k.from(begin), left, task.column, head.width);
    }
    store_row(sums, scale, back.grad_q.from(task.row).first, task.column, head.width);
  }
}

// The gradients of k and v.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_keys_scalar(AttentionBackward p) {
  using A = accum_t<T>;
  const A scale = static_cast<A>(p.forward.scale);
  const int lane = threadIdx.x % kWarp;
  for (int64_t index = first_task(); index < row_tasks(p.forward); index += task_step()) {
    const RowTask task = row_task(p.forward, index);
    const HeadBackward<T> back = head_of<T>(p, task.head);
    const Head<T>& head = back.forward;
    const T *k = head.k.from(task.row).first, *v = head.v.from(task.row).first;
    A grad_k[kLaneColumns] = {}, grad_v[kLaneColumns] = {};
    for (int64_t begin = 0; begin < p.forward.tokens; begin += kWarp) {
      const int64_t query = begin + lane, left = p.forward.tokens - begin;
      A weight = 0, grad = 0;
      if (lane < left) {
        weight = exp(dot(k, head.q.from(query).first, head.width) * scale - back.statistics[2 * query]);
        grad = weight * (dot(v, back.grad.from(query).first, head.width) - back.statistics[2 * query + 1]);
      }
      add_weighted_rows(grad_v, weight, back.grad.from(begin), left, task.column, head.width);
      add_weighted_rows(grad_k, grad, head.q.from(begin), left, task.column, head.width);
    }
    store_row(grad_k, scale, back.grad_k.from(task.row).first, task.column, head.width);
    store_row(grad_v, A(1), back.grad_v.from(task.row).first, task.column, head.width);
  }
}

}  // namespace convdit::cuda
