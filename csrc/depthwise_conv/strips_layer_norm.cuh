// The 7x7 convolution and the LayerNorm after it in one launch. A block has all channels of a run of tiles, 32 at a time: what it writes of
// them it reads again, from cache, once it knows each site's mean and deviation. These come from the sums in registers.
#pragma once
#include <algorithm>

#include "depthwise_conv/strips.cuh"

namespace convdit::cuda {
namespace {

// How sums over channels go together where the lanes of a half warp, two channels each, change places in four steps: for each, what share
// of the channels summed by then is the other lane's, and that share times the number of the lane's own.
struct Merges {
  float share[4], product[4];
  __device__ explicit Merges(int channel, int64_t channels) {
    float own = channel < channels ? 2.f : 0.f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float other = __shfl_xor_sync(0xffffffffu, own, 8 >> k), total = own + other;
      share[k] = total > 0 ? other / total : 0.f, product[k] = own * share[k], own = total;
    }
  }
};

// The first 2 * N means and sums of squares about them: a lane gives half of them away for the other lane's part of the rest.
template <int N>
__device__ __forceinline__ void change_places(float (&mean)[16], float (&squares)[16], float share, float product) {
  const bool upper = threadIdx.x & N;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float own = upper ? mean[i + N] : mean[i], own_squares = upper ? squares[i + N] : squares[i];
    const float other_squares = __shfl_xor_sync(0xffffffffu, upper ? squares[i] : squares[i + N], N);
    const float apart = __shfl_xor_sync(0xffffffffu, upper ? mean[i] : mean[i + N], N) - own;
    mean[i] = own + apart * share, squares[i] = own_squares + other_squares + apart * apart * product;
  }
}

// A lane has two channels of `Sites` sites. Gives it one site, that of its number in the half warp: the mean over all channels and the
// sum of squares about it, of which pairs merge (Chan et al. 1979): right for rows with a large mean.
template <int Sites>
__device__ __forceinline__ float2 merge_sites(const float (&values)[Sites][2], const Merges& merges) {
  static_assert(Sites <= 16);
  float mean[16] = {}, squares[16] = {};
#pragma unroll
  for (int i = 0; i < Sites; ++i) {
    const float half = (values[i][0] - values[i][1]) / 2;
    mean[i] = values[i][1] + half, squares[i] = 2 * half * half;
  }
  change_places<8>(mean, squares, merges.share[0], merges.product[0]);
  change_places<4>(mean, squares, merges.share[1], merges.product[1]);
  change_places<2>(mean, squares, merges.share[2], merges.product[2]);
  change_places<1>(mean, squares, merges.share[3], merges.product[3]);
  return make_float2(mean[0], squares[0]);
}

