#include "activations.h"
#include "channels.cuh"
#include "launch.h"
#include "workspace.h"

namespace taylorkern::cuda {
namespace {

template <class T>
struct Tensors {
  const T *dy, *x;
  const uint8_t* mask;
  const T* y;
  T *dx, *dresidual;
};

template <class T, int V, bool kTold>
struct Inputs {
  Pack<T, V> dy, x;
};
template <class T, int V>
struct Inputs<T, V, true> {
  Pack<T, V> dy, x, y;
  Pack<uint8_t, V> mask;
};

template <class T, int V, bool kTold>
struct Stage {
  const Tensors<T>& of;

  __device__ __forceinline__ Inputs<T, V, kTold> operator()(const Slice& slice) const {
    Inputs<T, V, kTold> in;
    in.dy = load<T, V>(of.dy, slice);
    in.x = load<T, V>(of.x, slice);
    if constexpr (kTold) {
      if (of.y) in.y = load<T, V>(of.y, slice);
      if (of.mask) in.mask = load<uint8_t, V>(of.mask, slice);
    }
    return in;
  }
};

// dz of element j. A mask or relu's y tells act', or a z that is computed from x.
template <class T, int V, class Act>
__device__ __forceinline__ float activation_gradient(const Tensors<T>& of, const Inputs<T, V, true>& in, int j, Act act,
                                                     const ScaleShift&) {
  const float dy = widen(in.dy.at(j));
  if (of.y) return act.gradient(widen(in.y.at(j)), dy);
  return in.mask.at(j) ? dy : act.stopped(dy);
}
template <class T, int V, class Act>
__device__ __forceinline__ float activation_gradient(const Tensors<T>&, const Inputs<T, V, false>& in, int j, Act act,
                                                     const ScaleShift& affine) {
  return act.gradient(normalise(widen(in.x.at(j)), affine.scale, affine.shift), widen(in.dy.at(j)));
}

struct Centred : ScaleShift {
  float mean;
};

// Of every slot and channel the sums of (x - mean) * dz and of dz, and s of whole samples
template <class T, class Tile, int V, class Act, bool kTold>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_sums(Tensors<T> of, float* s, float* centred, float* plain, Affine affine, Act act, Tiling tiling) {
  const Tile tile(tiling, blockIdx.x);
  Centred channel[Tile::kWidth] = {};
  tile.per_channel([&](int64_t c) { return Centred{ScaleShift::of(affine, c), affine.mean[c]}; }, channel);
  const auto add = [&](const Slice& slice, const auto& in, auto& sums) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Centred& at = channel[j % Tile::kWidth];
      const float dz = slice.holds(j) ? activation_gradient(of, in, j, act, at) : 0.0f;
      const float deviation = slice.holds(j) ? widen(in.x.at(j)) - at.mean : 0.0f;
      sums[0][j % Tile::kWidth] += deviation * dz;
      sums[1][j % Tile::kWidth] += dz;
    }
  };
  const auto of_sample = [&](int64_t n, int64_t c, const float (&sums)[2]) {
    if (!tiling.whole_samples()) return;
    s[n * tiling.C + c] = gate_gradient(affine.gamma(c), affine.beta(c), sums[0] * affine.inverse_std(c), sums[1]);
  };
  const auto of_tile = [&](int64_t c, const float (&sums)[2]) {
    centred[tile.slot * tiling.C + c] = sums[0];
    plain[tile.slot * tiling.C + c] = sums[1];
  };
  tile.template reduce<2>(Stage<T, V, kTold>{of}, add, of_sample, of_tile);
}

// The batch's sums from those of the slots, and s of samples that several slots share
__global__ void __launch_bounds__(kThreads, kBlocks)
    parameter_gradients(const float* centred, const float* plain, float* s, float* dweight, float* dbias, Affine affine,
                        Tiling tiling) {
  const Column column(tiling);
  const int64_t c = column.c, sharing = tiling.chunks;
  float sums[2] = {};
  for (int64_t first = column.share * sharing; column.live && first < tiling.slots; first += kShares * sharing) {
    float sample[2] = {};
    for (int64_t slot = first; slot < first + sharing; ++slot) {
      sample[0] += centred[slot * tiling.C + c];
      sample[1] += plain[slot * tiling.C + c];
    }
    if (!tiling.whole_samples()) {
      s[first / sharing * tiling.C + c] =
          gate_gradient(affine.gamma(c), affine.beta(c), sample[0] * affine.inverse_std(c), sample[1]);
    }
    sums[0] += sample[0];
    sums[1] += sample[1];
  }
  if (!column.join(sums)) return;
  dweight[c] = sums[0] * affine.inverse_std(c);
  dbias[c] = sums[1];
}

