// Counters of memory traffic: what each instruction moves, against the least that its bytes need.
#pragma once
#include "simt.h"

namespace simt::traffic {

// units: sectors of 32 bytes for global memory, wavefronts for shared memory; ideal: the least of them for the bytes asked for.
struct Count {
  uint64_t requests = 0, lanes = 0, units = 0, ideal = 0;
  bool shared = false;
};

extern bool enabled;
void begin(const Kernel& kernel);
void count(Thread& t, int site, uint64_t address, uint32_t bytes);
void count_matrix(const Thread* lanes, int matrix);  // ldmatrix: rows of 16 bytes
void end_block();
const std::vector<Count>& counts();  // by site

}  // namespace simt::traffic
