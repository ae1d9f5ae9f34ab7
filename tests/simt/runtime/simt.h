// The executor of translated kernels, as the translated code and the files of the runtime see it.
//
// A CUDA thread is a fibre. The threads of a block run by turns on one CPU thread: each until it ends or waits (barrier, shuffle,
// ...). Blocks run one after another. Every access to global and shared memory goes through memory.cpp, which checks it;
// a bad access is reported and does nothing (a read gives zeros).
#pragma once
#include <stdint.h>
#include <string.h>

#include <string>
#include <vector>

namespace simt {

struct Thread;
struct Warp;
struct Block;

// An instruction that the runtime takes part in, and the line of the CUDA source that it comes from.
struct Site {
  const char* text;
  const char* file;
  int line;
  const char* caller_file;  // where the function of that line was inlined; "" if it was not
  int caller_line;
};
struct Parameter {
  uint32_t offset, bytes;
};
struct Kernel {
  Kernel(const char* name, void (*run)(Thread&), const Site* sites, int site_count, int code_blocks, uint32_t shared_bytes,
         const Parameter* parameters, int parameter_count, uint32_t parameter_bytes);  // enters itself into the list of kernels
  const char* name;
  void (*run)(Thread&);
  const Site* sites;
  int site_count, code_blocks;  // code_blocks: basic blocks, whose runs are counted
  uint32_t shared_bytes;        // static shared memory
  const Parameter* parameters;
  int parameter_count;
  uint32_t parameter_bytes;
};
// Memory of the module itself: __constant__ and __device__ variables.
struct Memory {
  Memory(const char* name, void* address, uint64_t bytes);
};

enum class State : uint8_t { kRuns, kWaitsForWarp, kWaitsForBlock, kWaitsForActiveMask, kDone };

struct Copy {  // a cp.async on its way
  int site;
  uint64_t to, from;
  uint32_t bytes, given;  // the last bytes - given are filled with zeros
};

constexpr int kLanes = 32;
struct Thread {
  uint32_t index[3], flat, lane;
  Block* block;
  Warp* warp;
  State state;
  void* stack_pointer;
  int64_t fuel;
  // What it waits for, and what it hands to the other lanes of its warp.
  int site;
  uint32_t mask;
  void (*operation)(Block&, Warp&, uint32_t);
  uint64_t in[5];
  uint32_t out[4];
  // Order within the warp: clock counts the warp synchronisations of this thread; what lane l did up to its clock ordered[l]
  // happened before what this thread does now.
  uint32_t clock, ordered[kLanes];
  std::vector<Copy> open;                 // cp.async since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};
struct Warp {
  uint32_t first, exists;  // flat index of lane 0; mask of the lanes that the block has
};
struct Block {
  uint32_t index[3], threads[3], grid[3];
  const Kernel* kernel;
  const uint8_t* parameters;
  uint32_t shared_bytes;
  uint32_t first_epoch, epoch;  // epochs are numbered through all blocks; a barrier of the whole block begins a new one
  uint64_t* counts;             // runs of each basic block
  std::vector<Thread> all;
  std::vector<Warp> warps;
};

// ---- memory (memory.cpp) -------------------------------------------------------------------------------------------------
enum Space : uint8_t { kGeneric, kGlobal, kShared, kLocal };
enum class Access : uint8_t { kRead, kWrite, kAtomic };

constexpr uint64_t kSharedWindow = 1 << 20;
extern uint64_t shared_window;  // the generic address of shared memory: a shared-space address is an offset from it

// Checks an access and returns where to read or write; on a finding, a place that does no harm.
void* access(Thread& t, int site, Space space, uint64_t address, uint32_t bytes, Access kind);

template <class T, int N>
inline void load(Thread& t, int site, Space space, uint64_t address, T (&to)[N]) {
  memcpy(to, access(t, site, space, address, sizeof to, Access::kRead), sizeof to);
}
template <class T, int N>
inline void store(Thread& t, int site, Space space, uint64_t address, const T (&from)[N]) {
  memcpy(access(t, site, space, address, sizeof from, Access::kWrite), from, sizeof from);
}
template <class T, class F>
inline T atomic(Thread& t, int site, Space space, uint64_t address, F change) {
  T* const place = static_cast<T*>(access(t, site, space, address, sizeof(T), Access::kAtomic));
  const T old = *place;
  *place = change(old);
  return old;
}
void copy_async(Thread& t, int site, uint64_t to, uint64_t from, uint32_t bytes, uint32_t given);
void copy_commit(Thread& t);
void copy_wait(Thread& t, uint32_t pending_groups);

// ---- threads (executor.cpp) ------------------------------------------------------------------------------------------------
void report(Thread& t, int site, const char* what, const std::string& detail = "");
void wait(Thread& t, State state);    // lets the others run until `state` is taken from it
[[noreturn]] void leave(Thread& t);   // ends the thread
void end_of_fuel(Thread& t);
void sync_block(Thread& t, int site, uint32_t barrier, uint32_t count);
void trap(Thread& t, int site);
inline void spend_fuel(Thread& t) {
  if (--t.fuel < 0) end_of_fuel(t);
}
// A fence orders nothing here: what relies on one alone, without a barrier, is reported as a race.
inline void fence(Thread&) {}

// ---- warps (warp.cpp) ----------------------------------------------------------------------------------------------------
enum class Shuffle { idx, up, down, bfly };
// Waits until all lanes of `mask` are here, then the last of them runs `operation`, which reads in and writes out of each.
void together(Thread& t, int site, uint32_t mask, void (*operation)(Block&, Warp&, uint32_t));
void sync_warp(Thread& t, int site, uint32_t mask);
uint32_t active_mask(Thread& t, int site);
uint32_t ballot(Thread& t, int site, bool value, uint32_t mask);
template <Shuffle S>
uint32_t shuffle(Thread& t, int site, uint32_t value, uint32_t lane, uint32_t clamp, uint32_t mask, bool& valid);
template <int N, bool Transposed>
void load_matrix(Thread& t, int site, uint64_t address, uint32_t (&to)[N]);
uint32_t transpose_matrix(Thread& t, int site, uint32_t row);
template <class Half, int Depth>
void multiply_matrices(Thread& t, int site, const uint32_t* a, const uint32_t* b, float* c);

template <class T, class F>
inline T reduce(Thread& t, int site, T value, uint32_t mask, F) {
  t.in[0] = static_cast<uint32_t>(value);
  together(t, site, mask, [](Block& block, Warp& warp, uint32_t lanes) {
    bool first = true;
    T sum{};
    for (int l = 0; l < kLanes; ++l)
      if (lanes >> l & 1) {
        const T v = static_cast<T>(block.all[warp.first + l].in[0]);
        sum = first ? v : F{}(sum, v);
        first = false;
      }
    for (int l = 0; l < kLanes; ++l)
      if (lanes >> l & 1) block.all[warp.first + l].out[0] = static_cast<uint32_t>(sum);
  });
  return static_cast<T>(t.out[0]);
}

}  // namespace simt
