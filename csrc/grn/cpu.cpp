// CPU kernels of the global response normalisation: two passes over an image with a small sum over its tiles between.
// The second pass follows closely on the first and goes backwards, so that it finds the image, or its end, in cache.
#include "grn/grn.h"

#include "common/simd.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kCacheBytes = 16 << 20;  // of the last-level cache, what one operator may hope to keep

struct Rows {
  int64_t first, last;
};
Rows rows_of_image(const GrnShape& p, int64_t image) {
  if (p.offsets != nullptr) return {p.offsets[image], p.offsets[image + 1]};
  const int64_t each = p.rows / p.images;
  return {image * each, (image + 1) * each};
}

void number_tiles(const GrnShape& p, int64_t* first_tile) {
  const int64_t tile_rows = grn_tile_rows(p.channels);
  first_tile[0] = 0;
  for (int64_t image = 0; image < p.images; ++image) {
    const Rows r = rows_of_image(p, image);
    first_tile[image + 1] = first_tile[image] + (r.last - r.first + tile_rows - 1) / tile_rows;
  }
}

struct Tile {
  int64_t image, first_row, rows;
};
// The tile of that number among the images first_image ... end_image - 1.
Tile find_tile(const GrnShape& p, const int64_t* first_tile, int64_t number, int64_t first_image, int64_t end_image) {
  while (end_image - first_image > 1) {
    const int64_t middle = (first_image + end_image) / 2;
    (first_tile[middle] <= number ? first_image : end_image) = middle;
  }
  const int64_t tile_rows = grn_tile_rows(p.channels);
  const Rows r = rows_of_image(p, first_image);
  const int64_t first = r.first + (number - first_tile[first_image]) * tile_rows;
  return {first_image, first, r.last - first < tile_rows ? r.last - first : tile_rows};
}

// Runs first(tile, number) on all tiles of an image, then between(image), then second(tile, number). Either one thread
// does all of an image, or all threads share a group of images that fits the cache. Results do not depend on which.
template <class First, class Between, class Second>
void two_passes(const GrnShape& p, const int64_t* first_tile, int64_t row_bytes, const Runner& run, const First& first,
                const Between& between, const Second& second) {
  const int64_t image_bytes = p.rows * row_bytes / p.images;
  if (run.threads == 1 || (p.images >= 2 * run.threads && image_bytes <= kCacheBytes / run.threads)) {
    run(p.images, [&](int64_t image) {
      const int64_t begin = first_tile[image], end = first_tile[image + 1];
      for (int64_t tile = begin; tile < end; ++tile) first(find_tile(p, first_tile, tile, image, image + 1), tile);
      between(image);
      for (int64_t tile = end; tile-- > begin;) second(find_tile(p, first_tile, tile, image, image + 1), tile);
    });
    return;
  }
  const int64_t fitting = image_bytes > 0 ? kCacheBytes / image_bytes : p.images, group = fitting > 0 ? fitting : 1;
  for (int64_t begin = 0; begin < p.images; begin += group) {
    const int64_t end = begin + group < p.images ? begin + group : p.images;
    const int64_t first_of_group = first_tile[begin], tiles = first_tile[end] - first_of_group;
    run(tiles, [&](int64_t i) { first(find_tile(p, first_tile, first_of_group + i, begin, end), first_of_group + i); });
    run(end - begin, [&](int64_t i) { between(begin + i); });
    run(tiles, [&](int64_t i) {
      const int64_t tile = first_of_group + tiles - 1 - i;
      second(find_tile(p, first_tile, tile, begin, end), tile);
    });
  }
}

// Small sums are taken in double, a chunk of channels at a time, so that the compiler can use whole registers.
constexpr int kChunk = 32;

