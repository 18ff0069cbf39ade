// The two layouts behind one interface, so that a pass is written once. Each class is one thread's part of one tile, with
//   kWidth                       channels of a thread
//   live, c                      whether it has any, and the first
//   first, last                  the samples of its tile, of which it has some
//   per_channel(of, values)      values[kWidth] = of(channel) of its channels, by all threads of the block
//   each(stage, use)             use(slice, stage(slice)) for all its elements, several staged before the first is used
//   reduce<K>(stage, add, of_sample, of_tile)
//                                add(slice, staged, sums) adds each element's terms to sums[K][kWidth];
//                                of_sample(n, c, sums) and of_tile(c, sums) get sums[K] of one channel, once each
//   middle(c)                    the offset of an element that is like the others of the tile's channel c
#pragma once

#include "element.cuh"
#include "tiling.h"

namespace taylorkern::cuda {

// How often a thread stages before it uses the first: 64 bytes on their way are enough where 512 threads do the same, and
// more than the registers of two blocks hold is too much.
template <class Staged>
constexpr int kUnroll = sizeof(Staged) <= 16 ? 4 : 2;

template <class T, int V>
class ChannelsLast {
  static constexpr int kLanes = V > 1 ? 8 : kWarp, kRows = kThreads / kLanes, kColumns = V * kLanes;
  const Tiling& tiling;
  const int lane, row;
  int64_t group, begin, end, n;

 public:
  static constexpr int kWidth = V;
  int64_t slot, first, last, c;
  bool live;

  __device__ ChannelsLast(const Tiling& tiling, int64_t block)
      : tiling(tiling), lane(threadIdx.x % kLanes), row(threadIdx.x / kLanes) {
    group = tiling.first_group + block % tiling.wave_groups;
    slot = block / tiling.wave_groups;
    first = tiling.first_sample(slot);
    last = tiling.last_sample(slot);
    n = first + row / tiling.workers;
    begin = tiling.first_position(slot);
    end = tiling.last_position(slot);
    c = group * tiling.channels + lane * V;
    live = c < tiling.C && n < last;
  }

  __device__ int64_t middle(int64_t channel) const { return (first * tiling.S + (begin + end) / 2) * tiling.C + channel; }

  // Every channel's numbers are computed once and not by each row of threads.
  template <class Of, class Values>
  __device__ __forceinline__ void per_channel(const Of& of, Values (&values)[V]) const {
    Values* const shared = reinterpret_cast<Values*>(dynamic_memory);  // [kColumns]
    const int64_t channel = group * tiling.channels + threadIdx.x;
    if (threadIdx.x < kColumns && channel < tiling.C) shared[threadIdx.x] = of(channel);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (live) values[j] = shared[lane * V + j];
    }
    __syncthreads();
  }

  template <class Stage, class Use>
  __device__ __forceinline__ void each(const Stage& stage, const Use& use) const {
    if (!live) return;
    const int64_t row_of_sample = n * tiling.S;
    const int workers = tiling.workers;
    using Staged = decltype(stage(Slice{}));
    for (int64_t s = begin + row % workers; s < end; s += kUnroll<Staged> * workers) {
      Staged staged[kUnroll<Staged>];
#pragma unroll
      for (int u = 0; u < kUnroll<Staged>; ++u) {
        const int64_t position = s + u * workers;
        if (position < end) staged[u] = stage(Slice{(row_of_sample + position) * tiling.C + c, 0, V});
      }
#pragma unroll
      for (int u = 0; u < kUnroll<Staged>; ++u) {
        const int64_t position = s + u * workers;
        if (position < end) use(Slice{(row_of_sample + position) * tiling.C + c, 0, V}, staged[u]);
      }
    }
  }

