// Attention of float32 by fused multiply-adds, on tiles in shared memory. A warp has rows of its own, all lanes work on each:
// a lane has every 32nd column. Rows' weights pass through shared memory from one product to the next, within the warp.
#pragma once
#include "attention/tile.cuh"

namespace convdit::cuda {

template <int kWidth>
struct FmaPlan {
  static constexpr int kWarpRows = kWidth <= 96 ? 16 : 8, kRows = kWarps * kWarpRows;  // rows of a block
  static constexpr int kColumns = kWidth <= 64 ? 64 : 32;                             // rows of a tile that it goes through
  static constexpr int kOwn = kRows * kWidth, kTile = kColumns * kWidth, kWeights = kRows * kColumns;  // elements
  static constexpr int kForwardBytes = (kOwn + 2 * kTile + kWeights) * 4;
  static constexpr int kBackwardBytes = (2 * kOwn + 2 * kTile + kWeights) * 4;
};

__device__ __forceinline__ float4 four(const float* p) { return *reinterpret_cast<const float4*>(p); }

// products[r][j] = row own_row + r of `own` times row lane + 32 j of `tile`.
template <int kWidth, int kOwnRows, int kGroups>
__device__ __forceinline__ void multiply_rows(float (&products)[kOwnRows][kGroups], const float* own, int own_row,
                                              const float* tile) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
    for (int j = 0; j < kGroups; ++j) products[r][j] = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < kWidth / 4; ++chunk) {
    float4 b[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) b[j] = four(tile + Tile<float, kWidth>::at(lane + kWarp * j, chunk));
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const float4 a = four(own + Tile<float, kWidth>::at(own_row + r, chunk));
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        products[r][j] += a.x * b[j].x, products[r][j] += a.y * b[j].y;
        products[r][j] += a.z * b[j].z, products[r][j] += a.w * b[j].w;
      }
    }
  }
}

// Puts a warp's weights where add_weighted_rows reads them.
template <int kOwnRows, int kGroups>
__device__ __forceinline__ void share_weights(float* to, int own_row, const float (&weights)[kOwnRows][kGroups]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
    for (int j = 0; j < kGroups; ++j) to[(own_row + r) * kGroups * kWarp + lane + kWarp * j] = weights[r][j];
  __syncwarp();
}

// sums[r][j] += weights of row own_row + r times column lane + 32 j of `tile`.
template <int kWidth, int kColumns, int kOwnRows>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[kOwnRows][kWidth / kWarp], const float* weights, int own_row,
                                                  const float* tile) {
  constexpr int groups = kWidth / kWarp;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int column = 0; column < kColumns; column += 4) {
    float b[4][groups];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < groups; ++j) b[i][j] = tile[Tile<float, kWidth>::at(column + i, j * 8 + lane / 4) + lane % 4];
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const float4 w = four(weights + (own_row + r) * kColumns + column);
#pragma unroll
      for (int j = 0; j < groups; ++j) {
        sums[r][j] += w.x * b[0][j], sums[r][j] += w.y * b[1][j];
        sums[r][j] += w.z * b[2][j], sums[r][j] += w.w * b[3][j];
      }
    }
  }
}

