// What the attention kernels on tiles share: which rows a block works on, and tiles of them in shared memory.
#pragma once
#include "attention/attention.h"
#include "common/mma.cuh"
#include "common/reduce.cuh"

namespace convdit::cuda {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
// A row's g sums to 0. Where one key has nearly all of a row's weight, its own g is a difference of two numbers that are nearly the same,
// and of which float32 may leave nothing: in the gradient of q it is minus the sum of the others. A row has one such key at most.
constexpr float kNearlyAll = 0.6f;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The blocks of a launch: some for each head of each sample, one a tile of its rows.
struct Blocks {
  int64_t a_head, first;  // the first of this launch, where one launch cannot hold all
  __device__ int tile() const { return static_cast<int>((first + blockIdx.x) % a_head); }
  __device__ int64_t head() const { return (first + blockIdx.x) / a_head; }  // and sample: sample * heads + head
};

// Rows of one head in a (B, T, ...) tensor, from some token on: `length` of them, `stride` elements apart.
template <class T>
struct Rows {
  T* first;
  int64_t stride;
  __device__ Rows from(int64_t token) const { return {first + token * stride, stride}; }
};

// One head of one sample.
template <class T>
struct Head {
  using A = accum_t<T>;
  int tokens, width;  // tokens: of kernels on tiles, which are for fewer than 2^31
  Rows<const T> q, k, v;
  Rows<T> out;
  Rows<A> log_sum_exp;
  Rows<T> rest;  // where `first` is not null
};
template <class T>
__device__ __forceinline__ Head<T> head_of(const Attention& p, int64_t index) {
  const int64_t sample = index / p.heads, head = index % p.heads, model = p.heads * p.head_dim, offset = head * p.head_dim;
  const T* q = static_cast<const T*>(p.qkv) + sample * p.batch_stride + offset;
  const int64_t result = sample * p.tokens * model + offset;
  return {static_cast<int>(p.tokens),
          static_cast<int>(p.head_dim),
          {q, p.token_stride},
          {q + model, p.token_stride},
          {q + 2 * model, p.token_stride},
          {static_cast<T*>(p.out) + result, model},
          {static_cast<accum_t<T>*>(p.log_sum_exp) + sample * p.tokens * p.heads + head, p.heads},
          {p.rest ? static_cast<T*>(p.rest) + result : nullptr, model}};
}

// The same for the backward.
template <class T>
struct HeadBackward {
  using A = accum_t<T>;
  Head<T> forward;
  Rows<const T> grad;
  Rows<T> grad_q, grad_k, grad_v;
  A* statistics;  // two of each row, from a launch for the next
};
template <class T>
__device__ __forceinline__ HeadBackward<T> head_of(const AttentionBackward& b, int64_t index) {
  const Attention& p = b.forward;
  const int64_t sample = index / p.heads, head = index % p.heads, model = p.heads * p.head_dim, offset = head * p.head_dim;
  T* grad_q = static_cast<T*>(b.grad_qkv) + sample * p.tokens * 3 * model + offset;
  return {head_of<T>(p, index),
          {static_cast<const T*>(b.grad) + sample * p.tokens * model + offset, model},
          {grad_q, 3 * model},
          {grad_q + model, 3 * model},
          {grad_q + 2 * model, 3 * model},
          static_cast<accum_t<T>*>(b.workspace) + index * p.tokens * 2};
}

// A tile in shared memory: rows of kWidth elements in chunks of 16 bytes. The row permutes its chunks, in a period of 8 rows,
// so that 8 rows read at one chunk, and chunks written one after the other, lie on different banks: without padding.
template <class T, int kWidth>
struct Tile {
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kChunks = kWidth / kChunk;
  static constexpr int kPermuted = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  // Where the chunk starts, in elements.
  static __device__ __forceinline__ int at(unsigned row, unsigned chunk) {
    return (row * kChunks + (chunk ^ (row / (8 / kPermuted) % kPermuted))) * kChunk;
  }
};

// Starts copying `length` rows of `width` elements to a tile of kRows rows; what is left of the tile becomes 0. A thread keeps
// to one chunk of the rows, and steps by the rows that all threads copy at once.
template <int kRows, int kWidth, class T>
__device__ __forceinline__ void load_tile(T* tile, Rows<const T> rows, int length, int width) {
  using Layout = Tile<T, kWidth>;
  constexpr int step = kThreads / Layout::kChunks;
  const int first = threadIdx.x / Layout::kChunks, chunk = threadIdx.x % Layout::kChunks;
  if (first >= step) return;  // threads left over
  const bool exists = chunk * Layout::kChunk < width;
  const T* from = rows.from(first).first + chunk * Layout::kChunk;
#pragma unroll 1
  for (int row = first; row < kRows; row += step, from += step * rows.stride)
    copy_async<16>(tile + Layout::at(row, chunk), from, exists && row < length);
}

}  // namespace convdit::cuda
