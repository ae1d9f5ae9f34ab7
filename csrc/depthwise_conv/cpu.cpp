// CPU kernels of the depthwise convolution. Work goes plane by plane, a plane being one vector of channels of one image, and
// in it row by row. The inner kernels (tiles.h) read the map itself where they can: float32, K = 7, channels enough for a
// vector. Elsewhere the rows pass through a ring of K rows on the stack, [row][column][lanes] in the accumulate dtype with
// zeros around the map, which settles borders, dtypes and channel tails at a fiftieth of the work that is then done.
#include "depthwise_conv/depthwise_conv.h"

#include "common/simd.h"
#include "depthwise_conv/tiles.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kStrip = 56;                 // columns of the map in the ring at a time
constexpr int64_t kBandBytes = 512 * 1024;     // of x that one task passes over for all its channels: stays in the L2 cache

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part i of `total` things cut into `parts` of equal size but for one.
struct Range {
  int64_t first, last;
};
CONVDIT_INLINE Range part_of(int64_t total, int64_t parts, int64_t i) { return {total * i / parts, total * (i + 1) / parts}; }

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
// A column of a row is a cache line far from the next one: the hardware does not see the pattern.
template <bool Write, class T>
void prefetch_row(const T* row, int64_t step, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) __builtin_prefetch(row + i * step, Write, 3);
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
template <class A>
Strip<A> make_strip(const Map& map, Range columns) {
  const int64_t radius = map.kernel / 2;
  Strip<A> s{columns.first, columns.last - columns.first, larger(0, radius - columns.first),
             larger(0, columns.last + radius - map.width), ceil_div(columns.last - columns.first, kMaxTile), {}};
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

// Columns 4 KiB apart share a set of the first-level cache; a tile and its kernel rows then evict one another.
template <class T>
bool reads_map(const Map& map, Plane plane) {
  using A = accum_t<T>;
  return sizeof(T) == sizeof(A) && tiles_skip_edges<A>(map.kernel) && plane.lanes == lanes<A> &&
         map.channels * static_cast<int64_t>(sizeof(T)) % 2048 != 0;
}

// Calls body(h, strip, rows, ahead) for the rows `band` of one image, strip by strip; x points to the first channel of the plane.
// `rows` is what the kernel covers at row h; `ahead` is the strip's part of the next row of x, or null: to be prefetched.
template <class T, class F>
CONVDIT_INLINE void pass_rows(const T* x, const Map& map, Range band, Plane plane, const F& body) {
  using A = accum_t<T>;
  alignas(kVectorBytes) A ring[kMaxKernel * (kStrip + kMaxKernel - 1) * lanes<A>];
  A* ring_rows[kMaxKernel];  // from the kernel's first row at row h
  const A* x_rows[kMaxKernel];
  const int64_t radius = map.kernel / 2, strips = ceil_div(map.width, kStrip), row_size = map.width * map.channels;
  const bool direct = reads_map<T>(map, plane);
  for (int64_t i = 0; i < strips; ++i) {
    const Strip<A> strip = make_strip<A>(map, part_of(map.width, strips, i));
    const int64_t width = strip.columns + 2 * radius, seen = width - strip.left - strip.right;
    const T* column = x + (strip.first - radius + strip.left) * map.channels;  // the first that is seen
    const auto read = [&](int64_t h, A* to) {
      read_row(column + h * row_size, map.channels, seen, plane.lanes, to + strip.left * lanes<A>);
    };
    TileRows<A> rows{x_rows, direct ? map.channels : lanes<A>, 0, 0, 0, map.kernel};
    if (!direct) {
      for (int64_t k = 0; k < map.kernel; ++k) {
        ring_rows[k] = ring + k * width * lanes<A>;
        zero_row(strip.left, ring_rows[k]);
        zero_row(strip.right, ring_rows[k] + (width - strip.right) * lanes<A>);
      }
      for (int64_t h = larger(0, band.first - radius); h < smaller(map.height, band.first + radius); ++h)
        read(h, ring_rows[h - band.first + radius]);
    }
    for (int64_t h = band.first; h < band.last; ++h) {
      rows.first = larger(0, radius - h), rows.last = smaller(map.kernel, map.height + radius - h);
      if (!direct) {
        if (h + radius < map.height) read(h + radius, ring_rows[map.kernel - 1]);
        for (int64_t k = 0; k < map.kernel; ++k) x_rows[k] = ring_rows[k];
        for (int64_t k = 1; k < map.kernel; ++k) ring_rows[k - 1] = ring_rows[k];
        ring_rows[map.kernel - 1] = const_cast<A*>(x_rows[0]);
      } else if constexpr (sizeof(T) == sizeof(A)) {
        const T* first = x + (h - radius) * row_size + (strip.first - radius) * map.channels;
        for (int64_t k = rows.first; k < rows.last; ++k) x_rows[k] = first + k * row_size;
      }
      const int64_t next = h + radius + 1;
      body(h, strip, rows, next < map.height ? x + next * row_size + strip.first * map.channels : nullptr);
    }
  }
}

// ---- weights between (channels, taps) and (taps, lanes) ------------------------------------------------------------
// Transposes the square of lanes<A> rows: at each step, the two off-diagonal quarters of every square of 2 * Step swap.
template <class V>
CONVDIT_INLINE void transpose(V* rows) {
  constexpr int n = static_cast<int>(sizeof(V) / sizeof(rows[0][0]));
  const auto step = [&]<int Step>() __attribute__((always_inline)) {
    unroll<n>(CONVDIT_UNROLLED(I) {
      if constexpr ((I & Step) == 0) {
        const V a = rows[I], b = rows[I + Step];
        const auto pick = [&]<int... L>(std::integer_sequence<int, L...>) __attribute__((always_inline)) {
          rows[I] = __builtin_shufflevector(a, b, (L & Step ? n + L - Step : L)...);
          rows[I + Step] = __builtin_shufflevector(a, b, (L & Step ? n + L : L + Step)...);
        };
        pick(std::make_integer_sequence<int, n>{});
      }
    });
  };
  step.template operator()<1>();
  if constexpr (n > 2) step.template operator()<2>();
  if constexpr (n > 4) step.template operator()<4>();
  if constexpr (n > 8) step.template operator()<8>();
}

// (n, taps) to (taps, lanes), lanes from n on zero; `flip`: the taps in reverse order.
template <class A>
void pack_taps(const A* from, int64_t n, int64_t taps, bool flip, A* to) {
  for (int64_t tap = 0; tap < taps; tap += lanes<A>) {
    const int64_t m = smaller(lanes<A>, taps - tap);
    Vec<A> rows[lanes<A>];
    for (int64_t i = 0; i < lanes<A>; ++i) rows[i] = i < n ? load_lanes<false>(from + i * taps + tap, m) : Vec<A>{};
    transpose(rows);
    for (int64_t i = 0; i < m; ++i) store(to + (flip ? taps - 1 - tap - i : tap + i) * lanes<A>, rows[i]);
  }
}
// (taps, lanes) to (n, taps), from the lane `first` on.
template <class A>
void unpack_taps(const A* from, int64_t first, int64_t n, int64_t taps, A* to) {
  for (int64_t tap = 0; tap < taps; tap += lanes<A>) {
    const int64_t m = smaller(lanes<A>, taps - tap);
    Vec<A> rows[lanes<A>];
    for (int64_t i = 0; i < lanes<A>; ++i) rows[i] = i < m ? load(from + (tap + i) * lanes<A>) : Vec<A>{};
    transpose(rows);
    for (int64_t i = first; i < n; ++i) store_lanes<false>(to + i * taps + tap, rows[i], m);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------
template <class A>
void pack_weights(const DepthwiseConv& p, int64_t plane) {
  const int64_t taps = p.kernel * p.kernel;
  const Plane c = plane_channels<A>(p.channels, plane);
  pack_taps(static_cast<const A*>(p.weight) + c.first * taps, c.lanes, taps, p.flip,
            static_cast<A*>(p.packed) + plane * taps * lanes<A>);
}

template <class T>
void forward_plane(const DepthwiseConv& p, int64_t image, int64_t plane, Range band) {
  using A = accum_t<T>;
  const Map map{p.height, p.width, p.channels, p.kernel};
  const Plane c = plane_channels<A>(p.channels, plane);
  const int64_t offset = image * p.height * p.width * p.channels + c.first;
  const A* weight = static_cast<const A*>(p.packed) + plane * p.kernel * p.kernel * lanes<A>;
  const Vec<A> start = p.bias ? load_lanes<false>(static_cast<const A*>(p.bias) + c.first, c.lanes) : Vec<A>{};
  T* y = static_cast<T*>(p.y) + offset;
  pass_rows(static_cast<const T*>(p.x) + offset, map, band, c,
            [&](int64_t h, const Strip<A>& strip, TileRows<A>& rows, const T* ahead) {
    alignas(kVectorBytes) A row[kStrip * lanes<A>];
    T* to = y + (h * p.width + strip.first) * p.channels;
    A* out = row;
    int64_t out_step = lanes<A>;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (c.lanes == lanes<A>) out = to, out_step = p.channels;
    }
    for (int64_t i = 0; i < strip.tiles; ++i) {
      const auto& tile = strip.tile[i];
      if (ahead) prefetch_row<false>(ahead + tile.first * p.channels, p.channels, tile.columns);
      prefetch_row<true>(to + tile.first * p.channels, p.channels, tile.columns);
      rows.offset = tile.first * rows.step;
      tile.kernels->forward[tile.columns](rows, weight, start, out + tile.first * out_step, out_step);
    }
    if (out == row) write_row(row, p.channels, strip.columns, c.lanes, to);
  });
}

// How the forward is cut into tasks: bands of rows, and where these are few, groups of planes. The planes that overlap
// are in one group: no two threads write the same value.
struct ForwardTasks {
  int64_t bands, groups, planes, apart;
  Range planes_of(int64_t group) const {
    const Range r = part_of(apart, groups, group);
    return {r.first, r.last == apart ? planes : r.last};
  }
};
template <class T>
ForwardTasks forward_tasks(const DepthwiseConv& p, const Runner& run, bool split_channels) {
  constexpr int64_t vector = lanes<accum_t<T>>;
  const int64_t wanted = run.threads > 1 ? 4 * run.threads : 1, row_bytes = p.width * p.channels * static_cast<int64_t>(sizeof(T));
  int64_t rows = larger(kBandBytes / row_bytes - p.kernel + 1, p.kernel);
  if (!split_channels) rows = smaller(rows, larger(1, p.batch * p.height / wanted));
  const int64_t bands = ceil_div(p.height, rows), apart = larger(1, p.channels / vector);
  return {bands, split_channels ? smaller(apart, ceil_div(wanted, p.batch * bands)) : 1, ceil_div(p.channels, vector), apart};
}

template <class T>
void forward(const DepthwiseConv& p, const Runner& run) {
  const ForwardTasks tasks = forward_tasks<T>(p, run, true);
  run(tasks.planes, [&](int64_t plane) { pack_weights<accum_t<T>>(p, plane); });
  run(p.batch * tasks.bands * tasks.groups, [&](int64_t task) {
    const int64_t image = task / tasks.groups / tasks.bands;
    const Range planes = tasks.planes_of(task % tasks.groups), band = part_of(p.height, tasks.bands, task / tasks.groups % tasks.bands);
    for (int64_t plane = planes.first; plane < planes.last; ++plane) forward_plane<T>(p, image, plane, band);
  });
}

template <class T>
void normalise_site(const DepthwiseConvLayerNorm& p, int64_t site) {
  using A = accum_t<T>;
  const int64_t channels = p.conv.channels;
  const T* y = static_cast<const T*>(p.conv.y) + site * channels;
  const A mean = sum_vectors<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
                   return load_lanes<decltype(full)::value>(y + i, n);
                 }) / static_cast<A>(channels);
  const A variance = sum_vectors<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
                       Vec<A> d = load_lanes<decltype(full)::value>(y + i, n) - mean;
                       if constexpr (!decltype(full)::value)
                         for (int64_t lane = n; lane < lanes<A>; ++lane) d[lane] = 0;
                       return d * d;
                     }) / static_cast<A>(channels);
  const A rstd = 1 / static_cast<A>(__builtin_sqrt(variance + static_cast<A>(p.eps)));
  if (p.mean) static_cast<A*>(p.mean)[site] = mean;
  if (p.rstd) static_cast<A*>(p.rstd)[site] = rstd;
  const A *weight = static_cast<const A*>(p.ln_weight), *bias = static_cast<const A*>(p.ln_bias);
  T* out = static_cast<T*>(p.out) + site * channels;
  for_each_vector<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    const Vec<A> normalised = (load_lanes<kFull>(y + i, n) - mean) * rstd;
    store_lanes<kFull>(out + i, normalised * load_lanes<kFull>(weight + i, n) + load_lanes<kFull>(bias + i, n), n);
  });
}

