// CPU kernels of the depthwise convolution. Work goes plane by plane: the rows of one vector of channels pass through a ring
// of K rows on the stack, [row][column][lanes] in the accumulate dtype with zeros around the map. Copying a value in
// costs a fiftieth of what is then done with it, and settles borders, dtypes, channel tails, alignment and
// power-of-two strides (which would put a whole tile into one cache set) before the inner kernels (tiles.h).
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
template <class A>
void zero_row(int64_t columns, A* to) {
  for (int64_t i = 0; i < columns; ++i) store(to + i * lanes<A>, Vec<A>{});
}

// Calls body(h, columns, rows) for the rows `band` of one image's map, strip by strip; `rows` are the rows of x, channels `n`
// from `x` on, under the kernel at row h, from the leftmost tap of the strip.
template <class T, class F>
CONVDIT_INLINE void pass_rows(const T* x, const Map& map, Range band, int64_t n, const F& body) {
  using A = accum_t<T>;
  alignas(kVectorBytes) A ring[kMaxKernel * (kStrip + kMaxKernel - 1) * lanes<A>];
  const int64_t radius = map.kernel / 2, strips = ceil_div(map.width, kStrip);
  for (int64_t s = 0; s < strips; ++s) {
    const Range strip = part_of(map.width, strips, s);
    const int64_t pitch = (strip.last - strip.first + 2 * radius) * lanes<A>;
    const Range seen = {larger(0, strip.first - radius), smaller(map.width, strip.last + radius)};
    const int64_t left = seen.first - (strip.first - radius), right = strip.last + radius - seen.last;
    for (int64_t slot = 0; slot < map.kernel; ++slot) {
      zero_row(left, ring + slot * pitch);
      zero_row(right, ring + (slot + 1) * pitch - right * lanes<A>);
    }
    int64_t next = larger(0, band.first - radius);  // the next row of x to be read
    for (int64_t h = band.first; h < band.last; ++h) {
      for (; next < smaller(map.height, h + radius + 1); ++next)
        read_row(x + (next * map.width + seen.first) * map.channels, map.channels, seen.last - seen.first, n,
                 ring + next % map.kernel * pitch + left * lanes<A>);
      const A* rows[kMaxKernel];
      TileRows<A> t{rows, 0, larger(0, radius - h), smaller(map.kernel, map.height + radius - h), map.kernel};
      for (int64_t i = t.first; i < t.last; ++i) rows[i] = ring + (h + i - radius) % map.kernel * pitch;
      body(h, strip, t);
    }
  }
}

