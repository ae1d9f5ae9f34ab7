// CPU kernels of the depthwise convolution and of the LayerNorm after it: what is computed, cut into tasks. planes.h walks a
// map, tiles.h holds the inner loops, layer_norm.h normalises.
#include "depthwise_conv/depthwise_conv.h"

#include "common/simd.h"
#include "common/transpose.h"
#include "depthwise_conv/layer_norm.h"
#include "depthwise_conv/planes.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Of x, in one band of rows that is passed over for all its channels: with y, and the next band that is fetched meanwhile, it
// stays in the second-level cache.
constexpr int64_t kBandBytes = 300 * 1024;
constexpr int64_t kNearBytes = 1 << 20;  // arrays smaller than this stay there: nothing is fetched ahead

template <class P>
Map map_of(const P& p) {
  return {p.height, p.width, p.channels, p.kernel};
}

// ---- forward -----------------------------------------------------------------------------------------------------
template <class A>
void pack_weights(const DepthwiseConv& p, int64_t plane) {
  const int64_t taps = p.kernel * p.kernel;
  const Plane c = plane_channels<A>(p.channels, plane);
  pack_taps(static_cast<const A*>(p.weight) + c.first * taps, c.lanes, taps, p.flip, static_cast<A*>(p.packed) + plane * taps * lanes<A>);
}

template <class T>
void forward_plane(const DepthwiseConv& p, const Band& band, int64_t plane, Ahead& next_x, Ahead& next_y) {
  using A = accum_t<T>;
  const Map map = map_of(p);
  const Plane c = plane_channels<A>(p.channels, plane);
  const int64_t offset = band.image * p.height * p.width * p.channels + c.first;
  const A* weight = static_cast<const A*>(p.packed) + plane * p.kernel * p.kernel * lanes<A>;
  const Vec<A> start = p.bias ? load_lanes<false>(static_cast<const A*>(p.bias) + c.first, c.lanes) : Vec<A>{};
  const T* x = static_cast<const T*>(p.x) + offset;
  T* y = static_cast<T*>(p.y) + offset;
  pass_rows<true>(x, map, band.rows, c, [&](int64_t h, const Strip<A>& strip, TileRows<A>& rows) {
    alignas(kVectorBytes) A row[kStrip * lanes<A>];
    T* to = y + (h * p.width + strip.first) * p.channels;
    A* out = row;
    int64_t out_step = lanes<A>;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (c.lanes == lanes<A>) out = to, out_step = p.channels;
      if (rows.outputs == 2) {
        rows.ahead = {next_x.take(2), next_y.take(2)};
        return strip.tile[0].kernels->pair[strip.columns](rows, weight, start, out, out_step, p.width * p.channels);
      }
    }
    for (int64_t i = 0; i < strip.tiles; ++i) {
      const auto& tile = strip.tile[i];
      rows.ahead = {next_x.take(), next_y.take()};
      rows.offset = tile.first * rows.step;
      tile.kernels->forward[tile.columns](rows, weight, start, out + tile.first * out_step, out_step);
    }
    if (out == row) write_row(row, p.channels, strip.columns, c.lanes, to);
  });
}

// How the forward is cut: bands of rows, and groups of planes where bands are few or wide. The planes that overlap are in one
// group: no two threads write the same value.
template <class T>
class ForwardParts {
  using A = accum_t<T>;

 public:
  int64_t bands, groups;  // of all images; of each band

