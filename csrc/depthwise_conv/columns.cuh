// The 7x7 convolution of float32 and the halves by columns: a warp has a unit of seven columns and 32 channels, a channel a lane, and
// goes down the map a row of x at a time. A row is read once, from a ring of rows in shared memory, and meets all seven rows of the
// kernel while it is in registers; what seven rows of outputs have so far stays there too, and so do the 49 taps.
#pragma once
#include "common/depthwise.cuh"
#include "depthwise_conv/depthwise_conv.h"

namespace convdit::cuda {
namespace {

// ---- strips: units side by side, a block's ---------------------------------------------------------------------------------------
// Narrow: maps of up to 14 columns (or two maps of up to seven), the second unit going from the last column to the left, so that the halo
// outside the map is on the left of both, and is left out.
template <class T, bool Narrow>
struct Strip {
  static constexpr int kUnits = Narrow ? 2 : 4, kThreads = kWarp * kUnits, kColumns = 7;
  static constexpr int kBlocks = Narrow ? 6 : 3;  // a multiprocessor: 168 registers for 49 taps, 49 sums and a row of x
  static constexpr int kFirst = Narrow ? 0 : -kRadius, kTaken = kColumns + kRadius - kFirst;  // columns of x that a unit takes
  static constexpr int kBetween = Narrow ? kTaken : kColumns;  // columns from unit to unit in a row of the ring
  static constexpr int kStored = kBetween * (kUnits - 1) + kTaken;  // of x in a row of the ring
  static constexpr unsigned kSlots = 4;  // rows of the ring: three are on their way
  static constexpr int kRow = kStored * kChannels, kGradRow = (kStored - kTaken + kColumns) * kChannels;
};

struct Unit {
  int64_t image, column;
  int step, inside;  // 1, or -1 to the left; columns in the map
};
template <class Strip, class P>
__device__ __forceinline__ Unit unit_of(const P& p, int64_t strip, int unit) {
  constexpr int columns = Strip::kColumns;
  Unit result{strip, 0, 1, columns};
  if constexpr (Strip::kUnits == 2) {
    if (p.width <= columns) result.image = 2 * strip + unit;
    else if (unit == 1) result.column = p.width - 1, result.step = -1;
    const int64_t inside = result.step < 0 ? p.width - columns : p.width;
    result.inside = result.image >= p.batch ? 0 : inside < columns ? static_cast<int>(inside) : columns;
  } else {
    const int64_t across = ceil_div(p.width, Strip::kUnits * columns);
    result.image = strip / across, result.column = (strip % across * Strip::kUnits + unit) * columns;
    const int64_t inside = p.width - result.column;
    result.inside = inside < 0 ? 0 : inside < columns ? static_cast<int>(inside) : columns;
  }
  return result;
}
template <class Strip, class P>
__host__ __device__ int64_t strips_of(const P& p) {
  constexpr bool narrow = Strip::kUnits == 2;
  if (narrow && p.width <= Strip::kColumns) return ceil_div(p.batch, 2);
  return narrow ? p.batch : p.batch * ceil_div(p.width, Strip::kUnits * Strip::kColumns);
}

// Bytes from a row of the map to the next, and from a vector that a thread copies to its next in the row. As arguments of a kernel they
// take no registers.
struct Steps {
  int64_t row, copy;
};
template <class T, class Strip, class P>
Steps steps_of(const P& p) {
  const int64_t site = p.channels * static_cast<int64_t>(sizeof(T));
  return {p.width * site, (Strip::kUnits == 2 ? kWarp : Strip::kThreads) / (kChannels / kVector<T>)*site};
}

// What a thread computes once: left to itself the compiler computes it again for each row of the map, to save its register.
__device__ __forceinline__ int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- rows of a strip on their way to shared memory -------------------------------------------------------------------------------
// `Columns` columns of 32 channels, copied by all threads, or in a narrow strip by a warp for its unit: the same few vectors of each row.
template <class T, class Strip, int Columns>
struct RowCopy {
  static constexpr bool kNarrow = Strip::kUnits == 2;
  static constexpr int kVectors = kChannels / kVector<T>, kThreads = kNarrow ? kWarp : Strip::kThreads, kPlaces = Columns * kVectors;
  static constexpr int kCopies = (kPlaces + kThreads - 1) / kThreads;
  const char* from;  // the thread's first vector in the next row
  uint32_t to;  // and in a row of the ring, in bytes
  int64_t step;  // to its next
  bool inside[kCopies];

