// Attention of float32 by fused multiply-adds, on tiles in shared memory. A warp has rows of its own. Its lanes lie on them in four rows
// of eight: a lane has every fourth row, and of those every eighth column, so that each value it reads serves several products.
// Rows' weights pass through shared memory from one product to the next, within the warp.
#pragma once
#include "attention/tile.cuh"

namespace convdit::cuda {

constexpr int kDown = 4, kAcross = 8;  // lanes of a warp

// Rows of a warp, and columns of a tile that a block goes through: what registers and 99 KiB of shared memory have room for.
template <int kWidth, int kWarpRows, int kTileColumns, int kOwnTiles>
struct FmaPlan {
  static constexpr int kLaneRows = kWarpRows / kDown, kRows = kWarps * kWarpRows, kColumns = kTileColumns,
                       kLaneColumns = kColumns / kAcross;
  static constexpr int kOwn = kRows * kWidth, kTile = kColumns * kWidth;  // elements
  // Of the weights. The four rows that lanes write at once lie on different banks.
  static constexpr int kWeightsRow = kColumns + kAcross;
  static constexpr int kBytes = (kOwnTiles * kOwn + 2 * kTile + kRows * kWeightsRow) * static_cast<int>(sizeof(float));
  static_assert(kWarpRows % 8 == 0 && kColumns % 8 == 0, "the chunks of a tile's rows are permuted in a period of 8 rows");
  static_assert(kBytes <= 99 * 1024);
};
template <int kWidth>
using FmaForward = FmaPlan<kWidth, 16, kWidth <= 96 ? 64 : 32, 1>;
template <int kWidth>
using FmaBackward = FmaPlan<kWidth, kWidth <= 96 ? 16 : 8, kWidth <= 64 ? 64 : 32, 2>;

// A thread's place: its first row of the block's, and its first column.
template <class Plan>
struct FmaPlace {
  const int warp_row = threadIdx.x / kWarp * Plan::kLaneRows * kDown;
  const int row = warp_row + threadIdx.x % kWarp / kAcross, column = threadIdx.x % kAcross;
};

template <class A>
__device__ __forceinline__ A sum_across(A x) {
#pragma unroll
  for (int step = kAcross / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ __forceinline__ float4 four(const float* p) { return *reinterpret_cast<const float4*>(p); }

// products[i][j] = the lane's i-th row of `own` times its j-th row of `tile`.
template <int kWidth, class Plan>
__device__ __forceinline__ void multiply_rows(float (&products)[Plan::kLaneRows][Plan::kLaneColumns], const float* own, const float* tile) {
  using Layout = Tile<float, kWidth>;
  const FmaPlace<Plan> place;
#pragma unroll
  for (int i = 0; i < Plan::kLaneRows; ++i)
#pragma unroll
    for (int j = 0; j < Plan::kLaneColumns; ++j) products[i][j] = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < kWidth / 4; ++chunk) {
    float4 b[Plan::kLaneColumns];
    const float* columns = tile + Layout::at(place.column, chunk);
#pragma unroll
    for (int j = 0; j < Plan::kLaneColumns; ++j) b[j] = four(columns + j * kAcross * kWidth);
    const float* rows[2] = {own + Layout::at(place.row, chunk), own + Layout::at(place.row + kDown, chunk)};
#pragma unroll
    for (int i = 0; i < Plan::kLaneRows; ++i) {
      const float4 a = four(rows[i % 2] + i / 2 * 2 * kDown * kWidth);
#pragma unroll
      for (int j = 0; j < Plan::kLaneColumns; ++j) {
        products[i][j] += a.x * b[j].x, products[i][j] += a.y * b[j].y;
        products[i][j] += a.z * b[j].z, products[i][j] += a.w * b[j].w;
      }
    }
  }
}

// Puts a warp's weights where add_weighted_rows reads them.
template <class Plan>
__device__ __forceinline__ void share_weights(float* to, const float (&weights)[Plan::kLaneRows][Plan::kLaneColumns]) {
  const FmaPlace<Plan> place;
#pragma unroll
  for (int i = 0; i < Plan::kLaneRows; ++i)
#pragma unroll
    for (int j = 0; j < Plan::kLaneColumns; ++j)
      to[(place.row + i * kDown) * Plan::kWeightsRow + place.column + j * kAcross] = weights[i][j];
  __syncwarp();
}

// A lane's results: pairs of columns.
template <int kWidth, class Plan>
using FmaSums = float2[Plan::kLaneRows][kWidth / (2 * kAcross)];

// sums[i][j] += the lane's i-th row of weights times its j-th pair of columns of `tile`.
template <int kWidth, class Plan>
__device__ __forceinline__ void add_weighted_rows(FmaSums<kWidth, Plan>& sums, const float* weights, const float* tile) {
  using Layout = Tile<float, kWidth>;
  constexpr int pairs = kWidth / (2 * kAcross);
  const FmaPlace<Plan> place;
#pragma unroll 1
  for (int row = 0; row < Plan::kColumns; row += 8) {
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
      float2 b[4][pairs];
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < pairs; ++j)
          b[k][j] = *reinterpret_cast<const float2*>(tile + row * kWidth + Layout::at(half + k, place.column / 2 + j * kAcross / 2) +
                                                     place.column % 2 * 2);
#pragma unroll
      for (int i = 0; i < Plan::kLaneRows; ++i) {
        const float4 w = four(weights + (place.row + i * kDown) * Plan::kWeightsRow + row + half);
#pragma unroll
        for (int j = 0; j < pairs; ++j) {
          sums[i][j].x += w.x * b[0][j].x, sums[i][j].y += w.x * b[0][j].y;
          sums[i][j].x += w.y * b[1][j].x, sums[i][j].y += w.y * b[1][j].y;
          sums[i][j].x += w.z * b[2][j].x, sums[i][j].y += w.z * b[2][j].y;
          sums[i][j].x += w.w * b[3][j].x, sums[i][j].y += w.w * b[3][j].y;
        }
      }
    }
  }
}

