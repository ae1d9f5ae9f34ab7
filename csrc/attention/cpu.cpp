// CPU kernels of attention, in float32 and from halves; see attention.h for the formulas. A head's keys are taken block by block, each
// packed once for many queries; a tile of queries meets all keys of a block, so that its scores stay in the first-level cache between
// one product and the next (Dao et al. 2022). What a result is does not depend on how the work is cut up for the threads.
#include "attention/attention.h"

#include "attention/tile.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kMostKeys = 256;               // of a block,
constexpr int64_t kBlockFloats = 1 << 16;        // and at most so many values, where heads are wide
constexpr int64_t kMostQueries = 448;            // of a task of the forward that has several blocks of keys
constexpr int64_t kQueryBlock = 140;             // of the backward: their weights stay in the second-level cache
constexpr int64_t kScoreStep = kMostKeys + 16;   // rows of a tile fall into different sets of the cache
constexpr int64_t kSmallestShare = 1 << 18;      // multiply-adds that are worth another thread

Cut key_blocks(const Attention& p) {
  const int64_t fitting = kBlockFloats / p.head_dim / kColumns * kColumns;
  return {p.tokens, larger(smaller(fitting, kMostKeys), kColumns), kColumns};
}
// The most of a part.
int64_t largest_part(const Cut& cut) { return round_up(ceil_div(cut.n, cut.parts), cut.unit); }

// Where a task's arrays lie in its scratch.
struct Layout {
  int64_t floats = 0;
  int64_t take(int64_t count) {
    const int64_t at = floats;
    floats += round_up(count, 64 / sizeof(float));
    return at;
  }
};

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
  const auto step = [&]<int Step, int... L>(std::integer_sequence<int, L...>) CONVDIT_FLAT {
    v = f(v, pick<float, (L + Step) % kFloats...>(v, v));
  };
  constexpr auto all = std::make_integer_sequence<int, kFloats>{};
  if constexpr (kFloats > 8) step.template operator()<8>(all);
  if constexpr (kFloats > 4) step.template operator()<4>(all);
  step.template operator()<2>(all);
  step.template operator()<1>(all);
  return v;
}

// Scores are scaled as they become weights, where that does not round them once more; the sign goes into the queries, for a largest score
// to be one of the largest products.
struct Scale {
  float of_queries, of_products;
  explicit Scale(double scale)
      : of_queries(scale == 0 ? 0.f : scale < 0 ? -1.f : 1.f), of_products(scale == 0 ? 1.f : static_cast<float>(scale < 0 ? -scale : scale)) {}
};

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

// ---- forward -----------------------------------------------------------------------------------------------------
struct ForwardLayout : Layout {
  Cut blocks;
  int64_t width, keys, values, queries, scores, out, largest, sums;
  ForwardLayout(const Attention& p, int64_t most_queries) : blocks(key_blocks(p)), width(round_up(p.head_dim, kFloats)) {
    const int64_t most = largest_part(blocks);
    keys = take(most * p.head_dim), values = take(most * round_up(p.head_dim, kColumns));
    queries = take(kTurnedRows * p.head_dim), scores = take(kRows * kScoreStep);
    out = take(most_queries * width), largest = take(most_queries), sums = take(most_queries);
  }
};

// How a head's queries are shared out: to all threads, several times over.
Cut query_parts(const Attention& p, int64_t threads) {
  const int64_t tasks = threads > 1 ? 4 * threads : 1, least = 4 * kRows;
  return {p.tokens, larger(smaller(ceil_div(p.tokens * p.batch * p.heads, tasks), kMostQueries), least)};
}

// What the last vector of a row of products is filled up with, that no product be below: 0 for those that are there.
CONVDIT_INLINE Vec<float> fill_of(int64_t keys) {
  Vec<float> fill{};
  for (int i = 0; i < kFloats; ++i) fill[i] = i > (keys - 1) % kFloats ? -INFINITY : 0;
  return fill;
}

// The largest product of a row so far. Fills the last vector up with what no product is below.
CONVDIT_INLINE float largest_of(float* row, int64_t keys, Vec<float> absent, float before) {
  const int64_t last = (keys - 1) / kFloats * kFloats;
  store(row + last, load(row + last) + absent);
  Vec<float> top[2] = {splat(before), splat(before)};  // two chains: one would take as long as the exponentials
  for (int64_t i = 0; i < last; i += 2 * kFloats) unroll<2>(CONVDIT_UNROLLED(C) { top[C] = vmax(top[C], load(row + i + C * kFloats)); });
  top[0] = vmax(top[0], load(row + last));
  return reduce(vmax(top[0], top[1]), [](Vec<float> a, Vec<float> b) CONVDIT_FLAT { return vmax(a, b); })[0];
}

