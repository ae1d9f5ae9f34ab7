// A square of vectors transposed in registers; and with it depthwise weights between (channels, taps), as PyTorch has them,
// and (taps, lanes), as the inner kernels read and sum them.
#pragma once
#include "common/simd.h"
#include "common/unroll.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// The lanes of a and b, counted on from a to b, at the places I.
template <class A, int... I>
CONVDIT_INLINE Vec<A> pick(Vec<A> a, Vec<A> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, typename VecOf<A>::integer{I...});
#endif
}

// One step of the transposition: the two off-diagonal quarters of every square of 2 * Step rows and lanes swap.
template <class A, int Step, int... L>
CONVDIT_INLINE void swap_quarters(Vec<A>* rows, std::integer_sequence<int, L...>) {
  unroll<lanes<A>>(CONVDIT_UNROLLED(I) {
    if constexpr ((I & Step) == 0) {
      const Vec<A> a = rows[I], b = rows[I + Step];
      rows[I] = pick<A, (L & Step ? lanes<A> + L - Step : L)...>(a, b);
      rows[I + Step] = pick<A, (L & Step ? lanes<A> + L : L + Step)...>(a, b);
    }
  });
}
// Transposes the square of lanes<A> rows.
template <class A>
CONVDIT_INLINE void transpose(Vec<A>* rows) {
  constexpr auto all = std::make_integer_sequence<int, lanes<A>>{};
  swap_quarters<A, 1>(rows, all);
  if constexpr (lanes<A> > 2) swap_quarters<A, 2>(rows, all);
  if constexpr (lanes<A> > 4) swap_quarters<A, 4>(rows, all);
  if constexpr (lanes<A> > 8) swap_quarters<A, 8>(rows, all);
}

// Squares of taps cover all of them; the last one overlaps the one before it, so that it is full, too.
template <class A, class F>
CONVDIT_INLINE void for_squares(int64_t taps, const F& f) {
  if (taps < lanes<A>) return f(0, taps, PartVector{});
  for (int64_t tap = 0; tap < taps; tap += lanes<A>) f(smaller(tap, taps - lanes<A>), lanes<A>, FullVector{});
}

// (n, taps) to (taps, lanes), lanes from n on zero; `flip`: the taps in reverse order.
template <class A>
void pack_taps(const A* from, int64_t n, int64_t taps, bool flip, A* to) {
  for_squares<A>(taps, [&](int64_t tap, int64_t m, auto full) CONVDIT_FLAT {
    Vec<A> rows[lanes<A>];
    for (int64_t i = 0; i < lanes<A>; ++i) rows[i] = i < n ? load_lanes<decltype(full)::value>(from + i * taps + tap, m) : Vec<A>{};
    transpose<A>(rows);
    for (int64_t i = 0; i < m; ++i) store(to + (flip ? taps - 1 - tap - i : tap + i) * lanes<A>, rows[i]);
  });
}
// (taps, lanes) to (n, taps), from the lane `first` on.
template <class A>
void unpack_taps(const A* from, int64_t first, int64_t n, int64_t taps, A* to) {
  for_squares<A>(taps, [&](int64_t tap, int64_t m, auto full) CONVDIT_FLAT {
    Vec<A> rows[lanes<A>];
    for (int64_t i = 0; i < lanes<A>; ++i) rows[i] = i < m ? load(from + (tap + i) * lanes<A>) : Vec<A>{};
    transpose<A>(rows);
    for (int64_t i = first; i < n; ++i) store_lanes<decltype(full)::value>(to + i * taps + tap, rows[i], m);
  });
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
