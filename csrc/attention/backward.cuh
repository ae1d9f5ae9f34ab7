// Attention backward of bf16 and f16 by mma.sync, in one launch and without atomics: some of its blocks keep keys and go through queries,
// for the gradients of k and v; the others keep queries and go through keys and values, for that of q. Weights are computed again
// in both: 7 products instead of 5, and every sum has a fixed order. Both read the same tensors, which so come from memory once.
#pragma once
#include "attention/mma_tile.cuh"

namespace convdit::cuda {

// With two row tiles a warp, each operand read from shared memory serves two products: as many as registers allow.
template <class T, int kWidth>
struct BackwardPlan {
  static constexpr int kSize = sizeof(T), kRowBytes = kSize * kWidth;
  // Blocks of queries. A stage holds a tile of keys and one of values.
  static constexpr int kQueryTiles = kWidth <= 80 ? 2 : 1, kQueries = kWarps * kQueryTiles * kMma;
  static constexpr int kKeyStage = 2 * kKeys * kWidth;  // elements
  static_assert(kQueries * kWidth <= kKeyStage, "a block's own rows come in through a stage");
  // Blocks of keys. A stage holds a tile of queries and one of the gradient of the result. One more pair of tiles has the result and what
  // its rounding left out. Keys and values of the block stay in tiles of their own where there are no registers for them.
  static constexpr int kKeyTiles = kWidth <= 72 ? 2 : 1, kOwnKeys = kWarps * kKeyTiles * kMma;
  static constexpr int kStep = kWidth <= 96 ? 64 : 32, kStage = 2 * kStep * kWidth;
  static constexpr bool kKeysInTile = kWidth == 72, kValuesInTile = kKeyTiles == 2 || kWidth == 128;
  static constexpr int kOwn = kOwnKeys * kWidth, kKept = (kKeysInTile + kValuesInTile) * kOwn;
  static_assert((2 - kKeysInTile - kValuesInTile) * kOwn <= kStage, "what registers keep comes in through a stage");
  static constexpr int kStatisticsBytes = 2 * kStep * static_cast<int>(sizeof(float));
  static constexpr int kBytesOfKeys = (3 * kStage + kKept) * kSize + kStatisticsBytes,
                       kBytesOfQueries = 2 * kKeyStage * kSize + kQueries * 4;
  static constexpr int kSharedBytes = kBytesOfKeys > kBytesOfQueries ? kBytesOfKeys : kBytesOfQueries;
  static_assert(kSharedBytes <= 99 * 1024);
};

// delta = sum(grad * (out + rest)) over a row: the diagonal of a product like grad v^T. Where the result is one of the values, as with a
// weight of 1, both are then the same to the last bit, and their difference is 0 as it should be. Adds what 16 rows from `rows` on
// give, for the row of the lane in each half of 8.
template <class T, int kWidth, class Own>
__device__ __forceinline__ void add_diagonal(float (&delta)[2], const Own& grad, int m, const Matrices<kWidth>& matrices, uint32_t rows) {
  const int row = threadIdx.x % kWarp / 4, holder = row * 4 + row / 2;  // the lane that has the row's diagonal
  float products[1][2][4];
  clear(products);
  multiply_rows<T>(products, RowTile<Own>{grad, m}, matrices, rows);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* const two = products[0][half] + 2 * half;
    delta[half] += __shfl_sync(0xffffffffu, row % 2 ? two[1] : two[0], holder);
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void backward_queries_mma(const HeadBackward<T>& back, float scale, int first) {
  using Plan = BackwardPlan<T, kWidth>;
  constexpr int row_tiles = Plan::kQueryTiles;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const stages = reinterpret_cast<T*>(shared);
  int* const nearly_all = reinterpret_cast<int*>(stages + 2 * Plan::kKeyStage);  // of each row that key, or -1
  const Matrices<kWidth> matrices;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own_row = warp * row_tiles * kMma;
  const uint32_t stage_0 = shared_address(shared), own_rows = stage_0 + own_row * Plan::kRowBytes;
  constexpr uint32_t stage_bytes = Plan::kKeyStage * Plan::kSize;
  const Head<T>& head = back.forward;
  const auto load_own = [&](int stage, Rows<const T> rows) {
    load_tile<Plan::kQueries, kWidth>(stages + stage * Plan::kKeyStage, rows.from(first), head.tokens - first, head.width);
    commit_copies();
  };
  const auto load_keys = [&](int tile) {
    T* const stage = stages + tile % 2 * Plan::kKeyStage;
    load_tile<kKeys, kWidth>(stage, head.k.from(tile * kKeys), head.tokens - tile * kKeys, head.width);
    load_tile<kKeys, kWidth>(stage + kKeys * kWidth, head.v.from(tile * kKeys), head.tokens - tile * kKeys, head.width);
    commit_copies();
  };

  Operand<T, kWidth, row_tiles> grad;
  float delta[row_tiles][2] = {}, log_sum_exp[row_tiles][2];
  const auto add_to_delta = [&] {  // what lies in the second stage
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) add_diagonal<T>(delta[m], grad, m, matrices, own_rows + stage_bytes + m * kMma * Plan::kRowBytes);
  };
  if (lane < row_tiles * kMma) nearly_all[own_row + lane] = -1;
  load_own(0, back.grad);
  load_own(1, {head.out.first, head.out.stride});
  wait_copies<0>();
  __syncthreads();
  grad.load(matrices, own_rows);
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
      log_sum_exp[m][half] = row < head.tokens ? *head.log_sum_exp.from(row).first : INFINITY;  // of no row a weight is 0
    }
  __syncthreads();
  load_own(1, head.q);
  load_keys(0);
  wait_copies<0>();
  __syncthreads();
  Operand<T, kWidth, row_tiles> q;
  q.load(matrices, own_rows + stage_bytes);

