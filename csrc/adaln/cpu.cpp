// CPU kernels of the adaptive LayerNorm. Each tensor is read from memory once: a few rows at a time stay in the first-level
// cache for the passes over them. Results too large for the last-level cache are streamed past it, which saves reading
// their lines before they are overwritten.
#include "adaln/adaln.h"

#include "common/simd.h"
#include "common/unroll.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Rows that the forward works on together: parameters are loaded once. Not more: memory is quickest in one piece.
constexpr int kRows = 2;
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

// Whether to stream two results (or one and null): the tensors read and written, `tensors` in all, take more than `cache`, and
// each row starts at a whole vector.
template <class T>
bool too_large(const void* a, const void* b, int64_t values, int64_t width, int64_t tensors, int64_t cache) {
  const auto address = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return address % kVectorBytes == 0 && width % lanes<accum_t<T>> == 0 && tensors * values * static_cast<int64_t>(sizeof(T)) > cache;
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

// R rows of one sample. `Norm`: there is an out.
template <int R, bool Norm, bool Stream, class T, class Y>
void forward_rows(const Adaln& p, int64_t row) {
  using A = accum_t<T>;
  const int64_t width = p.width, parameters = row / p.tokens * width;
  alignas(kVectorBytes) T scratch[Norm && Stream ? kScratch : 1];
  const T* residual = static_cast<const T*>(p.x) + row * width;
  Moments<R, A> moments;
  if (p.y != nullptr) {
    T* sum_rows = static_cast<T*>(p.residual) + row * width;
    const Y* y = static_cast<const Y*>(p.y) + row * width;
    const void* gate = p.gate;
    const bool narrow_gate = p.narrow_gate;  // a copy, which no store can change
    for (int r = 0; r < R; ++r) {            // row after row: memory is quickest in one piece
      const int64_t at = r * width;
      for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT {
        constexpr bool kFull = decltype(full)::value;
        Vec<A> v = load_lanes<kFull>(residual + at + i, n) +
                   load_gate<kFull, T>(gate, narrow_gate, parameters + i, n) * load_lanes<kFull>(y + at + i, n);
        if constexpr (Norm) v = as_stored<T>(v);
        write_lanes<Stream, kFull>(sum_rows + at + i, v, n);
        if constexpr (Norm && Stream) store_lanes<kFull>(scratch + at + i, v, n);
        if constexpr (Norm) moments.add(r, v);
      });
    }
    residual = Norm && Stream ? scratch : sum_rows;
  } else {
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT {
      for (int r = 0; r < R; ++r) moments.add(r, load_lanes<decltype(full)::value>(residual + r * width + i, n));
    });
  }
  if constexpr (Norm) {
    A unkept[2][R];
    A* const means = p.mean != nullptr ? static_cast<A*>(p.mean) + row : unkept[0];
    A* const rstds = p.mean != nullptr ? static_cast<A*>(p.rstd) + row : unkept[1];
    Vec<A> mean[R], rstd[R];
    for (int r = 0; r < R; ++r) {
      row_statistics<T>(residual + r * width, width, static_cast<A>(p.eps), moments.sums[r], moments.squares[r], means + r, rstds + r);
      mean[r] = splat(means[r]), rstd[r] = splat(rstds[r]);
    }
    const bool prefetch = Stream && p.y == nullptr;
    const A *shift = static_cast<const A*>(p.shift) + parameters, *scale = static_cast<const A*>(p.scale) + parameters;
    T* out = static_cast<T*>(p.out) + row * width;
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT {
      constexpr bool kFull = decltype(full)::value;
      const Vec<A> factor = 1 + load_lanes<kFull>(scale + i, n), offset = load_lanes<kFull>(shift + i, n);
      for (int r = 0; r < R; ++r) {
        const Vec<A> normalised = (load_lanes<kFull>(residual + r * width + i, n) - mean[r]) * rstd[r];
        write_lanes<Stream, kFull>(out + r * width + i, normalised * factor + offset, n);
        if (prefetch) __builtin_prefetch(residual + (R + r) * width + i, 0, 3);  // the next rows
      }
    });
  }
}

