// Attention backward of float32, on the tiles of fma.cuh: 5 products. A block goes through tiles of a head's keys, which keep the gradients
// of k and v in registers, and with each through all queries; those of q it adds up in memory, where each value has a thread of its own. Where
// heads are few their keys are dealt out to several blocks. One more launch adds up their gradients of q, in order, and puts in what the
// keys with nearly all weight (tile.cuh) have to do with them.
#pragma once
#include "attention/fma.cuh"
#include "common/vector.cuh"

namespace convdit::cuda {

template <int kWidth>
using FmaBackward = FmaPlan<kWidth, kWidth <= 96 ? 16 : 8, kWidth <= 72 ? 64 : 32, 2>;
// What a block keeps of a tile's queries.
template <class Plan>
struct QueryStatistics {
  float2 given[Plan::kColumns];  // log_sum_exp and delta
  int nearly_all[Plan::kColumns];  // the key of the block's tile which has nearly all weight, or -1
  float sums[kWarps][Plan::kColumns];  // of g, over the keys of each warp
};
template <class Plan>
constexpr int kFmaBackwardBytes = Plan::kBytes + static_cast<int>(sizeof(QueryStatistics<Plan>));
// The same of all keys of a part, for the next launch: of query t of a head.
struct PartStatistics {
  float sum;
  int nearly_all;
};
// Where the workspace has them, and the gradients of q by parts after all of them: (parts, B, T, D).
__host__ __device__ inline int64_t part_statistics(const Attention& p, int64_t parts) { return parts * p.batch * p.heads * p.tokens; }
__device__ __forceinline__ PartStatistics* part_statistics_of(const AttentionBackward& b, int64_t part, int64_t head) {
  const Attention& p = b.forward;
  return static_cast<PartStatistics*>(b.workspace) + (part * p.batch * p.heads + head) * p.tokens;
}
__device__ __forceinline__ float* part_gradients(const AttentionBackward& b, int64_t parts) {
  return reinterpret_cast<float*>(static_cast<PartStatistics*>(b.workspace) + (part_statistics(b.forward, parts) + 1) / 2 * 2);
}

// Of the gradient of a tile's queries a warp has half, summed over half of the keys; two warps have the same half. A lane's queries lie next
// to each other.
template <class Plan>
constexpr int kLaneQueries = Plan::kColumns / 2 / kDown;
template <int kWidth, class Plan>
using QuerySums = float[kLaneQueries<Plan>][LaneColumns<kWidth>::kCount];
template <class Plan>
struct QueryPlace {
  const int warp = threadIdx.x / kWarp, half = warp / 2, lane = threadIdx.x % kWarp, column = lane % kAcross;
  const int query = (warp % 2 * kDown + lane / kAcross) * kLaneQueries<Plan>;
};

// log_sum_exp and delta = sum(grad * out) of a tile's queries, 0 beyond the `length` that exist; and no key yet with nearly all weight.
template <class Plan>
__device__ __forceinline__ void find_statistics(QueryStatistics<Plan>& statistics, const HeadBackward<float>& back, int begin, int length) {
  const int column = threadIdx.x % kAcross;
#pragma unroll 1
  for (int row = threadIdx.x / kAcross; row < Plan::kColumns; row += kThreads / kAcross) {
    float2 result{};
    if (row < length) {
      const float *grad = back.grad.from(begin + row).first, *out = back.forward.out.from(begin + row).first;
#pragma unroll 1
      for (int c = 4 * column; c < back.forward.width; c += 4 * kAcross) {
        const float4 a = four(grad + c), b = four(out + c);
        result.y += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
      result.x = *back.forward.log_sum_exp.from(begin + row).first;
    }
    result.y = sum_across(result.y);
    if (column == 0) statistics.given[row] = result, statistics.nearly_all[row] = -1;
  }
}

// sums[i][j] += the lane's i-th column of weights times its j-th column of `tile`, over the warp's half of the tile's rows, of which
// `length` exist. (Of those up to the next multiple of 8 weights are 0.)
template <int kWidth, class Plan>
__device__ __forceinline__ void add_rows_by_queries(QuerySums<kWidth, Plan>& sums, const float* weights, const float* tile, int length) {
  constexpr int queries = kLaneQueries<Plan>, columns = LaneColumns<kWidth>::kCount, rows = Plan::kRows / 2;
  const QueryPlace<Plan> place;
#pragma unroll 1
  for (int row = place.half * rows; row < rows * (1 + place.half) && row < length; row += 8) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      float b[columns];
      LaneColumns<kWidth>::load(b, tile + row * kWidth, k, place.column);
      const auto w = fetch<queries>(weights + weights_at<Plan>(row + k, place.query / kAcross) + place.query % kAcross);
#pragma unroll
      for (int i = 0; i < queries; ++i)
#pragma unroll
        for (int j = 0; j < columns; ++j) sums[i][j] += w.values[i] * b[j];
    }
  }
}

