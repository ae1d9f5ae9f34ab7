// Memory that is needed soon, fetched to the second-level cache in equal steps: all at once, the lines would hold up the loads that
// are waited for. In the order of memory, since the CPU's own prefetchers then join in; a loop over vectors of channels
// goes from site to site in steps that they do not follow, and alone it waits for a few lines at a time.
#pragma once
#include "common/unroll.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

// A run of lines that a kernel fetches itself, two at a time between its products: as many as wait for memory without holding up
// the kernel's own loads.
struct Lines {
  static constexpr int64_t kLine = 64;
  const char *next = nullptr, *end = nullptr;
  CONVDIT_INLINE void two() {
    for (int i = 0; i < 2 && next != end; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
  }
  CONVDIT_INLINE void rest() {
    for (; next != end; next += kLine) __builtin_prefetch(next, 0, 2);
  }
};

class Ahead {
 public:
  Ahead() = default;
  // `count` pieces of `bytes`, `apart` bytes from one to the next.
  Ahead(const void* from, int64_t bytes, int64_t apart, int64_t count, int64_t steps) {
    if (bytes == apart) bytes *= count, apart = bytes, count = 1;
    piece_ = ceil_div(bytes, kLine) * kLine, gap_ = apart - piece_;
    next_ = end_ = static_cast<const char*>(from) - gap_;
    pieces_ = count, lines_ = ceil_div(piece_ / kLine * count, larger(steps, 1));
  }
  Ahead(const void* from, int64_t bytes, int64_t steps) : Ahead(from, bytes, bytes, 1, steps) {}
  CONVDIT_INLINE void step(int64_t count = 1) { fetch(count * lines_); }
  // A step whose lines the caller fetches; those in a further piece are fetched at once.
  CONVDIT_INLINE Lines take(int64_t count = 1) {
    int64_t left = count * lines_;
    const Lines lines = run(left);
    fetch(left);
    return lines;
  }

 private:
  static constexpr int64_t kLine = Lines::kLine;
  // The next lines that lie side by side, at most `left`, of which they are then taken.
  CONVDIT_INLINE Lines run(int64_t& left) {
    if (next_ == end_) {
      if (pieces_ == 0) return left = 0, Lines{};
      --pieces_, next_ += gap_, end_ = next_ + piece_;
    }
    const int64_t lines = smaller(left, (end_ - next_) / kLine);
    const char* first = next_;
    left -= lines, next_ += lines * kLine;
    return {first, next_};
  }
  CONVDIT_INLINE void fetch(int64_t left) {
    while (left > 0) run(left).rest();
  }

  const char *next_ = nullptr, *end_ = nullptr;
  int64_t piece_ = 0, gap_ = 0, pieces_ = 0, lines_ = 0;  // lines_: a step
};

}  // namespace
}  // namespace convdit::CONVDIT_LEVEL