  float sums[row_tiles][kWidth / 8][4];
  clear(sums);
  float others[row_tiles][2] = {};  // the sum of g, without that of the key which has nearly all weight
  const bool has_rows = first + own_row < head.tokens;  // the same for the whole warp
  const int tiles = (head.tokens + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before (or the queries) any more
    if (tile + 1 < tiles) load_keys(tile + 1);
    if (!has_rows) continue;
    const int left = head.tokens - tile * kKeys;
#pragma unroll 1
    for (int key = 0; key < kKeys && key < left; key += kMma) {
      const uint32_t keys = stage_0 + tile % 2 * stage_bytes + key * Plan::kRowBytes, values = keys + kKeys * Plan::kRowBytes;
      float scores[row_tiles][2][4], grads[row_tiles][2][4];
      clear(scores);
      clear(grads);
      multiply_rows<T>(scores, q, matrices, keys);
      multiply_rows<T>(grads, grad, matrices, values);
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][n][i] = exp2_approximate(fmaf(scores[m][n][i], scale, -log_sum_exp[m][i / 2]) * kLog2e);
      if (left - key < kMma) {
        // Beyond the end the score is 0, which may be so far above the row's own that the weight is infinite.
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (key + n * 8 + lane % 4 * 2 + i % 2 >= left) scores[m][n][i] = 0;
      }
      float largest = 0;
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            largest = fmaxf(largest, scores[m][n][i]);
            grads[m][n][i] = scores[m][n][i] * (grads[m][n][i] - delta[m][i / 2]);
          }
      if (largest > kNearlyAll) {
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (scores[m][n][i] > kNearlyAll) {
                nearly_all[own_row + m * kMma + i / 2 * 8 + lane / 4] = tile * kKeys + key + n * 8 + lane % 4 * 2 + i % 2;
                grads[m][n][i] = 0;
              }
      }
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) others[m][i / 2] += grads[m][n][i];
      uint32_t weights[row_tiles][4];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) to_operand<T>(weights[m], grads[m][0], grads[m][1]);
      add_weighted_rows<T>(sums, weights, matrices, keys);
    }
  }

  if (has_rows) {
    __syncwarp();  // the keys with nearly all weight are there
    float factors[row_tiles][2];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factors[m][half] = scale;
        float& sum = others[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int key = nearly_all[own_row + m * kMma + half * 8 + lane / 4];
        if (key < 0) continue;
        const T* const row = head.k.from(key).first + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
          if (8 * n >= head.width) continue;
          const float2 two = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(row + 8 * n));
          sums[m][n][2 * half] -= sum * two.x, sums[m][n][2 * half + 1] -= sum * two.y;
        }
      }
    // Nobody reads the stage that would be loaded next.
    store_rows<kWidth>(stages + tiles % 2 * Plan::kKeyStage + own_row * kWidth, sums, factors, back.grad_q.from(first + own_row),
                       head.tokens - first - own_row, head.width);
  }
}