// `rows`: from the block's first row on, of which `length` exist.
template <int kWidth, class Plan>
__device__ __forceinline__ void store_rows(const FmaSums<kWidth, Plan>& sums, const float (&factors)[Plan::kLaneRows], Rows<float> rows,
                                           int length, int width) {
  const FmaPlace<Plan> place;
#pragma unroll
  for (int i = 0; i < Plan::kLaneRows; ++i)
#pragma unroll
    for (int j = 0; j < kWidth / (2 * kAcross); ++j) {
      const int row = place.row + i * kDown, column = 2 * (place.column + j * kAcross);
      if (row < length && column < width)
        *reinterpret_cast<float2*>(rows.from(row).first + column) = make_float2(sums[i][j].x * factors[i], sums[i][j].y * factors[i]);
    }
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2) forward_fma(Attention p, Blocks blocks) {
  using Plan = FmaForward<kWidth>;
  constexpr int lane_rows = Plan::kLaneRows, lane_columns = Plan::kLaneColumns;
  extern __shared__ __align__(16) float memory[];
  float *const queries = memory, *const keys = queries + Plan::kOwn, *const values = keys + Plan::kTile;
  float* const weights = values + Plan::kTile;
  const FmaPlace<Plan> place;
  const float scale = static_cast<float>(p.scale);
  const int first = blocks.tile() * Plan::kRows;
  const Head<float> head = head_of<float>(p, blocks.head());
  load_tile<Plan::kRows, kWidth>(queries, head.q.from(first), head.tokens - first, head.width);
  FmaSums<kWidth, Plan> sums = {};
  float largest[lane_rows], total[lane_rows] = {};
#pragma unroll
  for (int i = 0; i < lane_rows; ++i) largest[i] = -INFINITY;
  for (int begin = 0; begin < head.tokens; begin += Plan::kColumns) {
    const int left = head.tokens - begin;
    load_tile<Plan::kColumns, kWidth>(keys, head.k.from(begin), left, head.width);
    load_tile<Plan::kColumns, kWidth>(values, head.v.from(begin), left, head.width);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float scores[lane_rows][lane_columns];
    multiply_rows<kWidth, Plan>(scores, queries, keys);
#pragma unroll
    for (int i = 0; i < lane_rows; ++i) {
      float top = largest[i];
#pragma unroll
      for (int j = 0; j < lane_columns; ++j) {
        scores[i][j] = place.column + j * kAcross < left ? __fmul_rn(scores[i][j], scale) : -INFINITY;
        top = fmaxf(top, scores[i][j]);
      }
#pragma unroll
      for (int step = kAcross / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
      // Where all scores so far are -inf, a weight is exp(-inf) and not exp(-inf + inf).
      const float from = top == -INFINITY ? 0.f : top, shrink = expf(largest[i] - from);
      largest[i] = top;
      total[i] *= shrink;
#pragma unroll
      for (int j = 0; j < kWidth / (2 * kAcross); ++j) sums[i][j].x *= shrink, sums[i][j].y *= shrink;
#pragma unroll
      for (int j = 0; j < lane_columns; ++j) scores[i][j] = expf(scores[i][j] - from), total[i] += scores[i][j];
    }
    share_weights<Plan>(weights, scores);
    add_weighted_rows<kWidth, Plan>(sums, weights, values);
    __syncthreads();  // before the next copies
  }
#pragma unroll
  for (int i = 0; i < lane_rows; ++i) {
    total[i] = sum_across(total[i]);
    const int row = first + place.row + i * kDown;
    if (place.column == 0 && row < head.tokens) *head.log_sum_exp.from(row).first = largest[i] + logf(total[i]);
    total[i] = 1 / total[i];
  }
  store_rows<kWidth, Plan>(sums, total, head.out.from(first), head.tokens - first, head.width);
}

// The gradient of q; leaves the statistics of its rows for the next launch.
template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2) backward_queries_fma(AttentionBackward p, Blocks blocks) {
  using Plan = FmaBackward<kWidth>;
  constexpr int lane_rows = Plan::kLaneRows, lane_columns = Plan::kLaneColumns;
  extern __shared__ __align__(16) float memory[];
  float *const queries = memory, *const grads_out = queries + Plan::kOwn, *const keys = grads_out + Plan::kOwn;
  float *const values = keys + Plan::kTile, *const weights = values + Plan::kTile;
  const FmaPlace<Plan> place;
  const float scale = static_cast<float>(p.forward.scale);
  const int first = blocks.tile() * Plan::kRows;
  const HeadBackward<float> back = head_of<float>(p, blocks.head());
  const Head<float>& head = back.forward;
  load_tile<Plan::kRows, kWidth>(queries, head.q.from(first), head.tokens - first, head.width);
  load_tile<Plan::kRows, kWidth>(grads_out, back.grad.from(first), head.tokens - first, head.width);
  FmaSums<kWidth, Plan> sums = {};
  float delta[lane_rows] = {}, log_sum_exp[lane_rows] = {}, factors[lane_rows];
#pragma unroll
  for (int i = 0; i < lane_rows; ++i) {
    const int row = first + place.row + i * kDown;
    factors[i] = scale;
    if (row < head.tokens) {
      const float *grad = back.grad.from(row).first, *out = head.out.from(row).first;
      for (int c = place.column; c < head.width; c += kAcross) delta[i] += grad[c] * out[c];
      log_sum_exp[i] = *head.log_sum_exp.from(row).first;
    }
    delta[i] = sum_across(delta[i]);
    if (place.column == 0 && row < head.tokens) reinterpret_cast<float2*>(back.statistics)[row] = make_float2(log_sum_exp[i], delta[i]);
  }
  for (int begin = 0; begin < head.tokens; begin += Plan::kColumns) {
    const int left = head.tokens - begin;
    load_tile<Plan::kColumns, kWidth>(keys, head.k.from(begin), left, head.width);
    load_tile<Plan::kColumns, kWidth>(values, head.v.from(begin), left, head.width);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float scores[lane_rows][lane_columns], grads[lane_rows][lane_columns];
    multiply_rows<kWidth, Plan>(scores, queries, keys);
    multiply_rows<kWidth, Plan>(grads, grads_out, values);
#pragma unroll
    for (int i = 0; i < lane_rows; ++i)
#pragma unroll
      for (int j = 0; j < lane_columns; ++j)
        // Beyond the end a weight is 0: the score 0 of no key may be far above the row's own.
        grads[i][j] =
            place.column + j * kAcross < left ? expf(__fmul_rn(scores[i][j], scale) - log_sum_exp[i]) * (grads[i][j] - delta[i]) : 0.f;
    share_weights<Plan>(weights, grads);
    add_weighted_rows<kWidth, Plan>(sums, weights, keys);
    __syncthreads();  // before the next copies
  }
  store_rows<kWidth, Plan>(sums, factors, back.grad_q.from(first), head.tokens - first, head.width);
}