// Two warps have sums over half of the keys each. Each gives half of its queries to the other, through shared memory; what it keeps
// is then in the first half of its sums.
template <int kWidth, class Plan>
__device__ __forceinline__ void change_halves(QuerySums<kWidth, Plan>& sums, float* shared) {
  constexpr int kept = kLaneQueries<Plan> / 2, columns = LaneColumns<kWidth>::kCount;
  const QueryPlace<Plan> place;
  float *const to = shared + threadIdx.x, *const from = shared + (threadIdx.x ^ 2 * kWarp);
#pragma unroll
  for (int i = 0; i < kept; ++i)
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      to[(i * columns + j) * kThreads] = place.half ? sums[i][j] : sums[i + kept][j];
      if (place.half) sums[i][j] = sums[i + kept][j];
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kept; ++i)
#pragma unroll
    for (int j = 0; j < columns; ++j) sums[i][j] += from[(i * columns + j) * kThreads];
}

// `blocks`: of a head as many as its keys have parts.
template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2) backward_fma(AttentionBackward p, Blocks blocks) {
  using Plan = FmaBackward<kWidth>;
  constexpr int lane_rows = Plan::kLaneRows, lane_columns = Plan::kLaneColumns, kept = kLaneQueries<Plan> / 2;
  extern __shared__ __align__(16) float memory[];
  float *const keys = memory, *const values = keys + Plan::kOwn, *const queries = values + Plan::kOwn;
  float *const grads_out = queries + Plan::kTile, *const weights = grads_out + Plan::kTile;
  auto& statistics = *reinterpret_cast<QueryStatistics<Plan>*>(weights + Plan::kRows * Plan::kColumns);
  const FmaPlace<Plan> place;
  const QueryPlace<Plan> query_place;
  const float scale = static_cast<float>(p.forward.scale);
  const auto find_head = [&] {
    int64_t index = blocks.head();
    asm volatile("" : "+l"(index));  // else what only the loop over keys needs stays in registers through that over queries, or is spilled
    return head_of<float>(p, index);
  };
  const HeadBackward<float> back = find_head();
  const Head<float>& head = back.forward;
  const int64_t part = blocks.tile(), tiles = (head.tokens + Plan::kRows - 1) / Plan::kRows;
  const int from = static_cast<int>(tiles * part / blocks.a_head) * Plan::kRows,
            to = static_cast<int>(tiles * (part + 1) / blocks.a_head) * Plan::kRows;
  Rows<float> grad_q = back.grad_q;
  if (blocks.a_head > 1) {
    const int64_t size = p.forward.batch * p.forward.tokens * back.grad.stride,
                  of_head = back.grad.first - static_cast<const float*>(p.grad);
    grad_q = {part_gradients(p, blocks.a_head) + part * size + of_head, back.grad.stride};
  }
  PartStatistics* const of_part = part_statistics_of(p, part, blocks.head());
  float scales[lane_rows], ones[lane_rows];
#pragma unroll
  for (int i = 0; i < lane_rows; ++i) scales[i] = scale, ones[i] = 1;
  for (int first = from; first < to; first += Plan::kRows) {
    const int keys_left = head.tokens - first;
    const Head<float> own = find_head().forward;
    load_tile<Plan::kRows, kWidth>(keys, own.k.from(first), keys_left, head.width);
    load_tile<Plan::kRows, kWidth>(values, own.v.from(first), keys_left, head.width);
    const bool has_rows = place.warp_row < keys_left;  // the same for the whole warp
    FmaSums<kWidth, Plan> grad_k = {}, grad_v = {};
    for (int begin = 0; begin < head.tokens; begin += Plan::kColumns) {
      const int left = head.tokens - begin;
      load_tile<Plan::kColumns, kWidth>(queries, head.q.from(begin), left, head.width);
      load_tile<Plan::kColumns, kWidth>(grads_out, back.grad.from(begin), left, head.width);
      commit_copies();
      find_statistics<Plan>(statistics, back, begin, left);
      wait_copies<0>();
      __syncthreads();
      float of_queries[lane_columns] = {}, largest = 0;
      if (has_rows) {
        float scores[lane_rows][lane_columns], grads[lane_rows][lane_columns];
        multiply_rows<kWidth, Plan>(scores, keys, queries);
        multiply_rows<kWidth, Plan>(grads, values, grads_out);
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) {
          const float log_sum_exp = statistics.given[place.column + j * kAcross].x;
#pragma unroll
          for (int i = 0; i < lane_rows; ++i) scores[i][j] = expf(__fmul_rn(scores[i][j], scale) - log_sum_exp);
        }
        if (keys_left < Plan::kRows) {  // Beyond the end a weight is 0: the score 0 of no key may be far above the query's own.
#pragma unroll
          for (int i = 0; i < lane_rows; ++i)
            if (place.row + i * kDown >= keys_left)
#pragma unroll
              for (int j = 0; j < lane_columns; ++j) scores[i][j] = 0;
        }
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) {
          // Queries beyond the end are zeros, and so are their gradients and statistics: their weights are 1, of nothing.
          const float delta = statistics.given[place.column + j * kAcross].y;
#pragma unroll
          for (int i = 0; i < lane_rows; ++i) {
            grads[i][j] = scores[i][j] * (grads[i][j] - delta);
            of_queries[j] += grads[i][j];
            largest = fmaxf(largest, scores[i][j]);
          }
        }
        if (largest > kNearlyAll) {
#pragma unroll
          for (int j = 0; j < lane_columns; ++j) {
            const int query = place.column + j * kAcross;
            if (query >= left) continue;
#pragma unroll
            for (int i = 0; i < lane_rows; ++i)
              if (scores[i][j] > kNearlyAll) statistics.nearly_all[query] = first + place.row + i * kDown;
          }
        }
        share_weights<Plan>(weights, scores);
        add_weighted_rows<kWidth, Plan>(grad_v, weights, grads_out);
        __syncwarp();  // before the same weights are written again
        share_weights<Plan>(weights, grads);
        add_weighted_rows<kWidth, Plan>(grad_k, weights, queries);
      }
#pragma unroll
      for (int j = 0; j < lane_columns; ++j) {
#pragma unroll
        for (int step = kAcross; step < kWarp; step *= 2) of_queries[j] += __shfl_xor_sync(0xffffffffu, of_queries[j], step);
        if (threadIdx.x % kWarp < kAcross) statistics.sums[threadIdx.x / kWarp][place.column + j * kAcross] = of_queries[j];
      }
      __syncthreads();  // all warps' weights and sums are there
      if (const int query = threadIdx.x; query < Plan::kColumns && query < left) {
        PartStatistics now = first > from ? of_part[begin + query] : PartStatistics{0, -1};
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) now.sum += statistics.sums[warp][query];
        if (statistics.nearly_all[query] >= 0) now.nearly_all = statistics.nearly_all[query];
        of_part[begin + query] = now;
      }
      QuerySums<kWidth, Plan> sums = {};
      add_rows_by_queries<kWidth, Plan>(sums, weights, keys, keys_left);
      change_halves<kWidth, Plan>(sums, grads_out);  // which nobody reads any more
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        const int query = query_place.query + query_place.half * kept + i;
        if (query < left) store_row<kWidth>(sums[i], scale, grad_q.from(begin + query).first, head.width, first > from);
      }
      __syncthreads();  // before the next copies
    }
    const HeadBackward<float> results = find_head();
    store_rows<kWidth, Plan>(grad_k, scales, results.grad_k.from(first), keys_left, head.width);
    store_rows<kWidth, Plan>(grad_v, ones, results.grad_v.from(first), keys_left, head.width);
  }
}

