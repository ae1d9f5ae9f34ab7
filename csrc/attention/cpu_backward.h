// Attention backward: for a block of keys and a block of queries, weights and slopes (the gradient of scores) are kept, tile by tile of
// queries, which adds to the gradient of queries; then keys and values get theirs, tile by tile of keys.
#pragma once
#include "attention/cpu_common.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kQueryBlock = 140;  // their weights stay in the second-level cache

struct BackwardLayout : Layout {
  Cut blocks, query_blocks;
  int64_t width, keys, values, key_rows, query_rows, grad_rows, queries, grads, weights, slopes, delta, grad_q, grad_k, grad_v;
  explicit BackwardLayout(const Attention& p)
      : blocks(key_blocks(p)), query_blocks(p.tokens, kQueryBlock), width(round_up(p.head_dim, kFloats)) {
    const int64_t most = largest_part(blocks), most_queries = largest_part(query_blocks), panels = round_up(p.head_dim, kColumns);
    keys = reserve(most * p.head_dim), values = reserve(most * p.head_dim), key_rows = reserve(most * panels);
    query_rows = reserve(most_queries * panels), grad_rows = reserve(most_queries * panels);
    queries = reserve(kTurnedRows * p.head_dim), grads = reserve(kTurnedRows * p.head_dim);
    weights = reserve(most_queries * kScoreStep), slopes = reserve(most_queries * kScoreStep), delta = reserve(p.tokens);
    grad_q = reserve(p.tokens * width), grad_k = reserve(most * width), grad_v = reserve(most * width);
  }
};

// How a head is shared out. Whole, it takes five products; in `parts` by its queries, for their gradient, and as many by its keys, for
// the gradients of keys and values, seven. A row of slopes is finished where all its keys are (slope()): then it is not cut.
int64_t head_parts(const Attention& p, int64_t threads) {
  const int64_t heads = p.batch * p.heads;
  if (key_blocks(p).parts == 1) return 1;
  return 7 * heads < 5 * threads * ceil_div(heads, threads) ? ceil_div(2 * threads, heads) : 1;
}

// Weights, and their gradient before the softmax, from products and from the gradient of weights: a row of each, in place. The latter sum
// to 0 over all keys; where all are here, what rounding left of that is taken out, since it may be most of a small gradient.
CONVDIT_INLINE void slope(float* weights, float* slopes, int64_t keys, Vec<float> fill, bool all_keys, float scale, float log_sum_exp,
                          float delta) {
  fill_up(weights, keys, fill);
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
  const Scale scale = split(p.scale);
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

    for (int64_t block = 0; block < at.blocks.parts; ++block) {
      const int64_t first_key = larger(at.blocks[block].first, t.keys.first), last_key = smaller(at.blocks[block].last, t.keys.last);
      const int64_t count = last_key - first_key;
      if (count <= 0) continue;
      const bool first_block = first_key == t.keys.first, last_block = last_key == t.keys.last;
      const NextKeys<T> next_block{{k + last_key * qkv_step, qkv_step, smaller(t.keys.last - last_key, count), d}, step};
      const NextKeys<T>& next_keys = last_block ? next_head : next_block;
      for (int64_t j = 0; j < count; j += kColumns) {
        const int64_t columns = smaller(count - j, kColumns), row = (first_key + j) * qkv_step;
        turn<kColumns>(k + row, qkv_step, columns, d, 1.f, keys + j * d);
        turn<kColumns>(v + row, qkv_step, columns, d, 1.f, values + j * d);
        if (t.of_queries) pack(k + first_key * qkv_step, qkv_step, j, j + columns, count, d, 1.f, key_rows);
      }
      const Vec<float> fill = fill_of(count);
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
          multiply<1>(rows, scratch + at.queries, kTurnedRows, keys, d, count, false, tile_weights, kScoreStep, ask);
          multiply<1>(rows, scratch + at.grads, kTurnedRows, values, d, count, false, tile_slopes, kScoreStep, nothing);
          for (int64_t row = 0; row < rows; ++row) {
            float& delta_here = delta[token + row];
            if (first_block) delta_here = product_of(grad + (token + row) * step, out + (token + row) * step);
            slope(tile_weights + row * kScoreStep, tile_slopes + row * kScoreStep, count, fill, count == p.tokens, scale.of_products,
                  log_sum_exp[(token + row) * p.heads], delta_here);
          }
          if (!t.of_queries) continue;
          float* grad_q = scratch + at.grad_q + token * at.width;
          multiply<kScoreStep>(rows, tile_slopes, 1, key_rows, count, d, !first_block, grad_q, at.width, nothing);
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
            multiply<1>(rows, left + first, kScoreStep, scratch + right, queries, d, first_query > t.queries.first, here, at.width,
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
    for (int64_t row = 0; row < rows; ++row) write_row(from + row * at.width, d, by, to + row * 3 * step);
  }

  void operator()() const {
    const int64_t tasks = p.batch * p.heads * (parts == 1 ? 1 : 2 * parts);
    run_in_scratch(p, run, tasks, useful_threads(p, run.threads), at.size, [&](int64_t number, int64_t upcoming, float* scratch) {
      const Task next = task(upcoming);
      const int64_t rows = upcoming < tasks ? smaller(at.blocks[0].last, next.keys.last - next.keys.first) : 0;
      compute(task(number), {{queries_of(next) + step + next.keys.first * p.token_stride, p.token_stride, rows, d}, step}, scratch);
    });
  }
};

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
