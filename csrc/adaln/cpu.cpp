// CPU kernels of the adaptive LayerNorm. Each tensor is read from memory once: a few rows at a time stay in the first-level
// cache for the passes over them. Results too large for the last-level cache are streamed past it, which saves reading
// their lines before they are overwritten.
#include "adaln/adaln.h"

#include "common/simd.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Rows of one sample that are worked on together: what they share (parameters, sums over T) is loaded and stored once.
constexpr int kRows = kVectorRegisters == 32 ? 4 : 2;
constexpr int64_t kRowsPerTask = 16;
// Elements of the first-level cache that keep the residual rows where the residual itself is streamed.
constexpr int64_t kScratch = 8192;

template <bool Stream, bool Full, class T>
CONVDIT_INLINE void write_lanes(T* p, Vec<accum_t<T>> v, int64_t n) {
  if constexpr (Stream && Full) stream(p, v);
  else store_lanes<Full>(p, v, n);
}

// v as it is read back after a store as T.
template <class T>
CONVDIT_INLINE Vec<accum_t<T>> as_stored(Vec<accum_t<T>> v) {
  if constexpr (sizeof(T) == 2) return widen(narrow(v, T{}), T{});
  else return v;
}

// Whether to stream two results (or one and null): with what is read for them, `tensors` for each result in all, they take
// more than half of the last-level cache, and each row starts at a whole vector.
template <class T>
bool too_large(const void* a, const void* b, int64_t rows, int64_t width, int64_t tensors) {
  const auto address = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  const int64_t bytes = (a && b ? 2 : 1) * rows * width * static_cast<int64_t>(sizeof(T));
  return address % kVectorBytes == 0 && width % lanes<accum_t<T>> == 0 && tensors * bytes > cache_bytes() / 2;
}

template <class T>
CONVDIT_INLINE T* advance(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

// The gate comes as A, or as T where it is `narrow`: converting it beforehand takes as long as a short call.
template <bool Full, class T>
CONVDIT_INLINE Vec<accum_t<T>> load_gate(const void* gate, bool narrow, int64_t at, int64_t n) {
  if constexpr (sizeof(T) == 2) {
    if (narrow) return load_lanes<Full>(static_cast<const T*>(gate) + at, n);
  }
  return load_lanes<Full>(static_cast<const accum_t<T>*>(gate) + at, n);
}

// Sums of R rows' values and of their squares.
template <int R, class A>
struct Moments {
  Vec<A> sums[R] = {}, squares[R] = {};
  CONVDIT_INLINE void add(int r, Vec<A> v) {
    sums[r] += v;
    squares[r] += v * v;
  }
};

// Mean and 1/sqrt(variance + eps) of a row: of its values in `moments`, unless that would lose digits because the mean is far
// larger than the deviation; then from a second pass over the deviations from it.
template <class T, class A = accum_t<T>>
CONVDIT_INLINE void row_statistics(const T* x, int64_t width, A eps, Vec<A> sums, Vec<A> squares, A* mean, A* rstd) {
  A average = sum(sums) / static_cast<A>(width), variance = sum(squares) / static_cast<A>(width) - average * average;
  if (!(average * average <= 4 * variance)) {  // two bits lost at most, infinities and NaN set aside
    Moments<1, A> deviations;
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      Vec<A> d = load_lanes<decltype(full)::value>(x + i, n) - average;
      if constexpr (!decltype(full)::value)
        for (int64_t lane = n; lane < lanes<A>; ++lane) d[lane] = 0;
      deviations.add(0, d);
    });
    const A rest = sum(deviations.sums[0]) / static_cast<A>(width);
    average += rest;
    variance = sum(deviations.squares[0]) / static_cast<A>(width) - rest * rest;
  }
  *mean = average;
  *rstd = 1 / static_cast<A>(__builtin_sqrt((variance > 0 ? variance : 0) + eps));
}