  ForwardParts(const DepthwiseConv& p, const Runner& run, bool split_channels)
      : p_(p), map_(map_of(p)), planes_(plane_count<A>(p.channels)), apart_(larger(1, p.channels / lanes<A>)) {
    const int64_t wanted = run.threads > 1 ? 4 * run.threads : 1, row_bytes = p.width * p.channels * static_cast<int64_t>(sizeof(T));
    // Not so few that most rows are read for two bands; a LayerNorm wants the band in cache.
    int64_t rows = larger(kBandBytes / row_bytes - p.kernel + 1, split_channels ? 2 * p.kernel : p.kernel);
    if (!split_channels) rows = smaller(rows, larger(1, p.batch * p.height / wanted));
    rows = smaller(rows, p.height);
    per_image_ = ceil_div(p.height, rows), bands = p.batch * per_image_;
    groups = smaller(apart_, larger(ceil_div(rows * row_bytes, kBandBytes), split_channels ? ceil_div(wanted, bands) : 1));
    fetch_ = 2 * p.batch * p.height * row_bytes > kNearBytes;
    run(planes_, [&](int64_t plane) { pack_weights<A>(p_, plane); });
  }

  Band band_of(int64_t part) const {
    const int64_t band = part / groups;
    return {band / per_image_, part_of(p_.height, per_image_, band % per_image_)};
  }
  // Convolves part `part` of bands * groups, and fetches the part that this thread takes next, as far as one can tell.
  void convolve(int64_t part, int64_t next) const {
    const Band band = band_of(part);
    const Range planes = planes_of(part);
    Ahead next_x, next_y;
    if (fetch_ && next < bands * groups) {
      const int64_t steps = (band.rows.last - band.rows.first) * (planes.last - planes.first) * row_tiles(map_);
      next_x = band_ahead<T>(p_.x, map_, band_of(next), planes_of(next), p_.kernel / 2, steps);
      next_y = band_ahead<T>(p_.y, map_, band_of(next), planes_of(next), 0, steps);
    }
    for (int64_t plane = planes.first; plane < planes.last; ++plane) forward_plane<T>(p_, band, plane, next_x, next_y);
  }

 private:
  Range planes_of(int64_t part) const {
    const Range r = part_of(apart_, groups, part % groups);
    return {r.first, r.last == apart_ ? planes_ : r.last};
  }

  const DepthwiseConv& p_;
  const Map map_;
  int64_t planes_, apart_, per_image_;
  bool fetch_;
};

template <class T>
void forward(const DepthwiseConv& p, const Runner& run) {
  const ForwardParts<T> parts(p, run, true);
  run(parts.bands * parts.groups, [&](int64_t part) { parts.convolve(part, part + run.threads); });
}

template <class T>
void forward_layer_norm(const DepthwiseConvLayerNorm& p, const Runner& run) {
  const DepthwiseConv& conv = p.conv;
  const ForwardParts<T> parts(conv, run, false);
  run(parts.bands, [&](int64_t task) {
    const int64_t first = task * parts.groups, end = first + parts.groups;
    for (int64_t part = first; part < end; ++part) parts.convolve(part, part + 1 < end ? part + 1 : first + run.threads * parts.groups);
    const Band band = parts.band_of(first);
    const int64_t last = (band.image * conv.height + band.rows.last) * conv.width;
    constexpr int64_t group = lanes<accum_t<T>>;
    for (int64_t site = (band.image * conv.height + band.rows.first) * conv.width; site < last; site += group)
      normalise_sites<T>(p, site, smaller(group, last - site));
  });
}

