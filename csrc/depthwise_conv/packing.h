// Weights between (channels, taps), as PyTorch has them, and (taps, lanes), as the inner kernels read and sum them.
#pragma once
#include "common/simd.h"
#include "depthwise_conv/tiles.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// Transposes the square of lanes<A> rows: at each step, the two off-diagonal quarters of every square of 2 * Step swap.
template <class V>
CONVDIT_INLINE void transpose(V* rows) {
  constexpr int n = static_cast<int>(sizeof(V) / sizeof(rows[0][0]));
  const auto step = [&]<int Step>() __attribute__((always_inline)) {
    unroll<n>(CONVDIT_UNROLLED(I) {
      if constexpr ((I & Step) == 0) {
        const V a = rows[I], b = rows[I + Step];
        const auto pick = [&]<int... L>(std::integer_sequence<int, L...>) __attribute__((always_inline)) {
          rows[I] = __builtin_shufflevector(a, b, (L & Step ? n + L - Step : L)...);
          rows[I + Step] = __builtin_shufflevector(a, b, (L & Step ? n + L : L + Step)...);
        };
        pick(std::make_integer_sequence<int, n>{});
      }
    });
  };
  step.template operator()<1>();
  if constexpr (n > 2) step.template operator()<2>();
  if constexpr (n > 4) step.template operator()<4>();
  if constexpr (n > 8) step.template operator()<8>();
}

// (n, taps) to (taps, lanes), lanes from n on zero; `flip`: the taps in reverse order.
template <class A>
void pack_taps(const A* from, int64_t n, int64_t taps, bool flip, A* to) {
  for (int64_t tap = 0; tap < taps; tap += lanes<A>) {
    const int64_t m = taps - tap < lanes<A> ? taps - tap : lanes<A>;
    Vec<A> rows[lanes<A>];
    for (int64_t i = 0; i < lanes<A>; ++i) rows[i] = i < n ? load_lanes<false>(from + i * taps + tap, m) : Vec<A>{};
    transpose(rows);
    for (int64_t i = 0; i < m; ++i) store(to + (flip ? taps - 1 - tap - i : tap + i) * lanes<A>, rows[i]);
  }
}
// (taps, lanes) to (n, taps), from the lane `first` on.
template <class A>
void unpack_taps(const A* from, int64_t first, int64_t n, int64_t taps, A* to) {
  for (int64_t tap = 0; tap < taps; tap += lanes<A>) {
    const int64_t m = taps - tap < lanes<A> ? taps - tap : lanes<A>;
    Vec<A> rows[lanes<A>];
    for (int64_t i = 0; i < lanes<A>; ++i) rows[i] = i < m ? load(from + (tap + i) * lanes<A>) : Vec<A>{};
    transpose(rows);
    for (int64_t i = first; i < n; ++i) store_lanes<false>(to + i * taps + tap, rows[i], m);
  }
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
