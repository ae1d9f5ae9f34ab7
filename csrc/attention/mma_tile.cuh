// Operands of mma.sync from tiles in shared memory, and results back through them to memory.
#pragma once
#include "attention/tile.cuh"

namespace convdit::cuda {

constexpr int kMma = 16;   // rows of an operand a, and columns that one product of a and b sums over
constexpr int kKeys = 64;  // rows of a tile that a block goes through

// Where in a tile a lane has its row of the matrices that it loads; a tile is given by its address in shared memory. Matrices come
// from two chunks (16 columns) at a time: of an odd number of chunks, the last comes alone. The permutation of a row's chunks
// repeats every 8 rows and kPhases steps, so that all other addresses are these plus a constant.
template <int kWidth>
struct Matrices {
  static constexpr int kChunks = kWidth / 8, kSteps = (kChunks + 1) / 2, kRowBytes = 2 * kWidth;
  static constexpr int kPermuted = Tile<bf16, kWidth>::kPermuted, kPhases = kPermuted < 2 ? 1 : kPermuted / 2;
  uint32_t down[kPhases], across[kPhases];

  __device__ __forceinline__ Matrices() {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kPhases; ++k) {
      down[k] = 2 * Tile<bf16, kWidth>::at(lane % 16, 2 * k + lane / 16);
      across[k] = 2 * Tile<bf16, kWidth>::at(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
    }
  }
  static __device__ __forceinline__ constexpr bool alone(int step) { return 2 * step + 1 == kChunks; }
  static __device__ __forceinline__ uint32_t at(const uint32_t (&lane)[kPhases], uint32_t rows, int step) {
    return rows + lane[step % kPhases] + step / kPhases * kPhases * 32;
  }
  // 16 rows of a tile, as operand a of a product with the tile's rows as rows.
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t rows, int step) const {
    if (alone(step)) load_matrices<false>(a[0], a[1], at(down, rows, step));
    else load_matrices<false>(a, at(down, rows, step));
  }
  // The same, as two operands b (0 and 1; 2 and 3) of a product that sums over the tile's rows. Alone: one operand.
  __device__ __forceinline__ void load_b_over_rows(uint32_t (&b)[4], uint32_t rows, int step) const {
    if (alone(step)) load_matrices<true>(b[0], b[1], at(down, rows, step));
    else load_matrices<true>(b, at(down, rows, step));
  }
  // The same, as two operands b of a product that sums over the tile's columns: 8 rows each. Alone: 0 and 2, of 8 columns.
  __device__ __forceinline__ void load_b_over_columns(uint32_t (&b)[4], uint32_t rows, int step) const {
    if (alone(step)) load_matrices<false>(b[0], b[2], at(down, rows, step));
    else load_matrices<false>(b, at(across, rows, step));
  }
};

// A warp's rows of a tile as operands a, kept in registers.
template <class T, int kWidth, int kRowTiles>
struct Operand {
  uint32_t pairs[kRowTiles][Matrices<kWidth>::kSteps][4];
  __device__ __forceinline__ void get(uint32_t (&a)[4], int m, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pairs[m][step][i];
  }
  __device__ __forceinline__ void load(const Matrices<kWidth>& matrices, uint32_t rows) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int k = 0; k < Matrices<kWidth>::kSteps; ++k) matrices.load_a(pairs[m][k], rows + m * kMma * Matrices<kWidth>::kRowBytes, k);
  }
  // Exponentials multiply scores by |scale|. The sign goes in here; and where scale is 0, the scores become 0.
  __device__ __forceinline__ void take_sign(float scale) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int k = 0; k < Matrices<kWidth>::kSteps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[m][k][i] = scale > 0 ? pairs[m][k][i] : scale < 0 ? pairs[m][k][i] ^ 0x80008000u : 0u;
  }
};
// The same, left in the tile and read from there each time, where registers are short.
template <class T, int kWidth, int kRowTiles>
struct OperandInTile {
  Matrices<kWidth> matrices;
  uint32_t rows;
  __device__ __forceinline__ void load(const Matrices<kWidth>& where, uint32_t from) { matrices = where, rows = from; }
  __device__ __forceinline__ void get(uint32_t (&a)[4], int m, int step) const {
    matrices.load_a(a, rows + m * kMma * Matrices<kWidth>::kRowBytes, step);
  }
};
// 16 of an operand's rows.
template <class Own>
struct RowTile {
  const Own& own;
  int m;
  __device__ __forceinline__ void get(uint32_t (&a)[4], int, int step) const { own.get(a, m, step); }
};

// What multiplies scores in base-2 exponentials, of operands that have taken the sign. Positive, so that the largest score
// stays the largest and -inf stays -inf.
__device__ __forceinline__ float exponent_factor(float scale) { return scale == 0 ? 1.f : fabsf(scale) * kLog2e; }

__device__ __forceinline__ float exp2_approximate(float x) {  // to 2 units in the last place; 0 below 2^-126
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// products[m][n] += own rows (m-th 16 of them) times the n-th 8 rows from `rows` on, over the whole width.
template <class T, int kWidth, class Own, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_rows(float (&products)[kRowTiles][kColumnTiles][4], const Own& own,
                                              const Matrices<kWidth>& matrices, uint32_t rows) {
#pragma unroll
  for (int k = 0; k < Matrices<kWidth>::kSteps; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) own.get(a[m], m, k);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t b[4];
      matrices.load_b_over_columns(b, rows + 8 * n * Matrices<kWidth>::kRowBytes, k);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (Matrices<kWidth>::alone(k)) {
          mma_half<T>(products[m][n], a[m], b[0]);
          mma_half<T>(products[m][n + 1], a[m], b[2]);
        } else {
          mma<T>(products[m][n], a[m], b[0], b[1]);
          mma<T>(products[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// sums[m][n] += weights (16 rows, 16 columns) times the 16 rows from `rows` on; n counts 8 columns of them.
template <class T, int kWidth, int kRowTiles>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[kRowTiles][kWidth / 8][4], const uint32_t (&weights)[kRowTiles][4],
                                                  const Matrices<kWidth>& matrices, uint32_t rows) {
#pragma unroll
  for (int k = 0; k < Matrices<kWidth>::kSteps; ++k) {
    uint32_t b[4];
    matrices.load_b_over_rows(b, rows, k);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      mma<T>(sums[m][2 * k], weights[m], b[0], b[1]);
      if (!Matrices<kWidth>::alone(k)) mma<T>(sums[m][2 * k + 1], weights[m], b[2], b[3]);
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
  constexpr int chunks = kRowTiles * kMma * Layout::kChunks;
  static_assert(chunks % kWarp == 0);
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
  for (int i = 0; i < chunks / kWarp; ++i) {
    const int index = lane + i * kWarp, row = index / Layout::kChunks, chunk = index % Layout::kChunks;
    if (row < length && chunk * Layout::kChunk < width)
      *reinterpret_cast<uint4*>(rows.first + row * rows.stride + chunk * Layout::kChunk) =
          *reinterpret_cast<const uint4*>(tile + Layout::at(row, chunk));
  }
}

}  // namespace convdit::cuda
