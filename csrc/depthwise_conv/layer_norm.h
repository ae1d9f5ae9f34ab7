// The LayerNorm of sites over their channels, forward and backward, as many sites at a time as a vector has lanes: a site's sum
// over its channels is a vector, and a square of such vectors is turned once and added up, where one site alone would wait
// for its lanes to be added one after another.
#pragma once
#include "common/simd.h"
#include "common/transpose.h"
#include "depthwise_conv/depthwise_conv.h"
#include "depthwise_conv/planes.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Lane i of the result is the sum of the lanes of rows[i].
template <class A>
CONVDIT_INLINE Vec<A> sum_each(Vec<A>* rows) {
  transpose<A>(rows);
  for (int step = 1; step < lanes<A>; step *= 2)
    for (int i = 0; i < lanes<A>; i += 2 * step) rows[i] += rows[i + step];
  return rows[0];
}

CONVDIT_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
CONVDIT_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// 1 in the first n lanes, 0 in the others.
template <class A>
CONVDIT_INLINE Vec<A> first_lanes(int64_t n) {
  Vec<A> v{};
  for (int i = 0; i < lanes<A>; ++i) v[i] = i < n ? 1 : 0;
  return v;
}

// Normalises `count` sites, at most lanes<A>, from the site `first` on.
template <class T>
void normalise_sites(const DepthwiseConvLayerNorm& p, int64_t first, int64_t count) {
  using A = accum_t<T>;
  const int64_t channels = p.conv.channels;
  const T* y = static_cast<const T*>(p.conv.y) + first * channels;
  const Vec<A> tail = first_lanes<A>(channels % lanes<A>);
  Vec<A> sums[lanes<A>] = {};
  for (int64_t s = 0; s < count; ++s)
    for_each_vector<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      sums[s] += load_lanes<decltype(full)::value>(y + s * channels + i, n);
    });
  const Vec<A> mean = sum_each<A>(sums) / static_cast<A>(channels);
  for (int64_t s = 0; s < lanes<A>; ++s) sums[s] = Vec<A>{};
  for (int64_t s = 0; s < count; ++s)
    for_each_vector<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      Vec<A> d = load_lanes<kFull>(y + s * channels + i, n) - mean[s];
      if constexpr (!kFull) d *= tail;
      sums[s] += d * d;
    });
  Vec<A> rstd = sum_each<A>(sums) / static_cast<A>(channels) + static_cast<A>(p.eps);
  for (int i = 0; i < lanes<A>; ++i) rstd[i] = 1 / square_root(rstd[i]);
  if (p.mean) {
    store_lanes<false>(static_cast<A*>(p.mean) + first, mean, count);
    store_lanes<false>(static_cast<A*>(p.rstd) + first, rstd, count);
  }
  const A *weight = static_cast<const A*>(p.ln_weight), *bias = static_cast<const A*>(p.ln_bias);
  T* out = static_cast<T*>(p.out) + first * channels;
  for (int64_t s = 0; s < count; ++s)
    for_each_vector<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      const Vec<A> normalised = (load_lanes<kFull>(y + s * channels + i, n) - mean[s]) * rstd[s];
      store_lanes<kFull>(out + s * channels + i, normalised * load_lanes<kFull>(weight + i, n) + load_lanes<kFull>(bias + i, n), n);
    });
}

// The gradients of one part of the sites, and its share of those of weight and bias: `weight_sum` and `bias_sum`, (C,).
template <class T>
void layer_norm_backward_part(const LayerNormBackward& p, Range rows, accum_t<T>* weight_sum, accum_t<T>* bias_sum) {
  using A = accum_t<T>;
  const int64_t channels = p.channels;
  const A* weight = static_cast<const A*>(p.weight);
  for (int64_t i = 0; i < channels; ++i) weight_sum[i] = bias_sum[i] = 0;
  for (int64_t first = rows.first; first < rows.last; first += lanes<A>) {
    const int64_t count = smaller(lanes<A>, rows.last - first);
    const Vec<A> mean = load_lanes<false>(static_cast<const A*>(p.mean) + first, count);
    const Vec<A> rstd = load_lanes<false>(static_cast<const A*>(p.rstd) + first, count);
    const T *grad = static_cast<const T*>(p.grad) + first * channels, *x = static_cast<const T*>(p.x) + first * channels;
    T* grad_x = static_cast<T*>(p.grad_x) + first * channels;
    // With n the normalised site and g = grad * weight: grad_x = rstd * (g - mean(g) - n * mean(g * n)).
    Vec<A> sums_g[lanes<A>] = {}, sums_gn[lanes<A>] = {};
    for (int64_t s = 0; s < count; ++s)
      for_each_vector<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        const Vec<A> g = load_lanes<kFull>(grad + s * channels + i, n) * load_lanes<kFull>(weight + i, n);
        sums_g[s] += g;
        sums_gn[s] += g * ((load_lanes<kFull>(x + s * channels + i, n) - mean[s]) * rstd[s]);
      });
    const Vec<A> mean_g = sum_each<A>(sums_g) / static_cast<A>(channels), mean_gn = sum_each<A>(sums_gn) / static_cast<A>(channels);
    // A few sites share one load and store of the sums over sites.
    constexpr int64_t few = 4;
    for (int64_t s0 = 0; s0 < count; s0 += few)
      for_each_vector<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        const Vec<A> w = load_lanes<kFull>(weight + i, n);
        Vec<A> weight_total = load_lanes<kFull>(weight_sum + i, n), bias_total = load_lanes<kFull>(bias_sum + i, n);
        for (int64_t s = s0; s < smaller(s0 + few, count); ++s) {
          const Vec<A> d = load_lanes<kFull>(grad + s * channels + i, n);
          const Vec<A> normalised = (load_lanes<kFull>(x + s * channels + i, n) - mean[s]) * rstd[s];
          weight_total += d * normalised;
          bias_total += d;
          store_lanes<kFull>(grad_x + s * channels + i, rstd[s] * (d * w - mean_g[s] - normalised * mean_gn[s]), n);
        }
        store_lanes<kFull>(weight_sum + i, weight_total, n);
        store_lanes<kFull>(bias_sum + i, bias_total, n);
      });
  }
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