// f(first channel, sums over the tiles in order, n) for each chunk of n channels; `stride` lies between tiles.
template <class A, class F>
void sum_tiles(const A* part, int64_t tiles, int64_t stride, int64_t channels, const F& f) {
  for (int64_t c = 0; c < channels; c += kChunk) {
    const int n = channels - c < kChunk ? static_cast<int>(channels - c) : kChunk;
    double totals[kChunk] = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const A* values = part + tile * stride + c;
      if (n == kChunk) {
        for (int i = 0; i < kChunk; ++i) totals[i] += values[i];
      } else {
        for (int i = 0; i < n; ++i) totals[i] += values[i];
      }
    }
    f(c, totals, n);
  }
}

// A mean over channels, collected chunk by chunk.
struct Mean {
  double totals[kChunk] = {};
  template <class A>
  CONVDIT_INLINE void add(const A* values, int n) {
    if (n == kChunk) {
      for (int i = 0; i < kChunk; ++i) totals[i] += values[i];
    } else {
      for (int i = 0; i < n; ++i) totals[i] += values[i];
    }
  }
  double over(int64_t channels) const {
    double total = 0;
    for (const double t : totals) total += t;
    return total / static_cast<double>(channels);
  }
};

enum class Activation { none, gelu, shifted_gelu };

// x, or x + shift: n values from x[i] on.
template <Activation Act, bool Full, class T>
CONVDIT_INLINE Vec<accum_t<T>> load_shifted(const T* x, const accum_t<T>* shift, int64_t i, int64_t n) {
  auto v = load_lanes<Full>(x + i, n);
  if constexpr (Act == Activation::shifted_gelu) v += load_lanes<Full>(shift + i, n);
  return v;
}
// n values of g.
template <Activation Act, bool Full, class T>
CONVDIT_INLINE Vec<accum_t<T>> activate(const T* x, const accum_t<T>* shift, int64_t i, int64_t n) {
  auto v = load_shifted<Act, Full>(x, shift, i, n);
  if constexpr (Act != Activation::none) v *= normal_cdf(v);
  return v;
}

// f(row, rows, channel, n, full) for each vector of channels of a few rows at a time, and of the last rows one by one: sums
// over rows stay in registers for a few rows, and the processor has independent work. `rows` is a constant: rows.value.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <class A, class F>
CONVDIT_INLINE void for_each_few_rows(int64_t rows, int64_t channels, const F& f) {
  constexpr int kFew = 4;
  int64_t row = 0;
  for (; row + kFew <= rows; row += kFew)
    for_each_vector<A>(channels,
                       [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) { f(row, Constant<kFew>{}, i, n, full); });
  for (; row < rows; ++row)
    for_each_vector<A>(channels,
                       [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) { f(row, Constant<1>{}, i, n, full); });
}

// sums[c] = sum of g^2 over the tile's rows; g itself goes to `kept` where Keep.
template <Activation Act, bool Keep, class T>
void add_squares(const T* x, const accum_t<T>* shift, T* kept, int64_t rows, int64_t channels, accum_t<T>* sums) {
  using A = accum_t<T>;
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for_each_few_rows<A>(rows, channels, [&](int64_t row, auto few, int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    Vec<A> total = load_lanes<kFull>(sums + i, n);
    for (int r = 0; r < few.value; ++r) {
      const int64_t at = (row + r) * channels;
      const Vec<A> g = activate<Act, kFull>(x + at, shift, i, n);
      total += g * g;
      if constexpr (Keep) store_lanes<kFull>(kept + at + i, g, n);
    }
    store_lanes<kFull>(sums + i, total, n);
  });
}

// norm and scale = 1 + weight * N of one image from the sums of its tiles.
template <class A>
void finish_image(const A* sums, int64_t tiles, int64_t channels, A eps, const A* weight, A* norm, A* scale) {
  Mean mean;
  sum_tiles(sums, tiles, channels, channels, [&](int64_t c, const double* squares, int n) __attribute__((always_inline)) {
    for (int i = 0; i < n; ++i) norm[c + i] = static_cast<A>(__builtin_sqrt(squares[i]));
    mean.add(norm + c, n);
  });
  const A divisor = static_cast<A>(mean.over(channels)) + eps;
  for (int64_t c = 0; c < channels; ++c) scale[c] = 1 + weight[c] * (norm[c] / divisor);
}

