// Windows of consecutive blocks, which are consecutive rows, in shared memory: what the 7x7 kernels of the sparse convolution share.
#pragma once
#include "common/depthwise.cuh"
#include "sparse_depthwise_conv/sparse_depthwise_conv.h"

namespace convdit::cuda {
namespace {

constexpr int kWindow = 128;  // sites

// Blocks of B x B sites under a 7x7 kernel.
template <int B>
struct Blocks {
  static constexpr int kSites = B * B, kCount = kWindow / kSites;               // of a block; blocks of a window
  static constexpr int kReach = (kRadius + B - 1) / B, kSide = 2 * kReach + 1;  // of the table
};

struct Window {
  int first, count;  // blocks
  int64_t c0;        // first channel
};
template <int B>
__device__ __forceinline__ Window window_at(int64_t index, int64_t c0, int64_t blocks) {
  const int64_t first = index * Blocks<B>::kCount, left = blocks - first;
  return {static_cast<int>(first), static_cast<int>(left < Blocks<B>::kCount ? left : Blocks<B>::kCount), c0};
}

// Copies a window's rows of x, (sites, C), to (sites, Channels) in shared memory, 16 bytes at a time.
template <class T, int B, int Threads, int Channels>
__device__ __forceinline__ void stage_window(const T* x, const Window& w, int64_t channels, T* shared) {
  constexpr int vector = kVector<T>, vectors = Channels / vector;
  const T* from = x + int64_t{w.first} * Blocks<B>::kSites * channels + w.c0;
  for (int i = threadIdx.x; i < w.count * Blocks<B>::kSites * vectors; i += Threads) {
    const int site = i / vectors, c = i % vectors * vector;
    if (w.c0 + c < channels) copy_async<16>(shared + site * Channels + c, from + site * channels + c, true);
  }
}

}  // namespace
}  // namespace convdit::cuda
