// CPU kernels of the tanh form of GELU; see gelu_tanh.h. The logistic form takes one exponential and one division, and
// keeps its digits where 1 + tanh would cancel.
#include "gelu_tanh/gelu_tanh.h"

#include <type_traits>

#include "common/simd.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kElementsPerTask = 32768;
constexpr double kSlope = 1.5957691216057307117597842397375;  // 2 sqrt(2/pi)
constexpr double kCube = kSlope * 0.044715;
constexpr double kFlat = 10;  // beyond, the derivative is 0 or 1 to the last digit of a float; within, e^-2u is finite

// f(element, column, n, full) for each vector of each row. Without a bias there are no columns, and a task is one row.
template <class A, class Params, class F>
void for_all(const Params& p, const Runner& run, const F& f) {
  const int64_t width = p.bias != nullptr ? p.width : kElementsPerTask;
  const int64_t each = width < kElementsPerTask ? kElementsPerTask / width * width : width;  // a task's elements: whole rows
  run((p.count + each - 1) / each, [&](int64_t task) {
    const int64_t first = task * each, last = first + each < p.count ? first + each : p.count;
    for (int64_t row = first; row < last; row += width)
      for_each_vector<A>(row + width < last ? width : last - row,
                         [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) { f(row + i, i, n, full); });
  });
}

// B: the bias's type, void where there is none.
template <class B, class T>
void forward(const GeluTanh& p, const Runner& run) {
  using A = accum_t<T>;
  const T* x = static_cast<const T*>(p.x);
  const B* bias = static_cast<const B*>(p.bias);
  T* y = static_cast<T*>(p.y);
  for_all<A>(p, run, [&](int64_t at, int64_t column, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    Vec<A> v = load_lanes<kFull>(x + at, n);
    if constexpr (!std::is_void_v<B>) v += load_lanes<kFull>(bias + column, n);
    const Vec<A> e = exp(-v * (static_cast<A>(kSlope) + static_cast<A>(kCube) * (v * v)));
    store_lanes<kFull>(y + at, v / (1 + e), n);
  });
}

template <class B, class T>
void backward(const GeluTanhBackward& p, const Runner& run) {
  using A = accum_t<T>;
  const T *grad = static_cast<const T*>(p.grad), *x = static_cast<const T*>(p.x);
  const B* bias = static_cast<const B*>(p.bias);
  T* grad_x = static_cast<T*>(p.grad_x);
  for_all<A>(p, run, [&](int64_t at, int64_t column, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    Vec<A> v = load_lanes<kFull>(x + at, n);
    if constexpr (!std::is_void_v<B>) v += load_lanes<kFull>(bias + column, n);
    v = vmin(splat(static_cast<A>(kFlat)), vmax(splat(static_cast<A>(-kFlat)), v));  // in this order a NaN stays one
    const Vec<A> square = v * v, e = exp(-v * (static_cast<A>(kSlope) + static_cast<A>(kCube) * square)), s = 1 / (1 + e);
    const Vec<A> slope = static_cast<A>(kSlope) + 3 * static_cast<A>(kCube) * square;
    store_lanes<kFull>(grad_x + at, load_lanes<kFull>(grad + at, n) * (s + v * slope * (s * (e * s))), n);
  });
}

// f(bias, x), of their types: the bias comes in the accumulate dtype or, `narrow`, in x's.
template <class Params, class F>
void dispatch_both(const Params& p, const F& f) {
  dispatch(p.dtype, [&](auto x) {
    using T = decltype(x);
    if (p.bias == nullptr) f(std::type_identity<void>{}, x);
    else if (sizeof(T) == 2 && p.narrow_bias) f(std::type_identity<T>{}, x);
    else f(std::type_identity<accum_t<T>>{}, x);
  });
}
void dispatch_forward(const GeluTanh& p, const Runner& run) {
  dispatch_both(p, [&](auto bias, auto x) { forward<typename decltype(bias)::type, decltype(x)>(p, run); });
}
void dispatch_backward(const GeluTanhBackward& p, const Runner& run) {
  dispatch_both(p, [&](auto bias, auto x) { backward<typename decltype(bias)::type, decltype(x)>(p, run); });
}

}  // namespace

extern const GeluTanhKernels gelu_tanh = {dispatch_forward, dispatch_backward};

}  // namespace convdit::CONVDIT_LEVEL
