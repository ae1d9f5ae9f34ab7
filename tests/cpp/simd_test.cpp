// Checks of csrc/common/simd.h at one CPU level, without PyTorch: conversions, partial loads, elementary functions.
#include "common/simd.h"

#include <cmath>
#include <cstdio>
#include <string_view>

#include "common/cpu_level.h"

using namespace convdit;
using namespace convdit::CONVDIT_LEVEL;

static int failures = 0;
static void expect(bool ok, const char* what, double value) {
  if (!ok && ++failures < 20) std::printf("FAILED: %s at %g\n", what, value);
}

static const char* kLevel =
#define NAME_(x) #x
#define NAME(x) NAME_(x)
    NAME(CONVDIT_LEVEL);

template <class H>
static void check_halves(const char* name) {
  // Every half widens and narrows back to itself, one by one and by vectors.
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const H half{static_cast<uint16_t>(bits)};
    H row[kFloats];
    for (auto& h : row) h = half;
    const float wide = widen(half);
    H back[kFloats];
    store(back, load(row));
    if (wide != wide) {
      expect(widen(back[0]) != widen(back[0]), name, bits);
      continue;
    }
    expect(narrow<H>(wide).bits == bits, name, bits);
    expect(back[kFloats - 1].bits == bits, name, bits);
    // Halfway to the next value rounds to even; just beyond it rounds up.
    const H next{static_cast<uint16_t>(bits + 1)};
    const float after = widen(next);
    if (after != after || std::isinf(after) || std::isinf(wide) || (bits & 0x7fff) == 0x7fff) continue;
    const float middle = static_cast<float>((static_cast<double>(wide) + after) / 2);
    const uint16_t even = bits & 1 ? next.bits : half.bits;
    H many[kFloats];
    store(many, splat(middle));
    expect(narrow<H>(middle).bits == even && many[0].bits == even, name, middle);
    const float beyond = std::nextafter(middle, after);
    store(many, splat(beyond));
    expect(narrow<H>(beyond).bits == next.bits && many[0].bits == next.bits, name, beyond);
  }
}

template <class T>
static void check_part(const char* name) {
  constexpr int n = lanes<accum_t<T>>;
  T in[n], out[n];
  for (int i = 0; i < n; ++i) in[i] = narrow<T>(static_cast<accum_t<T>>(i + 1));
  for (int part = 0; part <= n; ++part) {
    auto v = load(in, part);
    for (int i = 0; i < n; ++i) expect(v[i] == (i < part ? i + 1 : 0), name, i);
    for (auto& o : out) o = narrow<T>(static_cast<accum_t<T>>(-1));
    store(out, v, part);
    for (int i = 0; i < n; ++i) expect(widen(out[i]) == (i < part ? i + 1 : -1), name, i);
  }
  expect(sum(load(in)) == n * (n + 1) / 2, "sum", n);
}

int main() {
  for (int level = 0; level <= static_cast<int>(cpu_level()); ++level)
    if (std::string_view(kLevel) == cpu_level_name(static_cast<CpuLevel>(level))) goto supported;
  std::printf("this machine does not run level %s\n", kLevel);
  return 0;
supported:
  check_halves<bf16>("bf16");
  check_halves<f16>("f16");
  check_part<float>("float");
  check_part<double>("double");
  check_part<bf16>("bf16 part");
  check_part<f16>("f16 part");
  for (double x = -110; x <= 90; x += 0.00137) {
    const float f = static_cast<float>(x), got = CONVDIT_LEVEL::exp(splat(f))[0];
    const double right = std::exp(static_cast<double>(f));
    expect(std::isinf(got) ? right > 3.4e38 : std::fabs(got - right) <= 2e-7 * right + 1e-44, "exp", x);
    const float th = CONVDIT_LEVEL::tanh(splat(f / 10))[0];
    expect(std::fabs(th - std::tanh(static_cast<double>(f / 10))) <= 2e-7, "tanh", x);
    for (const float y : {f / 10, f / 100}) {
      const double cdf = 0.5 * std::erfc(-y / std::sqrt(2.0)), pdf = std::exp(-0.5 * y * y) / std::sqrt(2 * M_PI);
      expect(std::fabs(normal_cdf(splat(y))[0] - cdf) <= 1.5e-7, "normal_cdf", y);
      expect(std::fabs(normal_pdf(splat(y))[0] - pdf) <= 1e-7, "normal_pdf", y);
      expect(std::fabs(normal_cdf(splat<double>(y))[0] - cdf) <= 1e-15, "normal_cdf of double", y);
    }
  }
  for (const float far : {5.6f, 1e3f, 1e30f, INFINITY}) {
    expect(normal_cdf(splat(far))[0] == 1 && normal_cdf(splat(-far))[0] == 0, "normal_cdf far out", far);
    expect(far < 100 || (normal_pdf(splat(far))[0] == 0 && normal_pdf(splat(-far))[0] == 0), "normal_pdf far out", far);
  }
  expect(CONVDIT_LEVEL::exp(splat(INFINITY))[0] == INFINITY && CONVDIT_LEVEL::exp(splat(-INFINITY))[0] == 0, "exp far out", 0);
  const float nan = std::nanf("");
  expect(std::isnan(normal_cdf(splat(nan))[0]) && std::isnan(normal_pdf(splat(nan))[0]), "nan", 1);
  expect(std::isnan(CONVDIT_LEVEL::exp(splat(nan))[0]) && std::isnan(CONVDIT_LEVEL::tanh(splat(nan))[0]), "nan", 0);
  std::printf("%s: %d failures\n", kLevel, failures);
  return failures != 0;
}