// Rows of one sample: their gradients, and what they add to the sums over T. `Norm`: there is a gradient of out; `Gated`: there
// is a branch. The sums that a row's gradients need are taken while those of the row before it are written, so that
// memory is read all the time.
template <bool Norm, bool Gated, bool Stream, class T, class Y>
void backward_rows(const AdalnBackward& p, int64_t row, int64_t end, accum_t<T>* sums) {
  using A = accum_t<T>;
  constexpr int64_t kAhead = 3072 / sizeof(T);  // elements, fetched into the second-level cache
  const int64_t width = p.width, parameters = row / p.tokens * width;
  A *gate_sum = sums, *shift_sum = sums + width, *scale_sum = sums + 2 * width;
  const A* scale = Norm ? static_cast<const A*>(p.scale) + parameters : nullptr;
  const T *grad_residual = static_cast<const T*>(p.grad_residual), *grad_out = static_cast<const T*>(p.grad_out);
  const T* residual = static_cast<const T*>(p.residual);
  const Y* y = static_cast<const Y*>(p.y);
  T* grad_x = static_cast<T*>(p.grad_x);
  Y* grad_y = static_cast<Y*>(p.grad_y);
  const void* gate = p.gate;
  const bool narrow_gate = p.narrow_gate;  // a copy, which no store can change

  // With n the normalised row and g = grad_out * (1 + scale): grad = rstd * (g - mean(g) - n * mean(g * n)).
  struct Row {
    Vec<A> mean, rstd, g, gn;  // sums of g and g * n, then their means
  };
  const auto start = [&](int64_t row) CONVDIT_FLAT {
    return Row{splat(static_cast<const A*>(p.mean)[row]), splat(static_cast<const A*>(p.rstd)[row]), {}, {}};
  };
  const auto add = [&](Row& of, int64_t at, int64_t i, int64_t n, auto full) CONVDIT_FLAT {
    constexpr bool kFull = decltype(full)::value;
    const Vec<A> g = rounded(load_lanes<kFull>(grad_out + at, n) * (1 + load_lanes<kFull>(scale + i, n)));
    of.g += g;
    of.gn += g * ((load_lanes<kFull>(residual + at, n) - of.mean) * of.rstd);
  };
  const auto write = [&](const Row& of, int64_t at, int64_t i, int64_t n, auto full) CONVDIT_FLAT {
    constexpr bool kFull = decltype(full)::value;
    Vec<A> grad = {};
    if constexpr (Gated) grad = load_lanes<kFull>(grad_residual + at, n);
    if constexpr (Norm) {
      const Vec<A> d = rounded(load_lanes<kFull>(grad_out + at, n));  // so that GCC does not load it once a use
      const Vec<A> normalised = (load_lanes<kFull>(residual + at, n) - of.mean) * of.rstd;
      store_lanes<kFull>(shift_sum + i, load_lanes<kFull>(shift_sum + i, n) + d, n);
      store_lanes<kFull>(scale_sum + i, load_lanes<kFull>(scale_sum + i, n) + d * normalised, n);
      grad += of.rstd * (rounded(d * (1 + load_lanes<kFull>(scale + i, n))) - of.g - normalised * of.gn);
      write_lanes<Stream, kFull>(grad_x + at, grad, n);
    }
    if constexpr (Gated) {
      store_lanes<kFull>(gate_sum + i, load_lanes<kFull>(gate_sum + i, n) + grad * load_lanes<kFull>(y + at, n), n);
      write_lanes<Stream, kFull>(grad_y + at, grad * load_gate<kFull, T>(gate, narrow_gate, parameters + i, n), n);
    }
  };

  Row next = {};
  if constexpr (Norm) {
    next = start(row);
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT { add(next, row * width + i, i, n, full); });
  }
  for (; row < end; ++row) {
    const int64_t first = row * width;
    const Row of = {next.mean, next.rstd, splat(sum(next.g) / static_cast<A>(width)), splat(sum(next.gn) / static_cast<A>(width))};
    if (!Norm || row + 1 == end) {
      for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT { write(of, first + i, i, n, full); });
      continue;
    }
    next = start(row + 1);
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT {
      const int64_t at = first + i, below = at + width, ahead = below + kAhead;
      write(of, at, i, n, full);
      add(next, below, i, n, full);
      __builtin_prefetch(grad_out + ahead, 0, 2), __builtin_prefetch(residual + ahead, 0, 2);
      if constexpr (Gated) __builtin_prefetch(grad_residual + ahead, 0, 2), __builtin_prefetch(y + ahead, 0, 2);
    });
  }
}