template <class T>
void forward_layer_norm(const DepthwiseConvLayerNorm& p, const Runner& run) {
  const DepthwiseConv& conv = p.conv;
  const ForwardTasks tasks = forward_tasks<T>(conv, run, false);
  run(tasks.planes, [&](int64_t plane) { pack_weights<accum_t<T>>(conv, plane); });
  run(conv.batch * tasks.bands, [&](int64_t task) {
    const int64_t image = task / tasks.bands;
    const Range band = part_of(conv.height, tasks.bands, task % tasks.bands);
    for (int64_t plane = 0; plane < tasks.planes; ++plane) forward_plane<T>(conv, image, plane, band);
    const int64_t first = image * conv.height;
    for (int64_t site = (first + band.first) * conv.width; site < (first + band.last) * conv.width; ++site)
      normalise_site<T>(p, site);
  });
}

// ---- weight gradient ---------------------------------------------------------------------------------------------
// One part's sums for one plane: `total` is (K*K + 1, lanes), the last row for the bias.
template <class T>
void weight_grad_part(const DepthwiseConvWeightGrad& p, int64_t part, int64_t plane, accum_t<T>* total) {
  using A = accum_t<T>;
  const Map map{p.height, p.width, p.channels, p.kernel};
  const Plane c = plane_channels<A>(p.channels, plane);
  for (int64_t i = 0; i <= p.kernel * p.kernel; ++i) store(total + i * lanes<A>, Vec<A>{});
  const Range all = part_of(p.batch * p.height, p.parts, part);
  for (int64_t image = all.first / p.height; image * p.height < all.last; ++image) {
    const int64_t offset = image * p.height * p.width * p.channels + c.first;
    const Range band = {larger(0, all.first - image * p.height), smaller(p.height, all.last - image * p.height)};
    const T* grad = static_cast<const T*>(p.grad) + offset;
    pass_rows(static_cast<const T*>(p.x) + offset, map, band, c,
              [&](int64_t h, const Strip<A>& strip, TileRows<A>& rows, const T* ahead) {
      alignas(kVectorBytes) A row[kStrip * lanes<A>];
      const T *from = grad + (h * p.width + strip.first) * p.channels, *from_ahead = h + 1 < band.last ? from + p.width * p.channels : nullptr;
      const A* g = row;
      int64_t g_step = lanes<A>;
      bool copy = true;
      if constexpr (sizeof(T) == sizeof(A)) {
        if (c.lanes == lanes<A>) g = from, g_step = p.channels, copy = false;
      }
      if (copy) read_row(from, p.channels, strip.columns, c.lanes, row);
      for (int64_t i = 0; i < strip.tiles; ++i) {
        const auto& tile = strip.tile[i];
        if (ahead) prefetch_row<false>(ahead + tile.first * p.channels, p.channels, tile.columns);
        if (from_ahead) prefetch_row<false>(from_ahead + tile.first * p.channels, p.channels, tile.columns);
        rows.offset = tile.first * rows.step;
        tile.kernels->weight[tile.columns](rows, g + tile.first * g_step, g_step, total);
      }
    });
  }
}

