// CUDA kernels of the table of neighbours: clear a map, let every site write its row into it, let every place of the table read
// it. No hash, and nothing is looked at by the host.
#include "sites/sites.h"

#include "common/launch.cuh"

namespace convdit::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t first_index() { return blockIdx.x * int64_t{kThreads} + threadIdx.x; }
__device__ __forceinline__ int64_t step() { return int64_t{gridDim.x} * kThreads; }

struct Site {
  int64_t image, row, column;
  __device__ bool inside(const Neighbors& p) const {
    return image >= 0 && image < p.images && row >= 0 && row < p.height && column >= 0 && column < p.width;
  }
  __device__ int64_t cell(const Neighbors& p) const { return (image * p.height + row) * p.width + column; }
};
__device__ __forceinline__ Site site_of(const Neighbors& p, int64_t i) {
  return {p.indices[3 * i], p.indices[3 * i + 1], p.indices[3 * i + 2]};
}

__global__ void clear_map(Neighbors p) {
  for (int64_t i = first_index(); i < p.images * p.height * p.width; i += step()) p.map[i] = -1;
}

// The three numbers of a site come in through shared memory: read by their own thread, each would be a request for all of a warp's sectors.
__global__ void write_rows(Neighbors p) {
  __shared__ int64_t indices[3 * kThreads];
  for (int64_t first = blockIdx.x * int64_t{kThreads}; first < p.count; first += step()) {
    __syncthreads();  // those before may still be read
    for (int i = threadIdx.x; i < 3 * kThreads; i += kThreads)
      if (3 * first + i < 3 * p.count) indices[i] = p.indices[3 * first + i];
    __syncthreads();
    const int64_t i = first + threadIdx.x;
    const int64_t* own = indices + 3 * threadIdx.x;
    if (i >= p.count) continue;
    const Site site{own[0], own[1], own[2]};
    if (site.inside(p)) p.map[site.cell(p)] = static_cast<int32_t>(i);
  }
}

__global__ void read_windows(Neighbors p) {
  const int64_t side = 2 * p.radius + 1, window = side * side;
  for (int64_t i = first_index(); i < p.count * window; i += step()) {
    const Site site = site_of(p, i / window);
    const Site other{site.image, site.row + i % window / side - p.radius, site.column + i % side - p.radius};
    p.table[i] = site.inside(p) && other.inside(p) ? p.map[other.cell(p)] : -1;
  }
}

}  // namespace

int sites_neighbors(const Neighbors& p, void* stream) {
  const auto blocks = [](int64_t tasks) { return grid(ceil_div(tasks, kThreads)); };
  const int64_t cells = p.images * p.height * p.width, side = 2 * p.radius + 1;
  if (p.count == 0) return cudaSuccess;
  if (cells > 0) {
    clear_map<<<blocks(cells), kThreads, 0, stream_of(stream)>>>(p);
    if (const int status = launch_status()) return status;
    write_rows<<<blocks(p.count), kThreads, 0, stream_of(stream)>>>(p);
    if (const int status = launch_status()) return status;
  }
  read_windows<<<blocks(p.count * side * side), kThreads, 0, stream_of(stream)>>>(p);
  return launch_status();
}

}  // namespace convdit::cuda
