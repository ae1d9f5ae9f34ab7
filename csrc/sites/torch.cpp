// Schema, checks and allocation of the table of neighbours; see sites.h.
#include "sites/sites.h"

#include <limits>

#include "common/checks.h"

namespace convdit {
namespace {

Tensor neighbors(const Tensor& indices_in, int64_t n, int64_t h, int64_t w, int64_t radius) {
  check_dim("indices", indices_in, 2, "(P, 3)");
  CONVDIT_CHECK(indices_in.size(1) == 3, "indices: expected shape (P, 3): image, row, column; got ", describe(indices_in));
  check_dtype("indices", indices_in, ScalarType::Int);
  CONVDIT_CHECK(n >= 0 && h >= 0 && w >= 0, "n, h, w: expected sizes of at least 0, got ", n, ", ", h, ", ", w);
  CONVDIT_CHECK(radius >= 0 && radius <= 1000, "radius: expected 0 to 1000, got ", radius);
  const Tensor indices = dense(indices_in);
  const int64_t side = 2 * radius + 1;
  const Tensor table = allocate({indices.size(0), side * side}, ScalarType::Int, indices);
  if (indices.size(0) == 0) return table;
  CONVDIT_CHECK(indices.size(0) <= std::numeric_limits<int32_t>::max(), "indices: expected fewer than 2^31 rows, got ", indices.size(0));
  const Tensor map = allocate({n, h, w}, ScalarType::Int, indices);
  Neighbors p{indices.size(0), n, h, w, radius, nullptr, nullptr, nullptr, nullptr};
  p.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  p.map = static_cast<int32_t*>(map.mutable_data_ptr()), p.table = static_cast<int32_t*>(table.mutable_data_ptr());
#ifndef CONVDIT_DEVICE_CUDA
  int64_t outside = -1;
  p.outside = &outside;
#endif
  CONVDIT_RUN(sites, neighbors, indices, p);
#ifndef CONVDIT_DEVICE_CUDA
  if (outside >= 0) {
    const int32_t* site = p.indices + 3 * outside;
    fail("indices: expected image, row, column inside ", n, " maps of ", h, "x", w, ", got (", site[0], ", ", site[1], ", ", site[2],
         ") in row ", outside);
  }
#endif
  return table;
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) { m.def("neighbors(Tensor indices, SymInt n, SymInt h, SymInt w, int radius) -> Tensor"); }
#endif

CONVDIT_KERNELS(m) { m.impl("neighbors", TORCH_BOX(&neighbors)); }

}  // namespace
}  // namespace convdit