// Adds up the parts in order, and turns (K*K + 1, lanes) back into (C, K*K) and (C,).
template <class A>
void add_weight_parts(const DepthwiseConvWeightGrad& p, int64_t plane) {
  const int64_t taps = p.kernel * p.kernel, sums = (taps + 1) * lanes<A>, planes = plane_count<A>(p.channels);
  const Plane c = plane_channels<A>(p.channels, plane);
  A* total = static_cast<A*>(p.workspace) + plane * sums;
  for (int64_t part = 1; part < p.parts; ++part)
    for (int64_t i = 0; i < sums; i += lanes<A>) store(total + i, load(total + i) + load(total + part * planes * sums + i));
  const int64_t known = plane * lanes<A> - c.first;  // channels that the plane before has, too: the same sums
  unpack_taps(total, known, c.lanes, taps, static_cast<A*>(p.grad_weight) + c.first * taps);
  for (int64_t i = known; i < c.lanes; ++i) static_cast<A*>(p.grad_bias)[c.first + i] = total[taps * lanes<A> + i];
}

template <class T>
void weight_grad(const DepthwiseConvWeightGrad& p, const Runner& run) {
  using A = accum_t<T>;
  const int64_t planes = plane_count<A>(p.channels), sums = (p.kernel * p.kernel + 1) * lanes<A>;
  run(p.parts * planes, [&](int64_t task) {
    weight_grad_part<T>(p, task / planes, task % planes, static_cast<A*>(p.workspace) + task * sums);
  });
  run(planes, [&](int64_t plane) { add_weight_parts<A>(p, plane); });
}