template <Activation Act, class T>
void apply(const T* x, const accum_t<T>* shift, const accum_t<T>* scale, const accum_t<T>* bias, T* y, int64_t rows, int64_t channels) {
  using A = accum_t<T>;
  for (int64_t row = 0; row < rows; ++row, x += channels, y += channels)
    for_each_vector<A>(channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      const Vec<A> g = activate<Act, kFull>(x, shift, i, n);
      store_lanes<kFull>(y + i, g * load_lanes<kFull>(scale + i, n) + load_lanes<kFull>(bias + i, n), n);
    });
}

// The output may hold a value between the passes where that loses nothing: not where it has fewer digits than the sums.
template <class T>
constexpr bool kHoldsSums = sizeof(T) == sizeof(accum_t<T>);

// Keep: the first pass leaves g in y, and the second, if there is one, multiplies it there.
template <Activation Act, bool Keep, class T>
void forward(const Grn& p, const Runner& run) {
  using A = accum_t<T>;
  const int64_t channels = p.channels;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  A *norm = static_cast<A*>(p.norm), *sums = static_cast<A*>(p.workspace);
  const A *weight = static_cast<const A*>(p.weight), *bias = static_cast<const A*>(p.bias), *shift = static_cast<const A*>(p.shift);
  number_tiles(p, p.first_tile);
  A* scales = p.scale != nullptr ? static_cast<A*>(p.scale) : sums + p.first_tile[p.images] * channels;
  two_passes(
      p, p.first_tile, 2 * channels * static_cast<int64_t>(sizeof(T)), run,
      [&](Tile t, int64_t number) {
        const int64_t at = t.first_row * channels;
        add_squares<Act, Keep>(x + at, shift, y + at, t.rows, channels, sums + number * channels);
      },
      [&](int64_t image) {
        const int64_t tile = p.first_tile[image], at = image * channels;
        finish_image(sums + tile * channels, p.first_tile[image + 1] - tile, channels, static_cast<A>(p.eps), weight, norm + at,
                     scales + at);
      },
      [&](Tile t, int64_t) {
        if (p.scale != nullptr) return;
        const int64_t at = t.first_row * channels;
        const A* scale = scales + t.image * channels;
        if constexpr (Keep) apply<Activation::none>(y + at, shift, scale, bias, y + at, t.rows, channels);
        else apply<Act>(x + at, shift, scale, bias, y + at, t.rows, channels);
      });
}

// sums[0][c] = sum of grad * g, sums[1][c] = sum of grad over the tile's rows; normal_cdf goes to `kept` where Keep.
template <Activation Act, bool Keep, class T>
void add_products(const T* grad, const T* x, const accum_t<T>* shift, T* kept, int64_t rows, int64_t channels, accum_t<T>* sums) {
  using A = accum_t<T>;
  A* plain = sums + channels;
  for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = 0;
  for_each_few_rows<A>(rows, channels, [&](int64_t row, auto few, int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    Vec<A> products = load_lanes<kFull>(sums + i, n), total = load_lanes<kFull>(plain + i, n);
    for (int r = 0; r < few.value; ++r) {
      const int64_t at = (row + r) * channels;
      Vec<A> g = load_shifted<Act, kFull>(x + at, shift, i, n);
      const Vec<A> d = load_lanes<kFull>(grad + at + i, n);
      if constexpr (Act != Activation::none) {
        const Vec<A> cdf = normal_cdf(g);
        if constexpr (Keep) store_lanes<kFull>(kept + at + i, cdf, n);
        g *= cdf;
      }
      products += g * d;
      total += d;
    }
    store_lanes<kFull>(sums + i, products, n);
    store_lanes<kFull>(plain + i, total, n);
  });
}

// One image: the coefficients of grad_g = grad * scale + g * pull, and its share of the parameters' gradients.
template <class A>
struct ImageGradients {
  A *scale, *pull, *weight, *bias;
  ImageGradients(A* base, int64_t image, int64_t channels)
      : scale(base + 4 * image * channels), pull(scale + channels), weight(pull + channels), bias(weight + channels) {}
};