template <class T, class Tile>
__global__ void __launch_bounds__(kForwardThreads<T, Tile>, kNoSpills)
    forward_norm_strips(DepthwiseConvLayerNorm p, Tiles tiles, int64_t length) {
  constexpr int threads = kForwardThreads<T, Tile>, rows = Tile::kUnitRows, columns = Tile::kUnitColumns, width = Tile::kColumns;
  extern __shared__ __align__(16) unsigned char bytes[];
  // Of each site of the run: the mean and the sum of squares about it, over the channels so far; then the mean and 1/deviation.
  float2* const statistics = reinterpret_cast<float2*>(bytes + kForwardBytes<T, Tile>);
  const DepthwiseConv& conv = p.conv;
  const int64_t channels = conv.channels, tasks = conv.batch * tiles.columns * ceil_div(tiles.rows, length);
  const Place<Tile> place;
  const int own_site = (place.row + place.lane / columns) * width + place.column + place.lane % columns;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const TileRun run = run_of<Tile>(conv, tiles, length, task);
    for (int64_t c0 = 0; c0 < channels; c0 += kChannels) {
      const Merges merges(place.channel, channels - c0);
      const float before = static_cast<float>(c0), total = static_cast<float>(channels - c0 < kChannels ? channels : c0 + kChannels);
      const float share = (total - before) / total;
      convolve<T, Tile>(conv, run, c0, bytes, [&](int64_t h0, const float (&sum)[rows][columns][2]) {
        store_unit<T, Tile>(conv, run, c0, h0, sum);
        float values[rows * columns][2];  // as they are written: the norm is of those
#pragma unroll
        for (int i = 0; i < rows * columns; ++i) widen<2, T>(narrow_all<T>(sum[i / columns][i % columns]), values[i]);
        const float2 group = merge_sites(values, merges);
        if (place.lane >= rows * columns) return;
        float2& site = statistics[(h0 - run.first) * width + own_site];
        const float apart = group.x - site.x;
        site = c0 == 0 ? group : make_float2(site.x + apart * share, site.y + group.y + apart * apart * before * share);
      });
    }
    __syncthreads();
    const int64_t first_site = (run.image * conv.height + run.first) * conv.width + run.w0;
    const int sites = static_cast<int>(run.last - run.first) * width;
    for (int i = threadIdx.x; i < sites; i += threads) {
      const float mean = statistics[i].x, rstd = 1.f / sqrtf(statistics[i].y / static_cast<float>(channels) + static_cast<float>(p.eps));
      statistics[i].y = rstd;
      if (!p.mean || run.w0 + i % width >= conv.width) continue;
      const int64_t site = first_site + i / width * conv.width + i % width;
      static_cast<float*>(p.mean)[site] = mean, static_cast<float*>(p.rstd)[site] = rstd;
    }
    __syncthreads();
    // A team of lanes has a site at a time.
    constexpr int V = kVector<T>, lanes = kChannels / V;
    for (int64_t c0 = 0; c0 < channels; c0 += kChannels) {
      const int64_t c = c0 + threadIdx.x % lanes * V;
      float scale[V], shift[V];
      load_row(static_cast<const float*>(p.ln_weight), c, channels, scale);
      load_row(static_cast<const float*>(p.ln_bias), c, channels, shift);
      if (c >= channels) continue;
      for (int i = threadIdx.x / lanes; i < sites; i += threads / lanes) {
        if (run.w0 + i % width >= conv.width) continue;
        const int64_t place = (first_site + i / width * conv.width + i % width) * channels + c;
        const float2 site = statistics[i];
        float v[V];
        load(static_cast<const T*>(conv.y) + place, V, true, v);
#pragma unroll
        for (int k = 0; k < V; ++k) v[k] = (v[k] - site.x) * site.y * scale[k] + shift[k];
        store(static_cast<T*>(p.out) + place, V, true, v);
      }
    }
  }
}

// With fewer tiles than this, a launch that cuts the channels too has work for more multiprocessors; a map of so few tiles is in cache
// when a second launch takes the norm. Tests set a small number, to see both ways.
#ifndef CONVDIT_ENOUGH_TILES
#define CONVDIT_ENOUGH_TILES 128
#endif
// Of a run, all channels: what two blocks on each multiprocessor have written is then at most 26 MB on an H100, half its cache, when
// they read it again.
constexpr int64_t kCachedBytes = 96 * 1024;

// Returns -1 where two launches do better.
template <class T, class Tile>
int launch_norm_strips(const DepthwiseConvLayerNorm& p, cudaStream_t stream) {
  const Tiles tiles = tiles_of<Tile>(p.conv.height, p.conv.width, p.conv.channels);
  const int64_t strips = p.conv.batch * tiles.columns, count = strips * tiles.rows, enough = CONVDIT_ENOUGH_TILES;
  const int64_t tile_bytes = Tile::kRows * Tile::kColumns * p.conv.channels * static_cast<int64_t>(sizeof(T));
  if (count < enough || tile_bytes > kCachedBytes) return -1;
  const int64_t length = std::max<int64_t>(1, std::min({kCachedBytes / tile_bytes, tiles.rows, count / (2 * enough)}));
  const int64_t bytes = kForwardBytes<T, Tile> + length * Tile::kRows * Tile::kColumns * static_cast<int64_t>(sizeof(float2));
  if (const int status = allow_shared_bytes(forward_norm_strips<T, Tile>, bytes)) return status;
  forward_norm_strips<T, Tile><<<grid(strips * ceil_div(tiles.rows, length)), kForwardThreads<T, Tile>, bytes, stream>>>(p, tiles, length);
  return launch_status();
}

}  // namespace
}  // namespace convdit::cuda