// A row of products to weights, shifted by the largest so far; returns their sum.
CONVDIT_INLINE float weigh(float* row, int64_t keys, float scale, float largest) {
  Vec<float> sum{};
  for (int64_t i = 0; i < keys; i += kFloats) {
    const Vec<float> weight = exp_of_difference((load(row + i) - largest) * scale);
    store(row + i, weight);
    sum += weight;
  }
  return reduce(sum, [](Vec<float> a, Vec<float> b) CONVDIT_FLAT { return a + b; })[0];
}

template <class T>
void forward(const Attention& p, const Runner& run) {
  const int64_t d = p.head_dim, out_step = p.heads * d;
  const Cut parts = query_parts(p, run.threads);
  const ForwardLayout at(p, largest_part(parts));
  const Scale scale(p.scale);
  const int64_t tasks = p.batch * p.heads * parts.parts;
  const auto queries_of = [&](int64_t sample, int64_t head) { return static_cast<const T*>(p.qkv) + sample * p.batch_stride + head * d; };
  run_in_scratch(p, run, tasks, useful_threads(p, run.threads), at.floats, [&](int64_t task, int64_t upcoming, float* scratch) {
    const int64_t sample = task / parts.parts / p.heads, head = task / parts.parts % p.heads;
    const Range part = parts[task % parts.parts];
    const T* q = queries_of(sample, head);
    const T *k = q + out_step, *v = k + out_step;
    T* result = static_cast<T*>(p.out) + sample * p.tokens * out_step + head * d;
    float* log_sum_exp = static_cast<float*>(p.log_sum_exp) + sample * p.tokens * p.heads + head;
    float *keys = scratch + at.keys, *values = scratch + at.values, *queries = scratch + at.queries, *scores = scratch + at.scores;
    const Cut tiles(part.last - part.first, kRows);
    for (int64_t block = 0; block < at.blocks.parts; ++block) {
      const Range some = at.blocks[block];
      const int64_t count = some.last - some.first;
      const bool done = block + 1 == at.blocks.parts;
      const Range next = done ? Range{0, upcoming < tasks ? at.blocks[0].last : 0} : at.blocks[block + 1];
      const T* next_k = done ? queries_of(upcoming / parts.parts / p.heads, upcoming / parts.parts % p.heads) + out_step : k;
      const NextKeys<T> next_keys{{next_k + next.first * p.token_stride, p.token_stride, next.last - next.first, d}, out_step};
      for (int64_t j = 0; j < count; j += kColumns) {
        const int64_t columns = smaller(count - j, kColumns);
        turn<kColumns>(k + (some.first + j) * p.token_stride, p.token_stride, columns, d, 1.f, keys + j * d);
        pack(v + some.first * p.token_stride, p.token_stride, j, j + columns, count, d, 1.f, values);
      }
      const Vec<float> absent = fill_of(count);
      for (int64_t i = 0; i < tiles.parts; ++i) {
        const auto [first, last] = tiles[i];
        const int64_t rows = last - first;
        const Reads<T> next_queries{q + (part.first + last) * p.token_stride, p.token_stride, smaller(kRows, part.last - part.first - last), d};
        const Writes<T> results{result + (part.first + first) * out_step, out_step, done ? rows : 0, d};
        float *out = scratch + at.out + first * at.width, *largest = scratch + at.largest + first, *sums = scratch + at.sums + first;
        turn<kTurnedRows>(q + (part.first + first) * p.token_stride, p.token_stride, rows, d, scale.of_queries, queries);
        multiply<1, kTurnedRows>(rows, queries, keys, d, count, false, scores, kScoreStep, [&](int64_t panel, int64_t panels) CONVDIT_FLAT {
          next_queries.ask(panel, panels), results.ask(panel, panels);
          next_keys.ask(i * panels + panel, tiles.parts * panels);
        });
        float shift[kRows];
        for (int64_t row = 0; row < rows; ++row) {
          const float before = block > 0 ? largest[row] : -INFINITY, now = largest_of(scores + row * kScoreStep, count, absent, before);
          shift[row] = now == -INFINITY ? 0 : now;  // no product yet that counts
          largest[row] = now;
          if (block == 0) continue;
          const float shrink = exp_of_difference(splat((before - shift[row]) * scale.of_products))[0];
          sums[row] *= shrink;
          for (int64_t j = 0; j < at.width; j += kFloats) store(out + row * at.width + j, load(out + row * at.width + j) * shrink);
        }
        for (int64_t row = 0; row < rows; ++row)
          sums[row] = (block > 0 ? sums[row] : 0) + weigh(scores + row * kScoreStep, count, scale.of_products, shift[row]);
        multiply<kScoreStep, 1>(rows, scores, values, count, d, block > 0, out, at.width, nothing);
        if (!done) continue;
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t token = part.first + first + row;
          const float share = 1 / sums[row];
          for_each_vector<float>(d, [&](int64_t j, int64_t n, auto full) CONVDIT_FLAT {
            store_lanes<decltype(full)::value>(result + token * out_step + j, load(out + row * at.width + j) * share, n);
          });
          log_sum_exp[token * p.heads] = scale.of_products * largest[row] + ::logf(sums[row]);
        }
      }
    }
  });
}

