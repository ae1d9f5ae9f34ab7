// CPU kernels of attention, in float32 and from halves; see attention.h for the formulas. A head's keys are taken block by block, each
// packed once for many queries; a tile of queries meets all keys of a block, so that its scores stay in the first-level cache between
// one product and the next (Dao et al. 2022). What a result is does not depend on how the work is cut up for the threads.
#include "attention/cpu_backward.h"
#include "attention/cpu_forward.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

template <class F>
void dispatch_float(DType dtype, const F& f) {
  if (dtype == DType::bf16) f(bf16{});
  else if (dtype == DType::f16) f(f16{});
  else f(float{});
}
void dispatch_forward(const Attention& p, const Runner& run) {
  dispatch_float(p.dtype, [&](auto x) { forward<decltype(x)>(p, run); });
}
void dispatch_backward(const AttentionBackward& b, const Runner& run) {
  dispatch_float(b.forward.dtype, [&](auto x) { Backward<decltype(x)>{b, run}(); });
}

int64_t forward_scratch(const Attention& p, int64_t threads) {
  return useful_threads(p, threads) * ForwardLayout(p, largest_part(query_parts(p, threads))).size;
}
int64_t backward_scratch(const Attention& p, int64_t threads) { return useful_threads(p, threads) * BackwardLayout(p).size; }

}  // namespace

extern const AttentionKernels attention = {dispatch_forward, dispatch_backward, forward_scratch, backward_scratch};

}  // namespace convdit::CONVDIT_LEVEL
