// CPU levels: each kernel file is compiled once for each level, into a namespace of the level's name, and exports one
// constant table of function pointers. The binding picks the table of the best level that this machine runs.
#pragma once
#include <cstdint>

namespace convdit {

enum class CpuLevel : int { baseline, avx2, avx512 };

// The best level of this machine, or the lower one named by the environment variable CONVDIT_CPU_LEVEL; read once.
CpuLevel cpu_level();
const char* cpu_level_name(CpuLevel level);

// Whether this machine has instructions for products of halves; without them PyTorch's matrix products of halves are many times
// slower than those of float32. On other machines than x86: not known to be otherwise.
bool multiplies_bf16();
bool multiplies_f16();

// Whether large matrix products of float32 are ours, not PyTorch's: on processors with AVX-512 that are not Intel's, where its MKL keeps to
// narrower code. The environment variable CONVDIT_PRODUCTS, convdit or pytorch, decides otherwise; read once.
bool own_products();

// Bytes of the third-level cache: what Linux says (32 MiB where it does not; on Intel's servers at most eight times the
// second level), or the environment variable CONVDIT_CACHE_BYTES; read once.
int64_t cache_bytes();

}  // namespace convdit

// Declares one table a level and `Type const& name_table()`, which picks.
#if defined(__x86_64__)
#define CONVDIT_CPU_TABLE(Type, name)             \
  namespace baseline { extern const Type name; }  \
  namespace avx2 { extern const Type name; }      \
  namespace avx512 { extern const Type name; }    \
  inline const Type& name##_table() {             \
    switch (cpu_level()) {                        \
      case CpuLevel::avx512: return avx512::name; \
      case CpuLevel::avx2: return avx2::name;     \
      default: return baseline::name;             \
    }                                             \
  }
#else
#define CONVDIT_CPU_TABLE(Type, name)                          \
  namespace baseline { extern const Type name; }               \
  inline const Type& name##_table() { return baseline::name; }
#endif
