// The 7x7 convolution of float32 and the halves by tiles, for the LayerNorm after it (strips_layer_norm.cuh): a block goes down a strip of
// the map, tile by tile, for 32 channels. The tile's rows of x and the halo around them lie in a ring in shared memory, so that going on
// to the next tile loads new rows only.
#pragma once
#include "common/depthwise.cuh"
#include "depthwise_conv/depthwise_conv.h"

namespace convdit::cuda {
namespace {

// ---- tiles, K = 7 ---------------------------------------------------------------------------------------------------------
// A unit is 2 rows of 7 columns (maps of ImageNet's networks are 56, 28, 14 and 7 wide); a tile is `Across` x `Down` units.
template <class T, int Across, int Down>
struct Tile {
  static constexpr int kUnitRows = 2, kUnitColumns = 7;
  static constexpr int kRows = kUnitRows * Down, kColumns = kUnitColumns * Across;
  static constexpr int kRing = kRows + 2 * kRadius, kWidth = kColumns + 2 * kRadius;  // of x, with the halo
  // In elements of T. One unit across: the two units of a warp are two rows apart, and must not meet in the same banks.
  static constexpr int kRingRow = kWidth * kChannels + (Across == 1 && sizeof(T) == 2 ? 16 : 0);
  static constexpr int kRingSize = kRing * kRingRow;

