// Places of arrays in one allocation, which takes as long as a small kernel: all are reserved first.
#pragma once
#include <cstdint>

namespace convdit {

struct Layout {
  int64_t size = 0;

  int64_t reserve(int64_t count) {  // elements of 2 bytes or more; on a cache line of its own
    const int64_t at = size;
    size += (count + 31) / 32 * 32;
    return at;
  }
};

}  // namespace convdit
