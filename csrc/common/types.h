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

}  // namespace convdit