// R rows of one sample.
template <int R, bool Stream, class T, class Y>
void forward_rows(const Adaln& p, int64_t row) {
  using A = accum_t<T>;
  const int64_t width = p.width, parameters = row / p.tokens * width;
  alignas(kVectorBytes) T scratch[Stream ? kScratch : 1];
  const T* residual = static_cast<const T*>(p.x) + row * width;
  Moments<R, A> moments;
  if (p.y != nullptr) {
    const bool keep = Stream && p.out != nullptr;
    T* sum_rows = static_cast<T*>(p.residual) + row * width;
    const Y* y = static_cast<const Y*>(p.y) + row * width;
    for (int r = 0; r < R; ++r) {  // row after row: memory is quickest in one piece
      const int64_t at = r * width;
      for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        const Vec<A> v =
            as_stored<T>(load_lanes<kFull>(residual + at + i, n) +
                         load_gate<kFull, T>(p.gate, p.narrow_gate, parameters + i, n) * load_lanes<kFull>(y + at + i, n));
        write_lanes<Stream, kFull>(sum_rows + at + i, v, n);
        if (keep) store_lanes<kFull>(scratch + at + i, v, n);
        moments.add(r, v);
      });
    }
    residual = keep ? scratch : sum_rows;
  } else {
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      for (int r = 0; r < R; ++r) moments.add(r, load_lanes<decltype(full)::value>(residual + r * width + i, n));
    });
  }
  if (p.out == nullptr) return;
  A *means = static_cast<A*>(p.mean) + row, *rstds = static_cast<A*>(p.rstd) + row;
  Vec<A> mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    row_statistics<T>(residual + r * width, width, static_cast<A>(p.eps), moments.sums[r], moments.squares[r], means + r, rstds + r);
    mean[r] = splat(means[r]), rstd[r] = splat(rstds[r]);
  }
  const A *shift = static_cast<const A*>(p.shift) + parameters, *scale = static_cast<const A*>(p.scale) + parameters;
  T* out = static_cast<T*>(p.out) + row * width;
  for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    const Vec<A> factor = 1 + load_lanes<kFull>(scale + i, n), offset = load_lanes<kFull>(shift + i, n);
    for (int r = 0; r < R; ++r) {
      const Vec<A> normalised = (load_lanes<kFull>(residual + r * width + i, n) - mean[r]) * rstd[r];
      write_lanes<Stream, kFull>(out + r * width + i, normalised * factor + offset, n);
      if (Stream && p.y == nullptr) __builtin_prefetch(residual + (R + r) * width + i, 0, 3);  // the next rows
    }
  });
}

// R rows of one sample: their gradients, and what they add to the sums over T. `Norm`: there is a gradient of out;
// `Gated`: there is a branch.
template <int R, bool Norm, bool Gated, bool Stream, class T, class Y>
void backward_rows(const AdalnBackward& p, int64_t row, accum_t<T>* sums) {
  using A = accum_t<T>;
  constexpr int kNear = Stream ? 2 : 3;  // prefetch into the second-level cache: what comes from memory is long in coming
  const int64_t width = p.width, first = row * width, parameters = row / p.tokens * width;
  A *gate_sum = sums, *shift_sum = sums + width, *scale_sum = sums + 2 * width;
  const A* scale = advance(static_cast<const A*>(p.scale), parameters);
  const T* grad_residual = advance(static_cast<const T*>(p.grad_residual), first);
  const T* grad_out = advance(static_cast<const T*>(p.grad_out), first);
  const T* residual = advance(static_cast<const T*>(p.residual), first);
  const Y* y = advance(static_cast<const Y*>(p.y), first);
  T* grad_x = advance(static_cast<T*>(p.grad_x), first);
  Y* grad_y = advance(static_cast<Y*>(p.grad_y), first);
  Vec<A> mean[R], rstd[R], mean_g[R] = {}, mean_gn[R] = {};
  if constexpr (Norm) {
    // With n the normalised row and g = grad_out * (1 + scale): grad = rstd * (g - mean(g) - n * mean(g * n)).
    for (int r = 0; r < R; ++r)
      mean[r] = splat(static_cast<const A*>(p.mean)[row + r]), rstd[r] = splat(static_cast<const A*>(p.rstd)[row + r]);
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      const Vec<A> factor = 1 + load_lanes<kFull>(scale + i, n);
      for (int r = 0; r < R; ++r) {
        const Vec<A> g = rounded(load_lanes<kFull>(grad_out + r * width + i, n) * factor);
        mean_g[r] += g;
        mean_gn[r] += g * ((load_lanes<kFull>(residual + r * width + i, n) - mean[r]) * rstd[r]);
        if constexpr (Gated) __builtin_prefetch(grad_residual + r * width + i, 0, kNear), __builtin_prefetch(y + r * width + i, 0, kNear);
      }
    });
    for (int r = 0; r < R; ++r) {
      mean_g[r] = splat(sum(mean_g[r]) / static_cast<A>(width));
      mean_gn[r] = splat(sum(mean_gn[r]) / static_cast<A>(width));
    }
  }
  for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    Vec<A> factor, shifts, scales, weight, gates;
    if constexpr (Norm) {
      factor = 1 + load_lanes<kFull>(scale + i, n);
      shifts = load_lanes<kFull>(shift_sum + i, n), scales = load_lanes<kFull>(scale_sum + i, n);
    }
    if constexpr (Gated) weight = load_gate<kFull, T>(p.gate, p.narrow_gate, parameters + i, n), gates = load_lanes<kFull>(gate_sum + i, n);
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * width + i;
      Vec<A> grad = {};
      if constexpr (Gated) grad = load_lanes<kFull>(grad_residual + at, n);
      if constexpr (Norm) {
        const Vec<A> d = rounded(load_lanes<kFull>(grad_out + at, n));  // so that GCC does not load it once a use
        const Vec<A> normalised = (load_lanes<kFull>(residual + at, n) - mean[r]) * rstd[r];
        shifts += d;
        scales += d * normalised;
        grad += rstd[r] * (rounded(d * factor) - mean_g[r] - normalised * mean_gn[r]);
        write_lanes<Stream, kFull>(grad_x + at, grad, n);
        __builtin_prefetch(grad_out + R * width + at, 0, kNear);
        __builtin_prefetch(residual + R * width + at, 0, kNear);
      }
      if constexpr (Gated) {
        gates += grad * load_lanes<kFull>(y + at, n);
        write_lanes<Stream, kFull>(grad_y + at, grad * weight, n);
      }
    }
    if constexpr (Norm) store_lanes<kFull>(shift_sum + i, shifts, n), store_lanes<kFull>(scale_sum + i, scales, n);
    if constexpr (Gated) store_lanes<kFull>(gate_sum + i, gates, n);
  });
}

