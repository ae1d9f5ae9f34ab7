// Asynchronous copies from global into shared memory (sm_80).
#pragma once
#include <cstdint>

namespace convdit::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts a copy of kBytes (8 or 16, both ends aligned) to shared memory; writes zeros, and reads nothing, where !valid: `global` may
// then point anywhere.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)  // .cg: past L1, where a tile is not read twice
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  copy_async<kBytes>(shared_address(shared), global, valid);
}
// The copies started since the last commit are one group. A wait is for the calling thread's own copies: a barrier must
// follow before other threads read what they brought.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// All of them, by all threads of the block.
__device__ __forceinline__ void finish_copies() {
  commit_copies();
  wait_copies<0>();
  __syncthreads();
}

}  // namespace convdit::cuda