  // From `row` of the map on, columns `first` to `last` - 1, counted from the first of the unit, or of the strip.
  template <class P>
  __device__ __forceinline__ RowCopy(const P& p, const void* x, const Steps& steps, int64_t strip, int64_t c0, int64_t row, int first,
                                     int last) {
    const int place = threadIdx.x % kThreads, column = first + place / kVectors;
    const Unit unit = unit_of<Strip>(p, strip, kNarrow ? threadIdx.x / kWarp : 0);
    const int64_t c = c0 + place % kVectors * kVector<T>, w = unit.column + column * unit.step;
    from = static_cast<const char*>(x) + (((unit.image * p.height + row) * p.width + w) * p.channels + c) * static_cast<int64_t>(sizeof(T));
    to = kept((kNarrow ? threadIdx.x / kWarp * Strip::kBetween * kChannels * static_cast<int>(sizeof(T)) : 0) + place * 16);
    step = kNarrow ? unit.step * steps.copy : steps.copy;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int further = i * (kThreads / kVectors);
      const int64_t at = w + further * unit.step;
      inside[i] = c < p.channels && at >= 0 && at < p.width && unit.inside > 0 && column + further < last;
    }
  }
  // The next row; zeros outside the map.
  __device__ __forceinline__ void start(bool wanted, const Steps& steps, T* row) {
    if (wanted) {
      const int place = threadIdx.x % kThreads;
      const uint32_t first = shared_address(row) + to;
      const char* x = from;
#pragma unroll
      for (int i = 0; i < kCopies; ++i, x += step)
        if (i < kPlaces / kThreads || place < kPlaces % kThreads) copy_async<16>(first + i * kThreads * 16, x, inside[i]);
    }
    from += steps.row;
  }
};
template <class T, class Strip>
using InputCopy = RowCopy<T, Strip, Strip::kUnits == 2 ? Strip::kTaken : Strip::kStored>;
template <class T, class Strip>
using GradCopy = RowCopy<T, Strip, Strip::kUnits == 2 ? Strip::kColumns : Strip::kUnits * Strip::kColumns>;

// A unit's rows of outputs, `first` to `first` + count - 1. Their rows of x are numbered from 0, which is row `first` - 3 of the map.
struct Run {
  int64_t first;
  int count, begin, end;  // rows of x in the map: `begin` to `end` - 1
  __device__ Run(int64_t height, int64_t start, int64_t most) : first(start) {
    const int64_t left = height - first;
    count = static_cast<int>(left < most ? left : most);
    begin = first < kRadius ? static_cast<int>(kRadius - first) : 0;
    end = left < most + kRadius ? static_cast<int>(left) + kRadius : count + 2 * kRadius;
  }
  __device__ bool has(int row) const { return static_cast<unsigned>(row - begin) < static_cast<unsigned>(end - begin); }
};

// Calls copy(row, slot) and then use(row % 7, row, slot) for the rows of a run; row % 7 is a constant.
template <class Strip, class Copy, class Use>
__device__ __forceinline__ void go_down(const Run& run, const Copy& copy, const Use& use) {
  constexpr int ahead = static_cast<int>(Strip::kSlots) - 1, pending = ahead - 1;
  __syncthreads();  // the ring may still be read
#pragma unroll
  for (int row = 0; row < ahead; ++row) copy(row, row), commit_copies();
#pragma unroll 1
  for (int start = 0; start < run.count + 2 * kRadius; start += kTaps) {
#pragma unroll
    for (int phase = 0; phase < kTaps; ++phase) {
      wait_copies<pending>();
      __syncthreads();
      const int row = start + phase;
      copy(row + ahead, (row + ahead) % Strip::kSlots), commit_copies();
      use(phase, row, row % Strip::kSlots);
    }
  }
}

// A unit's row of x, number `row` of its run, in shared memory from `from` on. Calls use(k, values) for each row k of the kernel
// by which it meets a row of outputs.
template <class T, class Strip, class Use>
__device__ __forceinline__ void for_kernel_rows(const Run& run, int row, const T* from, const Use& use) {
  float values[Strip::kTaken];
#pragma unroll
  for (int i = 0; i < Strip::kTaken; ++i) values[i] = widen(from[i * kChannels]);
#pragma unroll
  for (int k = 0; k < kTaps; ++k)
    if (static_cast<unsigned>(row - k) < static_cast<unsigned>(run.count)) use(k, values);
}

// ---- forward and input gradient --------------------------------------------------------------------------------------------------
template <class T, class Strip>
constexpr int kStripBytes = Strip::kSlots * Strip::kRow * sizeof(T) + kChannels * kTapCount * sizeof(float);

// A block has a strip's run of `length` rows and a group of channels.
template <class T, class Strip>
__global__ void __launch_bounds__(Strip::kThreads, Strip::kBlocks) forward_strips(DepthwiseConv p, Steps steps, int64_t length) {
  constexpr int columns = Strip::kColumns, taken = Strip::kTaken;
  extern __shared__ __align__(16) unsigned char bytes[];
  T* const ring = reinterpret_cast<T*>(bytes);
  float* const weights = reinterpret_cast<float*>(bytes + Strip::kSlots * Strip::kRow * sizeof(T));
  const int lane = threadIdx.x % kWarp, number = threadIdx.x / kWarp;
  const int64_t runs = ceil_div(p.height, length), groups = ceil_div(p.channels, kChannels), tasks = strips_of<Strip>(p) * runs * groups;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t c0 = task % groups * kChannels, strip = task / groups / runs, c = c0 + lane;
    const Run run(p.height, task / groups % runs * length, length);
    Unit unit = unit_of<Strip>(p, strip, number);
    if (c >= p.channels) unit.inside = 0;
    // Nobody reads the taps before any more: going down the map, all have waited for each other since.
    const int count = static_cast<int>(p.channels - c0 < kChannels ? p.channels - c0 : kChannels) * kTapCount;
    for (int i = 4 * threadIdx.x; i < count; i += 4 * Strip::kThreads)
      copy_async<16>(weights + i, static_cast<const float*>(p.weight) + c0 * kTapCount + i, true);
    finish_copies();
    float taps[kTaps][kTaps] = {}, sum[kTaps][columns], bias = 0;
    if (unit.inside > 0) {
      // In a unit that goes to the left the taps do too; `flip` turns all.
      int flip = p.flip ? -1 : 1;
      asm volatile("" : "+r"(flip));  // else the places of all taps, the same for each task, are computed ahead of them, and spilled
      const int across = unit.step * flip;
      const float* tap = weights + lane * kTapCount + (flip < 0 ? kTapCount - 1 : 0) + (unit.step < 0 ? (kTaps - 1) * flip : 0);
#pragma unroll
      for (int i = 0; i < kTapCount; ++i) taps[i / kTaps][i % kTaps] = tap[i / kTaps * kTaps * flip + i % kTaps * across];
      if (p.bias) bias = static_cast<const float*>(p.bias)[c];
    }
#pragma unroll
    for (int i = 0; i < kTaps * columns; ++i) sum[i / columns][i % columns] = bias;
    const int own = kept((number * Strip::kBetween * kChannels + lane) * static_cast<int>(sizeof(T)));
    char* y = static_cast<char*>(p.y) +
              (((unit.image * p.height + run.first) * p.width + unit.column) * p.channels + c) * static_cast<int64_t>(sizeof(T));
    InputCopy<T, Strip> source(p, p.x, steps, strip, c0, run.first - kRadius, Strip::kFirst, Strip::kStored);
    const auto copy = [&](int row, int slot) { source.start(run.has(row), steps, ring + slot * Strip::kRow); };
    go_down<Strip>(run, copy, [&](int phase, int row, int slot) {
      if (unit.inside > 0 && run.has(row)) {
        const T* from = reinterpret_cast<const T*>(bytes + slot * (Strip::kRow * static_cast<int>(sizeof(T))) + own);
        for_kernel_rows<T, Strip>(run, row, from, [&](int k, const float (&v)[taken]) {
          float (&to)[columns] = sum[(phase - k + kTaps) % kTaps];
#pragma unroll
          for (int i = 0; i < taken; ++i)
#pragma unroll
            for (int j = 0; j < columns; ++j) {
              const int tap = i + Strip::kFirst - j + kRadius;
              if (tap >= 0 && tap < kTaps) to[j] += v[i] * taps[k][tap];
            }
        });
      }
      if (static_cast<unsigned>(row - 2 * kRadius) >= static_cast<unsigned>(run.count)) return;
      float (&done)[columns] = sum[(phase + 1) % kTaps];
      T* to = reinterpret_cast<T*>(y);
      const int64_t step = Strip::kUnits == 2 ? unit.step * p.channels : p.channels;
      if (unit.inside == columns) {
#pragma unroll
        for (int j = 0; j < columns; ++j, to += step) *to = narrow<T>(done[j]);
      } else {
#pragma unroll
        for (int j = 0; j < columns - 1; ++j, to += step)
          if (j < unit.inside) *to = narrow<T>(done[j]);
      }
#pragma unroll
      for (int j = 0; j < columns; ++j) done[j] = bias;
      y += steps.row;
    });
  }
}

