// CPU kernels of the adaptive LayerNorm. A row of D stays in the first-level cache, so mean and variance are taken in two
// passes (right for inputs with a large mean) and each tensor is read from memory once.
#include "adaln/adaln.h"

#include "common/simd.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kRowsPerTask = 16;

template <class T>
void row_statistics(const T* x, int64_t width, accum_t<T> eps, accum_t<T>* mean, accum_t<T>* rstd) {
  using A = accum_t<T>;
  const A mu = sum_vectors<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
                 return load_lanes<decltype(full)::value>(x + i, n);
               }) / static_cast<A>(width);
  // The second pass also sums the deviations themselves: what rounding left out of the mean.
  Vec<A> deviation[2] = {};
  int u = 0;
  const A squares = sum_vectors<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
    Vec<A> d = load_lanes<decltype(full)::value>(x + i, n) - mu;
    if constexpr (!decltype(full)::value)
      for (int64_t lane = n; lane < lanes<A>; ++lane) d[lane] = 0;
    deviation[u] += d;
    u ^= 1;
    return d * d;
  });
  const A shift = sum(deviation[0] + deviation[1]) / static_cast<A>(width);
  const A variance = squares / static_cast<A>(width) - shift * shift;
  *mean = mu + shift;
  *rstd = 1 / static_cast<A>(__builtin_sqrt((variance > 0 ? variance : 0) + eps));
}

template <class T, class Y>
void forward_rows(const Adaln& p, int64_t first, int64_t last) {
  using A = accum_t<T>;
  const int64_t width = p.width;
  for (int64_t row = first; row < last; ++row) {
    const int64_t parameters = row / p.tokens * width;
    const T* residual = static_cast<const T*>(p.x) + row * width;
    if (p.y != nullptr) {
      const T* x = residual;
      T* sum_row = static_cast<T*>(p.residual) + row * width;
      const Y* y = static_cast<const Y*>(p.y) + row * width;
      const A* gate = static_cast<const A*>(p.gate) + parameters;
      for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        store_lanes<kFull>(sum_row + i, load_lanes<kFull>(x + i, n) + load_lanes<kFull>(gate + i, n) * load_lanes<kFull>(y + i, n), n);
      });
      residual = sum_row;
    }
    if (p.out == nullptr) continue;
    A *mean = static_cast<A*>(p.mean) + row, *rstd = static_cast<A*>(p.rstd) + row;
    row_statistics(residual, width, static_cast<A>(p.eps), mean, rstd);
    const Vec<A> mu = splat(*mean), r = splat(*rstd);
    const A *shift = static_cast<const A*>(p.shift) + parameters, *scale = static_cast<const A*>(p.scale) + parameters;
    T* out = static_cast<T*>(p.out) + row * width;
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      const Vec<A> normalised = (load_lanes<kFull>(residual + i, n) - mu) * r;
      store_lanes<kFull>(out + i, normalised * (1 + load_lanes<kFull>(scale + i, n)) + load_lanes<kFull>(shift + i, n), n);
    });
  }
}

