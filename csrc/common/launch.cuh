// What every CUDA launcher needs: grids, alignment, the status of a launch.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"

namespace convdit::cuda {

// Blocks a multiprocessor, for __launch_bounds__: left to itself ptxas spills a few bytes to make room for one block more.
constexpr int kNoSpills = 1;

// A kernel loops over its tasks with the grid as stride, so a grid may be smaller than the number of tasks. Tests set a small
// limit, to see that they do.
#ifndef CONVDIT_MOST_BLOCKS
#define CONVDIT_MOST_BLOCKS 0x7fffffff
#endif
inline unsigned grid(int64_t tasks) {
  constexpr int64_t kMost = CONVDIT_MOST_BLOCKS;
  return static_cast<unsigned>(tasks < kMost ? tasks : kMost);
}

// Dynamic shared memory that every GPU grants without asking (48 KiB), less what a kernel may declare itself.
constexpr int64_t kSharedBytes = 47 * 1024;

// Lets a kernel have more than that, up to what the GPU has (99 KiB on the smallest of sm_80 and later).
template <class Kernel>
int allow_shared_bytes(Kernel* kernel, int64_t bytes) {
  if (bytes <= kSharedBytes) return cudaSuccess;
  return static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block that works on one row of `width` elements, `vector` a thread: whole warps, at most `most`.
inline unsigned row_threads(int64_t width, int64_t vector, int64_t most) {
  const int64_t threads = ceil_div(ceil_div(width, vector), 32) * 32;
  return static_cast<unsigned>(threads < most ? threads : most);
}

template <class... P>
bool aligned(int64_t bytes, const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
inline int launch_status() { return static_cast<int>(cudaGetLastError()); }

}  // namespace convdit::cuda
