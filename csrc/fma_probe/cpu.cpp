// Twelve independent chains: enough to hide the latency of two multiply-adds a cycle, and they fit 16 registers.
#include "fma_probe/fma_probe.h"

#include "common/simd.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int kChains = 12;

void run(const FmaProbe& p, const Runner& runner) {
  runner(p.tasks, [&](int64_t task) {
    const Vec<float> a = splat(0.999f), b = splat(1e-3f);
    Vec<float> chain[kChains];
    for (int i = 0; i < kChains; ++i) chain[i] = splat(static_cast<float>(i));
    for (int64_t done = 0; done < p.multiply_adds; done += kChains * kFloats)
      for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * a + b;
    Vec<float> total = chain[0];
    for (int i = 1; i < kChains; ++i) total += chain[i];
    p.out[task] = sum(total);
  });
}

}  // namespace

extern const FmaProbeKernels fma_probe = {run};

}  // namespace convdit::CONVDIT_LEVEL