// One chunk of rows of one sample: the row gradients, and this chunk's share of the sums over T.
template <class T, class Y>
void backward_chunk(const AdalnBackward& p, int64_t sample, int64_t chunk, accum_t<T>* sums) {
  using A = accum_t<T>;
  const int64_t width = p.width, last = (chunk + 1) * kAdalnChunk < p.tokens ? (chunk + 1) * kAdalnChunk : p.tokens;
  A *gate_sum = sums, *shift_sum = sums + width, *scale_sum = sums + 2 * width;
  for (int64_t i = 0; i < 3 * width; ++i) sums[i] = 0;
  const A* gate = static_cast<const A*>(p.gate) + sample * width;
  const A* scale = static_cast<const A*>(p.scale) + sample * width;
  for (int64_t token = chunk * kAdalnChunk; token < last; ++token) {
    const int64_t row = sample * p.tokens + token;
    const T* grad_residual = p.grad_residual ? static_cast<const T*>(p.grad_residual) + row * width : nullptr;
    const T* grad_out = p.grad_out ? static_cast<const T*>(p.grad_out) + row * width : nullptr;
    const T* residual = static_cast<const T*>(p.residual) + row * width;
    T* grad_x = p.grad_x ? static_cast<T*>(p.grad_x) + row * width : nullptr;
    const Y* y = p.y ? static_cast<const Y*>(p.y) + row * width : nullptr;
    Y* grad_y = p.y ? static_cast<Y*>(p.grad_y) + row * width : nullptr;
    Vec<A> mu{}, r{}, mean_g{}, mean_gn{};
    if (grad_out) {
      mu = splat(static_cast<const A*>(p.mean)[row]);
      r = splat(static_cast<const A*>(p.rstd)[row]);
      // With n the normalised row and g = grad_out * (1 + scale): grad = rstd * (g - mean(g) - n * mean(g * n)).
      Vec<A> total_gn[2] = {};
      int u = 0;
      const A total_g = sum_vectors<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        const Vec<A> g = rounded(load_lanes<kFull>(grad_out + i, n) * (1 + load_lanes<kFull>(scale + i, n)));
        total_gn[u] += g * ((load_lanes<kFull>(residual + i, n) - mu) * r);
        u ^= 1;
        return g;
      });
      mean_g = splat(total_g / static_cast<A>(width));
      mean_gn = splat(sum(total_gn[0] + total_gn[1]) / static_cast<A>(width));
    }
    for_each_vector<A>(width, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      Vec<A> grad = grad_residual ? load_lanes<kFull>(grad_residual + i, n) : Vec<A>{};
      if (grad_out) {
        const Vec<A> d = load_lanes<kFull>(grad_out + i, n), norm = (load_lanes<kFull>(residual + i, n) - mu) * r;
        const Vec<A> g = rounded(d * (1 + load_lanes<kFull>(scale + i, n)));
        store_lanes<kFull>(shift_sum + i, load_lanes<kFull>(shift_sum + i, n) + d, n);
        store_lanes<kFull>(scale_sum + i, load_lanes<kFull>(scale_sum + i, n) + d * norm, n);
        grad += r * (g - mean_g - norm * mean_gn);
      }
      if (grad_x) store_lanes<kFull>(grad_x + i, grad, n);
      if (y) {
        store_lanes<kFull>(gate_sum + i, load_lanes<kFull>(gate_sum + i, n) + grad * load_lanes<kFull>(y + i, n), n);
        store_lanes<kFull>(grad_y + i, grad * load_lanes<kFull>(gate + i, n), n);
      }
    });
  }
}

template <class T, class Y>
void forward(const Adaln& p, const Runner& run) {
  const int64_t rows = p.batch * p.tokens;
  run((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t first = task * kRowsPerTask, end = first + kRowsPerTask;
    forward_rows<T, Y>(p, first, end < rows ? end : rows);
  });
}

template <class T, class Y>
void backward(const AdalnBackward& p, const Runner& run) {
  using A = accum_t<T>;
  const int64_t width = p.width, chunks = (p.tokens + kAdalnChunk - 1) / kAdalnChunk;
  A* workspace = static_cast<A*>(p.workspace);
  run(p.batch * chunks, [&](int64_t task) {
    backward_chunk<T, Y>(p, task / chunks, task % chunks, workspace + task * 3 * width);
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
void dispatch(const Params& p, const F& f) {
  switch (p.dtype) {
    case DType::f64: return f(double{}, double{});
    case DType::bf16: return f(bf16{}, bf16{});
    case DType::f16: return f(f16{}, f16{});
    case DType::f32:
      if (p.branch_dtype == DType::bf16) return f(float{}, bf16{});
      if (p.branch_dtype == DType::f16) return f(float{}, f16{});
      return f(float{}, float{});
  }
}

void dispatch_forward(const Adaln& p, const Runner& run) {
  dispatch(p, [&](auto x, auto y) { forward<decltype(x), decltype(y)>(p, run); });
}
void dispatch_backward(const AdalnBackward& p, const Runner& run) {
  dispatch(p, [&](auto x, auto y) { backward<decltype(x), decltype(y)>(p, run); });
}

}  // namespace

extern const AdalnKernels adaln = {dispatch_forward, dispatch_backward};

}  // namespace convdit::CONVDIT_LEVEL
