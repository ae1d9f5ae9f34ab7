// Matrices in the memory of tensors, and scratch for several of them. What the fused blocks (convnext_block, adaln_zero_attention) work on:
// a tensor of its own for each step would cost as much as a small step.
#pragma once
#include <utility>

#include "common/checks.h"
#include "common/layout.h"

namespace convdit {

// A matrix in a tensor's memory, in elements. It is made a tensor only for PyTorch's product: that takes as long as a tiny product.
struct Matrix {
  Tensor memory;
  int64_t rows, columns, row_stride, column_stride, offset = 0;

  // Without gaps.
  Matrix(const Tensor& memory, int64_t rows, int64_t columns, int64_t offset = 0)
      : memory(memory), rows(rows), columns(columns), row_stride(columns), column_stride(1), offset(offset) {}
  explicit Matrix(const Tensor& t) : Matrix(t, t.size(0), t.size(1)) { row_stride = t.stride(0), column_stride = t.stride(1); }

  Matrix transposed() const {
    Matrix t = *this;
    std::swap(t.rows, t.columns), std::swap(t.row_stride, t.column_stride);
    return t;
  }
  Matrix row_range(int64_t first, int64_t count) const {
    Matrix t = *this;
    t.rows = count, t.offset += first * row_stride;
    return t;
  }
  Matrix column_range(int64_t first, int64_t count) const { return transposed().row_range(first, count).transposed(); }
  // Unknown to autograd, which would forbid writing to it.
  Tensor tensor() const { return view_of(memory, {rows, columns}, {row_stride, column_stride}, offset); }
  Tensor row(int64_t i) const { return view_of(memory, {columns}, {column_stride}, offset + i * row_stride); }
  const void* values() const { return static_cast<const char*>(memory.const_data_ptr()) + offset * memory.element_size(); }
  void* place() const { return static_cast<char*>(memory.mutable_data_ptr()) + offset * memory.element_size(); }
};

// Arrays of one dtype in one allocation. Several threads may each have a copy of them.
struct Scratch : Layout {
  std::optional<Tensor> memory;
  int64_t base = 0;  // of the copy

  void allocate(ScalarType dtype, const Tensor& like, int64_t copies = 1) { memory = convdit::allocate({copies * size}, dtype, like); }
  void take_copy(int64_t i) { base = i * size; }
  Matrix matrix(int64_t at, int64_t rows, int64_t columns) const { return {*memory, rows, columns, base + at}; }
  void* place(int64_t at) const { return matrix(at, 0, 0).place(); }
};

// What a kernel needs for itself: from the stack where it is little, since a call on a few values costs little else.
template <int64_t Few>
class Workspace {
 public:
  Workspace(int64_t floats, const Tensor& like) {
    if (floats > Few) large_ = allocate({floats}, ScalarType::Float, like);
  }
  float* place() { return large_ ? large_->mutable_data_ptr<float>() : few_; }

 private:
  alignas(64) float few_[Few];
  std::optional<Tensor> large_;
};

}  // namespace convdit
