// Fibres and their turns: runs the blocks of a launch, and reports what goes wrong.
#include "executor.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <sstream>

#include "memory.h"
#include "traffic.h"

#ifndef __x86_64__
#error "the executor switches fibres in x86-64 assembly"
#endif

namespace simt {

// ---- fibres ----------------------------------------------------------------------------------------------------------------
extern "C" void simt_switch(void** save, void* to);
asm(".text\n.globl simt_switch\n.hidden simt_switch\nsimt_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr uint32_t kMostThreads = 1024, kMostShared = 227 * 1024;

void* scheduler;  // its stack pointer, while a fibre runs
Thread* current;
std::vector<char*> stacks;

void enter() {
  current->block->kernel->run(*current);
  leave(*current);
}

void prepare_stack(Thread& t) {
  while (stacks.size() <= t.flat) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks.push_back(static_cast<char*>(p));
  }
  uint64_t* top = reinterpret_cast<uint64_t*>(stacks[t.flat] + kStack - 16);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(enter);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  t.stack_pointer = top;
}

void resume(Thread& t) {
  current = &t;
  simt_switch(&scheduler, t.stack_pointer);
}

}  // namespace

void wait(Thread& t, State state) {
  t.state = state;
  simt_switch(&t.stack_pointer, scheduler);
}
void leave(Thread& t) {
  t.state = State::kDone;
  simt_switch(&t.stack_pointer, scheduler);
  __builtin_unreachable();
}
bool on_stack(const Thread& t, uint64_t address, uint32_t bytes) {
  const uint64_t stack = reinterpret_cast<uint64_t>(stacks[t.flat]);
  return address >= stack && address + bytes <= stack + kStack;
}

// ---- findings --------------------------------------------------------------------------------------------------------------
namespace {

struct Allowed {
  std::string what, file;
  int line;
};
struct Findings {
  std::vector<std::string> all, last;
  std::map<std::string, uint64_t> seen;  // of the launch, by kind and instruction: one line each
  std::vector<Allowed> allowed;
  uint64_t allowed_count = 0, launches = 0;
  bool in_launch = false;
};
Findings& findings() {
  static Findings f;
  return f;
}

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = text ? text : name;
  free(text);
  return result;
}

void add_finding(const std::string& text) {
  Findings& f = findings();
  f.in_launch = true;
  if (f.last.size() < 20) f.last.push_back(text);
  if (f.all.size() < 1000) f.all.push_back(text);
}

std::string axes(const uint32_t (&v)[3]) {
  return "(" + std::to_string(v[0]) + "," + std::to_string(v[1]) + "," + std::to_string(v[2]) + ")";
}

bool is_allowed(const Site& s, const std::string& what) {
  Findings& f = findings();
  for (const Allowed& a : f.allowed)
    if (what.rfind(a.what, 0) == 0 &&
        ((a.file == s.file && a.line == s.line) || (a.file == s.caller_file && a.line == s.caller_line))) {
      ++f.allowed_count;
      return true;
    }
  return false;
}

}  // namespace

void report(Thread& t, int site, const char* what, const std::string& detail) {
  const Site& s = t.block->kernel->sites[site];
  if (is_allowed(s, what)) return;
  Findings& f = findings();
  f.in_launch = true;
  if (f.seen[std::string(what) + t.block->kernel->name + std::to_string(site)]++) return;
  std::ostringstream text;
  text << what << ": " << s.file << ":" << s.line;
  if (*s.caller_file) text << " (inlined at " << s.caller_file << ":" << s.caller_line << ")";
  text << ", block " << axes(t.block->index) << ", thread " << axes(t.index) << ", kernel " << demangled(t.block->kernel->name)
       << " [" << s.text << "]" << (detail.empty() ? "" : ": ") << detail;
  add_finding(text.str());
}

// ---- waiting ---------------------------------------------------------------------------------------------------------------
void sync_block(Thread& t, int site, uint32_t barrier, uint32_t count) {
  Block& b = *t.block;
  if (barrier != 0 || (count != 0 && count != b.all.size())) {
    report(t, site, "BARRIER OF A PART OF THE BLOCK", "not supported by the executor");
    leave(t);
  }
  t.site = site;
  wait(t, State::kWaitsForBlock);  // the scheduler answers, once all threads that have not left are here
}
void trap(Thread& t, int site) {
  report(t, site, "TRAP");
  leave(t);
}
void end_of_fuel(Thread& t) {
  report(t, 0, "ENDLESS LOOP");
  leave(t);
}

