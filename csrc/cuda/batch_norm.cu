#include "activations.h"
#include "channels.cuh"
#include "launch.h"
#include "workspace.h"

namespace taylorkern::cuda {
namespace {

// Of every slot and channel: an element, the mean's distance from it, and the summed squared deviation from the mean.
// Sums of deviations from a number that is near the mean lose nothing to it, however large it is.
template <class T, class Tile, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments(const T* x, float* pivots, float* offsets, float* m2s, Tiling tiling) {
  const Tile tile(tiling, blockIdx.x);
  float pivot[Tile::kWidth] = {};
  tile.per_channel([&](int64_t c) { return widen(x[tile.middle(c)]); }, pivot);
  const auto stage = [&](const Slice& slice) { return load<T, V>(x, slice); };
  const auto add = [&](const Slice& slice, const Pack<T, V>& pack, auto& sums) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float deviation = slice.holds(j) ? widen(pack.at(j)) - pivot[j % Tile::kWidth] : 0.0f;
      sums[0][j % Tile::kWidth] += deviation;
      sums[1][j % Tile::kWidth] += deviation * deviation;
    }
  };
  const auto of_tile = [&](int64_t c, const float (&sums)[2]) {
    const int64_t at = tile.slot * tiling.C + c;
    const Moments<float> found = moments_about(0.0f, sums[0], sums[1], static_cast<float>(tiling.values(tile.slot)));
    pivots[at] = widen(x[tile.middle(c)]);
    offsets[at] = found.mean;
    m2s[at] = found.m2;
  };
  tile.template reduce<2>(stage, add, [](int64_t, int64_t, const float (&)[2]) {}, of_tile);
}

// The batch's mean and variance from those of the slots: their distances from the first one's, weighted, in double
__global__ void __launch_bounds__(kThreads, kBlocks)
    statistics(const float* pivots, const float* offsets, const float* m2s, float* mean, float* var, Tiling tiling) {
  const Column column(tiling);
  const int64_t c = column.c;
  const bool live = column.live && tiling.slots > 0;
  const auto mean_of = [&](int64_t slot) {
    const int64_t at = slot * tiling.C + c;
    return static_cast<double>(pivots[at]) + offsets[at];
  };
  const double origin = live ? mean_of(0) : 0.0;
  double sums[2] = {};
  for (int64_t slot = column.share; live && slot < tiling.slots; slot += kShares) {
    const double distance = mean_of(slot) - origin, weighted = static_cast<double>(tiling.values(slot)) * distance;
    sums[0] += weighted;
    sums[1] += static_cast<double>(m2s[slot * tiling.C + c]) + weighted * distance;
  }
  if (!column.join(sums)) return;
  const double count = static_cast<double>(tiling.N * tiling.S);
  const Moments<double> all = count > 0 ? moments_about(origin, sums[0], sums[1], count) : Moments<double>{0, 0};
  mean[c] = static_cast<float>(all.mean);
  var[c] = biased_variance<float>(static_cast<float>(all.m2), count);
}

template <class T, class Tile, int V, class Act>
__global__ void __launch_bounds__(kThreads, kBlocks) normalisation(const T* x, const T* residual, T* y, uint8_t* mask,
                                                                   Affine affine, Act act, bool streams,
                                                                   Tiling tiling) {
  struct Inputs {
    Pack<T, V> x, residual;
  };
  // What the pass before this one has read last may still be in the cache.
  const Tile tile(tiling, tiling.blocks() - 1 - blockIdx.x);
  ScaleShift of[Tile::kWidth] = {};
  tile.per_channel([&](int64_t c) { return ScaleShift::of(affine, c); }, of);
  const auto stage = [&](const Slice& slice) {
    Inputs in;
    in.x = load<T, V>(x, slice);
    if (residual) in.residual = load<T, V>(residual, slice);
    return in;
  };
  tile.each(stage, [&](const Slice& slice, const Inputs& in) {
    Pack<T, V> out;
    Pack<uint8_t, V> passes{};
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float z = normalise(widen(in.x.at(j)), of[j % Tile::kWidth].scale, of[j % Tile::kWidth].shift);
      if (residual) z += widen(in.residual.at(j));
      if constexpr (kMasked<Act>) passes.put(j, act.passes(z));
      out.put(j, narrow<T>(act.apply(z)));
    }
    store(y, slice, out, streams);
    if (mask) store(mask, slice, passes, false);
  });
}

}  // namespace

void batch_norm_act(const BatchNormAct& args, const Launch& launch) {
  const bool wide = aligned({args.x, args.residual, args.y, args.mask});
  dispatch(args.shape, wide, [&](auto access, auto width) {
    using T = typename decltype(access)::element;
    using Tile = typename decltype(access)::tile;
    constexpr int V = decltype(width)::value;
    Tiling tiling = Tiling::of(args.shape, V);
    if (args.shape.S == 0) tiling.slots = 0;
    const Workspace of(launch.workspace, tiling);
    const T* const x = static_cast<const T*>(args.x);
    float *const mean = static_cast<float*>(args.mean), *const var = static_cast<float*>(args.var);

    for_waves(tiling, args.shape, 1, launch.resident_bytes, [&](const Tiling& wave) {
      if (args.training) {
        start(launch, wave.blocks(), Tile::template shared_bytes<float>(2), moments<T, Tile, V>, x, of.sums[0],
              of.sums[1], of.sums[2], wave);
        start(launch, column_blocks(wave), Column::shared_bytes<double>(2), statistics, of.sums[0], of.sums[1],
              of.sums[2], mean, var, wave);
      }
      with_activation(args.activation, args.slope, [&](auto act) {
        start(launch, wave.blocks(), Tile::template shared_bytes<ScaleShift>(0),
              normalisation<T, Tile, V, decltype(act)>, x, static_cast<const T*>(args.residual),
              static_cast<T*>(args.y), static_cast<uint8_t*>(args.mask), Affine::of(args), act, streams(args.shape),
              wave);
      });
    });
  });
}

}  // namespace taylorkern::cuda