// ---- backward ----------------------------------------------------------------------------------------------------
struct BackwardLayout : Layout {
  Cut blocks, query_blocks;
  int64_t width, keys, values, key_rows, query_rows, grad_rows, queries, grads, weights, slopes, delta, grad_q, grad_k, grad_v;
  explicit BackwardLayout(const Attention& p)
      : blocks(key_blocks(p)), query_blocks(p.tokens, kQueryBlock), width(round_up(p.head_dim, kFloats)) {
    const int64_t most = largest_part(blocks), most_queries = largest_part(query_blocks), panels = round_up(p.head_dim, kColumns);
    keys = take(most * p.head_dim), values = take(most * p.head_dim), key_rows = take(most * panels);
    query_rows = take(most_queries * panels), grad_rows = take(most_queries * panels);
    queries = take(kTurnedRows * p.head_dim), grads = take(kTurnedRows * p.head_dim);
    weights = take(most_queries * kScoreStep), slopes = take(most_queries * kScoreStep), delta = take(p.tokens);
    grad_q = take(p.tokens * width), grad_k = take(most * width), grad_v = take(most * width);
  }
};

// How a head is shared out. Whole, it takes five products; in `parts` by its queries, for their gradient, and as many by its keys, for
// the gradients of keys and values, seven.
int64_t head_parts(const Attention& p, int64_t threads) {
  const int64_t heads = p.batch * p.heads;
  return 7 * heads < 5 * threads * ceil_div(heads, threads) ? ceil_div(2 * threads, heads) : 1;
}

CONVDIT_INLINE float total(Vec<float> v) {
  return reduce(v, [](Vec<float> a, Vec<float> b) CONVDIT_FLAT { return a + b; })[0];
}

// Weights, and their gradient before the softmax, from products and from the gradient of weights: a row of each, in place. The latter sum
// to 0 over all keys; where all are here, what rounding left of that is taken out, since it may be most of a small gradient.
CONVDIT_INLINE void slope(float* weights, float* slopes, int64_t keys, Vec<float> absent, bool all_keys, float scale, float log_sum_exp,
                          float delta) {
  if (all_keys) {
    const int64_t last = (keys - 1) / kFloats * kFloats;
    store(weights + last, load(weights + last) + absent);
  }
  Vec<float> weight_sum{}, slope_sum{};
  for (int64_t i = 0; i < keys; i += kFloats) {
    const Vec<float> weight = exp_of_difference(vmin(splat(0.f), load(weights + i) * scale - log_sum_exp));  // no rounding beyond 1
    const Vec<float> slope = weight * (load(slopes + i) - delta);
    store(weights + i, weight), store(slopes + i, slope);
    weight_sum += weight, slope_sum += slope;
  }
  if (!all_keys) return;
  const float excess = total(slope_sum) / total(weight_sum);
  for (int64_t i = 0; i < keys; i += kFloats) store(slopes + i, load(slopes + i) - load(weights + i) * excess);
}

template <class T>
struct Backward {
  const AttentionBackward& b;
  const Runner& run;
  const Attention& p = b.forward;
  const BackwardLayout at{p};
  const Scale scale{p.scale};
  const int64_t d = p.head_dim, step = p.heads * d, parts = head_parts(p, run.threads);