template <class A>
void finish_image_backward(const A* sums, int64_t tiles, int64_t channels, A eps, const A* norm, const A* weight, ImageGradients<A> out) {
  Mean mean_norm, mean_pull;
  for (int64_t c = 0; c < channels; c += kChunk) mean_norm.add(norm + c, channels - c < kChunk ? static_cast<int>(channels - c) : kChunk);
  const A divisor = static_cast<A>(mean_norm.over(channels)) + eps;
  sum_tiles(sums, tiles, 2 * channels, channels, [&](int64_t c, const double* products, int n) __attribute__((always_inline)) {
    double pull[kChunk];
    for (int i = 0; i < n; ++i) {
      const A product = static_cast<A>(products[i]), response = norm[c + i] / divisor;
      pull[i] = static_cast<double>(weight[c + i]) * product * response;
      out.scale[c + i] = 1 + weight[c + i] * response;
      out.pull[c + i] = weight[c + i] * product;
      out.weight[c + i] = product * response;
    }
    mean_pull.add(pull, n);
  });
  sum_tiles(sums + channels, tiles, 2 * channels, channels, [&](int64_t c, const double* grads, int n) __attribute__((always_inline)) {
    for (int i = 0; i < n; ++i) out.bias[c + i] = static_cast<A>(grads[i]);
  });
  // Through N = G / (mean G + eps) to G, and through G = sqrt(sum g^2), whose derivative is g / G, or 0 where G is 0.
  const A back = static_cast<A>(mean_pull.over(channels));
  for (int64_t c = 0; c < channels; ++c) out.pull[c] = norm[c] > 0 ? (out.pull[c] - back) / (divisor * norm[c]) : 0;
}

// The rows of a tile in the second pass. Where Kept, `kept` holds normal_cdf on entry; it may be grad_x or y.
template <Activation Act, bool Kept, class T>
void apply_backward(const GrnBackward& p, Tile tile, const T* kept, const ImageGradients<accum_t<T>>& image, accum_t<T>* sums) {
  using A = accum_t<T>;
  constexpr bool kShifted = Act == Activation::shifted_gelu;
  const int64_t channels = p.channels, start = tile.first_row * channels;
  const T *grad = static_cast<const T*>(p.grad) + start, *x = static_cast<const T*>(p.x) + start;
  const A *shift = static_cast<const A*>(p.shift), *bias = static_cast<const A*>(p.bias);
  T *grad_x = static_cast<T*>(p.grad_x) + start, *y = kShifted ? static_cast<T*>(p.y) + start : nullptr;
  if constexpr (kShifted)
    for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for_each_few_rows<A>(tile.rows, channels, [&](int64_t row, auto few, int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    const Vec<A> scale = load_lanes<kFull>(image.scale + i, n), pull = load_lanes<kFull>(image.pull + i, n);
    Vec<A> total{};
    for (int r = 0; r < few.value; ++r) {
      const int64_t at = (row + r) * channels;
      const Vec<A> v = load_shifted<Act, kFull>(x + at, shift, i, n);
      Vec<A> d = load_lanes<kFull>(grad + at + i, n) * scale;
      if constexpr (Act == Activation::none) {
        d += v * pull;
      } else {
        const Vec<A> cdf = Kept ? load_lanes<kFull>(kept + start + at + i, n) : normal_cdf(v), g = v * cdf;
        d = (d + g * pull) * (cdf + v * normal_pdf(v));
        if constexpr (kShifted) store_lanes<kFull>(y + at + i, g * scale + load_lanes<kFull>(bias + i, n), n), total += d;
      }
      store_lanes<kFull>(grad_x + at + i, d, n);
    }
    if constexpr (kShifted) store_lanes<kFull>(sums + i, load_lanes<kFull>(sums + i, n) + total, n);
  });
}

