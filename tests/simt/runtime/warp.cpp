// What the lanes of a warp do together: synchronise, shuffle, vote, and the matrix instructions.
#include <algorithm>

#include "arithmetic.h"
#include "memory.h"
#include "simt.h"
#include "traffic.h"

namespace simt {
namespace {

template <class F>
void each(Block& block, Warp& warp, uint32_t mask, const F& f) {
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) f(l, block.all[warp.first + l]);
}

void order(Block& block, Warp& warp, uint32_t mask) {
  uint32_t ordered[kLanes] = {};
  each(block, warp, mask, [&](int lane, Thread& t) {
    for (int l = 0; l < kLanes; ++l) ordered[l] = std::max(ordered[l], t.ordered[l]);
    ordered[lane] = std::max(ordered[lane], t.clock);
  });
  each(block, warp, mask, [&](int, Thread& t) { std::copy_n(ordered, kLanes, t.ordered), ++t.clock; });
}

void count_votes(Block& block, Warp& warp, uint32_t mask) {
  uint32_t votes = 0;
  each(block, warp, mask, [&](int lane, Thread& t) { votes |= uint32_t(t.in[0] != 0) << lane; });
  each(block, warp, mask, [&](int, Thread& t) { t.out[0] = votes; });
}

template <Shuffle S>
void exchange(Block& block, Warp& warp, uint32_t mask) {
  each(block, warp, mask, [&](int lane, Thread& t) {
    const int b = t.in[1] & 31, clamp = t.in[2] & 31, segment = t.in[2] >> 8 & 31;
    const int least = lane & segment, most = (lane & segment) | (clamp & ~segment);
    int from = S == Shuffle::idx    ? least | (b & ~segment)
               : S == Shuffle::up   ? lane - b
               : S == Shuffle::down ? lane + b
                                    : lane ^ b;
    t.out[1] = S == Shuffle::up ? from >= most : from <= most;
    if (!t.out[1]) from = lane;
    if (!(mask >> from & 1)) {
      report(t, t.site, "SHUFFLE FROM A LANE NOT IN THE MASK", "lane " + std::to_string(from));
      from = lane;
    }
    t.out[0] = static_cast<uint32_t>(block.all[warp.first + from].in[0]);
  });
}

bool whole_warp(Thread& t, int site) {
  if (t.warp->exists == ~0u) return true;
  report(t, site, "MATRIX INSTRUCTION IN A PARTIAL WARP");
  return false;
}

// Row r of matrix m is at the address that lane 8 * m + r gives; lane l gets elements 2 * (l % 4) and + 1 of row l / 4.
template <int N, bool Transposed>
void read_matrices(Block& block, Warp& warp, uint32_t) {
  Thread* const lanes = &block.all[warp.first];
  for (int m = 0; m < N; ++m) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) {
      Thread& t = lanes[8 * m + r];
      memcpy(rows[r], check(t, t.site, kShared, t.in[0], 16, Access::kRead), 16);
    }
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      const uint16_t low = Transposed ? rows[column][row] : rows[row][column];
      const uint16_t high = Transposed ? rows[column + 1][row] : rows[row][column + 1];
      lanes[l].out[m] = low | uint32_t(high) << 16;
    }
    traffic::count_matrix(lanes, m);
  }
}

void transpose_rows(Block& block, Warp& warp, uint32_t) {
  Thread* const lanes = &block.all[warp.first];
  const auto element = [&](int row, int column) {
    return static_cast<uint16_t>(lanes[row * 4 + column / 2].in[0] >> column % 2 * 16);
  };
  for (int l = 0; l < kLanes; ++l) lanes[l].out[0] = element(l % 4 * 2, l / 4) | uint32_t(element(l % 4 * 2 + 1, l / 4)) << 16;
}

// D = A * B + C for 16 x Depth, Depth x 8; in: a[0..1], a[2..3], b[0..1], c[0..1], c[2..3]. Products are summed in double and
// rounded once: a GPU sums in float32 in an order of its own.
template <class Half, int Depth>
void multiply(Block& block, Warp& warp, uint32_t) {
  Thread* const lanes = &block.all[warp.first];
  double a[16][Depth], b[Depth][8];
  const auto half = [](uint64_t packed, int i) { return widen(Half{static_cast<uint16_t>(packed >> (16 * i))}); };
  for (int l = 0; l < kLanes; ++l) {
    const int row = l / 4, column = l % 4 * 2;
    for (int i = 0; i < Depth / 4; ++i)  // registers of A
      for (int h = 0; h < 2; ++h) a[row + i % 2 * 8][column + i / 2 * 8 + h] = half(lanes[l].in[i / 2], i % 2 * 2 + h);
    for (int i = 0; i < Depth / 8; ++i)  // of B
      for (int h = 0; h < 2; ++h) b[column + i * 8 + h][row] = half(lanes[l].in[2], i * 2 + h);
  }
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      double sum = std::bit_cast<float>(static_cast<uint32_t>(lanes[l].in[3 + i / 2] >> (32 * (i % 2))));
      for (int k = 0; k < Depth; ++k) sum += a[row][k] * b[k][column];
      lanes[l].out[i] = std::bit_cast<uint32_t>(static_cast<float>(sum));
    }
}

}  // namespace

