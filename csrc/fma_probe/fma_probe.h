// The peak rate of float multiply-adds, for benchmarks: chains of them in registers, no memory. Timed from outside.
//
// Each of `tasks` tasks does `multiply_adds` of them, rounded up to whole steps of all chains, and writes out[task], which
// means nothing but that the work was done.
#pragma once
#include <cstdint>

#include "common/cpu_level.h"
#include "common/parallel.h"

namespace convdit {

struct FmaProbe {
  int64_t tasks, multiply_adds;
  float* out;  // (tasks)
};

struct FmaProbeKernels {
  void (*run)(const FmaProbe&, const Runner&);
};
CONVDIT_CPU_TABLE(FmaProbeKernels, fma_probe)

}  // namespace convdit