// ---- backward of the LayerNorm -----------------------------------------------------------------------------------
template <class T>
void layer_norm_backward_part(const LayerNormBackward& p, int64_t part) {
  using A = accum_t<T>;
  const int64_t channels = p.channels;
  const A* weight = static_cast<const A*>(p.weight);
  A *weight_sum = static_cast<A*>(p.workspace) + part * 2 * channels, *bias_sum = weight_sum + channels;
  for (int64_t i = 0; i < 2 * channels; ++i) weight_sum[i] = 0;
  const Range rows = part_of(p.rows, p.parts, part);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const T *grad = static_cast<const T*>(p.grad) + row * channels, *x = static_cast<const T*>(p.x) + row * channels;
    T* grad_x = static_cast<T*>(p.grad_x) + row * channels;
    const A mean = static_cast<const A*>(p.mean)[row], rstd = static_cast<const A*>(p.rstd)[row];
    // With n the normalised row and g = grad * weight: grad_x = rstd * (g - mean(g) - n * mean(g * n)).
    Vec<A> total_gn[2] = {};
    int u = 0;
    const A total_g = sum_vectors<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      const Vec<A> g = load_lanes<kFull>(grad + i, n) * load_lanes<kFull>(weight + i, n);
      total_gn[u] += g * ((load_lanes<kFull>(x + i, n) - mean) * rstd);
      u ^= 1;
      return g;
    });
    const A mean_g = total_g / static_cast<A>(channels), mean_gn = sum(total_gn[0] + total_gn[1]) / static_cast<A>(channels);
    for_each_vector<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      const Vec<A> d = load_lanes<kFull>(grad + i, n), norm = (load_lanes<kFull>(x + i, n) - mean) * rstd;
      store_lanes<kFull>(weight_sum + i, load_lanes<kFull>(weight_sum + i, n) + d * norm, n);
      store_lanes<kFull>(bias_sum + i, load_lanes<kFull>(bias_sum + i, n) + d, n);
      store_lanes<kFull>(grad_x + i, rstd * (d * load_lanes<kFull>(weight + i, n) - mean_g - norm * mean_gn), n);
    });
  }
}