  // The gradient of some of a head's queries, which takes all keys, or those of some keys and values, which take all queries, or all.
  struct Task {
    int64_t sample, head;
    Range queries, keys;
    bool of_queries, of_keys;
  };
  Task task(int64_t number) const {
    const int64_t a_head = parts == 1 ? 1 : 2 * parts, part = number % a_head, head = number / a_head;
    const Range all{0, p.tokens}, some = part_of(p.tokens, parts, part / 2);
    const bool of_queries = part % 2 == 0, of_keys = part % 2 == 1 || parts == 1;
    return {head / p.heads, head % p.heads, of_queries ? some : all, of_keys ? some : all, of_queries, of_keys};
  }
  const T* queries_of(const Task& t) const { return static_cast<const T*>(p.qkv) + t.sample * p.batch_stride + t.head * d; }

  void compute(const Task& t, const NextKeys<T>& next_head, float* scratch) const {
    const int64_t qkv_step = p.token_stride, before = t.sample * p.tokens * step + t.head * d;
    const T *q = queries_of(t), *k = q + step, *v = k + step;
    const T *grad = static_cast<const T*>(b.grad) + before, *out = static_cast<const T*>(p.out) + before;
    const float* log_sum_exp = static_cast<const float*>(p.log_sum_exp) + t.sample * p.tokens * p.heads + t.head;
    T* to_q = static_cast<T*>(b.grad_qkv) + t.sample * p.tokens * 3 * step + t.head * d;
    T *to_k = to_q + step, *to_v = to_k + step;
    float *keys = scratch + at.keys, *values = scratch + at.values, *key_rows = scratch + at.key_rows;
    float *weights = scratch + at.weights, *slopes = scratch + at.slopes, *delta = scratch + at.delta;
    const float whole_scale = static_cast<float>(p.scale);

    bool first_block = true;
    for (int64_t block = 0; block < at.blocks.parts; ++block, first_block = false) {
      const int64_t first_key = larger(at.blocks[block].first, t.keys.first), last_key = smaller(at.blocks[block].last, t.keys.last);
      const int64_t count = last_key - first_key;
      if (count <= 0) continue;
      const bool last_block = last_key == t.keys.last;
      const NextKeys<T> next_block{{k + last_key * qkv_step, qkv_step, smaller(t.keys.last - last_key, count), d}, step};
      const NextKeys<T>& next_keys = last_block ? next_head : next_block;
      for (int64_t j = 0; j < count; j += kColumns) {
        const int64_t columns = smaller(count - j, kColumns), row = (first_key + j) * qkv_step;
        turn<kColumns>(k + row, qkv_step, columns, d, 1.f, keys + j * d);
        turn<kColumns>(v + row, qkv_step, columns, d, 1.f, values + j * d);
        if (t.of_queries) pack(k + first_key * qkv_step, qkv_step, j, j + columns, count, d, 1.f, key_rows);
      }
      const Vec<float> absent = fill_of(count);
      for (int64_t query_block = 0; query_block < at.query_blocks.parts; ++query_block) {
        const int64_t first_query = larger(at.query_blocks[query_block].first, t.queries.first);
        const int64_t queries = smaller(at.query_blocks[query_block].last, t.queries.last) - first_query;
        if (queries <= 0) continue;
        const bool last_queries = first_query + queries == t.queries.last;
        const Cut tiles(queries, kRows);
        for (int64_t i = 0; i < tiles.parts; ++i) {
          const auto [first, last] = tiles[i];
          const int64_t rows = last - first, token = first_query + first, after = first_query + last;
          const int64_t rows_after = smaller(kRows, t.queries.last - after);
          const Reads<T> next_queries{q + after * qkv_step, qkv_step, rows_after, d}, next_grads{grad + after * step, step, rows_after, d};
          const Reads<T> next_out{out + after * step, step, first_block ? rows_after : 0, d};
          const Writes<T> results{to_q + token * 3 * step, 3 * step, last_block && t.of_queries ? rows : 0, d};
          float *tile_weights = weights + first * kScoreStep, *tile_slopes = slopes + first * kScoreStep;
          turn<kTurnedRows>(q + token * qkv_step, qkv_step, rows, d, scale.of_queries, scratch + at.queries);
          turn<kTurnedRows>(grad + token * step, step, rows, d, 1.f, scratch + at.grads);
          if (t.of_keys) {
            pack(q + first_query * qkv_step, qkv_step, first, last, queries, d, whole_scale, scratch + at.query_rows);
            pack(grad + first_query * step, step, first, last, queries, d, 1.f, scratch + at.grad_rows);
          }
          const auto ask = [&](int64_t panel, int64_t panels) CONVDIT_FLAT {
            next_queries.ask(panel, panels), next_grads.ask(panel, panels), next_out.ask(panel, panels), results.ask(panel, panels);
            if (last_queries) next_keys.ask(i * panels + panel, tiles.parts * panels);
          };
          multiply<1, kTurnedRows>(rows, scratch + at.queries, keys, d, count, false, tile_weights, kScoreStep, ask);
          multiply<1, kTurnedRows>(rows, scratch + at.grads, values, d, count, false, tile_slopes, kScoreStep, nothing);
          for (int64_t row = 0; row < rows; ++row) {
            float& delta_here = delta[token + row];
            if (first_block) delta_here = product_of(grad + (token + row) * step, out + (token + row) * step);
            slope(tile_weights + row * kScoreStep, tile_slopes + row * kScoreStep, count, absent, count == p.tokens, scale.of_products,
                  log_sum_exp[(token + row) * p.heads], delta_here);
          }
          if (!t.of_queries) continue;
          float* grad_q = scratch + at.grad_q + token * at.width;
          multiply<kScoreStep, 1>(rows, tile_slopes, key_rows, count, d, !first_block, grad_q, at.width, nothing);
          if (last_block) write_rows(grad_q, rows, whole_scale, to_q + token * 3 * step);
        }
        if (!t.of_keys) continue;
        const Cut key_tiles(count, kRows);
        for (int64_t i = 0; i < key_tiles.parts; ++i) {
          const auto [first, last] = key_tiles[i];
          const auto add = [&](const float* left, int64_t right, int64_t sum, T* to) {
            const int64_t rows = last - first;
            float* here = scratch + sum + first * at.width;
            const Writes<T> results{to, 3 * step, last_queries ? rows : 0, d};
            multiply<1, kScoreStep>(rows, left + first, scratch + right, queries, d, first_query > t.queries.first, here, at.width,
                                    [&](int64_t panel, int64_t panels) CONVDIT_FLAT { results.ask(panel, panels); });
            if (last_queries) write_rows(here, rows, 1.f, to);
          };
          add(weights, at.grad_rows, at.grad_v, to_v + (first_key + first) * 3 * step);
          add(slopes, at.query_rows, at.grad_k, to_k + (first_key + first) * 3 * step);
        }
      }
    }
  }