void together(Thread& t, int site, uint32_t mask, void (*operation)(Block&, Warp&, uint32_t)) {
  Warp& warp = *t.warp;
  if (!(mask >> t.lane & 1)) {
    report(t, site, "LANE NOT IN ITS OWN MASK");
    mask |= 1u << t.lane;
  }
  if (mask & ~warp.exists) {
    report(t, site, "MASK NAMES A LANE THAT DOES NOT EXIST");
    mask &= warp.exists;
  }
  t.site = site, t.mask = mask, t.operation = operation;
  t.state = State::kWaitsForWarp;
  bool all = true;
  each(*t.block, warp, mask, [&](int, Thread& o) {
    // Lanes may meet at different __syncwarp(); everything else is one instruction for all of them.
    all = all && o.state == State::kWaitsForWarp && o.operation == operation && o.mask == mask &&
          (o.site == site || operation == order);
  });
  if (!all) return wait(t, State::kWaitsForWarp);
  operation(*t.block, warp, mask);
  each(*t.block, warp, mask, [](int, Thread& o) { o.state = State::kRuns; });
}

void sync_warp(Thread& t, int site, uint32_t mask) { together(t, site, mask, order); }

uint32_t ballot(Thread& t, int site, bool value, uint32_t mask) {
  t.in[0] = value;
  together(t, site, mask, count_votes);
  return t.out[0];
}

// The scheduler answers, once no thread of the block can run on: see executor.cpp.
uint32_t active_mask(Thread& t, int site) {
  t.site = site;
  wait(t, State::kWaitsForActiveMask);
  return t.out[0];
}

template <Shuffle S>
uint32_t shuffle(Thread& t, int site, uint32_t value, uint32_t lane, uint32_t clamp, uint32_t mask, bool& valid) {
  t.in[0] = value, t.in[1] = lane, t.in[2] = clamp;
  together(t, site, mask, exchange<S>);
  valid = t.out[1];
  return t.out[0];
}
template uint32_t shuffle<Shuffle::idx>(Thread&, int, uint32_t, uint32_t, uint32_t, uint32_t, bool&);
template uint32_t shuffle<Shuffle::up>(Thread&, int, uint32_t, uint32_t, uint32_t, uint32_t, bool&);
template uint32_t shuffle<Shuffle::down>(Thread&, int, uint32_t, uint32_t, uint32_t, uint32_t, bool&);
template uint32_t shuffle<Shuffle::bfly>(Thread&, int, uint32_t, uint32_t, uint32_t, uint32_t, bool&);

template <int N, bool Transposed>
void load_matrix(Thread& t, int site, uint64_t address, uint32_t (&to)[N]) {
  memset(to, 0, sizeof to);
  if (!whole_warp(t, site)) return;
  t.in[0] = address;
  together(t, site, ~0u, read_matrices<N, Transposed>);
  memcpy(to, t.out, sizeof to);
}
template void load_matrix<1, false>(Thread&, int, uint64_t, uint32_t (&)[1]);
template void load_matrix<2, false>(Thread&, int, uint64_t, uint32_t (&)[2]);
template void load_matrix<4, false>(Thread&, int, uint64_t, uint32_t (&)[4]);
template void load_matrix<1, true>(Thread&, int, uint64_t, uint32_t (&)[1]);
template void load_matrix<2, true>(Thread&, int, uint64_t, uint32_t (&)[2]);
template void load_matrix<4, true>(Thread&, int, uint64_t, uint32_t (&)[4]);

uint32_t transpose_matrix(Thread& t, int site, uint32_t row) {
  if (!whole_warp(t, site)) return 0;
  t.in[0] = row;
  together(t, site, ~0u, transpose_rows);
  return t.out[0];
}

template <class Half, int Depth>
void multiply_matrices(Thread& t, int site, const uint32_t* a, const uint32_t* b, float* c) {
  if (!whole_warp(t, site)) return;
  memcpy(t.in, a, Depth / 4 * 4), memcpy(t.in + 2, b, Depth / 8 * 4), memcpy(t.in + 3, c, 16);
  together(t, site, ~0u, multiply<Half, Depth>);
  memcpy(c, t.out, 16);
}
template void multiply_matrices<f16, 16>(Thread&, int, const uint32_t*, const uint32_t*, float*);
template void multiply_matrices<bf16, 16>(Thread&, int, const uint32_t*, const uint32_t*, float*);
template void multiply_matrices<f16, 8>(Thread&, int, const uint32_t*, const uint32_t*, float*);
template void multiply_matrices<bf16, 8>(Thread&, int, const uint32_t*, const uint32_t*, float*);

}  // namespace simt
