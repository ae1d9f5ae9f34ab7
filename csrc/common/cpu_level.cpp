#include "common/cpu_level.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace convdit {
namespace {

CpuLevel best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(CONVDIT_EMULATE_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
#endif
  if (avx512) return CpuLevel::avx512;
  if (avx2) return CpuLevel::avx2;
#endif
  return CpuLevel::baseline;
}

CpuLevel detect() {
  const CpuLevel best = best_level();
  const char* wanted = std::getenv("CONVDIT_CPU_LEVEL");
  if (wanted == nullptr) return best;
  for (int level = 0; level < static_cast<int>(best); ++level)
    if (std::strcmp(wanted, cpu_level_name(static_cast<CpuLevel>(level))) == 0) return static_cast<CpuLevel>(level);
  return best;
}

// Bytes of the first core's cache of that level as Linux tells them, 0 where it does not. Not sysconf(): on some virtual machines
// it multiplies the size by cores that are not there.
int64_t cache_of_level(int level) {
  char text[64];  // the path, then "32768K"
  std::snprintf(text, sizeof text, "/sys/devices/system/cpu/cpu0/cache/index%d/size", level);
  int64_t kilobytes = 0;
  if (FILE* file = std::fopen(text, "r")) {
    if (std::fgets(text, sizeof text, file) != nullptr) kilobytes = std::strtol(text, nullptr, 10);
    std::fclose(file);
  }
  return kilobytes << 10;
}

int64_t detect_cache() {
  if (const char* wanted = std::getenv("CONVDIT_CACHE_BYTES"); wanted != nullptr && *wanted != '\0')
    return std::strtoll(wanted, nullptr, 10);  // convdit/_library.py has refused what is not a number
  const int64_t third = cache_of_level(3), second = cache_of_level(2);
#if defined(__x86_64__)
  // The third level of Intel's servers is no quicker for one core than memory is, however large: measured on a Xeon with 300 MiB.
  if (__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f") && second > 0 && third > 8 * second) return 8 * second;
#endif
  return third > 0 ? third : int64_t{32} << 20;
}

bool detect_products() {
  if (const char* wanted = std::getenv("CONVDIT_PRODUCTS"); wanted != nullptr && *wanted != '\0')
    return std::strcmp(wanted, "convdit") == 0;
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

bool own_products() {
  static const bool chosen = detect_products();
  return chosen;
}

int64_t cache_bytes() {
  static const int64_t bytes = detect_cache();
  return bytes;
}

CpuLevel cpu_level() {
  static const CpuLevel level = detect();
  return level;
}

bool multiplies_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}
bool multiplies_f16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512fp16");
#else
  return true;
#endif
}

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace convdit