  // Copies `rows` rows of a map from row `first` on, Width columns from `column` on, zeros outside the map, to a ring of `slots` rows of
  // `shared_row` elements, the first into slot `slot`. A thread keeps its column and channels and goes down.
  template <int Threads, int Width>
  static __device__ __forceinline__ void stage(const T* map, int64_t height, int64_t map_width, int64_t channels, int64_t c0, int64_t first,
                                               int rows, int64_t column, int slot, int slots, int shared_row, T* shared) {
    constexpr int vector = kVector<T>, vectors = kChannels / vector, places = Width * vectors;
    constexpr int lanes = places < Threads ? Threads / places : 1;  // rows at once
    for (int i = threadIdx.x; i < places * lanes; i += Threads) {
      const int c = i % vectors * vector, x = i / vectors % Width;
      const int64_t w = column + x, top = first < 0 ? 0 : first;
      const bool inside = w >= 0 && w < map_width && c0 + c < channels;
      const T* from = inside ? map + w * channels + c0 + c : map;
      // Rows `begin` to `end` - 1 lie in the map.
      const int begin = inside ? static_cast<int>(top - first) : rows;
      const int end = height - first < rows ? static_cast<int>(height - first) : rows;
      const int64_t step = lanes * map_width * channels;
      const unsigned count = end > begin ? end - begin : 0;
      int y = i / places;
      from += (first + y) * map_width * channels;
      const unsigned row = shared_row * sizeof(T), ring = slots * row, base = shared_address(shared + x * kChannels + c),
                     end_of_ring = base + ring;
      unsigned to = base + (slot + y) % slots * row;
      for (; y < rows; y += lanes, from += step) {
        copy_async<16>(to, from, static_cast<unsigned>(y - begin) < count);
        to += lanes * row;
        if (to >= end_of_ring) to -= ring;
      }
    }
  }
};

// The tiles of all maps: down a strip first.
struct Tiles {
  int64_t rows, columns, groups;  // tiles of a map, and groups of channels
};
template <class Tile>
Tiles tiles_of(int64_t height, int64_t width, int64_t channels) {
  return {ceil_div(height, Tile::kRows), ceil_div(width, Tile::kColumns), ceil_div(channels, kChannels)};
}

// ---- the convolution --------------------------------------------------------------------------------------
// A half warp has a unit, two channels a lane.
template <class T, class Tile>
constexpr int kForwardThreads = Tile::kRows / Tile::kUnitRows * (Tile::kColumns / Tile::kUnitColumns) * kChannels / 2;
template <class T, class Tile>
constexpr int kForwardBytes = Tile::kRingSize * sizeof(T) + kTapCount * kWeightRow * sizeof(float);
template <class Tile>
struct Place {  // of a thread: its unit in the tile, its channels in the group
  static constexpr int kLanes = kChannels / 2, kAcross = Tile::kColumns / Tile::kUnitColumns;
  const int lane = threadIdx.x % kLanes, channel = 2 * lane;
  const int row = threadIdx.x / kLanes / kAcross * Tile::kUnitRows, column = threadIdx.x / kLanes % kAcross * Tile::kUnitColumns;
};

// Tiles down a strip, one after the other: rows `first` to `last` - 1 of a map, from column `w0` on.
struct TileRun {
  int64_t image, w0, first, last;
};
// The index-th of the runs of `length` tiles that all strips are cut into.
template <class Tile>
__device__ __forceinline__ TileRun run_of(const DepthwiseConv& p, const Tiles& tiles, int64_t length, int64_t index) {
  const int64_t runs = ceil_div(tiles.rows, length), strip = index / runs, first = index % runs * length * Tile::kRows;
  const int64_t last = first + length * Tile::kRows;
  return {strip / tiles.columns, strip % tiles.columns * Tile::kColumns, first, last < p.height ? last : p.height};
}

// Convolves the channels from c0 on. `use` gets the first row of each tile and what the thread has of it: two channels of its unit.
template <class T, class Tile, class F>
__device__ __forceinline__ void convolve(const DepthwiseConv& p, const TileRun& run, int64_t c0, unsigned char* bytes, const F& use) {
  constexpr int threads = kForwardThreads<T, Tile>, rows = Tile::kUnitRows, columns = Tile::kUnitColumns;
  T* const ring = reinterpret_cast<T*>(bytes);
  float* const weights = reinterpret_cast<float*>(bytes + Tile::kRingSize * sizeof(T));
  const float* bias = static_cast<const float*>(p.bias);
  const Place<Tile> place;
  const T* map = static_cast<const T*>(p.x) + run.image * p.height * p.width * p.channels;
  __syncthreads();  // what was convolved before may still be read
  stage_weights<threads>(static_cast<const float*>(p.weight), c0, p.channels, p.flip, weights);
  int slot = 0;  // of the tile's first row of x
  for (int64_t h0 = run.first; h0 < run.last; h0 += Tile::kRows) {
    const int kept = h0 == run.first ? 0 : 2 * kRadius;  // rows of the halo that the tile before has loaded
    if (kept > 0) {
      __syncthreads();  // it may still read the others
      slot = (slot + Tile::kRows) % Tile::kRing;
    }
    Tile::template stage<threads, Tile::kWidth>(map, p.height, p.width, p.channels, c0, h0 - kRadius + kept, Tile::kRing - kept,
                                                run.w0 - kRadius, (slot + kept) % Tile::kRing, Tile::kRing, Tile::kRingRow, ring);
    finish_copies();
    float sum[rows][columns][2], start[2] = {};
    if (bias && c0 + place.channel < p.channels) load(bias + c0 + place.channel, 2, false, start);
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int j = 0; j < columns; ++j) sum[i][j][0] = start[0], sum[i][j][1] = start[1];
    float taps[rows][kTaps][2];  // output row 1 takes the kernel row that row 0 took one row of x ago
    const auto add_row = [&](int kernel_row, auto first_row, auto second_row) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        taps[1][k][0] = taps[0][k][0], taps[1][k][1] = taps[0][k][1];
        if constexpr (decltype(first_row)::value)
          load(weights + (kernel_row * kTaps + k) * kWeightRow + place.channel, 2, true, taps[0][k]);
      }
      const int row = slot + place.row + kernel_row, ring_row = row < Tile::kRing ? row : row - Tile::kRing;
      const T* from = ring + ring_row * Tile::kRingRow + place.column * kChannels + place.channel;
#pragma unroll
      for (int column = 0; column < columns + 2 * kRadius; ++column) {
        float v[2];
        load(from + column * kChannels, 2, true, v);
        if constexpr (decltype(first_row)::value) add_taps(column - kRadius, v, taps[0], sum[0]);
        if constexpr (decltype(second_row)::value) add_taps(column - kRadius, v, taps[1], sum[1]);
      }
    };
    add_row(0, std::true_type{}, std::false_type{});
#pragma unroll 2  // the taps change places by name
    for (int kernel_row = 1; kernel_row < kTaps; ++kernel_row) add_row(kernel_row, std::true_type{}, std::true_type{});
    add_row(kTaps, std::false_type{}, std::true_type{});
    use(h0, sum);
  }
}

// Writes a thread's two channels of its unit to y, as far as the map has them.
template <class T, class Tile>
__device__ __forceinline__ void store_unit(const DepthwiseConv& p, const TileRun& run, int64_t c0, int64_t h0,
                                           const float (&sum)[Tile::kUnitRows][Tile::kUnitColumns][2]) {
  const Place<Tile> place;
  const int64_t h = h0 + place.row, w = run.w0 + place.column;
  if (c0 + place.channel >= p.channels) return;
  const int inside = p.width - w < Tile::kUnitColumns ? static_cast<int>(p.width - w) : Tile::kUnitColumns;
#pragma unroll
  for (int i = 0; i < Tile::kUnitRows; ++i) {
    if (h + i >= p.height) break;
    T* y = static_cast<T*>(p.y) + ((run.image * p.height + h + i) * p.width + w) * p.channels + c0 + place.channel;
#pragma unroll
    for (int j = 0; j < Tile::kUnitColumns; ++j, y += p.channels)
      if (j < inside) store(y, 2, true, sum[i][j]);
  }
}

}  // namespace
}  // namespace convdit::cuda