template <int R>
struct Rows {
  static constexpr int value = R;
};

// Calls rows(first, Rows<R>) for the rows from first to last, kRows at a time where there are as many.
template <int R = kRows, class F>
void in_groups(int64_t first, int64_t last, const F& rows) {
  for (; first + R <= last; first += R) rows(first, Rows<R>{});
  for (; first < last; ++first) rows(first, Rows<1>{});
}

template <bool Stream, class T, class Y>
void forward(const Adaln& p, const Runner& run) {
  const int64_t parts = (p.tokens + kRowsPerTask - 1) / kRowsPerTask;
  run(p.batch * parts, [&](int64_t task) {
    const int64_t end = (task / parts + 1) * p.tokens, first = task / parts * p.tokens + task % parts * kRowsPerTask;
    in_groups(first, first + kRowsPerTask < end ? first + kRowsPerTask : end,
              [&](int64_t row, auto rows) { forward_rows<decltype(rows)::value, Stream, T, Y>(p, row); });
    if (Stream) stream_fence();
  });
}

template <bool Norm, bool Gated, bool Stream, class T, class Y>
void backward(const AdalnBackward& p, const Runner& run) {
  using A = accum_t<T>;
  const int64_t width = p.width, chunks = (p.tokens + kAdalnChunk - 1) / kAdalnChunk;
  A* workspace = static_cast<A*>(p.workspace);
  run(p.batch * chunks, [&](int64_t task) {
    const int64_t end = (task / chunks + 1) * p.tokens, first = task / chunks * p.tokens + task % chunks * kAdalnChunk;
    A* sums = workspace + task * 3 * width;
    for (int64_t i = 0; i < 3 * width; ++i) sums[i] = 0;
    // Without a norm the rows are read once, and one after the other: memory is quickest in one piece.
    in_groups<Norm ? kRows : 1>(first, first + kAdalnChunk < end ? first + kAdalnChunk : end, [&](int64_t row, auto rows) {
      backward_rows<decltype(rows)::value, Norm, Gated, Stream, T, Y>(p, row, sums);
    });
    if (Stream) stream_fence();
  });
  void* const totals[3] = {p.grad_gate, p.grad_shift, p.grad_scale};
  run(p.batch, [&](int64_t sample) {
    for (int k = 0; k < 3; ++k) {
      if (totals[k] == nullptr) continue;
      A* total = static_cast<A*>(totals[k]) + sample * width;
      for (int64_t i = 0; i < width; ++i) total[i] = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const A* part = workspace + ((sample * chunks + chunk) * 3 + k) * width;
        for (int64_t i = 0; i < width; ++i) total[i] += part[i];
      }
    }
  });
}

// x and the branch have one dtype, or a float32 x takes a branch of halves.
template <class Params, class F>
void dispatch_both(const Params& p, const F& f) {
  if (p.dtype == DType::f32 && p.branch_dtype == DType::bf16) return f(float{}, bf16{});
  if (p.dtype == DType::f32 && p.branch_dtype == DType::f16) return f(float{}, f16{});
  dispatch(p.dtype, [&](auto x) { f(x, x); });
}

void dispatch_forward(const Adaln& p, const Runner& run) {
  dispatch_both(p, [&](auto x, auto y) {
    using T = decltype(x);
    using Y = decltype(y);
    const bool fits = p.y == nullptr || p.out == nullptr || kRows * p.width <= kScratch;
    if (fits && too_large<T>(p.y ? p.residual : nullptr, p.out, p.batch * p.tokens, p.width, 2)) forward<true, T, Y>(p, run);
    else forward<false, T, Y>(p, run);
  });
}

template <bool Stream, class T, class Y>
void backward_of(const AdalnBackward& p, const Runner& run) {
  if (p.grad_out == nullptr) backward<false, true, Stream, T, Y>(p, run);
  else if (p.y == nullptr) backward<true, false, Stream, T, Y>(p, run);
  else backward<true, true, Stream, T, Y>(p, run);
}
void dispatch_backward(const AdalnBackward& p, const Runner& run) {
  dispatch_both(p, [&](auto x, auto y) {
    using T = decltype(x);
    using Y = decltype(y);
    if (too_large<T>(p.grad_x, p.grad_y, p.batch * p.tokens, p.width, 3)) backward_of<true, T, Y>(p, run);
    else backward_of<false, T, Y>(p, run);
  });
}

}  // namespace

extern const AdalnKernels adaln = {dispatch_forward, dispatch_backward};

}  // namespace convdit::CONVDIT_LEVEL
