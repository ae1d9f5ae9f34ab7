// A kernel for each thing that the executor must report, and beside it one that does the same rightly. test_checks.py knows the
// lines by their comments: `// bad: NAME`.
#include <cuda_pipeline.h>

extern "C" {

__global__ void reads_behind_the_end(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i % n] = x[i];  // bad: OUT OF BOUNDS
}
__global__ void writes_before_the_begin(float* y) {
  y[static_cast<int>(threadIdx.x) - 1] = 1.f;  // bad: OUT OF BOUNDS
}
__global__ void reads_within_bounds(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}

__global__ void reads_misaligned_vectors(const float* x, float* y) {
  const float4 v = *reinterpret_cast<const float4*>(x + threadIdx.x);  // bad: MISALIGNED ACCESS
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void reads_behind_shared(float* y, int n) {
  extern __shared__ float dynamic[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) dynamic[i] = 1.f;  // bad: SHARED MEMORY OUT OF BOUNDS
  __syncthreads();
  y[threadIdx.x] = dynamic[threadIdx.x];
}

__global__ void reads_unwritten_global(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];  // bad: UNINITIALISED READ
}
__global__ void reads_unwritten_shared(float* y) {
  __shared__ float a[64];
  if (threadIdx.x < 32) a[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x + 1];  // bad: UNINITIALISED READ
}

__global__ void exchanges_between_warps(float* y, bool barrier) {
  __shared__ float a[64];
  a[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  y[threadIdx.x] = a[threadIdx.x ^ 32];  // bad: RACE: read after an unordered write
}
__global__ void exchanges_behind_a_fence(float* y) {
  __shared__ float a[64];
  a[threadIdx.x] = threadIdx.x;
  __threadfence_block();
  y[threadIdx.x] = a[threadIdx.x ^ 32];  // bad: RACE: read after an unordered write
}
__global__ void exchanges_within_a_warp(float* y, bool synchronise) {
  __shared__ float a[32];
  a[threadIdx.x] = threadIdx.x;
  if (synchronise) __syncwarp();
  y[threadIdx.x] = a[threadIdx.x ^ 1];  // bad: RACE: read after an unordered write
}
__global__ void overwrites_what_is_read(float* y, bool barrier) {
  __shared__ float a[64];
  a[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x ^ 32];
  if (barrier) __syncthreads();
  a[threadIdx.x] = 0.f;  // bad: RACE: write after an unordered read
}
__global__ void reads_together_then_one_writes(float* y, bool synchronise) {
  __shared__ float a;
  if (threadIdx.x == 0) a = 1.f;
  __syncwarp();
  y[threadIdx.x] = a;
  if (synchronise) __syncwarp();
  if (threadIdx.x == 5) a = 2.f;  // bad: RACE: write after an unordered read
}
__global__ void all_write_one_place(float* y, int step) {
  y[threadIdx.x * step] = threadIdx.x;  // bad: RACE: write after an unordered write
}
__global__ void half_a_warp_synchronises(float* y, unsigned mask) {
  __shared__ float a[32];
  a[threadIdx.x] = threadIdx.x;
  if (mask >> threadIdx.x & 1) __syncwarp(mask);
  y[threadIdx.x] = a[threadIdx.x ^ 16];  // bad: RACE: read after an unordered write
}
__global__ void blocks_add_to_one_place(float* y, int step) {
  y[blockIdx.x * step] += 1.f;  // bad: RACE BETWEEN BLOCKS: read after a write
}
__global__ void a_block_overwrites_what_another_reads(const float* x, float* y, int n) {
  y[blockIdx.x * n] = x[blockIdx.x + 1];  // bad: RACE BETWEEN BLOCKS
}
__global__ void blocks_count(unsigned* counter) { atomicAdd(counter, 1u); }

__global__ void some_threads_skip_a_barrier(float* y, int n) {
  __shared__ float a[64];
  a[threadIdx.x] = 1.f;
  if (threadIdx.x < n) {
    __syncthreads();
    y[threadIdx.x] = a[threadIdx.x];
  } else {
    __syncthreads();  // bad: THREADS OF A BLOCK WAIT AT DIFFERENT BARRIERS
    y[threadIdx.x] = 2.f * a[threadIdx.x];
  }
}
__global__ void some_lanes_miss_a_shuffle(float* y, int n) {
  if (threadIdx.x < n) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);  // bad: DEADLOCK
}
__global__ void shuffles_from_outside_the_mask(float* y, unsigned mask, int lane) {
  if (mask >> threadIdx.x & 1) y[threadIdx.x] = __shfl_sync(mask, threadIdx.x, lane);  // bad: SHUFFLE FROM A LANE NOT IN THE MASK
}
__global__ void votes_without_being_in_the_mask(unsigned* y, unsigned mask) {
  y[threadIdx.x] = __ballot_sync(mask, 1);  // bad: LANE NOT IN ITS OWN MASK
}
__global__ void names_lanes_that_do_not_exist(unsigned* y, unsigned mask) {
  y[threadIdx.x] = __ballot_sync(mask, 1);  // bad: MASK NAMES A LANE THAT DOES NOT EXIST
}
__global__ void waits_at_a_barrier_of_a_part(float* y, int n) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, %0;" ::"r"(n));  // bad: BARRIER OF A PART OF THE BLOCK
  y[threadIdx.x] = 1.f;
}

__global__ void copies_without_waiting(const float4* x, float4* y, bool wait, bool barrier) {
  __shared__ float4 a[64];
  __pipeline_memcpy_async(a + threadIdx.x, x + threadIdx.x, 16);
  __pipeline_commit();
  if (wait) __pipeline_wait_prior(0);
  if (barrier) __syncthreads();
  y[threadIdx.x] = a[threadIdx.x ^ 32];  // bad: READ BEFORE cp.async HAS BEEN WAITED FOR
}

__global__ void never_ends(float* y, int n) {
  volatile float* to = y;
  while (n == 0) to[threadIdx.x] = 1.f;  // bad: ENDLESS LOOP
}
__global__ void traps(float* y, int n) {
  if (threadIdx.x >= n) __trap();  // bad: TRAP
  y[threadIdx.x] = 1.f;
}
// The first of the threads to come takes the place: atomics are in order, what they order is not.
__global__ void depends_on_the_order(unsigned* counter, unsigned* y) { y[threadIdx.x] = atomicAdd(counter, 1u); }

}  // extern "C"

namespace {
__device__ __forceinline__ float value_at(const float* x, int i) {
  return x[i];  // bad: inlined
}
}  // namespace
extern "C" __global__ void calls_a_function(const float* x, float* y) {
  y[threadIdx.x] = value_at(x, 1000 + threadIdx.x);  // bad: caller
}
