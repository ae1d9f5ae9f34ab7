// CPU kernels of the fused ConvNeXt V2 block; see convnext_block.h. All three are bound by memory.
#include "convnext_block/convnext_block.h"

#include "common/simd.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kElementsPerTask = 32768;

// f(first row, end row) for tasks of whole rows.
template <class F>
void for_rows(int64_t rows, int64_t width, const Runner& run, const F& f) {
  const int64_t fitting = kElementsPerTask / (width > 0 ? width : 1), each = fitting > 0 ? fitting : 1;
  run((rows + each - 1) / each, [&](int64_t task) {
    const int64_t first = task * each;
    f(first, first + each < rows ? first + each : rows);
  });
}

template <class T>
void fold_scale(const FoldScale& p, const Runner& run) {
  using A = accum_t<T>;
  const A* scale = static_cast<const A*>(p.scale);
  for_rows(p.outputs, p.inputs, run, [&](int64_t first, int64_t end) {
    const T* weight = static_cast<const T*>(p.weight) + first * p.inputs;
    T* folded = static_cast<T*>(p.folded) + first * p.inputs;
    for (int64_t row = first; row < end; ++row, weight += p.inputs, folded += p.inputs)
      for_each_vector<A>(p.inputs, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        store_lanes<kFull>(folded + i, load_lanes<kFull>(weight + i, n) * load_lanes<kFull>(scale + i, n), n);
      });
  });
}

template <class T>
void fold_bias(const FoldBias& p, const Runner& run) {
  using A = accum_t<T>;
  const A *vector = static_cast<const A*>(p.vector), *bias = static_cast<const A*>(p.bias);
  A* folded = static_cast<A*>(p.folded);
  for_rows(p.outputs, p.inputs, run, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const T* weight = static_cast<const T*>(p.weight) + row * p.inputs;
      const A product = sum_vectors<A>(p.inputs, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        return load_lanes<kFull>(weight + i, n) * load_lanes<kFull>(vector + i, n);
      });
      folded[row] = product + (bias != nullptr ? bias[row] : 0);
    }
  });
}

template <class X, class T>
void add_residual(const AddResidual& p, const Runner& run) {
  using A = accum_t<X>;
  const A* bias = static_cast<const A*>(p.bias);
  for_rows(p.rows, p.channels, run, [&](int64_t first, int64_t end) {
    const X* x = static_cast<const X*>(p.x) + first * p.channels;
    const T* product = static_cast<const T*>(p.product) + first * p.channels;
    X* out = static_cast<X*>(p.out) + first * p.channels;
    for (int64_t row = first; row < end; ++row, x += p.channels, product += p.channels, out += p.channels)
      for_each_vector<A>(p.channels, [&](int64_t i, int64_t n, auto full) __attribute__((always_inline)) {
        constexpr bool kFull = decltype(full)::value;
        Vec<A> sum = load_lanes<kFull>(product + i, n);
        if (bias != nullptr) sum += load_lanes<kFull>(bias + i, n);
        store_lanes<kFull>(out + i, load_lanes<kFull>(x + i, n) + sum, n);
      });
  });
}

void dispatch_fold_scale(const FoldScale& p, const Runner& run) {
  dispatch(p.dtype, [&](auto t) { fold_scale<decltype(t)>(p, run); });
}
void dispatch_fold_bias(const FoldBias& p, const Runner& run) {
  dispatch(p.dtype, [&](auto t) { fold_bias<decltype(t)>(p, run); });
}
// x and the branch have one dtype, or one is float32 and the other of halves.
void dispatch_add_residual(const AddResidual& p, const Runner& run) {
  dispatch(p.dtype, [&](auto x) {
    using X = decltype(x);
    if (p.dtype == p.branch_dtype) return add_residual<X, X>(p, run);
    if constexpr (sizeof(X) == 2) return add_residual<X, float>(p, run);
    if constexpr (sizeof(X) == 4)
      return p.branch_dtype == DType::bf16 ? add_residual<float, bf16>(p, run) : add_residual<float, f16>(p, run);
  });
}

}  // namespace

extern const ConvnextBlockKernels convnext_block = {dispatch_fold_scale, dispatch_fold_bias, dispatch_add_residual};

}  // namespace convdit::CONVDIT_LEVEL
