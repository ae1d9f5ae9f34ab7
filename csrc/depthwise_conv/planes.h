// How a map is walked: plane by plane, a plane being one vector of channels of one image, and in it row by row. The inner
// kernels (tiles.h) read the map itself where they can: float32, K = 7, channels enough for a vector. Elsewhere the rows pass
// through a ring of K rows on the stack, [row][column][lanes] in the accumulate dtype with zeros around the map, which
// settles borders, dtypes and channel tails at a fiftieth of the work that is then done.
#pragma once
#include "common/ahead.h"
#include "common/simd.h"
#include "depthwise_conv/tiles.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Columns of the map that are passed at a time: with wide vectors seven rows of 56 columns of x, the gradients and the sums
// beside them do not fit the first-level cache.
constexpr int64_t kStrip = kVectorBytes < 64 ? 56 : 28;

struct Map {
  int64_t height, width, channels, kernel;
};

// ---- rows between memory and the stack ---------------------------------------------------------------------------
template <class T>
void read_row(const T* from, int64_t step, int64_t columns, int64_t n, accum_t<T>* to) {
  using A = accum_t<T>;
  if (n == lanes<A>) {
    for (int64_t i = 0; i < columns; ++i) store(to + i * lanes<A>, load(from + i * step));
  } else {
    for (int64_t i = 0; i < columns; ++i) store(to + i * lanes<A>, load(from + i * step, n));
  }
}
template <class T>
void write_row(const accum_t<T>* from, int64_t step, int64_t columns, int64_t n, T* to) {
  using A = accum_t<T>;
  if (n == lanes<A>) {
    for (int64_t i = 0; i < columns; ++i) store(to + i * step, load(from + i * lanes<A>));
  } else {
    for (int64_t i = 0; i < columns; ++i) store(to + i * step, load(from + i * lanes<A>), n);
  }
}
template <class A>
void zero_row(int64_t columns, A* to) {
  for (int64_t i = 0; i < columns; ++i) store(to + i * lanes<A>, Vec<A>{});
}

// One strip of columns of the map, cut into tiles of equal width but for one.
template <class A>
struct Strip {
  int64_t first, columns;  // of the map
  int64_t left, right;     // columns under the kernel beyond the map's edges
  int64_t tiles;
  struct {
    int64_t first, columns;  // of the strip
    const Tiles<A>* kernels;
  } tile[ceil_div(kStrip, kMaxTile)];
};
// Tiles of one row of the map.
inline int64_t row_tiles(const Map& map) {
  const int64_t strips = ceil_div(map.width, kStrip);
  int64_t tiles = 0;
  for (int64_t i = 0; i < strips; ++i) {
    const Range columns = part_of(map.width, strips, i);
    tiles += ceil_div(columns.last - columns.first, kMaxTile);
  }
  return tiles;
}
template <class A>
Strip<A> make_strip(const Map& map, Range columns) {
  const int64_t radius = map.kernel / 2;
  Strip<A> s{columns.first,
             columns.last - columns.first,
             larger(0, radius - columns.first),
             larger(0, columns.last + radius - map.width),
             ceil_div(columns.last - columns.first, kMaxTile),
             {}};
  for (int64_t i = 0; i < s.tiles; ++i) {
    const Range tile = part_of(s.columns, s.tiles, i);
    const int side = (s.first + tile.first > 0 ? kHasLeft : 0) | (s.first + tile.last < map.width ? kHasRight : 0);
    s.tile[i] = {tile.first, tile.last - tile.first, &tiles_for<A>(map.kernel, side)};
  }
  return s;
}

// The channels of one plane. The last plane of a map overlaps the one before it, so that it fills its vectors too; only a map
// narrower than a vector has `lanes` below lanes<A>.
struct Plane {
  int64_t first, lanes;
};
template <class A>
int64_t plane_count(int64_t channels) {
  return ceil_div(channels, lanes<A>);
}
template <class A>
Plane plane_channels(int64_t channels, int64_t plane) {
  return {larger(0, smaller(plane * lanes<A>, channels - lanes<A>)), smaller(lanes<A>, channels)};
}

// A band of rows of one image: what is worked on, plane by plane, while it stays in the second-level cache.
struct Band {
  int64_t image;
  Range rows;
};
// What the rows of a later band need of `values`, one of the arrays (N, H, W, C), in `steps` steps: its own rows, with those below
// that the kernel covers (`radius`). The rows above came with the band before.
template <class T>
Ahead band_ahead(const void* values, const Map& map, const Band& band, Range planes, int64_t radius, int64_t steps) {
  using A = accum_t<T>;
  constexpr int64_t size = sizeof(T);
  const int64_t first = plane_channels<A>(map.channels, planes.first).first;
  const Plane last = plane_channels<A>(map.channels, planes.last - 1);
  const int64_t top = band.rows.first == 0 ? 0 : band.rows.first + radius, bottom = smaller(map.height, band.rows.last + radius);
  const T* from = static_cast<const T*>(values) + (band.image * map.height + top) * map.width * map.channels + first;
  return {from, (last.first + last.lanes - first) * size, map.channels * size, larger(0, bottom - top) * map.width, steps};
}

