// What both passes of attention on the CPU share: products of small matrices that lie in the caches, blocks of keys, scratch, the
// exponential, and asking for memory ahead of its use.
#pragma once
#include "attention/attention.h"
#include "common/layout.h"
#include "common/tile.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kMostKeys = kVectorBytes >= 32 ? 256 : 128;  // of a block: fewer where products round too,
constexpr int64_t kBlockFloats = 1 << 16;        // and at most so many values, where heads are wide
constexpr int64_t kScoreStep = kMostKeys + 16;   // rows of a tile fall into different sets of the cache
constexpr int64_t kSmallestShare = 1 << 18;      // multiply-adds that are worth another thread
constexpr int64_t kTurnedRows = round_up(kRows, kFloats);  // of a left-hand matrix that turn() has packed

// n things in equal parts of at most `most`, cut at multiples of `unit`, which divides `most`.
struct Cut {
  int64_t n, parts, unit, units;
  constexpr Cut(int64_t total, int64_t most, int64_t of = 1)
      : n(total), parts(ceil_div(ceil_div(total, of), most / of)), unit(of), units(ceil_div(total, of)) {}
  Range operator[](int64_t i) const {
    const Range r = part_of(units, parts, i);
    return {r.first * unit, smaller(r.last * unit, n)};
  }
};

// c = a b, or c + a b, of one panel.
template <int Rows, int Vectors, int64_t RowStep>
void tile(const float* a, int64_t step, const float* b, int64_t depth, bool add, float* c, int64_t c_step) {
  sum_tile<Rows, Vectors, RowStep>(a, step, b, depth, [&](auto row, auto vector, Vec<float> sum) CONVDIT_FLAT {
    float* to = c + row.value * c_step + vector.value * kFloats;
    store(to, add ? load(to) + sum : sum);
  });
}

// At most kRows rows of c, round_up(columns, kFloats) wide, from all panels of b. Calls between(panel, panels) before each.
template <int64_t RowStep, class F>
void multiply(int64_t rows, const float* a, int64_t step, const float* b, int64_t depth, int64_t columns, bool add, float* c,
              int64_t c_step, const F& between) {
  const auto wide = tile_of(rows, []<int Rows>() { return tile<Rows, 2, RowStep>; });
  const auto narrow = tile_of(rows, []<int Rows>() { return tile<Rows, 1, RowStep>; });
  for (int64_t column = 0; column < columns; column += kColumns, b += depth * kColumns) {
    between(column / kColumns, ceil_div(columns, kColumns));
    (columns - column > kFloats ? wide : narrow)(a, step, b, depth, add, c + column, c_step);
  }
}

Cut key_blocks(const Attention& p) {
  const int64_t fitting = kBlockFloats / p.head_dim / kColumns * kColumns;
  return {p.tokens, larger(smaller(fitting, kMostKeys), kColumns), kColumns};
}
// The most of a part.
int64_t largest_part(const Cut& cut) { return round_up(ceil_div(cut.n, cut.parts), cut.unit); }

// f(task, the thread's next task, or the number of tasks, scratch) for each task, as many at once as there are scratches. A task's
// arithmetic is the same in any of them.
template <class F>
void run_in_scratch(const Attention& p, const Runner& run, int64_t tasks, int64_t scratches, int64_t floats, const F& f) {
  int64_t next = 0;
  const auto pull = [&] { return smaller(__atomic_fetch_add(&next, 1, __ATOMIC_RELAXED), tasks); };
  run(smaller(scratches, tasks), [&](int64_t i) {
    for (int64_t task = pull(), upcoming; task < tasks; task = upcoming) f(task, upcoming = pull(), p.scratch + i * floats);
  });
}

int64_t useful_threads(const Attention& p, int64_t threads) {
  return smaller(threads, p.batch * p.heads * p.tokens * p.head_dim / (kSmallestShare / p.tokens + 1) + 1);
}