template <class T>
void layer_norm_backward(const LayerNormBackward& p, const Runner& run) {
  using A = accum_t<T>;
  run(p.parts, [&](int64_t part) { layer_norm_backward_part<T>(p, part); });
  run(2, [&](int64_t which) {
    A* total = static_cast<A*>(which == 0 ? p.grad_weight : p.grad_bias);
    for (int64_t i = 0; i < p.channels; ++i) total[i] = 0;
    for (int64_t part = 0; part < p.parts; ++part) {
      const A* sums = static_cast<const A*>(p.workspace) + (part * 2 + which) * p.channels;
      for (int64_t i = 0; i < p.channels; ++i) total[i] += sums[i];
    }
  });
}

// ---- by dtype ----------------------------------------------------------------------------------------------------
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}
void dispatch_forward(const DepthwiseConv& p, const Runner& run) {
  dispatch(p.dtype, [&](auto x) { forward<decltype(x)>(p, run); });
}
void dispatch_forward_layer_norm(const DepthwiseConvLayerNorm& p, const Runner& run) {
  dispatch(p.conv.dtype, [&](auto x) { forward_layer_norm<decltype(x)>(p, run); });
}
void dispatch_weight_grad(const DepthwiseConvWeightGrad& p, const Runner& run) {
  dispatch(p.dtype, [&](auto x) { weight_grad<decltype(x)>(p, run); });
}
void dispatch_layer_norm_backward(const LayerNormBackward& p, const Runner& run) {
  dispatch(p.dtype, [&](auto x) { layer_norm_backward<decltype(x)>(p, run); });
}

}  // namespace

extern const DepthwiseConvKernels depthwise_conv = {dispatch_forward, dispatch_forward_layer_norm, dispatch_weight_grad,
                                                    dispatch_layer_norm_backward};

}  // namespace convdit::CONVDIT_LEVEL
