// How a tensor is cut into tiles, and how threads share them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "../ops.h"

namespace taylorkern::cpu {

constexpr int64_t kTileElements = 16384;  // fewer aren't worth a thread
constexpr int64_t kMaxTiles = 64;         // bounds the scratch memory; also the most threads that can help
constexpr int64_t kRowsPerTile = 16;      // a tile's positions come in multiples of it

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Samples [n0, n1), channels [c0, c1), positions [s0, s1). Tiles with the same slot cover disjoint channels, so their
// per-channel sums share one row of scratch memory.
struct Tile {
  int64_t n0, n1, c0, c1, s0, s1;
  int64_t slot;
};

// Depends on the shape alone: the order of every sum follows from it.
// A tile with several samples covers all their positions.
struct Partition {
  int64_t N, C, S;
  int64_t samples, channels, positions;  // extent of a tile
  int64_t slots_n, slots_s, columns;     // tiles along N, S, C

  explicit Partition(const Shape& shape) : N(shape.N), C(shape.C), S(shape.S) {
    const int64_t want = std::clamp<int64_t>(ceil_div(N * C * S, kTileElements), 1, kMaxTiles);
    samples = std::max<int64_t>(1, ceil_div(N, std::min(std::max<int64_t>(N, 1), want)));
    slots_n = ceil_div(N, samples);
    const int64_t per_sample = std::max<int64_t>(1, want / std::max<int64_t>(slots_n, 1));
    const bool split_channels = shape.layout == Layout::channels_first;
    channels = split_channels ? std::max<int64_t>(1, ceil_div(C, per_sample)) : std::max<int64_t>(C, 1);
    columns = ceil_div(C, channels);
    const int64_t chunks = samples > 1 ? 1 : std::max<int64_t>(1, per_sample / std::max<int64_t>(columns, 1));
    positions = std::max<int64_t>(1, ceil_div(ceil_div(S, chunks), kRowsPerTile) * kRowsPerTile);
    slots_s = ceil_div(S, positions);
  }

  int64_t slots() const { return slots_n * slots_s; }
  int64_t tiles() const { return slots() * columns; }
  bool whole_samples() const { return slots_s == 1; }

  // How many of the threads can help
  int useful(int threads) const {
    return static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(tiles(), 1)));
  }

  Tile tile(int64_t index) const {
    const int64_t column = index % columns, slot = index / columns;
    const int64_t n = slot / slots_s * samples, c = column * channels, s = slot % slots_s * positions;
    return {n, std::min(n + samples, N), c, std::min(c + channels, C), s, std::min(s + positions, S), slot};
  }
};

// body(index, worker) for every index below count; worker is below `threads`
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  const int workers = static_cast<int>(std::min<int64_t>(threads, count));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
}

}  // namespace taylorkern::cpu