// Products are transposed here: rows are keys, columns queries.
template <class T, int kWidth>
__device__ __forceinline__ void backward_keys_mma(const HeadBackward<T>& back, float scale, int first) {
  using Plan = BackwardPlan<T, kWidth>;
  constexpr int row_tiles = Plan::kKeyTiles, step = Plan::kStep;
  extern __shared__ __align__(16) unsigned char shared[];
  T *const stages = reinterpret_cast<T*>(shared), *const results = stages + 2 * Plan::kStage, *const kept = results + Plan::kStage;
  float2* const statistics = reinterpret_cast<float2*>(kept + Plan::kKept);  // of a row: log_sum_exp, delta
  const Matrices<kWidth> matrices;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own_row = warp * row_tiles * kMma;
  const Head<T>& head = back.forward;
  // Queries beyond the end are zeros, and so are their gradients and statistics: their weights are 1, of nothing.
  const auto load_queries = [&](int tile) {
    T* const stage = stages + tile % 2 * Plan::kStage;
    const int begin = tile * step, left = head.tokens - begin;
    load_tile<step, kWidth>(stage, head.q.from(begin), left, head.width);
    load_tile<step, kWidth>(stage + step * kWidth, back.grad.from(begin), left, head.width);
    load_tile<step, kWidth>(results, Rows<const T>{head.out.first, head.out.stride}.from(begin), left, head.width);
    if (head.rest.first)
      load_tile<step, kWidth>(results + step * kWidth, Rows<const T>{head.rest.first, head.rest.stride}.from(begin), left, head.width);
    commit_copies();
  };
  T* const keys = Plan::kKeysInTile ? kept : stages + Plan::kStage;
  T* const values = Plan::kValuesInTile && !Plan::kKeysInTile ? kept : keys + Plan::kOwn;
  load_tile<Plan::kOwnKeys, kWidth>(keys, head.k.from(first), head.tokens - first, head.width);
  load_tile<Plan::kOwnKeys, kWidth>(values, head.v.from(first), head.tokens - first, head.width);
  load_queries(0);
  wait_copies<0>();
  __syncthreads();
  std::conditional_t<Plan::kKeysInTile, OperandInTile<T, kWidth, row_tiles>, Operand<T, kWidth, row_tiles>> k;
  std::conditional_t<Plan::kValuesInTile, OperandInTile<T, kWidth, row_tiles>, Operand<T, kWidth, row_tiles>> v;
  k.load(matrices, shared_address(keys + own_row * kWidth));
  v.load(matrices, shared_address(values + own_row * kWidth));

  float grad_k[row_tiles][kWidth / 8][4], grad_v[row_tiles][kWidth / 8][4];
  clear(grad_k);
  clear(grad_v);
  const bool has_rows = first + own_row < head.tokens;  // the same for the whole warp
  const int tiles = (head.tokens + step - 1) / step;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before (or the keys) any more
    const int left = head.tokens - tile * step, sixteen = warp * kMma;
    const uint32_t queries = shared_address(stages + tile % 2 * Plan::kStage), grads_out = queries + step * Plan::kRowBytes;
    if (sixteen < step) {  // a warp works out the statistics of 16 queries
      const uint32_t out = shared_address(results + sixteen * kWidth);
      float log_sum_exp[2], delta[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = sixteen + half * 8 + lane / 4;
        log_sum_exp[half] = row < left ? *head.log_sum_exp.from(tile * step + row).first : 0.f;
      }
      OperandInTile<T, kWidth, 1> grad;
      grad.load(matrices, grads_out + sixteen * Plan::kRowBytes);
      add_diagonal<T>(delta, grad, 0, matrices, out);
      if (head.rest.first) add_diagonal<T>(delta, grad, 0, matrices, out + step * Plan::kRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0) statistics[sixteen + half * 8 + lane / 4] = make_float2(log_sum_exp[half], delta[half]);
    }
    __syncthreads();  // statistics are there, and nobody reads the results any more
    if (tile + 1 < tiles) load_queries(tile + 1);
    if (!has_rows) continue;
#pragma unroll 1
    for (int query = 0; query < step && query < left; query += kMma) {
      const uint32_t offset = query * Plan::kRowBytes;
      float scores[row_tiles][2][4], grads[row_tiles][2][4];
      clear(scores);
      clear(grads);
      multiply_rows<T>(scores, k, matrices, queries + offset);
      multiply_rows<T>(grads, v, matrices, grads_out + offset);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 two = *reinterpret_cast<const float4*>(statistics + query + n * 8 + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            scores[m][n][i] = exp2_approximate(fmaf(scores[m][n][i], scale, -(i % 2 ? two.z : two.x)) * kLog2e);
            grads[m][n][i] = scores[m][n][i] * (grads[m][n][i] - (i % 2 ? two.w : two.y));
          }
      }
      uint32_t for_v[row_tiles][4], for_k[row_tiles][4];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
        to_operand<T>(for_v[m], scores[m][0], scores[m][1]);
        to_operand<T>(for_k[m], grads[m][0], grads[m][1]);
      }
      add_weighted_rows<T>(grad_v, for_v, matrices, grads_out + offset);
      add_weighted_rows<T>(grad_k, for_k, matrices, queries + offset);
    }
  }

  if (has_rows) {
    float scales[row_tiles][2], ones[row_tiles][2];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) scales[m][0] = scales[m][1] = scale, ones[m][0] = ones[m][1] = 1;
    // Nobody reads the stage that would be loaded next.
    T* const through = stages + tiles % 2 * Plan::kStage + own_row * kWidth;
    const int row = first + own_row;
    store_rows<kWidth>(through, grad_k, scales, back.grad_k.from(row), head.tokens - row, head.width);
    __syncwarp();  // before the same rows of the stage are written again
    store_rows<kWidth>(through, grad_v, ones, back.grad_v.from(row), head.tokens - row, head.width);
  }
}

// Of a head, blocks of keys come first: they take longest.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) backward_mma(AttentionBackward p, Blocks blocks) {
  using Plan = BackwardPlan<T, kWidth>;
  const float scale = static_cast<float>(p.forward.scale);
  const HeadBackward<T> back = head_of<T>(p, blocks.head());
  const int tile = blocks.tile(), of_keys = (back.forward.tokens + Plan::kOwnKeys - 1) / Plan::kOwnKeys;
  if (tile < of_keys) backward_keys_mma<T, kWidth>(back, scale, tile * Plan::kOwnKeys);
  else backward_queries_mma<T, kWidth>(back, scale, (tile - of_keys) * Plan::kQueries);
}

}  // namespace convdit::cuda
