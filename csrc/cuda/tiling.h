// How a tensor [N, C, S] is cut into tiles, one for each block of threads. It depends on the shape and on the width of an
// access, 16 bytes wherever tensors begin at such addresses: sums are taken in the same order in every run.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../ops.h"

namespace taylorkern::cuda {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;            // at least, on one processor: they share its registers, and may have them all
constexpr int64_t kManyBlocks = 1024; // more keep no device busier
constexpr int kWarp = 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile is a group of channels by a slot: `samples` samples, or one of `chunks` runs of `length` positions of one sample.
//   channels_last   `lanes` threads side by side hold `width` channels each, and `workers` rows of them share a sample
//   channels_first  `lanes` threads share a row of positions, and every row is another channel
struct Tiling {
  int64_t N, C, S;
  int64_t groups, channels;  // of channels, and channels in each
  int64_t samples, chunks, length, slots;
  int lanes, workers;
  int64_t first_group, wave_groups;  // those of one launch

  static Tiling of(const Shape& shape, int width) {
    Tiling tiling = shape.layout == Layout::channels_last ? channels_last(shape, width) : channels_first(shape, width);
    tiling.slots = ceil_div(shape.N, tiling.samples) * tiling.chunks;
    tiling.first_group = 0;
    tiling.wave_groups = tiling.groups;
    return tiling;
  }

  __host__ __device__ bool whole_samples() const { return chunks == 1; }
  __host__ __device__ int64_t blocks() const { return wave_groups * slots; }

  // The channels of one launch
  __host__ __device__ int64_t first_channel() const { return first_group * channels; }
  __host__ __device__ int64_t last_channel() const { return least((first_group + wave_groups) * channels, C); }

  // Of a slot: its samples, its positions, and how many values of a channel they are
  __host__ __device__ int64_t first_sample(int64_t slot) const { return slot / chunks * samples; }
  __host__ __device__ int64_t last_sample(int64_t slot) const { return least(first_sample(slot) + samples, N); }
  __host__ __device__ int64_t first_position(int64_t slot) const { return slot % chunks * length; }
  __host__ __device__ int64_t last_position(int64_t slot) const { return least(first_position(slot) + length, S); }
  __host__ __device__ int64_t values(int64_t slot) const {
    return (last_sample(slot) - first_sample(slot)) * (last_position(slot) - first_position(slot));
  }

 private:
  static __host__ __device__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  static Tiling sized(const Shape& shape, int lanes, int64_t channels) {
    Tiling tiling{};
    tiling.N = shape.N, tiling.C = shape.C, tiling.S = shape.S;
    tiling.lanes = lanes;
    tiling.channels = channels;
    tiling.groups = ceil_div(shape.C, channels);
    tiling.samples = tiling.chunks = 1;
    return tiling;
  }

  // A row of lanes takes 128 bytes, a whole line, where accesses are wide.
  static Tiling channels_last(const Shape& shape, int width) {
    const int lanes = width > 1 ? 8 : kWarp;
    Tiling tiling = sized(shape, lanes, static_cast<int64_t>(lanes) * width);
    tiling.workers = kThreads / lanes;
    cut(tiling, tiling.workers, shape.N * tiling.groups);
    // What comes behind its positions costs a thread as much as some of them: it should have eight, or two where there
    // are few blocks.
    const auto blocks = [&] { return shape.N * tiling.groups / tiling.samples; };
    while (tiling.chunks == 1 && tiling.workers > 1 &&
           shape.S < (blocks() >= kManyBlocks / 2 ? 8 : 2) * static_cast<int64_t>(tiling.workers)) {
      tiling.workers /= 2;
      tiling.samples *= 2;
    }
    return tiling;
  }

  static Tiling channels_first(const Shape& shape, int width) {
    const int64_t packs = ceil_div(shape.S, width);
    int lanes = 1;
    while (lanes < kWarp && lanes * 3 <= packs) lanes *= 2;  // about two packs each, where there are as many
    Tiling tiling = sized(shape, lanes, kThreads / lanes);
    tiling.workers = 1;
    cut(tiling, static_cast<int64_t>(lanes) * width, shape.N * tiling.groups);
    constexpr int64_t kMostSamples = 16;
    if (tiling.chunks == 1) tiling.samples = std::clamp(shape.N * tiling.groups / kManyBlocks, int64_t{1}, kMostSamples);
    return tiling;
  }

  // Chunks of up to 64 steps of `step` positions, or of fewer where there are few blocks
  static void cut(Tiling& tiling, int64_t step, int64_t blocks) {
    int64_t steps = 64;
    while (steps > 8 && blocks * ceil_div(tiling.S, steps * step) < kManyBlocks) steps /= 2;
    tiling.chunks = std::max<int64_t>(1, ceil_div(tiling.S, steps * step));
    tiling.length = ceil_div(ceil_div(tiling.S, tiling.chunks), step) * step;
    tiling.chunks = std::max<int64_t>(1, ceil_div(tiling.S, std::max<int64_t>(tiling.length, 1)));
  }
};

// body(tiling) for waves of channels, of `tensors` tensors that are read twice, so that each wave's stay resident between
// its passes; once for all channels where that is not wanted, not needed or in vain
template <class Body>
void for_waves(const Tiling& whole, const Shape& shape, int64_t tensors, int64_t resident_bytes, const Body& body) {
  const int64_t group = whole.channels * shape.N * shape.S * bytes_of(shape.dtype) * tensors;
  const int64_t fitting = group ? resident_bytes / group : whole.groups;
  if (fitting == 0 || fitting >= whole.groups) return body(whole);
  for (int64_t first = 0; first < whole.groups; first += fitting) {
    Tiling wave = whole;
    wave.first_group = first;
    wave.wave_groups = std::min(fitting, whole.groups - first);
    body(wave);
  }
}

}  // namespace taylorkern::cuda
