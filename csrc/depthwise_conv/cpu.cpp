// CPU kernels of the depthwise convolution and of the LayerNorm after it: what is computed, cut into tasks. planes.h walks a
// map, tiles.h holds the inner loops, layer_norm.h normalises.
#include "depthwise_conv/depthwise_conv.h"

#include "common/simd.h"
#include "common/transpose.h"
#include "depthwise_conv/layer_norm.h"
#include "depthwise_conv/planes.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kBandBytes = 512 * 1024;  // of x that one task passes over for all its channels: stays in the L2 cache

template <class T, class P>
int64_t map_bytes(const P& p) {  // of x and y, or of x and grad
  return 2 * p.batch * p.height * p.width * p.channels * static_cast<int64_t>(sizeof(T));
}

// ---- forward -----------------------------------------------------------------------------------------------------
template <class A>
void pack_weights(const DepthwiseConv& p, int64_t plane) {
  const int64_t taps = p.kernel * p.kernel;
  const Plane c = plane_channels<A>(p.channels, plane);
  pack_taps(static_cast<const A*>(p.weight) + c.first * taps, c.lanes, taps, p.flip, static_cast<A*>(p.packed) + plane * taps * lanes<A>);
}

template <class T>
void forward_plane(const DepthwiseConv& p, int64_t image, int64_t plane, int64_t next, Range band) {
  using A = accum_t<T>;
  const Map map{p.height, p.width, p.channels, p.kernel};
  const Plane c = plane_channels<A>(p.channels, plane);
  const int64_t offset = image * p.height * p.width * p.channels + c.first;
  const A* weight = static_cast<const A*>(p.packed) + plane * p.kernel * p.kernel * lanes<A>;
  const Vec<A> start = p.bias ? load_lanes<false>(static_cast<const A*>(p.bias) + c.first, c.lanes) : Vec<A>{};
  const T* x = static_cast<const T*>(p.x) + offset;
  T* y = static_cast<T*>(p.y) + offset;
  const NextPlane<T> ahead(x, y, map, c, plane_channels<A>(p.channels, next), map_bytes<T>(p));
  pass_rows<true>(x, map, band, c, [&](int64_t h, const Strip<A>& strip, TileRows<A>& rows) {
    alignas(kVectorBytes) A row[kStrip * lanes<A>];
    T* to = y + (h * p.width + strip.first) * p.channels;
    A* out = row;
    int64_t out_step = lanes<A>;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (c.lanes == lanes<A>) out = to, out_step = p.channels;
      if (rows.outputs == 2) {
        for (int64_t r = 0; r < 2; ++r) ahead.fetch(h + r, strip.first, strip.columns);
        return strip.tile[0].kernels->pair[strip.columns](rows, weight, start, out, out_step, p.width * p.channels);
      }
    }
    for (int64_t i = 0; i < strip.tiles; ++i) {
      const auto& tile = strip.tile[i];
      ahead.fetch(h, strip.first + tile.first, tile.columns);
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
  // Not so few that most rows are read for two bands; a LayerNorm wants the band in cache.
  int64_t rows = larger(kBandBytes / row_bytes - p.kernel + 1, split_channels ? 2 * p.kernel : p.kernel);
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
    const Range planes = tasks.planes_of(task % tasks.groups);
    const Range band = part_of(p.height, tasks.bands, task / tasks.groups % tasks.bands);
    for (int64_t plane = planes.first; plane < planes.last; ++plane)
      forward_plane<T>(p, image, plane, smaller(plane + 1, planes.last - 1), band);
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
    for (int64_t plane = 0; plane < tasks.planes; ++plane) forward_plane<T>(conv, image, plane, smaller(plane + 1, tasks.planes - 1), band);
    const int64_t last = (image * conv.height + band.last) * conv.width;
    constexpr int64_t group = lanes<accum_t<T>>;
    for (int64_t site = (image * conv.height + band.first) * conv.width; site < last; site += group)
      normalise_sites<T>(p, site, smaller(group, last - site));
  });
}