// Calls body(columns, offset from the strip's first, sides) for the tiles of a strip.
template <class F>
CONVDIT_INLINE void for_each_tile(const Map& map, Range strip, const F& body) {
  const int64_t width = strip.last - strip.first, tiles = ceil_div(width, kMaxTile);
  for (int64_t i = 0; i < tiles; ++i) {
    const Range tile = part_of(width, tiles, i);
    const int side = (strip.first + tile.first > 0 ? kHasLeft : 0) | (strip.first + tile.last < map.width ? kHasRight : 0);
    body(tile.last - tile.first, tile.first, side);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------
// (C, K*K) to (C / lanes, K*K, lanes), the last lanes zero.
template <class A>
void pack_weights(const DepthwiseConv& p, int64_t block) {
  const int64_t taps = p.kernel * p.kernel, n = smaller(lanes<A>, p.channels - block * lanes<A>);
  const A* from = static_cast<const A*>(p.weight) + block * lanes<A> * taps;
  A* to = static_cast<A*>(p.packed) + block * lanes<A> * taps;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t lane = 0; lane < lanes<A>; ++lane)
      to[(p.flip ? taps - 1 - tap : tap) * lanes<A> + lane] = lane < n ? from[lane * taps + tap] : 0;
}

template <class T>
void forward_plane(const DepthwiseConv& p, int64_t image, int64_t block, Range band) {
  using A = accum_t<T>;
  const Map map{p.height, p.width, p.channels, p.kernel};
  const int64_t c = block * lanes<A>, n = smaller(lanes<A>, p.channels - c);
  const int64_t plane = image * p.height * p.width * p.channels + c;
  const A* weight = static_cast<const A*>(p.packed) + c * p.kernel * p.kernel;
  const Vec<A> start = p.bias ? load_lanes<false>(static_cast<const A*>(p.bias) + c, n) : Vec<A>{};
  T* y = static_cast<T*>(p.y) + plane;
  pass_rows(static_cast<const T*>(p.x) + plane, map, band, n, [&](int64_t h, Range strip, TileRows<A>& t) {
    alignas(kVectorBytes) A row[kStrip * lanes<A>];
    T* to = y + (h * p.width + strip.first) * p.channels;
    for_each_tile(map, strip, [&](int64_t columns, int64_t first, int side) {
      t.offset = first * lanes<A>;
      tiles_for<A>(p.kernel, side).forward[columns](t, weight, start, row + first * lanes<A>, lanes<A>);
    });
    write_row(row, p.channels, strip.last - strip.first, n, to);
  });
}

// How the forward is cut into tasks: bands of rows, and where these are few, groups of channel blocks.
struct ForwardTasks {
  int64_t bands, groups, blocks;
};
template <class T>
ForwardTasks forward_tasks(const DepthwiseConv& p, const Runner& run, bool split_channels) {
  const int64_t blocks = ceil_div(p.channels, lanes<accum_t<T>>), wanted = run.threads > 1 ? 4 * run.threads : 1;
  const int64_t row_bytes = p.width * p.channels * static_cast<int64_t>(sizeof(T));
  int64_t rows = larger(kBandBytes / row_bytes - p.kernel + 1, p.kernel);
  if (!split_channels) rows = smaller(rows, larger(1, p.batch * p.height / wanted));
  const int64_t bands = ceil_div(p.height, rows);
  return {bands, split_channels ? smaller(blocks, ceil_div(wanted, p.batch * bands)) : 1, blocks};
}

template <class T>
void forward(const DepthwiseConv& p, const Runner& run) {
  const ForwardTasks tasks = forward_tasks<T>(p, run, true);
  run(tasks.blocks, [&](int64_t block) { pack_weights<accum_t<T>>(p, block); });
  run(p.batch * tasks.bands * tasks.groups, [&](int64_t task) {
    const int64_t image = task / tasks.groups / tasks.bands;
    const Range blocks = part_of(tasks.blocks, tasks.groups, task % tasks.groups);
    const Range band = part_of(p.height, tasks.bands, task / tasks.groups % tasks.bands);
    for (int64_t block = blocks.first; block < blocks.last; ++block) forward_plane<T>(p, image, block, band);
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
  run(tasks.blocks, [&](int64_t block) { pack_weights<accum_t<T>>(conv, block); });
  run(conv.batch * tasks.bands, [&](int64_t task) {
    const int64_t image = task / tasks.bands;
    const Range band = part_of(conv.height, tasks.bands, task % tasks.bands);
    for (int64_t block = 0; block < tasks.blocks; ++block) forward_plane<T>(conv, image, block, band);
    const int64_t first = image * conv.height;
    for (int64_t site = (first + band.first) * conv.width; site < (first + band.last) * conv.width; ++site)
      normalise_site<T>(p, site);
  });
}

// ---- weight gradient ---------------------------------------------------------------------------------------------
// One part's sums for one block of channels: `total` is (K*K + 1, lanes), the last row for the bias.
template <class T>
void weight_grad_part(const DepthwiseConvWeightGrad& p, int64_t part, int64_t block) {
  using A = accum_t<T>;
  const Map map{p.height, p.width, p.channels, p.kernel};
  const int64_t c = block * lanes<A>, n = smaller(lanes<A>, p.channels - c), sums = (p.kernel * p.kernel + 1) * lanes<A>;
  A* total = static_cast<A*>(p.workspace) + (part * ceil_div(p.channels, lanes<A>) + block) * sums;
  for (int64_t i = 0; i < sums; i += lanes<A>) store(total + i, Vec<A>{});
  const Range rows = part_of(p.batch * p.height, p.parts, part);
  for (int64_t image = rows.first / p.height; image * p.height < rows.last; ++image) {
    const int64_t plane = image * p.height * p.width * p.channels + c;
    const Range band = {larger(0, rows.first - image * p.height), smaller(p.height, rows.last - image * p.height)};
    const T* grad = static_cast<const T*>(p.grad) + plane;
    pass_rows(static_cast<const T*>(p.x) + plane, map, band, n, [&](int64_t h, Range strip, TileRows<A>& t) {
      alignas(kVectorBytes) A row[kStrip * lanes<A>];
      read_row(grad + (h * p.width + strip.first) * p.channels, p.channels, strip.last - strip.first, n, row);
      for_each_tile(map, strip, [&](int64_t columns, int64_t first, int side) {
        t.offset = first * lanes<A>;
        tiles_for<A>(p.kernel, side).weight[columns](t, row + first * lanes<A>, lanes<A>, total);
      });
    });
  }
}

// Adds up the parts in order, and turns (K*K + 1, lanes) back into (C, K*K) and (C,).
template <class A>
void add_weight_parts(const DepthwiseConvWeightGrad& p, int64_t block) {
  const int64_t taps = p.kernel * p.kernel, sums = (taps + 1) * lanes<A>, blocks = ceil_div(p.channels, lanes<A>);
  const int64_t c = block * lanes<A>, n = smaller(lanes<A>, p.channels - c);
  A* total = static_cast<A*>(p.workspace) + block * sums;
  for (int64_t part = 1; part < p.parts; ++part)
    for (int64_t i = 0; i < sums; i += lanes<A>) store(total + i, load(total + i) + load(total + part * blocks * sums + i));
  A *weight = static_cast<A*>(p.grad_weight) + c * taps, *bias = static_cast<A*>(p.grad_bias) + c;
  for (int64_t lane = 0; lane < n; ++lane) {
    for (int64_t tap = 0; tap < taps; ++tap) weight[lane * taps + tap] = total[tap * lanes<A> + lane];
    bias[lane] = total[taps * lanes<A> + lane];
  }
}

template <class T>
void weight_grad(const DepthwiseConvWeightGrad& p, const Runner& run) {
  const int64_t blocks = ceil_div(p.channels, lanes<accum_t<T>>);
  run(p.parts * blocks, [&](int64_t task) { weight_grad_part<T>(p, task / blocks, task % blocks); });
  run(blocks, [&](int64_t block) { add_weight_parts<accum_t<T>>(p, block); });
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