// level = dbias / M and slope = dweight / sqrt(var + eps) / M; nought in evaluation mode
struct OfBatch : Centred {
  float level, slope;
};

template <class T, class Tile, int V, class Act, bool kTold>
__global__ void __launch_bounds__(kThreads, kBlocks)
    input_gradients(Tensors<T> of, const float* dweight, const float* dbias, Affine affine, Act act, bool training,
                    bool streams, Tiling tiling) {
  // What the pass before this one has read last may still be in the cache.
  const Tile tile(tiling, tiling.blocks() - 1 - blockIdx.x);
  const float count = static_cast<float>(tiling.N * tiling.S);
  OfBatch channel[Tile::kWidth] = {};
  const auto of_channel = [&](int64_t c) {
    const Centred at{ScaleShift::of(affine, c), affine.mean[c]};
    if (!training) return OfBatch{at, 0, 0};
    return OfBatch{at, dbias[c] / count, dweight[c] * affine.inverse_std(c) / count};
  };
  tile.per_channel(of_channel, channel);
  tile.each(Stage<T, V, kTold>{of}, [&](const Slice& slice, const auto& in) {
    Pack<T, V> dx{}, dresidual{};
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const OfBatch& at = channel[j % Tile::kWidth];
      const float dz = activation_gradient(of, in, j, act, at);
      const float trained = input_gradient(dz, widen(in.x.at(j)), at.mean, at.scale, at.level, at.slope);
      dx.put(j, narrow<T>(training ? trained : at.scale * dz));
      dresidual.put(j, narrow<T>(dz));
    }
    store(of.dx, slice, dx, streams);
    if (of.dresidual) store(of.dresidual, slice, dresidual, streams);
  });
}

template <class T, class Tile, int V, bool kTold, class Act>
void run(const BatchNormActBackward& args, const Launch& launch, Act act) {
  const Tiling tiling = Tiling::of(args.shape, V);
  const Workspace workspace(launch.workspace, tiling);
  const Tensors<T> of{static_cast<const T*>(args.dy), static_cast<const T*>(args.x),
                      static_cast<const uint8_t*>(args.mask), static_cast<const T*>(args.y), static_cast<T*>(args.dx),
                      static_cast<T*>(args.dresidual)};
  const Affine affine = Affine::of(args);
  float *const s = static_cast<float*>(args.s), *const centred = workspace.sums[0], *const plain = workspace.sums[1];
  float *const dweight = static_cast<float*>(args.dweight), *const dbias = static_cast<float*>(args.dbias);
  const int64_t read_twice = args.y ? 3 : 2;

  for_waves(tiling, args.shape, read_twice, launch.resident_bytes, [&](const Tiling& wave) {
    start(launch, wave.blocks(), Tile::template shared_bytes<Centred>(2), gradient_sums<T, Tile, V, Act, kTold>, of, s,
          centred, plain, affine, act, wave);
    start(launch, column_blocks(wave), Column::shared_bytes<float>(2), parameter_gradients, centred, plain, s, dweight,
          dbias, affine, wave);
    start(launch, wave.blocks(), Tile::template shared_bytes<OfBatch>(0), input_gradients<T, Tile, V, Act, kTold>, of,
          dweight, dbias, affine, act, args.training, streams(args.shape), wave);
  });
}

}  // namespace

void batch_norm_act_backward(const BatchNormActBackward& args, const Launch& launch) {
  const bool wide = aligned({args.dy, args.x, args.mask, args.y, args.dx, args.dresidual});
  const bool told = args.mask || args.y;
  dispatch(args.shape, wide, [&](auto access, auto width) {
    using T = typename decltype(access)::element;
    using Tile = typename decltype(access)::tile;
    with_activation(args.activation, args.slope, [&](auto act) {
      constexpr int V = decltype(width)::value;
      if constexpr (kMasked<decltype(act)>) {
        if (told) return run<T, Tile, V, true>(args, launch, act);
      }
      run<T, Tile, V, false>(args, launch, act);
    });
  });
}

}  // namespace taylorkern::cuda
