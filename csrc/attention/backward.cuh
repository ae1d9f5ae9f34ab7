// Attention backward of bf16 and f16 by mma.sync, in two launches and without atomics: a block of the first keeps queries and
// goes through keys and values, for the gradient of q; a block of the second keeps keys and values and goes through queries,
// for theirs. Weights are computed again in both: 7 products instead of 5, and every sum has a fixed order.
#pragma once
#include "attention/mma_tile.cuh"

namespace convdit::cuda {

// A stage holds two tiles of what is gone through: keys and values, or queries and the gradient of the result.
template <class T, int kWidth>
struct BackwardPlan {
  static constexpr int kRowTiles = kWidth <= 80 ? 2 : 1, kQueries = kWarps * kRowTiles * kMma;  // of a block of the first launch
  static constexpr int kOwnKeys = kWarps * kMma;                                                // of a block of the second
  static constexpr int kStage = 2 * kKeys * kWidth;
  static constexpr int kStageBytes = kStage * static_cast<int>(sizeof(T));
  // The second launch: registers hold the block's keys, and its values where there are registers left. Statistics lie
  // behind the stages, and the values behind them.
  static constexpr bool kValuesInTile = kWidth == 128;
  static constexpr int kStatisticsBytes = 2 * kKeys * 2 * static_cast<int>(sizeof(float));  // of two tiles of queries
  static constexpr int kQueriesBytes = 2 * kStageBytes;
  static constexpr int kKeysBytes = 2 * kStageBytes + kStatisticsBytes + (kValuesInTile ? kStageBytes / 2 : 0);
  static_assert(kQueries * kWidth <= kStage && 2 * kOwnKeys * kWidth <= kStage, "a block's own rows come in through a stage");
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) backward_queries_mma(AttentionBackward p, Blocks blocks) {
  using Plan = BackwardPlan<T, kWidth>;
  constexpr int row_tiles = Plan::kRowTiles;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const stages = reinterpret_cast<T*>(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own_row = warp * row_tiles * kMma;
  const float scale = static_cast<float>(p.forward.scale), magnitude = fabsf(scale);
  const int first = blocks.tile() * Plan::kQueries;
  const HeadBackward<T> back = head_of<T>(p, blocks.head());
  const Head<T>& head = back.forward;
  const auto load_own = [&](int stage, Rows<const T> rows) {
    load_tile<Plan::kQueries, kWidth>(stages + stage * Plan::kStage, rows.from(first), head.tokens - first, head.width);
    commit_copies();
  };
  const auto load_keys = [&](int tile) {
    T* const stage = stages + tile % 2 * Plan::kStage;
    load_tile<kKeys, kWidth>(stage, head.k.from(tile * kKeys), head.tokens - tile * kKeys, head.width);
    load_tile<kKeys, kWidth>(stage + kKeys * kWidth, head.v.from(tile * kKeys), head.tokens - tile * kKeys, head.width);
    commit_copies();
  };

  // delta = sum(grad * (out + rest)) over a row: the diagonal of a product like grad v^T below. Where the result is one of the values, as
  // with a weight of 1, both are then the same to the last bit, and their difference is 0 as it should be.
  Operand<T, kWidth, row_tiles> grad;
  float delta[row_tiles][2] = {}, log_sum_exp[row_tiles][2];
  const auto add_to_delta = [&] {  // what lies in the second stage
    const int row = lane / 4, holder = row * 4 + row / 2;  // of the row in each half of 8; the lane that has its diagonal
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) {
      float products[row_tiles][2][4];
      clear(products);
      multiply_rows<kWidth>(products, grad, stages + Plan::kStage, own_row + m * kMma);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        delta[m][half] += __shfl_sync(0xffffffffu, row % 2 ? products[m][half][2 * half + 1] : products[m][half][2 * half], holder);
    }
  };
  load_own(0, back.grad);
  load_own(1, {head.out.first, head.out.stride});
  wait_copies<0>();
  __syncthreads();
  grad.load(stages, own_row);
  add_to_delta();
  if (head.rest.first) {
    __syncthreads();
    load_own(1, {head.rest.first, head.rest.stride});
    wait_copies<0>();
    __syncthreads();
    add_to_delta();
  }
#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + own_row + m * kMma + half * 8 + lane / 4;
      log_sum_exp[m][half] = row < head.tokens ? *head.log_sum_exp.from(row).first : 0.f;
      if (lane % 4 == 0 && row < head.tokens)
        reinterpret_cast<float2*>(back.statistics)[row] = make_float2(log_sum_exp[m][half], delta[m][half]);
    }
  __syncthreads();
  load_own(1, head.q);
  load_keys(0);
  wait_copies<0>();
  __syncthreads();
  Operand<T, kWidth, row_tiles> q;
  q.load(stages + Plan::kStage, own_row);
  q.take_sign(scale);

