// Launches, and what came of them.
#pragma once
#include <mutex>

#include "simt.h"

namespace simt {

// One launch at a time, and no allocation meanwhile.
std::recursive_mutex& executor_mutex();

// Whether the bytes lie in the memory that t keeps its own local arrays in.
bool on_stack(const Thread& t, uint64_t address, uint32_t bytes);

// Runs a kernel once in each thread order. 0 if there was no finding.
int launch(const std::string& kernel, const uint32_t grid[3], const uint32_t block[3], uint32_t dynamic_shared, void** arguments);

}  // namespace simt

// For Python (executor.py) and the stand-in CUDA runtime (cudart.cpp). Texts are valid until the next call.
#pragma GCC visibility push(default)
extern "C" {
void* simt_allocate(uint64_t bytes);
void simt_release(void* p);
int simt_launch(const char* kernel, const uint32_t* grid, const uint32_t* block, uint32_t dynamic_shared, void** arguments);
const char* simt_findings();       // since simt_clear(), a line each
const char* simt_last_findings();  // of the last launch
void simt_clear();
void simt_set_orders(const char* orders);  // comma-separated: forward, reversed, or the seed of a shuffle
void simt_set_fuel(int64_t loops);         // backward branches that a thread may take before it counts as endless
void simt_set_counting(int on);
void simt_allow(const char* what, const char* file, int line);  // findings that begin with `what` there are intended
uint64_t simt_allowed();                                        // how many findings were
uint64_t simt_launches();
const char* simt_traffic();  // of the launches since simt_clear(), while counting: a JSON object a line
}
#pragma GCC visibility pop