  template <int K, class Stage, class Add, class OfSample, class OfTile>
  __device__ __forceinline__ void reduce(const Stage& stage, const Add& add, const OfSample& of_sample,
                                         const OfTile& of_tile) const {
    float sums[K][V] = {};
    each(stage, [&](const Slice& slice, const auto& staged) { add(slice, staged, sums); });
    float* const shared = reinterpret_cast<float*>(dynamic_memory);  // [K, kRows, V, kLanes]
    const auto place = [](int k, int row, int j, int lane) { return ((k * kRows + row) * V + j) * kLanes + lane; };
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) shared[place(k, row, j, lane)] = sums[k][j];
    }
    __syncthreads();
    const int column = threadIdx.x;
    const int64_t channel = group * tiling.channels + column;
    if (column >= kColumns || channel >= tiling.C) return;
    float total[K] = {};
    for (int64_t sample = first; sample < last; ++sample) {
      const int from = static_cast<int>(sample - first) * tiling.workers;
      float of_one[K] = {};
      for (int worker = 0; worker < tiling.workers; ++worker) {
        for (int k = 0; k < K; ++k) of_one[k] += shared[place(k, from + worker, column % V, column / V)];
      }
      of_sample(sample, channel, of_one);
      for (int k = 0; k < K; ++k) total[k] += of_one[k];
    }
    of_tile(channel, total);
  }

  // For per_channel, and for sums of K terms
  template <class Values>
  static constexpr size_t shared_bytes(size_t K) {
    return std::max(sizeof(Values) * kColumns, sizeof(float) * K * kThreads * V);
  }
};

template <class T, int V>
class ChannelsFirst {
  const Tiling& tiling;
  const int lane;
  int64_t begin, end;

 public:
  static constexpr int kWidth = 1;
  int64_t slot, first, last, c;
  bool live;

  __device__ ChannelsFirst(const Tiling& tiling, int64_t block) : tiling(tiling), lane(threadIdx.x % tiling.lanes) {
    const int64_t group = tiling.first_group + block % tiling.wave_groups;
    slot = block / tiling.wave_groups;
    first = tiling.first_sample(slot);
    last = tiling.last_sample(slot);
    begin = tiling.first_position(slot);
    end = tiling.last_position(slot);
    c = group * tiling.channels + threadIdx.x / tiling.lanes;
    live = c < tiling.C;
  }

  __device__ int64_t middle(int64_t channel) const { return (first * tiling.C + channel) * tiling.S + (begin + end) / 2; }

  template <class Of, class Values>
  __device__ __forceinline__ void per_channel(const Of& of, Values (&values)[1]) const {
    if (live) values[0] = of(c);
  }

  template <class Stage, class Use>
  __device__ __forceinline__ void each(const Stage& stage, const Use& use) const {
    for (int64_t n = first; n < last; ++n) of_sample(n, stage, use);
  }

  template <int K, class Stage, class Add, class OfSample, class OfTile>
  __device__ __forceinline__ void reduce(const Stage& stage, const Add& add, const OfSample& of_each,
                                         const OfTile& of_tile) const {
    float total[K] = {};
    for (int64_t n = first; n < last; ++n) {
      float sums[K][1] = {};
      of_sample(n, stage, [&](const Slice& slice, const auto& staged) { add(slice, staged, sums); });
      float of_one[K];
      for (int k = 0; k < K; ++k) {
        of_one[k] = sums[k][0];
        for (int distance = tiling.lanes / 2; distance; distance /= 2) {
          of_one[k] += __shfl_xor_sync(0xffffffffu, of_one[k], distance);
        }
        total[k] += of_one[k];
      }
      if (live && lane == 0) of_each(n, c, of_one);
    }
    if (live && lane == 0) of_tile(c, total);
  }

  template <class Values>
  static constexpr size_t shared_bytes(size_t) {
    return 0;
  }

 private:
  // Packs begin where memory is aligned, which rows need not; the first and the last may belong to another row in part.
  __device__ __forceinline__ Slice slice(int64_t pack, int64_t from, int64_t to) const {
    const int64_t at = pack * V;
    return {at, static_cast<int>(max(from - at, int64_t{0})), static_cast<int>(min(to - at, int64_t{V}))};
  }

  template <class Stage, class Use>
  __device__ __forceinline__ void of_sample(int64_t n, const Stage& stage, const Use& use) const {
    if (!live) return;
    const int64_t row = (n * tiling.C + c) * tiling.S, from = row + begin, to = row + end;
    const int64_t stop = (to + V - 1) / V;
    const int lanes = tiling.lanes;
    using Staged = decltype(stage(Slice{}));
    for (int64_t pack = from / V + lane; pack < stop; pack += kUnroll<Staged> * lanes) {
      Staged staged[kUnroll<Staged>];
#pragma unroll
      for (int u = 0; u < kUnroll<Staged>; ++u) {
        if (pack + u * lanes < stop) staged[u] = stage(slice(pack + u * lanes, from, to));
      }
#pragma unroll
      for (int u = 0; u < kUnroll<Staged>; ++u) {
        if (pack + u * lanes < stop) use(slice(pack + u * lanes, from, to), staged[u]);
      }
    }
  }
};

}  // namespace taylorkern::cuda