template <Activation Act, class T>
void backward(const GrnBackward& p, const Runner& run) {
  using A = accum_t<T>;
  constexpr bool kShifted = Act == Activation::shifted_gelu, kKeep = Act != Activation::none && kHoldsSums<T>;
  const int64_t channels = p.channels;
  const T *grad = static_cast<const T*>(p.grad), *x = static_cast<const T*>(p.x);
  T* kept = static_cast<T*>(kShifted ? p.y : p.grad_x);
  const A *norm = static_cast<const A*>(p.norm), *weight = static_cast<const A*>(p.weight), *shift = static_cast<const A*>(p.shift);
  A* sums = static_cast<A*>(p.workspace);
  number_tiles(p, p.first_tile);
  const int64_t tiles = p.first_tile[p.images];
  A* by_image = sums + 2 * tiles * channels;
  two_passes(
      p, p.first_tile, (kShifted ? 4 : 3) * channels * static_cast<int64_t>(sizeof(T)), run,
      [&](Tile t, int64_t number) {
        const int64_t at = t.first_row * channels;
        add_products<Act, kKeep>(grad + at, x + at, shift, kept + at, t.rows, channels, sums + 2 * number * channels);
      },
      [&](int64_t image) {
        const int64_t tile = p.first_tile[image];
        finish_image_backward(sums + 2 * tile * channels, p.first_tile[image + 1] - tile, channels, static_cast<A>(p.eps),
                              norm + image * channels, weight, ImageGradients<A>(by_image, image, channels));
      },
      [&](Tile t, int64_t number) {
        // The first pass' sums have served: their place takes the sums of grad_x.
        apply_backward<Act, kKeep>(p, t, kept, ImageGradients<A>(by_image, t.image, channels), sums + 2 * number * channels);
      });
  // What the parameters' gradients sum up, shared out by channels.
  struct Sum {
    const A* parts;
    int64_t count, stride;
    void* to;
  };
  const Sum totals[] = {{by_image + 2 * channels, p.images, 4 * channels, p.grad_weight},
                        {by_image + 3 * channels, p.images, 4 * channels, p.grad_bias},
                        {sums, tiles, 2 * channels, p.grad_shift}};
  constexpr int64_t kSlice = 8 * kChunk;
  const int64_t slices = (channels + kSlice - 1) / kSlice;
  run((kShifted ? 3 : 2) * slices, [&](int64_t task) {
    const Sum& total = totals[task / slices];
    const int64_t first = task % slices * kSlice, count = channels - first < kSlice ? channels - first : kSlice;
    A* result = static_cast<A*>(total.to) + first;
    sum_tiles(total.parts + first, total.count, total.stride, count, [&](int64_t c, const double* values, int n) {
      for (int i = 0; i < n; ++i) result[c + i] = (p.add ? result[c + i] : 0) + static_cast<A>(values[i]);
    });
  });
}

template <class T>
void forward_of(const Grn& p, const Runner& run) {
  if (!p.gelu) return forward<Activation::none, false, T>(p, run);
  if (p.shift == nullptr) return forward<Activation::gelu, kHoldsSums<T>, T>(p, run);
  if (p.scale != nullptr) return forward<Activation::shifted_gelu, true, T>(p, run);
  return forward<Activation::shifted_gelu, kHoldsSums<T>, T>(p, run);
}
void dispatch_forward(const Grn& p, const Runner& run) {
  dispatch(p.dtype, [&](auto x) { forward_of<decltype(x)>(p, run); });
}
void dispatch_backward(const GrnBackward& p, const Runner& run) {
  dispatch(p.dtype, [&](auto x) {
    using T = decltype(x);
    if (!p.gelu) return backward<Activation::none, T>(p, run);
    return p.shift == nullptr ? backward<Activation::gelu, T>(p, run) : backward<Activation::shifted_gelu, T>(p, run);
  });
}

}  // namespace

extern const GrnKernels grn = {dispatch_forward, dispatch_backward};

}  // namespace convdit::CONVDIT_LEVEL
