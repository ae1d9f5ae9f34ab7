// Schema and allocation of the multiply-add probe; see fma_probe.h. It exists on the CPU only.
#include "fma_probe/fma_probe.h"

#include "common/checks.h"

namespace convdit {
namespace {

// One task an element of `tasks`, whose values do not matter.
Tensor fma_probe(const Tensor& tasks, int64_t multiply_adds) {
  check_dim("tasks", tasks, 1, "(tasks)");
  check_dtype("tasks", tasks, ScalarType::Float);
  CONVDIT_CHECK(multiply_adds >= 0, "multiply_adds: expected at least 0, got ", multiply_adds);
  const Tensor out = allocate_like(tasks);
  CONVDIT_RUN(fma_probe, run, tasks, (FmaProbe{tasks.size(0), multiply_adds, static_cast<float*>(out.mutable_data_ptr())}));
  return out;
}

#ifdef CONVDIT_SCHEMAS
CONVDIT_SCHEMAS(m) { m.def("fma_probe(Tensor tasks, int multiply_adds) -> Tensor"); }
#endif

CONVDIT_KERNELS(m) { m.impl("fma_probe", TORCH_BOX(&fma_probe)); }

}  // namespace
}  // namespace convdit
