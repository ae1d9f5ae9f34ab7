// Matrices in the memory of tensors on a CPU, and scratch for several of them. What the fused blocks (convnext_block,
// adaln_zero_attention) work on: a tensor of its own for each step would cost as much as a small step.
#pragma once
#include <utility>

#include "common/checks.h"
#include "common/layout.h"

namespace convdit {

// A matrix in memory that something else keeps; strides are in elements. It is made a tensor only for PyTorch's product: that takes as
// long as a tiny product.
struct Matrix {
  char* first;
  ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride;

  // Without gaps.
  Matrix(void* memory, ScalarType dtype, int64_t rows, int64_t columns)
      : first(static_cast<char*>(memory)), dtype(dtype), rows(rows), columns(columns), row_stride(columns), column_stride(1) {}
  Matrix(const Tensor& t, int64_t rows, int64_t columns) : Matrix(const_cast<void*>(t.const_data_ptr()), t.scalar_type(), rows, columns) {}
  explicit Matrix(const Tensor& t) : Matrix(t, t.size(0), t.size(1)) { row_stride = t.stride(0), column_stride = t.stride(1); }

  Matrix transposed() const {
    Matrix t = *this;
    std::swap(t.rows, t.columns), std::swap(t.row_stride, t.column_stride);
    return t;
  }
  Matrix row_range(int64_t begin, int64_t count) const {
    Matrix t = *this;
    t.rows = count, t.first += begin * row_stride * bytes_of(dtype);
    return t;
  }
  Matrix column_range(int64_t begin, int64_t count) const { return transposed().row_range(begin, count).transposed(); }
  // Unknown to autograd, which would forbid writing to it.
  Tensor tensor() const { return tensor_at<2>({rows, columns}, {row_stride, column_stride}); }
  Tensor first_row() const { return tensor_at<1>({columns}, {column_stride}); }
  const void* values() const { return first; }
  void* place() const { return first; }

 private:
  template <size_t N>
  Tensor tensor_at(const int64_t (&sizes)[N], const int64_t (&strides)[N]) const {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_create_tensor_from_blob(first, N, sizes, strides, 0, shim_dtype(dtype), aoti_torch_device_type_cpu(), -1, &handle));
    return Tensor(handle);
  }
};

// Arrays of one dtype in one allocation. Several threads may each have a copy of them.
struct Scratch : Layout {
  std::optional<Workspace<>> memory;
  char* first = nullptr;
  ScalarType dtype = ScalarType::Float;

  Scratch() = default;
  Scratch(const Scratch& owner) : Layout(owner), first(owner.first), dtype(owner.dtype) {}  // the memory stays the owner's

  void allocate(ScalarType type, const Tensor& like, int64_t copies = 1) {
    memory.emplace(copies * size, type, like);
    first = static_cast<char*>(memory->data()), dtype = type;
  }
  void take_copy(int64_t i) { first += i * size * bytes_of(dtype); }
  Matrix matrix(int64_t at, int64_t rows, int64_t columns) const { return {place(at), dtype, rows, columns}; }
  void* place(int64_t at) const { return first + at * bytes_of(dtype); }
};

}  // namespace convdit
