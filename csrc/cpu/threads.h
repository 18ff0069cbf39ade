// How the work is cut up, and how threads share it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "../ops.h"

namespace taylorkern::cpu {

constexpr int64_t kTileElements = 16384;      // fewer aren't worth a thread
constexpr int64_t kMaxTiles = 64;             // bounds the scratch memory; also the most threads that can help
constexpr int64_t kRowsPerTile = 16;          // a tile's positions come in multiples of it
constexpr int64_t kFewestRows = 64;           // of a sample in one tile: with fewer its sums cost as much as its elements
constexpr int64_t kStreamBytes = 4 << 20;     // an output from this size on is not in a second-level cache when it is read next
constexpr int64_t kCacheBytes = 1 << 20;      // what a core's second-level cache keeps between two passes

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

// Channels [c0, c1), which `threads` share
struct Range {
  int64_t c0, c1;
  int threads;
};

// Samples [n0, n1), channels [c0, c1), positions [s0, s1), and the row of scratch memory for its sums
struct Tile {
  int64_t n0, n1, c0, c1, s0, s1;
  int64_t slot;
};

// Depends on the shape alone: the order of every sum follows from it.
//
// Where all values of a few channels fit into a core's cache, each thread takes such ranges of channels through all
// passes of an operation, and only the first pass goes to memory: one range, one tile. Otherwise there is one range, and
// threads share its tiles pass by pass. A tile with several samples covers all their positions.
struct Partition {
  int64_t N, C, S;
  int64_t width;               // channels of a range
  int64_t samples, positions;  // extent of a tile
  int64_t slots_n, slots_s;    // tiles along N, S

  // `tensors`: how many [N, C, S] are read again by a later pass
  Partition(const Shape& shape, int64_t tensors) : N(shape.N), C(shape.C), S(shape.S) {
    width = range_width(shape, tensors);
    const int64_t elements = N * C * S;
    const int64_t want = width < C ? 1 : std::clamp<int64_t>(ceil_div(elements, kTileElements), 1, kMaxTiles);
    samples = std::max<int64_t>(1, ceil_div(N, std::min(std::max<int64_t>(N, 1), want)));
    slots_n = ceil_div(N, samples);
    const int64_t most = samples > 1 ? 1 : std::max<int64_t>(S / kFewestRows, 1);
    const int64_t chunks = std::clamp<int64_t>(want / std::max<int64_t>(slots_n, 1), 1, most);
    positions = std::max<int64_t>(1, round_up(ceil_div(S, chunks), kRowsPerTile));
    slots_s = ceil_div(S, positions);
  }

  int64_t ranges() const { return ceil_div(C, width); }
  int64_t slots() const { return slots_n * slots_s; }
  bool whole_samples() const { return slots_s == 1; }

  // Whether outputs are written past the caches: only where rows are whole cache lines, for a line that is written in two
  // ways costs more than it saves
  bool streams(const Shape& shape) const {
    return whole_lines(shape) && N * C * S * bytes_of(shape.dtype) >= kStreamBytes;
  }

  // How many of the threads can help
  int useful(int threads) const {
    return static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>({ranges(), slots(), 1})));
  }

  Tile tile(int64_t slot, const Range& range) const {
    const int64_t n = slot / slots_s * samples, s = slot % slots_s * positions;
    return {n, std::min(n + samples, N), range.c0, range.c1, s, std::min(s + positions, S), slot};
  }

 private:
  // Rows of channels are read whole: a few channels of each row are a cache line here and there, which is slower from
  // memory than a second reading.
  int64_t range_width(const Shape& shape, int64_t tensors) const {
    const int64_t bytes = N * S * bytes_of(shape.dtype) * tensors;  // of one channel
    const bool apart = shape.layout == Layout::channels_first && C > 1 && bytes <= kCacheBytes;
    if (!apart) return std::max<int64_t>(C, 1);
    const int64_t fitting = kCacheBytes / std::max<int64_t>(bytes, 1);
    return std::clamp<int64_t>(fitting, 1, ceil_div(C, 16));  // so that there is something to share
  }
};

// body(index, worker) for every index below count; worker is below `threads`. Backwards, each worker goes through the
// same indices from the last one on, which its cache still holds.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body, bool backwards = false) {
  const auto work = [&](int64_t worker, int64_t workers) {
    const int64_t begin = count * worker / workers, end = count * (worker + 1) / workers;
    for (int64_t i = begin; i < end; ++i) body(backwards ? begin + end - 1 - i : i, static_cast<int>(worker));
  };
  const int workers = static_cast<int>(std::min<int64_t>(threads, count));
  if (workers <= 1) return work(0, 1);
#pragma omp parallel num_threads(workers)
  work(omp_get_thread_num(), omp_get_num_threads());
}

// body(range, worker): ranges side by side with a thread each, or the only one with all
template <class Body>
void for_ranges(const Partition& part, int threads, const Body& body) {
  const int64_t ranges = part.ranges();
  if (ranges <= 1) return body(Range{0, part.C, threads}, 0);
  parallel_for(ranges, threads, [&](int64_t index, int worker) {
    const int64_t c0 = index * part.width;
    body(Range{c0, std::min(c0 + part.width, part.C), 1}, worker);
  });
}

}  // namespace taylorkern::cpu