// ---- weight gradient ---------------------------------------------------------------------------------------------
// Adds the sums of one band for one plane to `total`, (K*K + 1, lanes), the last row for the bias.
template <class T>
void weight_grad_plane(const DepthwiseConvWeightGrad& p, const Band& band, int64_t plane, accum_t<T>* total, Ahead& next_x,
                       Ahead& next_grad) {
  using A = accum_t<T>;
  const Map map = map_of(p);
  const Plane c = plane_channels<A>(p.channels, plane);
  const int64_t rows = band.rows.last - band.rows.first, tiles = row_tiles(map);
  const WeightNarrow<A> narrow =
      p.width <= kMaxPair && p.height <= kMaxNarrowRows ? tiles_for<A>(p.kernel, kAlone).narrow[p.width] : nullptr;
  const int64_t offset = band.image * p.height * p.width * p.channels + c.first;
  const T *grad = static_cast<const T*>(p.grad) + offset, *x = static_cast<const T*>(p.x) + offset;
  if (narrow != nullptr && 2 * rows > p.height) {  // of fewer rows the copies would take longer than the sums
    alignas(kVectorBytes) A copies[2][kMaxNarrowRows * larger(kMaxPair, 1) * lanes<A>];
    read_row(x, p.channels, p.height * p.width, c.lanes, copies[0]);
    read_row(grad + band.rows.first * p.width * p.channels, p.channels, rows * p.width, c.lanes, copies[1]);
    for (int64_t k = 0; k < p.kernel; ++k) {
      const Range part = part_of(rows * tiles, p.kernel, k);
      const Fetch ahead{next_x.take(part.last - part.first), next_grad.take(part.last - part.first)};
      narrow({copies[0], copies[1], p.height, band.rows, ahead}, k, total);
    }
    return;
  }
  pass_rows<false>(x, map, band.rows, c, [&](int64_t h, const Strip<A>& strip, TileRows<A>& rows) {
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
      rows.ahead = {next_x.take(), next_grad.take()};
      rows.offset = tile.first * rows.step;
      tile.kernels->weight[tile.columns](rows, g + tile.first * g_step, g_step, total);
    }
  });
}

// The sums of one part, (planes, K*K + 1, lanes), band by band of `rows` rows. `next`: the part that this thread takes next, as far as
// one can tell, and its planes; it is fetched towards the end.
template <class T>
void weight_grad_part(const DepthwiseConvWeightGrad& p, int64_t part, int64_t rows, Range planes, int64_t next_part, Range next_planes,
                      accum_t<T>* totals) {
  using A = accum_t<T>;
  const Map map = map_of(p);
  const int64_t sums = (p.kernel * p.kernel + 1) * lanes<A>;
  const bool fetch = 2 * p.batch * p.height * p.width * p.channels * static_cast<int64_t>(sizeof(T)) > kNearBytes;
  const Range all = part_of(p.batch * p.height, p.parts, part);
  const auto band_at = [&](int64_t row, int64_t end) -> Band {
    const int64_t image = row / p.height, first = row - image * p.height;
    return {image, {first, smaller(smaller(p.height, first + rows), end - image * p.height)}};
  };
  for (int64_t i = planes.first * sums; i < planes.last * sums; i += lanes<A>) store(totals + i, Vec<A>{});
  for (int64_t row = all.first; row < all.last;) {
    const Band band = band_at(row, all.last);
    row += band.rows.last - band.rows.first;
    Ahead next_x, next_grad;
    const bool goes_on = row < all.last;
    if (fetch && (goes_on || next_part < p.parts)) {
      const Band next = band_at(goes_on ? row : part_of(p.batch * p.height, p.parts, next_part).first, p.batch * p.height);
      const Range of = goes_on ? planes : next_planes;
      const int64_t steps = (band.rows.last - band.rows.first) * (planes.last - planes.first) * row_tiles(map);
      next_x = band_ahead<T>(p.x, map, next, of, p.kernel / 2, steps), next_grad = band_ahead<T>(p.grad, map, next, of, 0, steps);
    }
    for (int64_t plane = planes.first; plane < planes.last; ++plane)
      weight_grad_plane<T>(p, band, plane, totals + plane * sums, next_x, next_grad);
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
  const int64_t row_bytes = 2 * p.width * p.channels * static_cast<int64_t>(sizeof(T)), rows = larger(kBandBytes / row_bytes, p.kernel);
  const int64_t wanted = run.threads > 1 ? 4 * run.threads : 1;
  const int64_t groups = smaller(planes, larger(ceil_div(wanted, p.parts), ceil_div(smaller(rows, p.height) * row_bytes, kBandBytes)));
  run(p.parts * groups, [&](int64_t task) {
    const int64_t part = task / groups, next = task + run.threads;
    weight_grad_part<T>(p, part, rows, part_of(planes, groups, task % groups), next / groups, part_of(planes, groups, next % groups),
                        static_cast<A*>(p.workspace) + part * planes * sums);
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
