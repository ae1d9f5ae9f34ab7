// Attention of float32 by fused multiply-adds, on tiles in shared memory. A warp has rows of its own. Its lanes lie on them in four rows
// of eight: a lane has every fourth row, and of a product's columns its share, so that each value it reads serves several products.
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
  static constexpr int kBytes = (kOwnTiles * kOwn + 2 * kTile + kRows * kColumns) * static_cast<int>(sizeof(float));
  static_assert(kWarpRows % 8 == 0 && kColumns % 8 == 0, "the chunks of a tile's rows are permuted in a period of 8 rows");
  static_assert(kLaneColumns % kDown == 0, "each of four rows of weights has banks of its own");
  static_assert(kBytes <= 99 * 1024);
};
template <int kWidth>
using FmaForward = FmaPlan<kWidth, kWidth <= 96 ? 32 : 16, kWidth <= 64 ? 64 : 32, 1>;

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

// products[i][j] = the lane's i-th row of `own` times its j-th row of `tile`: it has every eighth.
template <int kWidth, class Plan>
__device__ __forceinline__ void multiply_rows(float (&products)[Plan::kLaneRows][Plan::kLaneColumns], const float* own, const float* tile) {
  using Layout = Tile<float, kWidth>;
  const FmaPlace<Plan> place;
#pragma unroll
  for (int i = 0; i < Plan::kLaneRows; ++i)
#pragma unroll
    for (int j = 0; j < Plan::kLaneColumns; ++j) products[i][j] = 0;
#pragma unroll 2
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

// Weights in shared memory: a row permutes its groups of 8, so that the four rows that lanes write at once lie on different banks.
template <class Plan>
__device__ __forceinline__ int weights_at(int row, int group) {
  return row * Plan::kColumns + (group ^ row % kDown) * kAcross;
}
// Puts a warp's weights where add_weighted_rows reads them.
template <class Plan>
__device__ __forceinline__ void share_weights(float* to, const float (&weights)[Plan::kLaneRows][Plan::kLaneColumns]) {
  const FmaPlace<Plan> place;
#pragma unroll
  for (int j = 0; j < Plan::kLaneColumns; ++j) {
    float* const column = to + weights_at<Plan>(place.row, j) + place.column;
#pragma unroll
    for (int i = 0; i < Plan::kLaneRows; ++i) column[i * kDown * Plan::kColumns] = weights[i][j];
  }
  __syncwarp();
}

// A lane's share of the width: of each 32 columns four next to each other, and as much of what is left.
template <int kWidth>
struct LaneColumns {
  static constexpr int kCount = kWidth / kAcross, kFours = kWidth / 32, kLeft = kCount - 4 * kFours;
  static_assert(kLeft <= 2);
  // Of row `row` of a tile that starts at `tile`.
  static __device__ __forceinline__ void load(float (&x)[kCount], const float* tile, int row, int column) {
    using Layout = Tile<float, kWidth>;
    const float* const first = tile + Layout::at(row, column);  // chunks change places within eight
#pragma unroll
    for (int n = 0; n < kFours; ++n) {
      const float4 y = four(first + 4 * n * kAcross);
      x[4 * n] = y.x, x[4 * n + 1] = y.y, x[4 * n + 2] = y.z, x[4 * n + 3] = y.w;
    }
    const float* const left = tile + Layout::at(row, kFours * kAcross + column * kLeft / 4) + column * kLeft % 4;
    if constexpr (kLeft == 1) x[4 * kFours] = *left;
    if constexpr (kLeft == 2) {
      const float2 y = *reinterpret_cast<const float2*>(left);
      x[4 * kFours] = y.x, x[4 * kFours + 1] = y.y;
    }
  }
};
template <int kWidth, class Plan>
using FmaSums = float[Plan::kLaneRows][LaneColumns<kWidth>::kCount];

// sums[i][j] += the lane's i-th row of weights times its j-th column of `tile`.
template <int kWidth, class Plan>
__device__ __forceinline__ void add_weighted_rows(FmaSums<kWidth, Plan>& sums, const float* weights, const float* tile) {
  constexpr int columns = LaneColumns<kWidth>::kCount;
  const FmaPlace<Plan> place;
#pragma unroll 1
  for (int row = 0; row < Plan::kColumns; row += 8) {
    const float* const rows = weights + weights_at<Plan>(place.row, row / 8);
#pragma unroll
    for (int k = 0; k < 8; k += 4) {
      float b[4][columns];
#pragma unroll
      for (int i = 0; i < 4; ++i) LaneColumns<kWidth>::load(b[i], tile + row * kWidth, k + i, place.column);
#pragma unroll
      for (int i = 0; i < Plan::kLaneRows; ++i) {
        const float4 w = four(rows + i * kDown * Plan::kColumns + k);
#pragma unroll
        for (int j = 0; j < columns; ++j) {
          sums[i][j] += w.x * b[0][j], sums[i][j] += w.y * b[1][j];
          sums[i][j] += w.z * b[2][j], sums[i][j] += w.w * b[3][j];
        }
      }
    }
  }
}

// A lane's share of a row, times a factor, to memory; `add`: to what is there.
template <int kWidth>
__device__ __forceinline__ void store_row(const float (&sums)[LaneColumns<kWidth>::kCount], float factor, float* to, int width,
                                          bool add = false) {
  using Columns = LaneColumns<kWidth>;
  const int lane = threadIdx.x % kAcross;
#pragma unroll
  for (int n = 0; n < Columns::kFours; ++n) {
    const int column = 32 * n + 4 * lane;
    if (column >= width) continue;
    const float* x = sums + 4 * n;
    const float4 old = add ? four(to + column) : float4{};
    *reinterpret_cast<float4*>(to + column) =
        make_float4(old.x + x[0] * factor, old.y + x[1] * factor, old.z + x[2] * factor, old.w + x[3] * factor);
  }
#pragma unroll
  for (int n = 0; n < Columns::kLeft; ++n) {
    const int column = 32 * Columns::kFours + Columns::kLeft * lane + n;
    if (column < width) to[column] = (add ? to[column] : 0.f) + sums[4 * Columns::kFours + n] * factor;
  }
}
// `rows`: from the block's first row on, of which `length` exist.
template <int kWidth, class Plan>
__device__ __forceinline__ void store_rows(const FmaSums<kWidth, Plan>& sums, const float (&factors)[Plan::kLaneRows], Rows<float> rows,
                                           int length, int width) {
  const FmaPlace<Plan> place;
#pragma unroll
  for (int i = 0; i < Plan::kLaneRows; ++i) {
    const int row = place.row + i * kDown;
    if (row >= length) return;
    store_row<kWidth>(sums[i], factors[i], rows.from(row).first, width);
  }
}

// Keys and values take turns on their way: values while weights are worked out, the next keys while values are summed.
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
  const auto load_columns = [&](float* tile, Rows<const float> rows, int begin) {
    load_tile<Plan::kColumns, kWidth>(tile, rows.from(begin), head.tokens - begin, head.width);
    commit_copies();
  };
  load_tile<Plan::kRows, kWidth>(queries, head.q.from(first), head.tokens - first, head.width);
  load_columns(keys, head.k, 0);
  FmaSums<kWidth, Plan> sums = {};
  float largest[lane_rows], total[lane_rows] = {};
#pragma unroll
  for (int i = 0; i < lane_rows; ++i) largest[i] = -INFINITY;
  const bool has_rows = first + place.warp_row < head.tokens;  // the same for the whole warp
  for (int begin = 0; begin < head.tokens; begin += Plan::kColumns) {
    wait_copies<0>();
    __syncthreads();  // the keys are there, and nobody reads the values before these any more
    load_columns(values, head.v, begin);
    if (has_rows) {
      float scores[lane_rows][lane_columns];
      multiply_rows<kWidth, Plan>(scores, queries, keys);
      const int left = head.tokens - begin;
#pragma unroll
      for (int i = 0; i < lane_rows; ++i)
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) scores[i][j] = __fmul_rn(scores[i][j], scale);
      if (left < Plan::kColumns) {  // keys beyond the end
#pragma unroll
        for (int j = 0; j < lane_columns; ++j)
          if (place.column + j * kAcross >= left)
#pragma unroll
            for (int i = 0; i < lane_rows; ++i) scores[i][j] = -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < lane_rows; ++i) {
        float top = largest[i];
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) top = fmaxf(top, scores[i][j]);
#pragma unroll
        for (int step = kAcross / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
        // Where all scores so far are -inf, a weight is exp(-inf) and not exp(-inf + inf).
        const float from = top == -INFINITY ? 0.f : top, shrink = expf(largest[i] - from);
        largest[i] = top;
        total[i] *= shrink;
#pragma unroll
        for (int j = 0; j < LaneColumns<kWidth>::kCount; ++j) sums[i][j] *= shrink;
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) scores[i][j] = expf(scores[i][j] - from), total[i] += scores[i][j];
      }
      share_weights<Plan>(weights, scores);
    }
    wait_copies<0>();
    __syncthreads();  // the values are there, and nobody reads these keys any more
    if (begin + Plan::kColumns < head.tokens) load_columns(keys, head.k, begin + Plan::kColumns);
    if (has_rows) add_weighted_rows<kWidth, Plan>(sums, weights, values);
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

}  // namespace convdit::cuda
