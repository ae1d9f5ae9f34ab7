// Attention forward of bf16 and f16 by mma.sync: a block of 4 warps keeps its queries in registers and goes through the keys
// and values in tiles of 64, the next tile on its way while one is worked on. The softmax runs along: rows keep their
// largest score so far, and what was summed with an older one shrinks (Dao 2022, "FlashAttention").
#pragma once
#include "attention/mma_tile.cuh"

namespace convdit::cuda {

template <class T, int kWidth>
struct ForwardPlan {
  // Queries of a block, and keys at a time: as many as registers allow. With two row tiles a warp, each operand read from
  // shared memory serves two products.
  static constexpr int kRowTiles = kWidth <= 96 ? 2 : 1, kRows = kWarps * kRowTiles * kMma;
  static constexpr int kStep = kWidth <= 32 ? 64 : kWidth == 96 ? 16 : 32;
  static constexpr int kStage = 2 * kKeys * kWidth;  // elements: a tile of keys, and one of values
  static constexpr int kSharedBytes = 2 * kStage * static_cast<int>(sizeof(T));
  static_assert(kRows * kWidth <= kStage, "queries come in, and results go out, through one stage");
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) forward_mma(Attention p, Blocks blocks) {
  using Plan = ForwardPlan<T, kWidth>;
  constexpr int row_tiles = Plan::kRowTiles, step = Plan::kStep;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const stages = reinterpret_cast<T*>(shared);
  const uint32_t shared_stages = shared_address(shared);
  const Matrices<kWidth> matrices;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own_row = warp * row_tiles * kMma;
  const float scale = static_cast<float>(p.scale), factor = exponent_factor(scale);
  const int first = blocks.tile() * Plan::kRows;
  const Head<T> head = head_of<T>(p, blocks.head());
  const auto load_keys = [&](int tile) {
    T* const stage = stages + tile % 2 * Plan::kStage;
    load_tile<kKeys, kWidth>(stage, head.k.from(tile * kKeys), head.tokens - tile * kKeys, head.width);
    load_tile<kKeys, kWidth>(stage + kKeys * kWidth, head.v.from(tile * kKeys), head.tokens - tile * kKeys, head.width);
    commit_copies();
  };
  load_tile<Plan::kRows, kWidth>(stages + Plan::kStage, head.q.from(first), head.tokens - first, head.width);
  load_keys(0);
  wait_copies<0>();
  __syncthreads();
  Operand<T, kWidth, row_tiles> q;
  q.load(matrices, shared_stages + (Plan::kStage + own_row * kWidth) * sizeof(T));
  q.take_sign(scale);

  float sums[row_tiles][kWidth / 8][4], largest[row_tiles][2], total[row_tiles][2];
  clear(sums);
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) largest[m][0] = largest[m][1] = -INFINITY, total[m][0] = total[m][1] = 0;
  const bool has_rows = first + own_row < head.tokens;  // the same for the whole warp
  const int tiles = (head.tokens + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before (or the queries) any more
    if (tile + 1 < tiles) load_keys(tile + 1);
    if (!has_rows) continue;
    const uint32_t keys = shared_stages + tile % 2 * Plan::kStage * sizeof(T), values = keys + kKeys * kWidth * sizeof(T);
    const int left = head.tokens - tile * kKeys;
#pragma unroll 1
    for (int key = 0; key < kKeys && key < left; key += step) {
      float scores[row_tiles][step / 8][4];
      clear(scores);
      multiply_rows<T>(scores, q, matrices, keys + key * kWidth * sizeof(T));
      if (left - key < step) {  // keys beyond the end
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
#pragma unroll
          for (int n = 0; n < step / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (key + n * 8 + lane % 4 * 2 + i % 2 >= left) scores[m][n][i] = -INFINITY;
      }
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top = largest[m][half];
#pragma unroll
          for (int n = 0; n < step / 8; ++n) top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
          // Products are rounded before their difference, so that the largest weight is 1 to the last bit: a value that it alone weighs
          // comes out as it is. Where all scores so far are -inf, a weight is exp(-inf) and not exp(-inf + inf).
          const float from = top == -INFINITY ? 0.f : __fmul_rn(top, factor);
          const float shrink = exp2_approximate(__fmul_rn(largest[m][half], factor) - from);
          largest[m][half] = top;
          total[m][half] *= shrink;
#pragma unroll
          for (int n = 0; n < kWidth / 8; ++n) sums[m][n][2 * half] *= shrink, sums[m][n][2 * half + 1] *= shrink;
#pragma unroll
          for (int n = 0; n < step / 8; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              scores[m][n][i] = exp2_approximate(__fmul_rn(scores[m][n][i], factor) - from);
              total[m][half] += scores[m][n][i];
            }
        }
#pragma unroll
      for (int n = 0; n < step / 8; n += 2) {
        uint32_t weights[row_tiles][4];
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) to_operand<T>(weights[m], scores[m][n], scores[m][n + 1]);
        add_weighted_rows<T>(sums, weights, matrices, values + (key + n * 8) * kWidth * sizeof(T));
      }
    }
  }

  if (has_rows) {
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[m][half] += __shfl_xor_sync(0xffffffffu, total[m][half], 1);
        total[m][half] += __shfl_xor_sync(0xffffffffu, total[m][half], 2);
        const int row = first + own_row + m * kMma + half * 8 + lane / 4;
        // Weights were taken against the rounded product; what rounding left out is put back, so that the sum is rounded once.
        const float top = largest[m][half], rest = top == -INFINITY ? 0.f : fmaf(top, factor, -__fmul_rn(top, factor));
        if (lane % 4 == 0 && row < head.tokens)
          *head.log_sum_exp.from(row).first = fmaf(top, fabsf(scale), (log2f(total[m][half]) - rest) * kLn2);
        total[m][half] = 1 / total[m][half];
      }
    // Nobody reads the stage that would be loaded next.
    T* const through = stages + tiles % 2 * Plan::kStage + own_row * kWidth;
    const int row = first + own_row;
    store_rows<kWidth>(through, sums, total, head.out.from(row), head.tokens - row, head.width);
    if (head.rest.first) {
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float &a = sums[m][n][2 * half], &b = sums[m][n][2 * half + 1];
            a *= total[m][half], b *= total[m][half];
            const float2 stored = unpack_pair<T>(pack_pair<T>(a, b));
            a -= stored.x, b -= stored.y;
          }
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) total[m][0] = total[m][1] = 1;
      __syncwarp();  // before the same rows of the stage are written again
      store_rows<kWidth>(through, sums, total, head.rest.from(row), head.tokens - row, head.width);
    }
  }
}

}  // namespace convdit::cuda
