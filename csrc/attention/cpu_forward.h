// Attention forward: for a tile of queries, products with a block of keys become weights by the largest so far, and those times the
// values are added to what earlier blocks gave, shrunk to the same largest.
#pragma once
#include "attention/cpu_common.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kMostQueries = 448;  // of a task: their results stay in the second-level cache from one block of keys to the next

struct ForwardLayout : Layout {
  Cut blocks;
  int64_t width, keys, values, queries, scores, out, largest, sums;
  ForwardLayout(const Attention& p, int64_t most_queries) : blocks(key_blocks(p)), width(round_up(p.head_dim, kFloats)) {
    const int64_t most = largest_part(blocks);
    keys = reserve(most * p.head_dim), values = reserve(most * round_up(p.head_dim, kColumns));
    queries = reserve(kTurnedRows * p.head_dim), scores = reserve(kRows * kScoreStep);
    out = reserve(most_queries * width), largest = reserve(most_queries), sums = reserve(most_queries);
  }
};

// How a head's queries are shared out: to all threads, several times over.
Cut query_parts(const Attention& p, int64_t threads) {
  const int64_t tasks = threads > 1 ? 4 * threads : 1, least = 4 * kRows;
  return {p.tokens, larger(smaller(ceil_div(p.tokens * p.batch * p.heads, tasks), kMostQueries), least)};
}

// The largest product of a row, filled up, so far.
CONVDIT_INLINE float largest_of(const float* row, int64_t keys, float before) {
  const int64_t last = (keys - 1) / kFloats * kFloats;
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
  return total(sum);
}

template <class T>
void forward(const Attention& p, const Runner& run) {
  const int64_t d = p.head_dim, out_step = p.heads * d;
  const Cut parts = query_parts(p, run.threads);
  const ForwardLayout at(p, largest_part(parts));
  const Scale scale = split(p.scale);
  const int64_t tasks = p.batch * p.heads * parts.parts;
  const auto queries_of = [&](int64_t sample, int64_t head) { return static_cast<const T*>(p.qkv) + sample * p.batch_stride + head * d; };
  run_in_scratch(p, run, tasks, useful_threads(p, run.threads), at.size, [&](int64_t task, int64_t upcoming, float* scratch) {
    const int64_t sample = task / parts.parts / p.heads, head = task / parts.parts % p.heads;
    const Range part = parts[task % parts.parts];
    const T* q = queries_of(sample, head);
    const T *k = q + out_step, *v = k + out_step;
    T* result = static_cast<T*>(p.out) + sample * p.tokens * out_step + head * d;
    float* log_sum_exp = p.log_sum_exp == nullptr ? nullptr : static_cast<float*>(p.log_sum_exp) + sample * p.tokens * p.heads + head;
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
      const Vec<float> fill = fill_of(count);
      for (int64_t i = 0; i < tiles.parts; ++i) {
        const auto [first, last] = tiles[i];
        const int64_t rows = last - first;
        const Reads<T> next_queries{q + (part.first + last) * p.token_stride, p.token_stride, smaller(kRows, part.last - part.first - last),
                                    d};
        const Writes<T> results{result + (part.first + first) * out_step, out_step, done ? rows : 0, d};
        float *out = scratch + at.out + first * at.width, *largest = scratch + at.largest + first, *sums = scratch + at.sums + first;
        turn<kTurnedRows>(q + (part.first + first) * p.token_stride, p.token_stride, rows, d, scale.of_queries, queries);
        multiply<1>(rows, queries, kTurnedRows, keys, d, count, false, scores, kScoreStep, [&](int64_t panel, int64_t panels) CONVDIT_FLAT {
          next_queries.ask(panel, panels), results.ask(panel, panels);
          next_keys.ask(i * panels + panel, tiles.parts * panels);
        });
        float shift[kRows];
        for (int64_t row = 0; row < rows; ++row) {
          fill_up(scores + row * kScoreStep, count, fill);
          const float before = block > 0 ? largest[row] : -INFINITY, now = largest_of(scores + row * kScoreStep, count, before);
          shift[row] = now == -INFINITY ? 0 : now;  // no product yet that counts
          largest[row] = now;
          if (block == 0) continue;
          const float shrink = exp_of_difference(splat((before - shift[row]) * scale.of_products))[0];
          sums[row] *= shrink;
          for (int64_t j = 0; j < at.width; j += kFloats) store(out + row * at.width + j, load(out + row * at.width + j) * shrink);
        }
        for (int64_t row = 0; row < rows; ++row)
          sums[row] = (block > 0 ? sums[row] : 0) + weigh(scores + row * kScoreStep, count, scale.of_products, shift[row]);
        multiply<kScoreStep>(rows, scores, 1, values, count, d, block > 0, out, at.width, nothing);
        if (!done) continue;
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t token = part.first + first + row;
          write_row(out + row * at.width, d, 1 / sums[row], result + token * out_step);
          if (log_sum_exp != nullptr) log_sum_exp[token * p.heads] = scale.of_products * largest[row] + ::logf(sums[row]);
        }
      }
    }
  });
}

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
