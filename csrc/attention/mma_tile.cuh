// Operands of mma.sync from tiles in shared memory, and results back through them to memory.
#pragma once
#include "attention/tile.cuh"

namespace convdit::cuda {

constexpr int kMma = 16;   // rows of an operand a, and columns that one product of a and b sums over
constexpr int kKeys = 64;  // rows of a tile that a block goes through

// 16 rows from `row` on, the 16 columns of chunks `chunk` and `chunk + 1`. As operand a of a product with the tile's rows as
// rows; transposed, as two operands b (registers 0 and 1; 2 and 3) of a product that sums over the tile's rows.
template <int kWidth, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(a, tile + Tile<T, kWidth>::at(row + lane % 16, chunk + lane / 16));
}
template <int kWidth, class T>
__device__ __forceinline__ void load_b_over_rows(uint32_t (&b)[4], const T* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  load_matrices_transposed(b, tile + Tile<T, kWidth>::at(row + lane % 16, chunk + lane / 16));
}
// The same part of a tile as two operands b of a product that sums over the tile's columns: 8 rows each.
template <int kWidth, class T>
__device__ __forceinline__ void load_b_over_columns(uint32_t (&b)[4], const T* tile, int row, int chunk) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(b, tile + Tile<T, kWidth>::at(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}

// A warp's rows of a tile as operands a, kept in registers.
template <class T, int kWidth, int kRowTiles>
struct Operand {
  uint32_t pairs[kRowTiles][kWidth / kMma][4];
  __device__ __forceinline__ void get(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pairs[m][k][i];
  }
  __device__ __forceinline__ void load(const T* tile, int row) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int k = 0; k < kWidth / kMma; ++k) load_a<kWidth>(pairs[m][k], tile, row + m * kMma, 2 * k);
  }
  // Exponentials multiply scores by |scale|. The sign goes in here; and where scale is 0, the scores become 0.
  __device__ __forceinline__ void take_sign(float scale) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int k = 0; k < kWidth / kMma; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[m][k][i] = scale > 0 ? pairs[m][k][i] : scale < 0 ? pairs[m][k][i] ^ 0x80008000u : 0u;
  }
};
// The same, left in the tile and read from there each time, where registers are short.
template <class T, int kWidth, int kRowTiles>
struct OperandInTile {
  const T* rows;
  __device__ __forceinline__ void load(const T* tile, int row) { rows = tile + row * kWidth; }  // row: a multiple of 8
  __device__ __forceinline__ void get(uint32_t (&a)[4], int m, int k) const { load_a<kWidth>(a, rows, m * kMma, 2 * k); }
};

// What multiplies scores in base-2 exponentials, of operands that have taken the sign. Positive, so that the largest score
// stays the largest and -inf stays -inf.
__device__ __forceinline__ float exponent_factor(float scale) { return scale == 0 ? 1.f : fabsf(scale) * kLog2e; }

__device__ __forceinline__ float exp2_approximate(float x) {  // to 2 units in the last place; 0 below 2^-126
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// products[m][n] += own rows (m-th 16 of them) times rows [row + 8 n, row + 8 n + 8) of the tile, over the whole width.
template <int kWidth, class T, class Own, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_rows(float (&products)[kRowTiles][kColumnTiles][4], const Own& own, const T* tile, int row) {
#pragma unroll
  for (int k = 0; k < kWidth / kMma; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) own.get(a[m], m, k);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t b[4];
      load_b_over_columns<kWidth>(b, tile, row + 8 * n, 2 * k);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma<T>(products[m][n], a[m], b[0], b[1]);
        mma<T>(products[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// sums[m][n] += weights (16 rows, 16 columns) times rows [row, row + 16) of the tile; n counts 8 columns of it.
template <int kWidth, class T, int kRowTiles>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[kRowTiles][kWidth / 8][4], const uint32_t (&weights)[kRowTiles][4],
                                                  const T* tile, int row) {
#pragma unroll
  for (int n = 0; n < kWidth / 8; n += 2) {
    uint32_t b[4];
    load_b_over_rows<kWidth>(b, tile, row, n);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      mma<T>(sums[m][n], weights[m], b[0], b[1]);
      mma<T>(sums[m][n + 1], weights[m], b[2], b[3]);
    }
  }
}

// Two neighbouring results of a product, 16 rows by 8 columns each, as operand a of the next.
template <class T>
__device__ __forceinline__ void to_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_pair<T>(left[0], left[1]), a[1] = pack_pair<T>(left[2], left[3]);
  a[2] = pack_pair<T>(right[0], right[1]), a[3] = pack_pair<T>(right[2], right[3]);
}

template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void clear(float (&sums)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
}

// A warp's results, times a factor for each row, to memory in 16-byte stores, by way of the warp's own rows of a tile.
template <int kWidth, class T, int kRowTiles>
__device__ __forceinline__ void store_rows(T* tile, const float (&sums)[kRowTiles][kWidth / 8][4], const float (&factors)[kRowTiles][2],
                                           Rows<T> rows, int length, int width) {
  using Layout = Tile<T, kWidth>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(tile + Layout::at(m * kMma + half * 8 + lane / 4, n) + lane % 4 * 2) =
            pack_pair<T>(sums[m][n][2 * half] * factors[m][half], sums[m][n][2 * half + 1] * factors[m][half]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kRowTiles * kMma * Layout::kChunks / kWarp; ++i) {
    const int index = lane + i * kWarp, row = index / Layout::kChunks, chunk = index % Layout::kChunks;
    if (row < length && chunk * Layout::kChunk < width)
      *reinterpret_cast<uint4*>(rows.first + row * rows.stride + chunk * Layout::kChunk) =
          *reinterpret_cast<const uint4*>(tile + Layout::at(row, chunk));
  }
}

}  // namespace convdit::cuda