// The gradients of q by the parts of the keys, added up in order. A row's g sums to 0, so what its sum is too large by is too much in that
// of the key which has nearly all weight.
__global__ void __launch_bounds__(kThreads) finish_queries(AttentionBackward b, int64_t parts) {
  const Attention& p = b.forward;
  const int64_t model = p.heads * p.head_dim, vectors = p.batch * p.tokens * model / 4;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < vectors; i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = 4 * i / model, sample = row / p.tokens, token = row % p.tokens, column = 4 * i % model;
    const int64_t head = sample * p.heads + column / p.head_dim;
    PartStatistics all{0, -1};
    for (int64_t part = 0; part < parts; ++part) {
      const PartStatistics one = part_statistics_of(b, part, head)[token];
      all.sum += one.sum, all.nearly_all = max(all.nearly_all, one.nearly_all);
    }
    if (parts == 1 && all.nearly_all < 0) continue;
    float* const to = static_cast<float*>(b.grad_qkv) + row * 3 * model + column;
    float4 sum{};
    if (parts == 1) sum = four(to);
    else
      for (int64_t part = 0; part < parts; ++part) {
        const float4 x = four(part_gradients(b, parts) + (part * vectors + i) * 4);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
    if (all.nearly_all >= 0) {
      const float4 k = four(static_cast<const float*>(p.qkv) + sample * p.batch_stride + all.nearly_all * p.token_stride + model + column);
      const float f = -all.sum * static_cast<float>(p.scale);
      sum.x += f * k.x, sum.y += f * k.y, sum.z += f * k.z, sum.w += f * k.w;
    }
    *reinterpret_cast<float4*>(to) = sum;
  }
}

}  // namespace convdit::cuda
