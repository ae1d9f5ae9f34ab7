// Rows of the active sites around each active site: the table that every sparse operator walks.
//
//   table[p, (dy + r) * (2r + 1) + dx + r] = the row q with indices[q] = indices[p] + (0, dy, dx), or -1 where no site is
//
// indices (count, 3) int32 holds image, row, column of each site, without duplicates, in any order. All arrays are
// contiguous and owned by the caller. Any count and radius, including 0.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"

namespace convdit {

struct Neighbors {
  int64_t count, images, height, width, radius;
  const int32_t* indices;
  int32_t* map;    // (images, height, width): workspace
  int32_t* table;  // (count, (2 * radius + 1)^2): output
  // Output on the CPU: the first row that lies outside the maps, in which case the table is not written, or -1.
  // Null on CUDA, where looking would cost a wait: there such a row has no neighbours and is nobody's neighbour.
  int64_t* outside;
};

struct SitesKernels {
  void (*neighbors)(const Neighbors&, const Runner&);
};
CONVDIT_CPU_TABLE(SitesKernels, sites)

namespace cuda {
// Enqueues on `stream`; returns cudaError_t.
int sites_neighbors(const Neighbors&, void* stream);
}  // namespace cuda

}  // namespace convdit