  float sums[row_tiles][kWidth / 8][4];
  clear(sums);
  const bool has_rows = first + own_row < head.tokens;  // the same for the whole warp
  const int tiles = (head.tokens + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before (or the queries) any more
    if (tile + 1 < tiles) load_keys(tile + 1);
    if (!has_rows) continue;
    const T *keys = stages + tile % 2 * Plan::kStage, *values = keys + kKeys * kWidth;
    const int left = head.tokens - tile * kKeys;
#pragma unroll 1
    for (int key = 0; key < kKeys && key < left; key += kMma) {
      float scores[row_tiles][2][4], grads[row_tiles][2][4];
      clear(scores);
      clear(grads);
      multiply_rows<kWidth>(scores, q, keys, key);
      multiply_rows<kWidth>(grads, grad, values, key);
      uint32_t weights[row_tiles][4];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // Beyond the end the score is 0, which may be so far above the row's own that the weight is infinite.
            const float weight = exp2_approximate(fmaf(scores[m][n][i], magnitude, -log_sum_exp[m][i / 2]) * kLog2e);
            const bool exists = key + n * 8 + lane % 4 * 2 + i % 2 < left;
            grads[m][n][i] = exists ? weight * (grads[m][n][i] - delta[m][i / 2]) : 0.f;
          }
        to_operand<T>(weights[m], grads[m][0], grads[m][1]);
      }
      add_weighted_rows<kWidth>(sums, weights, keys, key);
    }
  }

  if (has_rows) {
    float factors[row_tiles][2];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) factors[m][0] = factors[m][1] = scale;
    // Nobody reads the stage that would be loaded next.
    store_rows<kWidth>(stages + tiles % 2 * Plan::kStage + own_row * kWidth, sums, factors, back.grad_q.from(first + own_row),
                       head.tokens - first - own_row, head.width);
  }
}

// Products are transposed here: rows are keys, columns queries.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) backward_keys_mma(AttentionBackward p, Blocks blocks) {
  using Plan = BackwardPlan<T, kWidth>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const stages = reinterpret_cast<T*>(shared);
  float2* const statistics = reinterpret_cast<float2*>(shared + 2 * Plan::kStageBytes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own_row = warp * kMma;
  const float scale = static_cast<float>(p.forward.scale), magnitude = fabsf(scale);
  const int first = blocks.tile() * Plan::kOwnKeys;
  const HeadBackward<T> back = head_of<T>(p, blocks.head());
  const Head<T>& head = back.forward;
  // Queries beyond the end are zeros, and so are their gradients and statistics: their weights are 1, of nothing.
  const auto load_queries = [&](int tile) {
    T* const stage = stages + tile % 2 * Plan::kStage;
    const int begin = tile * kKeys, left = head.tokens - begin;
    load_tile<kKeys, kWidth>(stage, head.q.from(begin), left, head.width);
    load_tile<kKeys, kWidth>(stage + kKeys * kWidth, back.grad.from(begin), left, head.width);
    const int row = threadIdx.x;
    if (row < kKeys) copy_async<8>(statistics + tile % 2 * kKeys + row, back.statistics + 2 * (begin + row), row < left);
    commit_copies();
  };
  T *const keys = stages + Plan::kStage, *const kept = reinterpret_cast<T*>(statistics + 2 * kKeys);
  T* const values = Plan::kValuesInTile ? kept : keys + Plan::kOwnKeys * kWidth;
  load_tile<Plan::kOwnKeys, kWidth>(keys, head.k.from(first), head.tokens - first, head.width);
  load_tile<Plan::kOwnKeys, kWidth>(values, head.v.from(first), head.tokens - first, head.width);
  load_queries(0);
  wait_copies<0>();
  __syncthreads();
  Operand<T, kWidth, 1> k;
  k.load(keys, own_row);
  k.take_sign(scale);
  std::conditional_t<Plan::kValuesInTile, OperandInTile<T, kWidth, 1>, Operand<T, kWidth, 1>> v;
  v.load(values, own_row);

  float grad_k[1][kWidth / 8][4], grad_v[1][kWidth / 8][4];
  clear(grad_k);
  clear(grad_v);
  const int tiles = (head.tokens + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before (or the keys) any more
    if (tile + 1 < tiles) load_queries(tile + 1);
    const T *queries = stages + tile % 2 * Plan::kStage, *grads_out = queries + kKeys * kWidth;
    const int left = head.tokens - tile * kKeys;
#pragma unroll 1
    for (int query = 0; query < kKeys && query < left; query += kMma) {
      float scores[1][2][4], grads[1][2][4];
      clear(scores);
      clear(grads);
      multiply_rows<kWidth>(scores, k, queries, query);
      multiply_rows<kWidth>(grads, v, grads_out, query);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 two = *reinterpret_cast<const float4*>(statistics + tile % 2 * kKeys + query + n * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[0][n][i] = exp2_approximate(fmaf(scores[0][n][i], magnitude, -(i % 2 ? two.z : two.x)) * kLog2e);
          grads[0][n][i] = scores[0][n][i] * (grads[0][n][i] - (i % 2 ? two.w : two.y));
        }
      }
      uint32_t for_v[1][4], for_k[1][4];
      to_operand<T>(for_v[0], scores[0][0], scores[0][1]);
      to_operand<T>(for_k[0], grads[0][0], grads[0][1]);
      add_weighted_rows<kWidth>(grad_v, for_v, grads_out, query);
      add_weighted_rows<kWidth>(grad_k, for_k, queries, query);
    }
  }

  // Nobody reads the stage that would be loaded next.
  T* const through = stages + tiles % 2 * Plan::kStage + own_row * kWidth;
  const int row = first + own_row;
  store_rows<kWidth>(through, grad_k, {{scale, scale}}, back.grad_k.from(row), head.tokens - row, head.width);
  __syncwarp();  // before the same rows of the stage are written again
  store_rows<kWidth>(through, grad_v, {{1.f, 1.f}}, back.grad_v.from(row), head.tokens - row, head.width);
}

}  // namespace convdit::cuda