namespace {

// All threads that have not left wait at barriers: let them on, with a new epoch.
bool release_barrier(Block& b) {
  const Thread* first = nullptr;
  for (Thread& t : b.all) {
    if (t.state == State::kDone) continue;
    if (t.state != State::kWaitsForBlock) return false;
    if (!first)
      first = &t;
    else if (t.site != first->site)
      report(t, t.site, "THREADS OF A BLOCK WAIT AT DIFFERENT BARRIERS");
  }
  if (!first) return false;
  ++b.epoch;
  for (Thread& t : b.all)
    if (t.state == State::kWaitsForBlock) t.state = State::kRuns;
  return true;
}

// __activemask() is answered when nobody can run on: the lanes of a warp that ask at the same place are together.
bool release_active_masks(Block& b) {
  bool any = false;
  for (const Warp& w : b.warps) {
    int site = -1;
    uint32_t mask = 0;
    for (int l = 0; l < kLanes; ++l)
      if (w.exists >> l & 1) {
        Thread& t = b.all[w.first + l];
        if (t.state != State::kWaitsForActiveMask || (site >= 0 && t.site != site)) continue;
        site = t.site, mask |= 1u << l;
      }
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) b.all[w.first + l].out[0] = mask, b.all[w.first + l].state = State::kRuns, any = true;
  }
  return any;
}

void report_deadlock(Block& b) {
  for (Thread& t : b.all)
    if (t.state != State::kDone && t.state != State::kRuns) {
      const auto waiting =
          std::count_if(b.all.begin(), b.all.end(), [&](const Thread& o) { return o.state == t.state && o.site == t.site; });
      return report(t, t.site, "DEADLOCK", std::to_string(waiting) + " threads wait here, of " + std::to_string(b.all.size()));
    }
}

void run_block(Block& b, const std::vector<uint32_t>& order) {
  for (size_t left = b.all.size();;) {
    bool ran = false;
    for (const uint32_t i : order) {
      Thread& t = b.all[i];
      if (t.state != State::kRuns) continue;
      ran = true;
      resume(t);
      left -= t.state == State::kDone;
    }
    if (left == 0) return;
    if (!ran && !release_barrier(b) && !release_active_masks(b)) return report_deadlock(b);
  }
}

// Numbers 0..n-1 in the order called "forward", "reversed", or by a seed.
std::vector<uint32_t> ordered(uint32_t n, const std::string& order, uint32_t salt) {
  std::vector<uint32_t> result(n);
  std::iota(result.begin(), result.end(), 0);
  if (order == "reversed")
    std::reverse(result.begin(), result.end());
  else if (order != "forward")
    std::shuffle(result.begin(), result.end(), std::mt19937(std::stoul(order) + salt));
  return result;
}

// ---- launches --------------------------------------------------------------------------------------------------------------
struct Settings {
  std::vector<std::string> orders{"forward"};
  int64_t fuel = 1 << 26;
};
Settings& settings() {
  static Settings s;
  return s;
}
std::map<std::string, const Kernel*>& kernels() {
  static std::map<std::string, const Kernel*> k;
  return k;
}
std::vector<std::string> traffic_lines;

void begin_thread(Block& b, uint32_t i) {
  Thread& t = b.all[i];
  const uint32_t x = b.threads[0], y = b.threads[1];
  t.index[0] = i % x, t.index[1] = i / x % y, t.index[2] = i / x / y, t.flat = i, t.lane = i % kLanes;
  t.block = &b, t.warp = &b.warps[i / kLanes], t.state = State::kRuns, t.fuel = settings().fuel, t.site = 0;
  t.clock = 1;
  memset(t.ordered, 0, sizeof t.ordered);
  t.open.clear(), t.groups.clear();
  prepare_stack(t);
}

void run_grid(Block& b, const std::string& order) {
  const uint32_t n = b.all.size(), blocks = b.grid[0] * b.grid[1] * b.grid[2];
  b.epoch = 0;
  memory::begin_run();
  for (const uint32_t i : ordered(blocks, order, 0)) {
    b.index[0] = i % b.grid[0], b.index[1] = i / b.grid[0] % b.grid[1], b.index[2] = i / b.grid[0] / b.grid[1];
    b.first_epoch = ++b.epoch;
    for (uint32_t w = 0; w < b.warps.size(); ++w)
      b.warps[w] = {w * kLanes, n - w * kLanes >= kLanes ? ~0u : (1u << (n - w * kLanes)) - 1};
    for (uint32_t t = 0; t < n; ++t) begin_thread(b, t);
    run_block(b, ordered(n, order, i));
    if (traffic::enabled) traffic::end_block();
  }
}

void write_traffic(const Block& b) {
  uint64_t read, written;
  memory::compulsory_bytes(read, written);
  std::ostringstream text;
  text << "{\"kernel\": \"" << b.kernel->name << "\", \"grid\": [" << b.grid[0] << ", " << b.grid[1] << ", " << b.grid[2]
       << "], \"threads\": " << b.all.size() << ", \"shared\": " << b.shared_bytes << ", \"read\": " << read
       << ", \"written\": " << written << ", \"sites\": [";
  const auto& counts = traffic::counts();
  for (size_t i = 0; i < counts.size(); ++i)
    text << (i ? ", " : "") << "[" << counts[i].requests << ", " << counts[i].lanes << ", " << counts[i].units << ", "
         << counts[i].ideal << ", " << counts[i].shared << "]";
  text << "], \"blocks\": [";
  for (int i = 0; i < b.kernel->code_blocks; ++i) text << (i ? ", " : "") << b.counts[i];
  text << "]}";
  traffic_lines.push_back(text.str());
}

}  // namespace

