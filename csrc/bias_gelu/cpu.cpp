// One pass, a few rows a task.
#include "bias_gelu/bias_gelu.h"

#include "common/simd.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kTaskBytes = 1 << 16;

// v/2 (1 + tanh(u)) with u = sqrt(2/pi) (v + 0.044715 v^3), written as v / (1 + e^-2u): one exp, and nothing cancels.
template <class A>
CONVDIT_INLINE Vec<A> gelu_tanh(Vec<A> v) {
  const A cubic = static_cast<A>(-2 * 0.79788456080286535588 * 0.044715), linear = static_cast<A>(-2 * 0.79788456080286535588);
  const A one = 1;
  return v / (exp(v * (v * v * cubic + linear)) + one);
}

template <class T>
void forward(const BiasGelu& p, const Runner& run) {
  using A = accum_t<T>;
  T* const x = static_cast<T*>(p.x);
  const A* const bias = static_cast<const A*>(p.bias);
  const int64_t row_bytes = p.columns * static_cast<int64_t>(sizeof(T)), fitting = kTaskBytes / (row_bytes > 0 ? row_bytes : 1);
  const int64_t each = fitting > 0 ? fitting : 1;
  run((p.rows + each - 1) / each, [&](int64_t task) {
    const int64_t first = task * each, end = p.rows - first < each ? p.rows : first + each;
    for (int64_t row = first; row < end; ++row) {
      T* const values = x + row * p.columns;
      for_each_vector<A>(p.columns, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        store_lanes<kFull>(values + i, gelu_tanh<A>(load_lanes<kFull>(values + i, n) + load_lanes<kFull>(bias + i, n)), n);
      });
    }
  });
}

void dispatch(const BiasGelu& p, const Runner& run) {
  switch (p.dtype) {
    case DType::f32: return forward<float>(p, run);
    case DType::f64: return forward<double>(p, run);
    case DType::bf16: return forward<bf16>(p, run);
    case DType::f16: return forward<f16>(p, run);
  }
}

}  // namespace

extern const BiasGeluKernels bias_gelu = {dispatch};

}  // namespace convdit::CONVDIT_LEVEL