// The gradients of k and v. Products are transposed here: rows are keys, columns queries.
template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2) backward_keys_fma(AttentionBackward p, Blocks blocks) {
  using Plan = FmaBackward<kWidth>;
  constexpr int lane_rows = Plan::kLaneRows, lane_columns = Plan::kLaneColumns;
  extern __shared__ __align__(16) float memory[];
  float *const keys = memory, *const values = keys + Plan::kOwn, *const queries = values + Plan::kOwn;
  float *const grads_out = queries + Plan::kTile, *const weights = grads_out + Plan::kTile;
  const FmaPlace<Plan> place;
  const float scale = static_cast<float>(p.forward.scale);
  const int first = blocks.tile() * Plan::kRows;
  const HeadBackward<float> back = head_of<float>(p, blocks.head());
  const Head<float>& head = back.forward;
  load_tile<Plan::kRows, kWidth>(keys, head.k.from(first), head.tokens - first, head.width);
  load_tile<Plan::kRows, kWidth>(values, head.v.from(first), head.tokens - first, head.width);
  FmaSums<kWidth, Plan> grad_k = {}, grad_v = {};
  float scales[lane_rows], ones[lane_rows];
#pragma unroll
  for (int i = 0; i < lane_rows; ++i) scales[i] = scale, ones[i] = 1;
  for (int begin = 0; begin < head.tokens; begin += Plan::kColumns) {
    const int left = head.tokens - begin;
    load_tile<Plan::kColumns, kWidth>(queries, head.q.from(begin), left, head.width);
    load_tile<Plan::kColumns, kWidth>(grads_out, back.grad.from(begin), left, head.width);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float scores[lane_rows][lane_columns], grads[lane_rows][lane_columns];
    multiply_rows<kWidth, Plan>(scores, keys, queries);
    multiply_rows<kWidth, Plan>(grads, values, grads_out);
#pragma unroll
    for (int j = 0; j < lane_columns; ++j) {
      // Queries beyond the end are zeros, and so are their gradients and statistics: their weights are 1, of nothing.
      const int column = place.column + j * kAcross;
      const float2 row = column < left ? reinterpret_cast<const float2*>(back.statistics)[begin + column] : float2{};
#pragma unroll
      for (int i = 0; i < lane_rows; ++i) {
        scores[i][j] = expf(__fmul_rn(scores[i][j], scale) - row.x);
        grads[i][j] = scores[i][j] * (grads[i][j] - row.y);
      }
    }
    share_weights<Plan>(weights, scores);
    add_weighted_rows<kWidth, Plan>(grad_v, weights, grads_out);
    __syncwarp();  // before the same weights are written again
    share_weights<Plan>(weights, grads);
    add_weighted_rows<kWidth, Plan>(grad_k, weights, queries);
    __syncthreads();  // before the next copies
  }
  store_rows<kWidth, Plan>(grad_k, scales, back.grad_k.from(first), head.tokens - first, head.width);
  store_rows<kWidth, Plan>(grad_v, ones, back.grad_v.from(first), head.tokens - first, head.width);
}

}  // namespace convdit::cuda