Kernel::Kernel(const char* name, void (*run)(Thread&), const Site* sites, int site_count, int code_blocks, uint32_t shared_bytes,
               const Parameter* parameters, int parameter_count, uint32_t parameter_bytes)
    : name(name),
      run(run),
      sites(sites),
      site_count(site_count),
      code_blocks(code_blocks),
      shared_bytes(shared_bytes),
      parameters(parameters),
      parameter_count(parameter_count),
      parameter_bytes(parameter_bytes) {
  kernels()[name] = this;
}

std::recursive_mutex& executor_mutex() {
  static std::recursive_mutex& m = *new std::recursive_mutex;  // never destroyed, as the memory is not
  return m;
}

int launch(const std::string& name, const uint32_t grid[3], const uint32_t block[3], uint32_t dynamic_shared, void** arguments) {
  const std::lock_guard<std::recursive_mutex> lock(executor_mutex());
  Findings& f = findings();
  f.last.clear(), f.seen.clear(), f.in_launch = false;
  ++f.launches;
  const auto found = kernels().find(name);
  if (found == kernels().end()) {
    add_finding("NO SUCH KERNEL: " + demangled(name.c_str()));
    return 1;
  }
  const Kernel& k = *found->second;
  std::vector<uint8_t> parameters(k.parameter_bytes + 16);
  for (int i = 0; i < k.parameter_count; ++i) memcpy(&parameters[k.parameters[i].offset], arguments[i], k.parameters[i].bytes);
  Block b{};
  b.kernel = &k, b.parameters = parameters.data(), b.shared_bytes = k.shared_bytes + dynamic_shared;
  std::copy_n(grid, 3, b.grid), std::copy_n(block, 3, b.threads);
  const uint64_t threads = uint64_t{block[0]} * block[1] * block[2], blocks = uint64_t{grid[0]} * grid[1] * grid[2];
  if (threads == 0 || threads > kMostThreads || blocks == 0 || blocks > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535 ||
      block[2] > 64 || b.shared_bytes > kMostShared) {
    add_finding("LAUNCH THAT NO DEVICE TAKES: grid " + axes(b.grid) + ", block " + axes(b.threads) + ", " +
                std::to_string(b.shared_bytes) + " bytes of shared memory, kernel " + demangled(k.name));
    return 1;
  }
  b.all.resize(threads), b.warps.resize((threads + kLanes - 1) / kLanes);
  std::vector<uint64_t> counts(k.code_blocks);
  b.counts = counts.data();
  memory::begin_launch(b.shared_bytes);
  traffic::begin(k);
  const bool counting = traffic::enabled;
  const auto& orders = settings().orders;
  for (size_t i = 0; i < orders.size(); ++i) {
    run_grid(b, orders[i]);
    if (f.in_launch) break;
    if (i == 0 && counting) write_traffic(b);
    traffic::enabled = false;
    if (i == 0)
      memory::keep_result();
    else if (const std::string difference = memory::difference_from_result(); !difference.empty())
      add_finding("RESULT DEPENDS ON THE ORDER OF THE THREADS: kernel " + demangled(k.name) + ", order " + orders[i] + ": " +
                  difference);
    if (i + 1 < orders.size()) memory::restore();
  }
  traffic::enabled = counting;
  return f.in_launch;
}

}  // namespace simt

// ---- for Python ------------------------------------------------------------------------------------------------------------
using namespace simt;
namespace {
const char* joined(const std::vector<std::string>& lines) {
  static std::string text;
  text.clear();
  for (const std::string& line : lines) text += line + "\n";
  return text.c_str();
}
}  // namespace

void* simt_allocate(uint64_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(executor_mutex());
  return memory::allocate(bytes);
}
void simt_release(void* p) {
  const std::lock_guard<std::recursive_mutex> lock(executor_mutex());
  memory::release(p);
}
int simt_launch(const char* kernel, const uint32_t* grid, const uint32_t* block, uint32_t dynamic_shared, void** arguments) {
  return launch(kernel, grid, block, dynamic_shared, arguments);
}
const char* simt_findings() { return joined(findings().all); }
const char* simt_last_findings() { return joined(findings().last); }
void simt_clear() {
  Findings& f = findings();
  f.all.clear(), f.last.clear();
  traffic_lines.clear();
}
void simt_set_orders(const char* orders) {
  settings().orders.clear();
  std::istringstream text(orders);
  for (std::string order; std::getline(text, order, ',');) settings().orders.push_back(order);
}
void simt_set_fuel(int64_t loops) { settings().fuel = loops; }
void simt_set_counting(int on) { traffic::enabled = on; }
void simt_allow(const char* what, const char* file, int line) { findings().allowed.push_back({what, file, line}); }
uint64_t simt_allowed() { return findings().allowed_count; }
uint64_t simt_launches() { return findings().launches; }
const char* simt_traffic() { return joined(traffic_lines); }
