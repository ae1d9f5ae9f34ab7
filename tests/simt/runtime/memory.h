// Memory that kernels may touch, and what is known of each cell of it.
//
// Device memory is allocated here, each array a region with untouched space around it, filled with a pattern: what still holds
// the pattern when a kernel reads it was never written. For every cell (4 bytes, or less where a kernel uses smaller accesses)
// the last write and the reads since are kept, with the barrier epoch and warp clock of each; two accesses of which one writes
// must be ordered by a barrier or a warp synchronisation, else they race.
#pragma once
#include "simt.h"

namespace simt {

struct Cell {
  uint32_t write_epoch, write_clock;
  uint32_t read_epoch, read_clock, read_lanes;  // of the readers' warp; read_clock is the largest
  uint16_t writer;                              // flat index of the thread
  uint8_t reader_warp;
  uint8_t flags;
};

struct Region {
  std::string name;
  uint64_t base = 0, bytes = 0;
  bool shared = false;
  int shift = 2;  // a cell is 1 << shift bytes
  std::vector<Cell> cells;
  uint64_t run = 0;                     // the run that `cells` are about
  bool written = false;                 // in this run; then `before` holds what was there
  std::vector<uint8_t> before, result;  // result: of the run with the first thread order
  std::vector<uint8_t> sectors;         // of 32 bytes: 1 read before it was written, 2 written
};

// Everything `access` does except counting traffic.
void* check(Thread& t, int site, Space space, uint64_t address, uint32_t bytes, Access kind);

namespace memory {
void* allocate(uint64_t bytes);
void release(void* p);
void begin_launch(uint32_t shared_bytes);
void begin_run();                                          // with one thread order
void keep_result();                                        // after the first run
std::string difference_from_result();                      // "" if this run wrote the same
void restore();                                            // memory as it was before the run
void compulsory_bytes(uint64_t& read, uint64_t& written);  // in whole sectors, by this run
}  // namespace memory

}  // namespace simt