// ---- weight gradient -----------------------------------------------------------------------------------------------------------------
constexpr int kGradRows = 14;  // of outputs, the least that a run of the weight gradient has
template <class T, class Strip>
constexpr int kWeightBytes = Strip::kSlots * (Strip::kRow + Strip::kGradRow) * sizeof(T);

// Sums lie as (parts, 50, padded C), the last row for the bias; a part is a run of pieces of strips.
template <class T, class Strip>
__global__ void __launch_bounds__(Strip::kThreads, Strip::kBlocks) weight_tiles(DepthwiseConvWeightGrad p, Steps steps) {
  constexpr int columns = Strip::kColumns, taken = Strip::kTaken;
  extern __shared__ __align__(16) unsigned char bytes[];
  constexpr int row_size = Strip::kRow + Strip::kGradRow;  // of the ring: a row of x, a row of the gradient
  T* const ring = reinterpret_cast<T*>(bytes);
  const int lane = threadIdx.x % kWarp, number = threadIdx.x / kWarp;
  const int64_t groups = ceil_div(p.channels, kChannels), padded_channels = padded(p.channels, kChannelMultiple);
  const int pieces = static_cast<int>(ceil_div(p.height, kGradRows));  // of a strip; no memory holds 2^31 of them
  for (int64_t task = blockIdx.x; task < p.parts * groups; task += gridDim.x) {
    const int64_t part = task / groups, c0 = task % groups * kChannels, count = strips_of<Strip>(p) * pieces;
    const int end_of_part = static_cast<int>(count * (part + 1) / p.parts);
    float sum[kTaps][kTaps] = {}, bias = 0;
    int step = 1;
    for (int piece = static_cast<int>(count * part / p.parts); piece < end_of_part;) {
      const int strip = piece / pieces, in_strip = piece % pieces, rest = pieces - in_strip;
      const int together = end_of_part - piece < rest ? end_of_part - piece : rest;
      const Run run(p.height, in_strip * kGradRows, together * kGradRows);
      piece += together;
      const Unit unit = unit_of<Strip>(p, strip, number);
      step = unit.step;
      const int own = kept((number * Strip::kBetween * kChannels + lane) * static_cast<int>(sizeof(T)));
      InputCopy<T, Strip> source(p, p.x, steps, strip, c0, run.first - kRadius, Strip::kFirst, Strip::kStored);
      GradCopy<T, Strip> grad_source(p, p.grad, steps, strip, c0, run.first, 0, Strip::kUnits == 2 ? unit.inside : Strip::kUnits * columns);
      const auto copy = [&](int row, int slot) {
        source.start(run.has(row), steps, ring + slot * row_size);
        grad_source.start(row < run.count, steps, ring + slot * row_size + Strip::kRow);
      };
      float grad[kTaps][columns];  // of the seven last rows
      go_down<Strip>(run, copy, [&](int phase, int row, int slot) {
        const T* from = reinterpret_cast<const T*>(bytes + slot * (row_size * static_cast<int>(sizeof(T))) + own);
        if (row < run.count) {
#pragma unroll
          for (int j = 0; j < columns; ++j) grad[phase][j] = widen(from[Strip::kRow + j * kChannels]), bias += grad[phase][j];
        }
        if (unit.inside == 0 || !run.has(row)) return;
        for_kernel_rows<T, Strip>(run, row, from, [&](int k, const float (&v)[taken]) {
          const float (&g)[columns] = grad[(phase - k + kTaps) % kTaps];
#pragma unroll
          for (int tap = 0; tap < kTaps; ++tap) {
            float row_sum = 0;  // a row at a time: one long sum would round two or three times as badly
            bool begun = false;
#pragma unroll
            for (int j = 0; j < columns; ++j) {
              const int i = tap + j - kRadius - Strip::kFirst;
              if (i < 0 || i >= taken) continue;
              row_sum = begun ? row_sum + v[i] * g[j] : v[i] * g[j], begun = true;
            }
            sum[k][tap] += row_sum;
          }
        });
      });
    }
    // The units' sums, one after the other.
    float* const sums = reinterpret_cast<float*>(bytes);
    for (int unit = 0; unit < Strip::kUnits; ++unit) {
      __syncthreads();
      if (unit != number) continue;
      float* to = sums + (step < 0 ? kTaps - 1 : 0) * kChannels + lane;
#pragma unroll
      for (int i = 0; i < kTapCount; ++i) {
        float& total = to[(i / kTaps * kTaps + i % kTaps * step) * kChannels];
        total = unit == 0 ? sum[i / kTaps][i % kTaps] : total + sum[i / kTaps][i % kTaps];
      }
      float& total = sums[kTapCount * kChannels + lane];
      total = unit == 0 ? bias : total + bias;
    }
    __syncthreads();
    float* to = static_cast<float*>(p.workspace) + part * (kTapCount + 1) * padded_channels + c0;
    if (c0 + lane < p.channels)
      for (int i = number; i <= kTapCount; i += Strip::kUnits) to[i * padded_channels + lane] = sums[i * kChannels + lane];
  }
}

}  // namespace
}  // namespace convdit::cuda