  CONVDIT_INLINE float product_of(const T* a, const T* c) const {
    return sum_vectors<float>(d, [&](int64_t j, int64_t n, auto full) CONVDIT_FLAT {
      return load_lanes<decltype(full)::value>(a + j, n) * load_lanes<decltype(full)::value>(c + j, n);
    });
  }

  void write_rows(const float* from, int64_t rows, float by, T* to) const {
    for (int64_t row = 0; row < rows; ++row)
      for_each_vector<float>(d, [&](int64_t j, int64_t n, auto full) CONVDIT_FLAT {
        store_lanes<decltype(full)::value>(to + row * 3 * step + j, load(from + row * at.width + j) * by, n);
      });
  }

  void operator()() const {
    const int64_t tasks = p.batch * p.heads * (parts == 1 ? 1 : 2 * parts);
    run_in_scratch(p, run, tasks, useful_threads(p, run.threads), at.floats, [&](int64_t number, int64_t upcoming, float* scratch) {
      const Task next = task(upcoming);
      const int64_t rows = upcoming < tasks ? smaller(at.blocks[0].last, next.keys.last - next.keys.first) : 0;
      compute(task(number), {{queries_of(next) + step + next.keys.first * p.token_stride, p.token_stride, rows, d}, step}, scratch);
    });
  }
};

// ---- by dtype ----------------------------------------------------------------------------------------------------
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
  return useful_threads(p, threads) * ForwardLayout(p, largest_part(query_parts(p, threads))).floats;
}
int64_t backward_scratch(const Attention& p, int64_t threads) { return useful_threads(p, threads) * BackwardLayout(p).floats; }

}  // namespace

extern const AttentionKernels attention = {dispatch_forward, dispatch_backward, forward_scratch, backward_scratch};

}  // namespace convdit::CONVDIT_LEVEL
