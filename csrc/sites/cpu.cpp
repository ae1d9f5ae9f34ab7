// CPU kernel of the table of neighbours: every site writes its row into a map, then reads its window of the map.
#include "sites/sites.h"

namespace convdit::CONVDIT_LEVEL {
namespace {

constexpr int64_t kSitesPerTask = 256;

bool inside(const Neighbors& p, const int32_t* site) {
  return site[0] >= 0 && site[0] < p.images && site[1] >= 0 && site[1] < p.height && site[2] >= 0 && site[2] < p.width;
}

void fill_map(const Neighbors& p) {
  *p.outside = -1;
  for (int64_t i = 0, cells = p.images * p.height * p.width; i < cells; ++i) p.map[i] = -1;
  for (int64_t row = 0; row < p.count; ++row) {
    const int32_t* site = p.indices + 3 * row;
    if (!inside(p, site)) {
      *p.outside = row;
      return;
    }
    p.map[(site[0] * p.height + site[1]) * p.width + site[2]] = static_cast<int32_t>(row);
  }
}

void read_window(const Neighbors& p, int64_t row) {
  const int32_t* site = p.indices + 3 * row;
  const int64_t side = 2 * p.radius + 1, left = site[2] - p.radius;
  const int64_t begin = left < 0 ? -left : 0, end = left + side > p.width ? p.width - left : side;
  int32_t* out = p.table + row * side * side;
  for (int64_t dy = 0; dy < side; ++dy, out += side) {
    const int64_t y = site[1] + dy - p.radius;
    if (y < 0 || y >= p.height) {
      for (int64_t dx = 0; dx < side; ++dx) out[dx] = -1;
      continue;
    }
    const int32_t* line = p.map + (site[0] * p.height + y) * p.width + left;
    for (int64_t dx = 0; dx < begin; ++dx) out[dx] = -1;
    for (int64_t dx = begin; dx < end; ++dx) out[dx] = line[dx];
    for (int64_t dx = end; dx < side; ++dx) out[dx] = -1;
  }
}

void neighbors(const Neighbors& p, const Runner& run) {
  fill_map(p);
  if (*p.outside >= 0) return;
  run((p.count + kSitesPerTask - 1) / kSitesPerTask, [&](int64_t task) {
    const int64_t first = task * kSitesPerTask, end = first + kSitesPerTask;
    for (int64_t row = first; row < (end < p.count ? end : p.count); ++row) read_window(p, row);
  });
}

}  // namespace

extern const SitesKernels sites = {neighbors};

}  // namespace convdit::CONVDIT_LEVEL
