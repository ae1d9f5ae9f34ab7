// A product of two float32 matrices, the first and the last step of a Linear layer and its gradients.
//
//   c (M, N) = a (M, K) b (K, N) + bias (N)
//
// a and b have any strides; c has unit stride along N and aliases neither. `bias` may be null. `packed` is scratch of
// product_scratch() floats. The caller owns them all; any sizes, including 0; any alignment.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"

namespace convdit {

struct Product {
  int64_t m, n, k;
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_row, b_column;
  const float* bias;
  float* c;
  int64_t c_row;
  float* packed;
};

// Terms that are summed in registers, one after the other; such sums are then added up, which keeps long ones accurate.
constexpr int64_t kProductDepth = 256;
// Columns of b that are packed at a time: a multiple of what any level packs together.
constexpr int64_t kProductColumns = 1024, kPanelMultiple = 32;

// Few sums of many terms, as in the gradient of a weight, are taken in sections of K side by side, which are then added up in
// order; how many does not depend on the threads.
constexpr int64_t product_sections(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMost = 8, kValues = 1 << 18, kShortest = 384;
  int64_t sections = kMost;
  while (sections > 1 && (sections * m * n > kValues || sections * kShortest > k)) sections /= 2;
  return sections;
}

constexpr int64_t product_panels(int64_t n, int64_t k) {  // floats that one section packs at a time
  const int64_t columns = (n + kPanelMultiple - 1) / kPanelMultiple * kPanelMultiple;
  return (columns < kProductColumns ? columns : kProductColumns) * (k < kProductDepth ? k : kProductDepth);
}
constexpr int64_t product_scratch(int64_t m, int64_t n, int64_t k) {
  const int64_t sections = product_sections(m, n, k);
  return sections * product_panels(n, k) + (sections - 1) * m * n;
}

struct LinearKernels {
  void (*multiply)(const Product&, const Runner&);
};
CONVDIT_CPU_TABLE(LinearKernels, linear)

}  // namespace convdit