template <int kOwnRows, int kGroups>
__device__ __forceinline__ void store_rows(const float (&sums)[kOwnRows][kGroups], const float (&factors)[kOwnRows],
                                           Rows<float> rows, int length, int width) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r)
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
      if (r < length && lane + kWarp * j < width) rows.from(r).first[lane + kWarp * j] = sums[r][j] * factors[r];
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2) forward_fma(Attention p, Blocks blocks) {
  using Plan = FmaPlan<kWidth>;
  constexpr int own_rows = Plan::kWarpRows, groups = Plan::kColumns / kWarp;
  extern __shared__ __align__(16) float memory[];
  float *const queries = memory, *const keys = queries + Plan::kOwn, *const values = keys + Plan::kTile;
  float* const weights = values + Plan::kTile;
  const int lane = threadIdx.x % kWarp, own_row = threadIdx.x / kWarp * own_rows;
  const float scale = static_cast<float>(p.scale);
  const int first = blocks.tile() * Plan::kRows;
  const Head<float> head = head_of<float>(p, blocks.head());
  load_tile<Plan::kRows, kWidth>(queries, head.q.from(first), head.tokens - first, head.width);
  float sums[own_rows][kWidth / kWarp] = {}, largest[own_rows], total[own_rows] = {};
#pragma unroll
  for (int r = 0; r < own_rows; ++r) largest[r] = -INFINITY;
  for (int begin = 0; begin < head.tokens; begin += Plan::kColumns) {
    const int left = head.tokens - begin;
    load_tile<Plan::kColumns, kWidth>(keys, head.k.from(begin), left, head.width);
    load_tile<Plan::kColumns, kWidth>(values, head.v.from(begin), left, head.width);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float scores[own_rows][groups];
    multiply_rows<kWidth>(scores, queries, own_row, keys);
#pragma unroll
    for (int r = 0; r < own_rows; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < groups; ++j) {
        scores[r][j] = lane + kWarp * j < left ? __fmul_rn(scores[r][j], scale) : -INFINITY;
        top = fmaxf(top, scores[r][j]);
      }
      top = fmaxf(largest[r], warp_max(top));
      // Where all scores so far are -inf, a weight is exp(-inf) and not exp(-inf + inf).
      const float from = top == -INFINITY ? 0.f : top, shrink = expf(largest[r] - from);
      largest[r] = top;
      total[r] *= shrink;
#pragma unroll
      for (int j = 0; j < kWidth / kWarp; ++j) sums[r][j] *= shrink;
#pragma unroll
      for (int j = 0; j < groups; ++j) scores[r][j] = expf(scores[r][j] - from), total[r] += scores[r][j];
    }
    share_weights(weights, own_row, scores);
    add_weighted_rows<kWidth, Plan::kColumns>(sums, weights, own_row, values);
    __syncthreads();  // before the next copies
  }
#pragma unroll
  for (int r = 0; r < own_rows; ++r) {
    total[r] = warp_sum(total[r]);
    const int row = first + own_row + r;
    if (lane == 0 && row < head.tokens) *head.log_sum_exp.from(row).first = largest[r] + logf(total[r]);
    total[r] = 1 / total[r];
  }
  store_rows(sums, total, head.out.from(first + own_row), head.tokens - first - own_row, head.width);
}

// The gradient of q; leaves the statistics of its rows for the next launch.
template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2) backward_queries_fma(AttentionBackward p, Blocks blocks) {
  using Plan = FmaPlan<kWidth>;
  constexpr int own_rows = Plan::kWarpRows, groups = Plan::kColumns / kWarp;
  extern __shared__ __align__(16) float memory[];
  float *const queries = memory, *const grads_out = queries + Plan::kOwn, *const keys = grads_out + Plan::kOwn;
  float *const values = keys + Plan::kTile, *const weights = values + Plan::kTile;
  const int lane = threadIdx.x % kWarp, own_row = threadIdx.x / kWarp * own_rows;
  const float scale = static_cast<float>(p.forward.scale);
  const int first = blocks.tile() * Plan::kRows;
  const HeadBackward<float> back = head_of<float>(p, blocks.head());
  const Head<float>& head = back.forward;
  load_tile<Plan::kRows, kWidth>(queries, head.q.from(first), head.tokens - first, head.width);
  load_tile<Plan::kRows, kWidth>(grads_out, back.grad.from(first), head.tokens - first, head.width);
  float delta[own_rows], log_sum_exp[own_rows], factors[own_rows], sums[own_rows][kWidth / kWarp] = {};
#pragma unroll
  for (int r = 0; r < own_rows; ++r) {
    const int row = first + own_row + r;
    delta[r] = log_sum_exp[r] = 0;
    factors[r] = scale;
    if (row >= head.tokens) continue;
    for (int i = lane; i < head.width; i += kWarp) delta[r] += back.grad.from(row).first[i] * head.out.from(row).first[i];
    delta[r] = warp_sum(delta[r]);
    log_sum_exp[r] = *head.log_sum_exp.from(row).first;
    if (lane == 0) reinterpret_cast<float2*>(back.statistics)[row] = make_float2(log_sum_exp[r], delta[r]);
  }
  for (int begin = 0; begin < head.tokens; begin += Plan::kColumns) {
    const int left = head.tokens - begin;
    load_tile<Plan::kColumns, kWidth>(keys, head.k.from(begin), left, head.width);
    load_tile<Plan::kColumns, kWidth>(values, head.v.from(begin), left, head.width);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float scores[own_rows][groups], grads[own_rows][groups];
    multiply_rows<kWidth>(scores, queries, own_row, keys);
    multiply_rows<kWidth>(grads, grads_out, own_row, values);
#pragma unroll
    for (int r = 0; r < own_rows; ++r)
#pragma unroll
      for (int j = 0; j < groups; ++j)
        // Beyond the end a weight is 0: the score 0 of no key may be far above the row's own.
        grads[r][j] = lane + kWarp * j < left ? expf(__fmul_rn(scores[r][j], scale) - log_sum_exp[r]) * (grads[r][j] - delta[r]) : 0.f;
    share_weights(weights, own_row, grads);
    add_weighted_rows<kWidth, Plan::kColumns>(sums, weights, own_row, keys);
    __syncthreads();  // before the next copies
  }
  store_rows(sums, factors, back.grad_q.from(first + own_row), head.tokens - first - own_row, head.width);
}

