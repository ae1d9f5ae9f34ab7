#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>

#include "executor.h"
#include "traffic.h"

namespace simt {

uint64_t shared_window;

namespace {

enum Flag : uint8_t { kInitialised = 1, kAtomicWrite = 2, kManyWarpsRead = 4, kOtherBlocksRead = 8, kInFlight = 16 };

constexpr uint16_t kPattern = 0xffe5;           // a NaN in every floating-point dtype
constexpr uint64_t kGap = 64 * 1024;            // regions begin at multiples of it and have as much free space behind them
constexpr uint64_t kArena = uint64_t{1} << 40;  // address space, not memory
constexpr size_t kQuarantine = 256;             // released arrays of one size that wait before their addresses are used again

struct Arena {
  char* begin = nullptr;
  uint64_t used = 0;
  std::map<uint64_t, std::unique_ptr<Region>> regions;  // by base
  std::map<uint64_t, std::deque<uint64_t>> released;    // by size
  std::vector<Region*> touched;                         // by the present launch
  std::unique_ptr<Region> shared = std::make_unique<Region>();
  uint64_t run = 0;
  Region* recent[4096] = {};  // by address
};
Arena& arena() {
  static Arena& a = *new Arena;  // never destroyed: tensors may be released at exit
  return a;
}

uint64_t space_for(uint64_t bytes) { return (bytes + kGap - 1) / kGap * kGap + kGap; }

Region* find(uint64_t address, uint32_t bytes) {
  Arena& a = arena();
  Region*& recent = a.recent[address / kGap % 4096];
  const auto inside = [&](const Region* r) { return address >= r->base && address + bytes <= r->base + r->bytes; };
  if (recent && inside(recent)) return recent;
  auto next = a.regions.upper_bound(address);
  if (next == a.regions.begin() || !inside(std::prev(next)->second.get())) return nullptr;
  return recent = std::prev(next)->second.get();
}

// Which array an address outside all of them is next to.
std::string nearest(uint64_t address) {
  const auto& regions = arena().regions;
  auto next = regions.upper_bound(address);
  if (next == regions.begin()) return "no array";
  const Region& r = *std::prev(next)->second;
  const uint64_t beyond = address - r.base - r.bytes;
  if (address < r.base + r.bytes) return "across the end of an array of " + std::to_string(r.bytes) + " bytes";
  if (beyond < kGap) return std::to_string(beyond) + " bytes behind an array of " + std::to_string(r.bytes) + " bytes";
  if (next != regions.end() && next->first - address <= kGap)
    return std::to_string(next->first - address) + " bytes before an array";
  return "no array";
}

bool has_pattern(const Region& r, uint64_t offset, int shift) {
  const char* p = reinterpret_cast<const char*>(r.base + offset);
  const uint64_t left = r.bytes - offset;
  uint16_t half[2] = {kPattern, kPattern};
  memcpy(half, p, std::min<uint64_t>(left, shift == 2 ? 4 : 2));
  return half[0] == kPattern && half[1] == kPattern && left >= 2;
}

void initialise(Region& r) {
  r.cells.assign((r.bytes + (1 << r.shift) - 1) >> r.shift, Cell{});
  if (r.shared) return;
  for (uint64_t i = 0; i < r.cells.size(); ++i)
    if (!has_pattern(r, (i << r.shift) & ~uint64_t{1}, r.shift)) r.cells[i].flags = kInitialised;
}

// Cells of half the size, until accesses of `bytes` are whole cells.
void refine(Region& r, uint32_t bytes) {
  while ((1u << r.shift) > bytes) {
    --r.shift;
    std::vector<Cell> finer((r.bytes + (1 << r.shift) - 1) >> r.shift);
    for (uint64_t i = 0; i < finer.size(); ++i) {
      finer[i] = r.cells[i / 2];
      if (!r.shared && finer[i].write_epoch == 0 && has_pattern(r, (i << r.shift) & ~uint64_t{1}, r.shift))
        finer[i].flags &= ~kInitialised;
    }
    r.cells = std::move(finer);
  }
}

Region& prepared(Region& r, uint32_t bytes) {
  Arena& a = arena();
  if (r.run != a.run) {
    r.run = a.run;
    r.written = false;
    r.sectors.assign((r.bytes + 31) / 32, 0);
    initialise(r);
    if (std::find(a.touched.begin(), a.touched.end(), &r) == a.touched.end()) a.touched.push_back(&r);
  }
  if ((1u << r.shift) > bytes) refine(r, bytes);
  return r;
}

bool happened_before(const Thread& t, uint32_t lanes, uint32_t clock) {
  for (int l = 0; l < kLanes; ++l)
    if (lanes >> l & 1 && uint32_t(l) != t.lane && t.ordered[l] < clock) return false;
  return true;
}

enum class Order { kBefore, kRace, kBlocksRace };

// The last write of the cell and what t does now.
Order after_write(const Thread& t, const Cell& c, bool shared) {
  const Block& b = *t.block;
  if (c.write_epoch < b.first_epoch) return c.write_epoch && !shared ? Order::kBlocksRace : Order::kBefore;
  if (c.write_epoch != b.epoch || c.writer == t.flat) return Order::kBefore;
  if (c.writer / kLanes != t.flat / kLanes) return Order::kRace;
  return t.ordered[c.writer % kLanes] >= c.write_clock ? Order::kBefore : Order::kRace;
}

// The reads since the last write, and a write of t now.
Order after_reads(const Thread& t, const Cell& c, bool shared) {
  const Block& b = *t.block;
  if (!shared && (c.flags & kOtherBlocksRead || (c.read_epoch && c.read_epoch < b.first_epoch))) return Order::kBlocksRace;
  if (c.read_epoch != b.epoch) return Order::kBefore;
  if (c.flags & kManyWarpsRead || c.reader_warp != t.flat / kLanes) return Order::kRace;
  return happened_before(t, c.read_lanes, c.read_clock) ? Order::kBefore : Order::kRace;
}

void read_cell(Thread& t, int site, Cell& c, bool shared) {
  const Block& b = *t.block;
  const bool of_block = c.write_epoch >= b.first_epoch;
  if (c.flags & kInFlight && of_block)
    report(t, site, "READ BEFORE cp.async HAS BEEN WAITED FOR");
  else if (!of_block && (shared || !(c.flags & kInitialised)))
    report(t, site, "UNINITIALISED READ");
  if (const Order order = after_write(t, c, shared); order != Order::kBefore)
    report(t, site, order == Order::kRace ? "RACE: read after an unordered write" : "RACE BETWEEN BLOCKS: read after a write");
  const uint8_t warp = t.flat / kLanes;
  if (c.read_epoch != b.epoch) {
    if (!shared && c.read_epoch && c.read_epoch < b.first_epoch) c.flags |= kOtherBlocksRead;
    c.flags &= ~kManyWarpsRead;
    c.read_epoch = b.epoch, c.read_clock = t.clock, c.read_lanes = 1u << t.lane, c.reader_warp = warp;
  } else if (c.reader_warp != warp) {
    c.flags |= kManyWarpsRead;
  } else {
    if (c.read_clock < t.clock && happened_before(t, c.read_lanes, c.read_clock)) c.read_lanes = 0;
    c.read_lanes |= 1u << t.lane;
    c.read_clock = std::max(c.read_clock, t.clock);
  }
}

void write_cell(Thread& t, int site, Cell& c, bool shared, Access kind) {
  const Block& b = *t.block;
  const bool atomic = kind == Access::kAtomic, of_block = c.write_epoch >= b.first_epoch;
  if (atomic && !of_block && (shared || !(c.flags & kInitialised))) report(t, site, "UNINITIALISED READ");
  if (c.flags & kInFlight && of_block) report(t, site, "WRITE BEFORE cp.async HAS BEEN WAITED FOR");
  if (const Order order = after_write(t, c, shared); order != Order::kBefore && !(atomic && c.flags & kAtomicWrite))
    report(t, site, order == Order::kRace ? "RACE: write after an unordered write" : "RACE BETWEEN BLOCKS: write after a write");
  if (const Order order = after_reads(t, c, shared); order != Order::kBefore)
    report(t, site, order == Order::kRace ? "RACE: write after an unordered read" : "RACE BETWEEN BLOCKS: write after a read");
  c.flags = kInitialised | (atomic ? kAtomicWrite : 0);
  c.write_epoch = b.epoch, c.write_clock = t.clock, c.writer = static_cast<uint16_t>(t.flat);
  c.read_epoch = 0;
}

template <class F>
void each_cell(Region& r, uint64_t offset, uint32_t bytes, const F& f) {
  for (uint64_t i = offset >> r.shift; i <= (offset + bytes - 1) >> r.shift; ++i) f(r.cells[i]);
}

void touch(Thread& t, int site, Region& r, uint64_t offset, uint32_t bytes, Access kind) {
  if (kind == Access::kRead)
    each_cell(r, offset, bytes, [&](Cell& c) { read_cell(t, site, c, r.shared); });
  else
    each_cell(r, offset, bytes, [&](Cell& c) { write_cell(t, site, c, r.shared, kind); });
}

// Where a bad access goes: reads give zeros, writes are lost.
void* nowhere() {
  alignas(16) static char place[16];
  memset(place, 0, sizeof place);
  return place;
}

std::string hexadecimal(uint64_t x) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

}  // namespace

Memory::Memory(const char* name, void* address, uint64_t bytes) {
  auto region = std::make_unique<Region>();
  region->name = name, region->base = reinterpret_cast<uint64_t>(address), region->bytes = bytes;
  arena().regions[region->base] = std::move(region);
}

void* check(Thread& t, int site, Space space, uint64_t address, uint32_t bytes, Access kind) {
  if (address % bytes) {
    report(t, site, "MISALIGNED ACCESS", hexadecimal(address) + " for " + std::to_string(bytes) + " bytes");
    return nowhere();
  }
  if (space == kShared || address - shared_window < kSharedWindow) {
    const uint64_t offset = space == kShared ? address : address - shared_window;
    Region& r = *arena().shared;
    if (offset + bytes > r.bytes) {
      report(t, site, "SHARED MEMORY OUT OF BOUNDS",
             "offset " + std::to_string(offset) + " of " + std::to_string(r.bytes) + " bytes");
      return nowhere();
    }
    if ((1u << r.shift) > bytes) refine(r, bytes);
    touch(t, site, r, offset, bytes, kind);
    return reinterpret_cast<void*>(shared_window + offset);
  }
  if (space != kGlobal) {
    if (on_stack(t, address, bytes)) return reinterpret_cast<void*>(address);
    const uint64_t parameters = reinterpret_cast<uint64_t>(t.block->parameters);
    if (kind == Access::kRead && address >= parameters && address + bytes <= parameters + t.block->kernel->parameter_bytes)
      return reinterpret_cast<void*>(address);
  }
  Region* const found = space == kLocal ? nullptr : find(address, bytes);
  if (!found) {
    report(t, site, space == kLocal ? "LOCAL MEMORY OUT OF BOUNDS" : "OUT OF BOUNDS",
           hexadecimal(address) + ", " + nearest(address));
    return nowhere();
  }
  Region& r = prepared(*found, bytes);
  const uint64_t offset = address - r.base;
  if (kind != Access::kRead && !r.written) {
    r.before.assign(reinterpret_cast<uint8_t*>(r.base), reinterpret_cast<uint8_t*>(r.base) + r.bytes);
    r.written = true;
  }
  touch(t, site, r, offset, bytes, kind);
  uint8_t& sector = r.sectors[offset / 32];
  if (kind != Access::kWrite && !(sector & 2)) sector |= 1;
  if (kind != Access::kRead) sector |= 2;
  return reinterpret_cast<void*>(address);
}

void* access(Thread& t, int site, Space space, uint64_t address, uint32_t bytes, Access kind) {
  void* const place = check(t, site, space, address, bytes, kind);
  if (traffic::enabled && space != kLocal) traffic::count(t, site, reinterpret_cast<uint64_t>(place), bytes);
  return place;
}

// ---- cp.async: done when it is waited for; from its start until then nobody may touch the destination -------------------
void copy_async(Thread& t, int site, uint64_t to, uint64_t from, uint32_t bytes, uint32_t given) {
  Region& shared = *arena().shared;
  if (given > bytes) return report(t, site, "cp.async GIVEN MORE BYTES THAN IT COPIES");
  if (to % bytes) return report(t, site, "MISALIGNED ACCESS", "shared offset " + std::to_string(to));
  if (to + bytes > shared.bytes) return report(t, site, "SHARED MEMORY OUT OF BOUNDS", "offset " + std::to_string(to));
  if (from % bytes) return report(t, site, "MISALIGNED ACCESS", hexadecimal(from) + " for " + std::to_string(bytes) + " bytes");
  for (uint32_t i = 0; i < given; i += 4) check(t, site, kGlobal, from + i, std::min(4u, given - i), Access::kRead);
  if (traffic::enabled && given > 0) traffic::count(t, site, from, given);
  touch(t, site, shared, to, bytes, Access::kWrite);
  each_cell(shared, to, bytes, [](Cell& c) { c.flags |= kInFlight; });
  if (find(from, std::max(1u, given)) || given == 0) t.open.push_back({site, to, from, bytes, given});
}
void copy_commit(Thread& t) {
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
void copy_wait(Thread& t, uint32_t pending_groups) {
  Region& shared = *arena().shared;
  for (; t.groups.size() > pending_groups; t.groups.erase(t.groups.begin()))
    for (const Copy& c : t.groups.front()) {
      each_cell(shared, c.to, c.bytes, [](Cell& cell) { cell.flags &= ~kInFlight; });
      touch(t, c.site, shared, c.to, c.bytes, Access::kWrite);
      memcpy(reinterpret_cast<void*>(shared_window + c.to), reinterpret_cast<const void*>(c.from), c.given);
      memset(reinterpret_cast<char*>(shared_window + c.to + c.given), 0, c.bytes - c.given);
    }
}

// ---- the life of a region ----------------------------------------------------------------------------------------------------
namespace memory {

void* allocate(uint64_t bytes) {
  Arena& a = arena();
  if (!a.begin) {
    void* const space = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return nullptr;
    a.begin = reinterpret_cast<char*>((reinterpret_cast<uint64_t>(space) + kGap - 1) / kGap * kGap);
    a.used = kGap;
  }
  const uint64_t space = space_for(bytes);
  auto& released = a.released[space];
  uint64_t base;
  if (released.size() > kQuarantine) {
    base = released.front();
    released.pop_front();
  } else {
    if (a.used + space + kGap > kArena) return nullptr;
    base = reinterpret_cast<uint64_t>(a.begin) + a.used;
    a.used += space;
  }
  std::fill_n(reinterpret_cast<uint16_t*>(base), (bytes + 1) / 2, kPattern);
  auto region = std::make_unique<Region>();
  region->base = base, region->bytes = bytes;
  a.regions[base] = std::move(region);
  return reinterpret_cast<void*>(base);
}

void release(void* p) {
  Arena& a = arena();
  const auto found = a.regions.find(reinterpret_cast<uint64_t>(p));
  if (found == a.regions.end()) return;
  Region* const r = found->second.get();
  for (Region*& recent : a.recent)
    if (recent == r) recent = nullptr;
  a.touched.erase(std::remove(a.touched.begin(), a.touched.end(), r), a.touched.end());
  const uint64_t space = space_for(r->bytes);
  madvise(p, space - kGap, MADV_DONTNEED);
  a.released[space].push_back(r->base);
  a.regions.erase(found);
}

void begin_launch(uint32_t shared_bytes) {
  Arena& a = arena();
  if (!shared_window)
    shared_window =
        reinterpret_cast<uint64_t>(mmap(nullptr, kSharedWindow, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  for (Region* r : a.touched) r->cells = {}, r->before = {}, r->result = {}, r->written = false;
  a.touched.clear();
  Region& s = *a.shared;
  s.shared = true, s.base = shared_window, s.bytes = shared_bytes, s.shift = 2;
}

void begin_run() {
  Arena& a = arena();
  ++a.run;
  initialise(*a.shared);
  memset(reinterpret_cast<void*>(shared_window), 0xcb, a.shared->bytes);
}

void keep_result() {
  for (Region* r : arena().touched)
    if (r->written) r->result.assign(reinterpret_cast<uint8_t*>(r->base), reinterpret_cast<uint8_t*>(r->base) + r->bytes);
}

std::string difference_from_result() {
  for (const Region* r : arena().touched) {
    if (!r->written && r->result.empty()) continue;
    if (!r->written || r->result.empty())
      return "an array of " + std::to_string(r->bytes) + " bytes is written in one order only";
    const uint8_t* now = reinterpret_cast<const uint8_t*>(r->base);
    const auto different = std::mismatch(r->result.begin(), r->result.end(), now).first;
    if (different != r->result.end())
      return "byte " + std::to_string(different - r->result.begin()) + " of an array of " + std::to_string(r->bytes) +
             " bytes differs";
  }
  return "";
}

void restore() {
  for (Region* r : arena().touched)
    if (r->written) memcpy(reinterpret_cast<void*>(r->base), r->before.data(), r->bytes);
}

void compulsory_bytes(uint64_t& read, uint64_t& written) {
  read = written = 0;
  for (const Region* r : arena().touched)
    for (const uint8_t s : r->sectors) read += s & 1 ? 32 : 0, written += s & 2 ? 32 : 0;
}

}  // namespace memory
}  // namespace simt