template <bool Norm, bool Stream, class T, class Y>
void forward(const Adaln& p, const Runner& run) {
  const int64_t parts = ceil_div(p.tokens, kRowsPerTask);
  run(p.batch * parts, [&](int64_t task) {
    int64_t row = task / parts * p.tokens + task % parts * kRowsPerTask;
    const int64_t end = smaller(row + kRowsPerTask, (task / parts + 1) * p.tokens);
    for (; row + kRows <= end; row += kRows) forward_rows<kRows, Norm, Stream, T, Y>(p, row);
    for (; row < end; ++row) forward_rows<1, Norm, Stream, T, Y>(p, row);
    if (Stream) stream_fence();
  });
}

template <class To>
void copy_row(const accum_t<To>* from, To* to, int64_t width) {
  for_each_vector<accum_t<To>>(width, [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT {
    store_lanes<decltype(full)::value>(to + i, load_lanes<decltype(full)::value>(from + i, n), n);
  });
}

template <bool Norm, bool Gated, bool Stream, class T, class Y>
void backward(const AdalnBackward& p, const Runner& run) {
  using A = accum_t<T>;
  const int64_t width = p.width, chunks = ceil_div(p.tokens, kAdalnChunk);
  A* workspace = static_cast<A*>(p.workspace);
  run(p.batch * chunks, [&](int64_t task) {
    const int64_t first = task / chunks * p.tokens + task % chunks * kAdalnChunk;
    A* sums = workspace + task * 3 * width;
    for (int64_t i = 0; i < 3 * width; ++i) sums[i] = 0;
    backward_rows<Norm, Gated, Stream, T, Y>(p, first, smaller(first + kAdalnChunk, (task / chunks + 1) * p.tokens), sums);
    if (Stream) stream_fence();
  });
  void* const totals[3] = {p.grad_gate, p.grad_shift, p.grad_scale};
  run(p.batch, [&](int64_t sample) {
    for (int k = 0; k < 3; ++k) {
      if (totals[k] == nullptr) continue;
      A* sum = workspace + (sample * chunks * 3 + k) * width;
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < width; ++i) sum[i] += sum[chunk * 3 * width + i];
      if (k == 0 && p.narrow_gate) copy_row(sum, static_cast<T*>(totals[k]) + sample * width, width);
      else copy_row(sum, static_cast<A*>(totals[k]) + sample * width, width);
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

template <bool Stream, class T, class Y>
void forward_of(const Adaln& p, const Runner& run) {
  if (p.out == nullptr) forward<false, Stream, T, Y>(p, run);
  else forward<true, Stream, T, Y>(p, run);
}
void dispatch_forward(const Adaln& p, const Runner& run) {
  dispatch_both(p, [&](auto x, auto y) {
    using T = decltype(x);
    using Y = decltype(y);
    // Plain stores are quicker up to there, and leave the results to the next reader: by a fifth on a Xeon, for (8, 256, 384).
    const bool both = p.y && p.out, fits = !both || kRows * p.width <= kScratch;
    const int64_t tensors = both ? 4 : p.y ? 3 : 2, cache = (both ? 1 : 2) * cache_bytes();
    if (fits && too_large<T>(p.y ? p.residual : nullptr, p.out, p.batch * p.tokens * p.width, p.width, tensors, cache))
      forward_of<true, T, Y>(p, run);
    else forward_of<false, T, Y>(p, run);
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
    // From half of the cache on, since the stores between, those of the sums, make the plain ones slower than the forward's.
    const int64_t tensors = (p.grad_x ? 3 : 0) + (p.grad_y ? 3 : 0);
    if (too_large<T>(p.grad_x, p.grad_y, p.batch * p.tokens * p.width, p.width, tensors, cache_bytes() / 2))
      backward_of<true, T, Y>(p, run);
    else backward_of<false, T, Y>(p, run);
  });
}

}  // namespace

extern const AdalnKernels adaln = {dispatch_forward, dispatch_backward};

}  // namespace convdit::CONVDIT_LEVEL