// The gradients of k and v. Products are transposed here: rows are keys, columns queries.
template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2) backward_keys_fma(AttentionBackward p, Blocks blocks) {
  using Plan = FmaPlan<kWidth>;
  constexpr int own_rows = Plan::kWarpRows, groups = Plan::kColumns / kWarp;
  extern __shared__ __align__(16) float memory[];
  float *const keys = memory, *const values = keys + Plan::kOwn, *const queries = values + Plan::kOwn;
  float *const grads_out = queries + Plan::kTile, *const weights = grads_out + Plan::kTile;
  const int lane = threadIdx.x % kWarp, own_row = threadIdx.x / kWarp * own_rows;
  const float scale = static_cast<float>(p.forward.scale);
  const int first = blocks.tile() * Plan::kRows;
  const HeadBackward<float> back = head_of<float>(p, blocks.head());
  const Head<float>& head = back.forward;
  load_tile<Plan::kRows, kWidth>(keys, head.k.from(first), head.tokens - first, head.width);
  load_tile<Plan::kRows, kWidth>(values, head.v.from(first), head.tokens - first, head.width);
  float grad_k[own_rows][kWidth / kWarp] = {}, grad_v[own_rows][kWidth / kWarp] = {}, scales[own_rows], ones[own_rows];
#pragma unroll
  for (int r = 0; r < own_rows; ++r) scales[r] = scale, ones[r] = 1;
  for (int begin = 0; begin < head.tokens; begin += Plan::kColumns) {
    const int left = head.tokens - begin;
    load_tile<Plan::kColumns, kWidth>(queries, head.q.from(begin), left, head.width);
    load_tile<Plan::kColumns, kWidth>(grads_out, back.grad.from(begin), left, head.width);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float scores[own_rows][groups], grads[own_rows][groups];
    multiply_rows<kWidth>(scores, keys, own_row, queries);
    multiply_rows<kWidth>(grads, values, own_row, grads_out);
#pragma unroll
    for (int j = 0; j < groups; ++j) {
      // Queries beyond the end are zeros, and so are their gradients and statistics: their weights are 1, of nothing.
      const int column = lane + kWarp * j;
      const float2 row = column < left ? reinterpret_cast<const float2*>(back.statistics)[begin + column] : float2{};
#pragma unroll
      for (int r = 0; r < own_rows; ++r) {
        scores[r][j] = expf(__fmul_rn(scores[r][j], scale) - row.x);
        grads[r][j] = scores[r][j] * (grads[r][j] - row.y);
      }
    }
    share_weights(weights, own_row, scores);
    add_weighted_rows<kWidth, Plan::kColumns>(grad_v, weights, own_row, grads_out);
    __syncwarp();  // before the same weights are written again
    share_weights(weights, own_row, grads);
    add_weighted_rows<kWidth, Plan::kColumns>(grad_k, weights, own_row, queries);
    __syncthreads();  // before the next copies
  }
  const int row = first + own_row;
  store_rows(grad_k, scales, back.grad_k.from(row), head.tokens - row, head.width);
  store_rows(grad_v, ones, back.grad_v.from(row), head.tokens - row, head.width);
}

}  // namespace convdit::cuda
