#include "traffic.h"

#include <algorithm>
#include <map>

namespace simt::traffic {

bool enabled;

namespace {

// The k-th execution of an instruction by each lane of a warp is taken for one request of the warp: so it is in code where the
// lanes stay together.
struct Request {
  uint32_t mask = 0, bytes = 0;
  uint64_t address[kLanes];
};
struct Site {
  uint32_t executed[kLanes] = {};
  std::vector<Request> requests;
};
std::vector<Count> result;
std::map<std::pair<uint32_t, int>, Site> sites;  // by warp and instruction, of the present block

int64_t distinct(uint64_t* values, int n) {
  std::sort(values, values + n);
  return std::unique(values, values + n) - values;
}

bool is_shared(uint64_t address) { return address - shared_window < kSharedWindow; }

int64_t wavefronts(uint64_t* words, int n) {
  int bank[32] = {}, most = 0;
  const int64_t different = distinct(words, n);
  for (int64_t i = 0; i < different; ++i) most = std::max(most, ++bank[words[i] % 32]);
  return most;
}

void add(Count& c, const Request& r) {
  uint64_t units[4 * kLanes];
  ++c.requests;
  c.lanes += __builtin_popcount(r.mask);
  c.shared = is_shared(r.address[__builtin_ctz(r.mask)]);
  if (!c.shared) {
    int n = 0;
    for (int l = 0; l < kLanes; ++l)
      if (r.mask >> l & 1) units[n++] = r.address[l] / 32;
    c.units += distinct(units, n);
    n = 0;
    for (int l = 0; l < kLanes; ++l)
      if (r.mask >> l & 1) units[n++] = r.address[l];
    c.ideal += (distinct(units, n) * r.bytes + 31) / 32;
    return;
  }
  // Accesses of 8 and 16 bytes are served a half or a quarter of the warp at a time.
  const int together = r.bytes <= 4 ? 32 : r.bytes == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += together) {
    int n = 0;
    for (int l = first; l < first + together; ++l)
      if (r.mask >> l & 1)
        for (uint32_t b = 0; b < r.bytes; b += 4) units[n++] = (r.address[l] + b) / 4;
    if (n) c.units += wavefronts(units, n), ++c.ideal;
  }
}

}  // namespace

void begin(const Kernel& kernel) {
  result.assign(kernel.site_count, {});
  sites.clear();
}

void count(Thread& t, int site, uint64_t address, uint32_t bytes) {
  Site& s = sites[{t.flat / kLanes, site}];
  const uint32_t k = s.executed[t.lane]++;
  if (k >= s.requests.size()) s.requests.resize(k + 1);
  Request& r = s.requests[k];
  r.mask |= 1u << t.lane, r.bytes = bytes, r.address[t.lane] = address;
}

void count_matrix(const Thread* lanes, int matrix) {
  if (!enabled) return;
  Count& c = result[lanes->site];
  uint64_t words[32];
  for (int row = 0; row < 8; ++row)
    for (int i = 0; i < 4; ++i) words[row * 4 + i] = lanes[8 * matrix + row].in[0] / 4 + i;
  if (matrix == 0) ++c.requests, c.lanes += kLanes;
  c.shared = true, c.units += wavefronts(words, 32), ++c.ideal;
}

void end_block() {
  for (const auto& [key, site] : sites)
    for (const Request& r : site.requests)
      if (r.mask) add(result[key.second], r);
  sites.clear();
}

const std::vector<Count>& counts() { return result; }

}  // namespace simt::traffic
