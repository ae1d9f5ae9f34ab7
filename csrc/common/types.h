// Element types that both the kernels and the bindings name. No PyTorch, no CUDA, no intrinsics.
#pragma once
#include <cstdint>

namespace convdit {

enum class DType : int { f32, f64, bf16, f16 };

// Storage only: arithmetic is done in accum_t.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
// float for float, bf16 and f16; double for double. Per-channel parameters are passed to kernels in this type.
template <class T>
using accum_t = typename Accumulate<T>::type;

// f of a value of the element type.
template <class F>
auto dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default: return f(float{});
  }
}

}  // namespace convdit