// Whether the tiles may read the map. The rows under the kernel should stay in the first-level cache for the next row, and
// copied they take half the lines where a vector is half a line. Cache lines a multiple of 4 KiB apart share one set of the first-level cache, so with
// 256 or 512 channels the window of a tile would fall into a few sets and evict itself: better copied.
template <class T>
bool reads_map(const Map& map, Plane plane) {
  using A = accum_t<T>;
  if (sizeof(T) != sizeof(A) || !tiles_skip_edges<A>(map.kernel) || plane.lanes < lanes<A>) return false;
  constexpr int64_t way = 4096, lines_a_set = 25;  // measured: more than there are ways, for the second-level cache helps
  constexpr int64_t rows_lines = kVectorBytes < 64 ? 24 * 1024 / 64 : INT64_MAX;
  if (smaller(map.width, kStrip) * map.kernel > rows_lines) return false;
  const int64_t bytes = map.channels * static_cast<int64_t>(sizeof(T)), apart = bytes & -bytes;  // the largest power of two in it
  const int64_t sets = way / smaller(larger(apart, 64), way), window = smaller(map.width, kMaxTile + 6) * map.kernel;
  return window <= lines_a_set * sets;
}

// Calls body(h, strip, rows) for the rows `band` of one image, strip by strip; x points to the first channel of the plane. `rows`
// is what the kernel covers at row h or, where `Pairs` and there is such a tile, at rows h and h + 1.
template <bool Pairs, class T, class F>
CONVDIT_INLINE void pass_rows(const T* x, const Map& map, Range band, Plane plane, const F& body) {
  using A = accum_t<T>;
  alignas(kVectorBytes) A ring[kMaxKernel * (kStrip + kMaxKernel - 1) * lanes<A>];
  A* ring_rows[kMaxKernel];  // from the kernel's first row at row h
  const A* x_rows[kMaxKernel + 1];
  const int64_t radius = map.kernel / 2, strips = ceil_div(map.width, kStrip), row_size = map.width * map.channels;
  const bool direct = reads_map<T>(map, plane);
  for (int64_t i = 0; i < strips; ++i) {
    const Strip<A> strip = make_strip<A>(map, part_of(map.width, strips, i));
    const int64_t width = strip.columns + 2 * radius, seen = width - strip.left - strip.right;
    const T* column = x + (strip.first - radius + strip.left) * map.channels;  // the first that is seen
    const auto read = [&](int64_t h, A* to) {
      read_row(column + h * row_size, map.channels, seen, plane.lanes, to + strip.left * lanes<A>);
    };
    TileRows<A> rows{x_rows, direct ? map.channels : lanes<A>, 0, 0, 0, map.kernel, 1, {}};
    if (!direct) {
      for (int64_t k = 0; k < map.kernel; ++k) {
        ring_rows[k] = ring + k * width * lanes<A>;
        zero_row(strip.left, ring_rows[k]);
        zero_row(strip.right, ring_rows[k] + (width - strip.right) * lanes<A>);
      }
      for (int64_t h = larger(0, band.first - radius); h < smaller(map.height, band.first + radius); ++h)
        read(h, ring_rows[h - band.first + radius]);
    }
    const bool pairs = Pairs && direct && strip.tiles == 1 && strip.tile[0].kernels->pair[strip.columns] != nullptr;
    for (int64_t h = band.first; h < band.last; h += rows.outputs) {
      rows.outputs = pairs && h + 1 < band.last ? 2 : 1;
      rows.first = larger(0, radius - h), rows.last = smaller(map.kernel + rows.outputs - 1, map.height + radius - h);
      if (!direct) {
        if (h + radius < map.height) read(h + radius, ring_rows[map.kernel - 1]);
        for (int64_t k = 0; k < map.kernel; ++k) x_rows[k] = ring_rows[k];
        for (int64_t k = 1; k < map.kernel; ++k) ring_rows[k - 1] = ring_rows[k];
        ring_rows[map.kernel - 1] = const_cast<A*>(x_rows[0]);
      } else if constexpr (sizeof(T) == sizeof(A)) {
        const T* row = x + (h - radius + rows.first) * row_size + (strip.first - radius) * map.channels;
        for (int64_t k = rows.first; k < rows.last; ++k, row += row_size) x_rows[k] = row;
      }
      body(h, strip, rows);
    }
  }
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
