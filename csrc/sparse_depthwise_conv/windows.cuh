// Windows of consecutive strips, which are consecutive rows, in shared memory: what the 7x7 kernels of the sparse convolution share.
#pragma once
#include "common/depthwise.cuh"
#include "sparse_depthwise_conv/sparse_depthwise_conv.h"

namespace convdit::cuda {
namespace {

// A strip is the work of a warp: a block of B x B sites, or half of one of 8 x 8. Around it, the sites under a 7x7 kernel lie in kSide x
// kSide strips. A warp takes kGroup channels of it, a lane kLane.
template <int B>
struct Strips {
  static constexpr int kRows = B < 4 ? B : 4, kColumns = B, kSites = kRows * kColumns;
  static constexpr int kWindow = B > 2 ? 256 : 128;  // sites
  static constexpr int kOfBlock = B / kRows, kOfWindow = kWindow / kSites;
  static constexpr int kReach = (kRadius + kRows - 1) / kRows, kSide = 2 * kReach + 1, kAround = kSide * kSide;
  static constexpr int kLane = B > 2 ? 1 : 2, kGroup = kWarp * kLane;
};

struct Window {
  int first, count;  // strips
  int64_t c0;        // first channel
};
template <int B>
__device__ __forceinline__ Window window_at(int64_t index, int64_t c0, int64_t blocks) {
  using S = Strips<B>;
  const int64_t first = index * S::kOfWindow, left = blocks * S::kOfBlock - first;
  return {static_cast<int>(first), static_cast<int>(left < S::kOfWindow ? left : S::kOfWindow), c0};
}

// Copies a window's rows of x, (sites, C), to (sites, kGroup) in shared memory, 16 bytes at a time.
template <class T, int B, int Threads>
__device__ __forceinline__ void stage_window(const T* x, const Window& w, int64_t channels, T* shared) {
  using S = Strips<B>;
  constexpr int vector = kVector<T>, vectors = S::kGroup / vector, together = Threads / vectors;  // sites
  static_assert(Threads % vectors == 0);
  const int c = threadIdx.x % vectors * vector, sites = w.count * S::kSites;
  if (w.c0 + c >= channels) return;
  int site = threadIdx.x / vectors;
  const T* from = x + (int64_t{w.first} * S::kSites + site) * channels + w.c0 + c;
  T* to = shared + site * S::kGroup + c;
#pragma unroll 4
  for (; site < sites; site += together, from += together * channels, to += together * S::kGroup) copy_async<16>(to, from, true);
}

}  // namespace
}  // namespace convdit::cuda