// ---- weight gradient ---------------------------------------------------------------------------------------------
// One part's sums for one plane: `total` is (K*K + 1, lanes), the last row for the bias.
template <class T>
void weight_grad_part(const DepthwiseConvWeightGrad& p, int64_t part, int64_t plane, accum_t<T>* total) {
  using A = accum_t<T>;
  const Map map{p.height, p.width, p.channels, p.kernel};
  const Plane c = plane_channels<A>(p.channels, plane);
  const Plane next = plane_channels<A>(p.channels, smaller(plane + 1, plane_count<A>(p.channels) - 1));
  const WeightNarrow<A> narrow =
      p.width <= kMaxPair && p.height <= kMaxNarrowRows ? tiles_for<A>(p.kernel, kAlone).narrow[p.width] : nullptr;
  for (int64_t i = 0; i <= p.kernel * p.kernel; ++i) store(total + i * lanes<A>, Vec<A>{});
  const Range all = part_of(p.batch * p.height, p.parts, part);
  for (int64_t image = all.first / p.height; image * p.height < all.last; ++image) {
    const int64_t offset = image * p.height * p.width * p.channels + c.first;
    const Range band = {larger(0, all.first - image * p.height), smaller(p.height, all.last - image * p.height)};
    const T *grad = static_cast<const T*>(p.grad) + offset, *x = static_cast<const T*>(p.x) + offset;
    if (narrow != nullptr && 2 * (band.last - band.first) > p.height) {  // of fewer rows the copies would take longer than the sums
      alignas(kVectorBytes) A copies[2][kMaxNarrowRows * larger(kMaxPair, 1) * lanes<A>];
      const int64_t size = p.height * p.width * p.channels, first = all.first / p.height;
      read_row(x, p.channels, p.height * p.width, c.lanes, copies[0]);
      read_row(grad + band.first * p.width * p.channels, p.channels, (band.last - band.first) * p.width, c.lanes, copies[1]);
      // The next image, or the next plane of the first one.
      const int64_t to = (image + 1) * p.height < all.last ? size : next.first - c.first - (image - first) * size;
      narrow({copies[0], copies[1], p.height, band.first, band.last, reinterpret_cast<const char*>(x + to),
              reinterpret_cast<const char*>(grad + to), p.channels * static_cast<int64_t>(sizeof(T))},
             total);
      continue;
    }
    const NextPlane<T> ahead(x, grad, map, c, next, map_bytes<T>(p));
    pass_rows<false>(x, map, band, c, [&](int64_t h, const Strip<A>& strip, TileRows<A>& rows) {
      alignas(kVectorBytes) A row[kStrip * lanes<A>];
      const T* from = grad + (h * p.width + strip.first) * p.channels;
      const A* g = row;
      int64_t g_step = lanes<A>;
      bool copy = true;
      if constexpr (sizeof(T) == sizeof(A)) {
        if (c.lanes == lanes<A>) g = from, g_step = p.channels, copy = false;
      }
      if (copy) read_row(from, p.channels, strip.columns, c.lanes, row);
      for (int64_t i = 0; i < strip.tiles; ++i) {
        const auto& tile = strip.tile[i];
        ahead.fetch(h, strip.first + tile.first, tile.columns);
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
  // A task takes planes side by side: each fetches the next one to the cache of its own core.
  const int64_t groups = run.threads == 1 ? 1 : smaller(ceil_div(4 * run.threads, p.parts), planes);
  run(p.parts * groups, [&](int64_t task) {
    const int64_t part = task / groups;
    const Range group = part_of(planes, groups, task % groups);
    for (int64_t plane = group.first; plane < group.last; ++plane)
      weight_grad_part<T>(p, part, plane, static_cast<A*>(p.workspace) + (part * planes + plane) * sums);
  });
  run(planes, [&](int64_t plane) { add_weight_parts<A>(p, plane); });
}

// ---- backward of the LayerNorm -----------------------------------------------------------------------------------
template <class T>
void layer_norm_backward(const LayerNormBackward& p, const Runner& run) {
  using A = accum_t<T>;
  run(p.parts, [&](int64_t part) {
    A* sums = static_cast<A*>(p.workspace) + part * 2 * p.channels;
    layer_norm_backward_part<T>(p, part_of(p.rows, p.parts, part), sums, sums + p.channels);
  });
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