// e^x where x is a score less a larger one, or nearly: relative error below 2e-7, 1 at 0, and 0 below -87.7. Quicker than exp().
CONVDIT_INLINE Vec<float> exp_of_difference(Vec<float> x) {
  typedef typename VecOf<float>::integer Int;
  // A NaN stays one; as a constant, GCC would compare with it and blend.
  const Vec<float> t = vmax(rounded(splat(-88.f)), x);
  const Vec<float> shift = splat(0x1.8p23f + 127.f), biased = t * 1.44269504f + shift, r = t * 1.44269504f - (biased - shift);
  Vec<float> e = splat(1.3264727e-3f);
  e = e * r + 9.671513e-3f;
  e = e * r + 5.5507336e-2f;
  e = e * r + 2.4022242e-1f;
  e = e * r + 6.93147e-1f;
  e = e * r + 1.f;
  return e * reinterpret_cast<Vec<float>>(reinterpret_cast<Int>(biased) << 23);
}

// f(a, b) of all lanes, in each lane.
template <class F>
CONVDIT_INLINE Vec<float> reduce(Vec<float> v, const F& f) {
  const auto step = [&]<int Step, int... L>(std::integer_sequence<int, L...>)
                        CONVDIT_FLAT { v = f(v, pick<float, (L + Step) % kFloats...>(v, v)); };
  constexpr auto all = std::make_integer_sequence<int, kFloats>{};
  if constexpr (kFloats > 8) step.template operator()<8>(all);
  if constexpr (kFloats > 4) step.template operator()<4>(all);
  step.template operator()<2>(all);
  step.template operator()<1>(all);
  return v;
}

CONVDIT_INLINE float total(Vec<float> v) {
  return reduce(v, [](Vec<float> a, Vec<float> b) CONVDIT_FLAT { return a + b; })[0];
}

// Scores are scaled as they become weights, where that does not round them once more; the sign goes into the queries, for a largest score
// to be one of the largest products.
struct Scale {
  float of_queries, of_products;
};
Scale split(double scale) {
  if (scale == 0) return {0.f, 1.f};
  return scale < 0 ? Scale{-1.f, static_cast<float>(-scale)} : Scale{1.f, static_cast<float>(scale)};
}

// Rows that are read or written soon, asked for a few at a time: they lie a page apart, where processors do not foresee them, and
// all at once they would hold up the work between.
template <bool Write, class T>
struct Soon {
  const T* from;
  int64_t step, rows, width;
  CONVDIT_INLINE void ask(int64_t part, int64_t parts) const {
    const Range share = part_of(rows, parts, part);
    for (int64_t row = share.first; row < share.last; ++row)
      for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(from + row * step + i, Write, 2);
  }
};
template <class T>
using Reads = Soon<false, T>;
template <class T>
using Writes = Soon<true, T>;

constexpr auto nothing = [](int64_t, int64_t) {};

// Keys and values to come.
template <class T>
struct NextKeys {
  Reads<T> keys;
  int64_t to_values;
  CONVDIT_INLINE void ask(int64_t part, int64_t parts) const {
    keys.ask(part, parts);
    Reads<T>{keys.from + to_values, keys.step, keys.rows, keys.width}.ask(part, parts);
  }
};

// What the last vector of a row of products is filled up with, that no product be below: 0 for those that are there.
CONVDIT_INLINE Vec<float> fill_of(int64_t keys) {
  Vec<float> fill{};
  for (int i = 0; i < kFloats; ++i) fill[i] = i > (keys - 1) % kFloats ? -INFINITY : 0;
  return fill;
}
CONVDIT_INLINE void fill_up(float* row, int64_t keys, Vec<float> fill) {
  float* last = row + (keys - 1) / kFloats * kFloats;
  store(last, load(last) + fill);
}

// Some values, `by` times.
template <class T>
CONVDIT_INLINE void write_row(const float* from, int64_t count, float by, T* to) {
  for_each_vector<float>(
      count, [&](int64_t i, int64_t n, auto full) CONVDIT_FLAT { store_lanes<decltype(full)::value>(to + i, load(from + i) * by, n); });
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
