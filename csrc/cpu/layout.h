// The two layouts behind one interface, so that an operation is written once. Each class offers
//   coefficient(pack, values, c)     what a [C] tensor holds for the lanes of a register that starts at channel c
//   each(tile, body)                 body(pack, i, c) for all elements of the tile, from offset i and channel c on
//   reduce(tile, n, sums, body)      sums[k][c] += sample n's terms, which body(pack, i, c, out) adds to out[k]
//   kBrief                           whether there is a way of its own for samples of a few positions, brief() and
//   each_sum(tile, body, finish)     finish(pack, n, c, out) with what body(pack, i, c, out) has added up over sample n
//   moments(tile, x, mean, m2)       mean[c] and summed squared deviation m2[c] of the tile
#pragma once

#include <memory>

#include "threads.h"
#include "vector.h"

namespace taylorkern::cpu {

struct ChannelsFirst {
  const Partition& part;
  static constexpr bool kBrief = false;

  template <class P>
  static TAYLORKERN_INLINE auto coefficient(P pack, const typename P::acc* values, int64_t c) {
    return splat(pack, values[c]);
  }

  template <class A, class Body>
  void each(const Tile& tile, const Body& body) const {
    for (int64_t n = tile.n0; n < tile.n1; ++n) {
      for (int64_t c = tile.c0; c < tile.c1; ++c) {
        const int64_t row = (n * part.C + c) * part.S;
        for_packs<A>(row + tile.s0, row + tile.s1,
                     [&](auto pack, int64_t i) TAYLORKERN_LAMBDA { body(pack, i, c); });
      }
    }
  }

  template <class A, int K, class Body>
  void reduce(const Tile& tile, int64_t n, double* const (&sums)[K], const Body& body) const {
    for (int64_t c = tile.c0; c < tile.c1; ++c) {
      const int64_t row = (n * part.C + c) * part.S;
      for (int64_t s = tile.s0; s < tile.s1; s += kSpan) {
        double span[K] = {};
        reduce_rows<A>(Rows{row + s, std::min(kSpan, tile.s1 - s), 1, 0}, span,
                       [&](auto pack, int64_t i, auto& out) TAYLORKERN_LAMBDA { body(pack, i, c, out); });
        for (int k = 0; k < K; ++k) sums[k][c] += span[k];
      }
    }
  }

  template <class T>
  void moments(const Tile& tile, const T* x, double* mean, double* m2) const {
    // Short runs of a channel, from several samples, are taken together: what a span costs besides its elements is the same.
    const int64_t length = tile.s1 - tile.s0, rows = std::max<int64_t>(1, kSpan / std::max<int64_t>(length, 1));
    for (int64_t c = tile.c0; c < tile.c1; ++c) {
      Moments<double> all{0, 0};
      double seen = 0;
      for (int64_t n = tile.n0; n < tile.n1; n += rows) {
        const int64_t row = (n * part.C + c) * part.S;
        for (int64_t s = tile.s0; s < tile.s1; s += kSpan) {
          const Rows span{row + s, std::min(kSpan, tile.s1 - s), std::min(rows, tile.n1 - n), part.C * part.S};
          const auto count = static_cast<double>(span.length * span.count);
          all = joined(all, seen, rows_moments(x, span, count), count);
          seen += count;
        }
      }
      mean[c] = all.mean;
      m2[c] = all.m2;
    }
  }

 private:
  static constexpr int64_t kSpan = 2048;  // stays in the first-level cache between two passes

  // `count` runs of `length` elements from offset `begin` on, `stride` apart
  struct Rows {
    int64_t begin, length, count, stride;
  };

  template <class A, int K, class Body>
  static TAYLORKERN_INLINE void reduce_rows(const Rows& rows, double (&sums)[K], const Body& body) {
    with_width<A>(rows.length, [&](auto pack) TAYLORKERN_LAMBDA {
      using V = typename decltype(pack)::type;
      constexpr int kWays = 4;  // hides the latency of an addition
      constexpr int64_t lanes = decltype(pack)::lanes;
      V ways[kWays][K] = {};
      for (int64_t row = 0, i = rows.begin; row < rows.count; ++row, i = rows.begin + row * rows.stride) {
        const int64_t end = i + rows.length;
        for (; i + kWays * lanes <= end; i += kWays * lanes) {
          for (int way = 0; way < kWays; ++way) body(pack, i + way * lanes, ways[way]);
        }
        step(pack, i, end, [&](auto last, int64_t j) TAYLORKERN_LAMBDA {
          V out[K] = {};
          body(last, j, out);
          for (int k = 0; k < K; ++k) ways[0][k] += unless_covered(last, out[k], V{});
        });
      }
      for (int k = 0; k < K; ++k) {
        sums[k] += lane_sum<lanes>(widen(pack, (ways[0][k] + ways[1][k]) + (ways[2][k] + ways[3][k])));
      }
    });
  }

  template <class T>
  static Moments<double> rows_moments(const T* x, const Rows& rows, double count) {
    using A = Acc<T>;
    double sum[1] = {};
    reduce_rows<A>(rows, sum, [&](auto pack, int64_t i, auto& out) TAYLORKERN_LAMBDA { out[0] += load(pack, x + i); });
    const A pivot = static_cast<A>(sum[0] / count);
    double about[2] = {};
    reduce_rows<A>(rows, about, [&](auto pack, int64_t i, auto& out) TAYLORKERN_LAMBDA {
      const auto d = load(pack, x + i) - splat(pack, pivot);
      out[0] += d;
      out[1] += d * d;
    });
    return moments_about(static_cast<double>(pivot), about[0], about[1], count);
  }
};

struct ChannelsLast {
  const Partition& part;
  static constexpr bool kBrief = true;

  template <class P>
  static TAYLORKERN_INLINE auto coefficient(P pack, const typename P::acc* values, int64_t c) {
    return load(pack, values + c);
  }

  template <class A, class Body>
  void each(const Tile& tile, const Body& body) const {
    for (int64_t row = first_row(tile); row < last_row(tile); ++row) {
      for_packs<A>(tile.c0, tile.c1,
                   [&](auto pack, int64_t c) TAYLORKERN_LAMBDA { body(pack, row * part.C + c, c); });
    }
  }

  template <class A, int K, class Body>
  void reduce(const Tile& tile, int64_t n, double* const (&sums)[K], const Body& body) const {
    const int64_t width = tile.c1 - tile.c0, end = n * part.S + tile.s1;
    const std::unique_ptr<A[]> band(new A[K * width]);  // [K, width]
    for (int64_t row = n * part.S + tile.s0; row < end; row += kBand) {
      reduce_band<A, K>(tile, row, std::min(row + kBand, end), band.get(), body);
      for (int k = 0; k < K; ++k) {
        for_packs<double>(0, width, [&](auto pack, int64_t c) TAYLORKERN_LAMBDA {
          add_to(pack, sums[k] + tile.c0 + c, load_wide(pack, band.get() + k * width + c));
        });
      }
    }
  }

  bool brief() const { return part.whole_samples() && part.S <= 2 * kStrip; }

  template <class A, int K, class Body, class Finish>
  void each_sum(const Tile& tile, const Body& body, const Finish& finish) const {
    for (int64_t n = tile.n0; n < tile.n1; ++n) {
      for_packs<A>(tile.c0, tile.c1, [&](auto pack, int64_t c) TAYLORKERN_LAMBDA {
        typename decltype(pack)::type out[K] = {};
        for (int64_t row = n * part.S; row < (n + 1) * part.S; ++row) body(pack, row * part.C + c, c, out);
        finish(pack, n, c, out);
      });
    }
  }

  template <class T>
  void moments(const Tile& tile, const T* x, double* mean, double* m2) const {
    using A = Acc<T>;
    std::fill(mean + tile.c0, mean + tile.c1, 0.0);
    std::fill(m2 + tile.c0, m2 + tile.c1, 0.0);
    const int64_t width = tile.c1 - tile.c0, last = last_row(tile);
    const std::unique_ptr<A[]> memory(new A[4 * width]);
    A *sum = memory.get(), *pivot = sum + width, *about = pivot + width;  // about: [2, width]
    double seen = 0;
    for (int64_t row = first_row(tile), end; row < last; row = end) {
      end = std::min(row + kBand, last);
      reduce_band<A, 1>(tile, row, end, sum, [&](auto pack, int64_t i, int64_t, auto& out) TAYLORKERN_LAMBDA {
        out[0] += load(pack, x + i);
      });
      const auto count = static_cast<double>(end - row);
      for (int64_t c = 0; c < width; ++c) pivot[c] = sum[c] / static_cast<A>(count);
      reduce_band<A, 2>(tile, row, end, about, [&](auto pack, int64_t i, int64_t c, auto& out) TAYLORKERN_LAMBDA {
        const auto d = load(pack, x + i) - load(pack, pivot + (c - tile.c0));
        out[0] += d;
        out[1] += d * d;
      });
      for_packs<double>(0, width, [&](auto pack, int64_t c) TAYLORKERN_LAMBDA {
        const auto band = moments_about(load_wide(pack, pivot + c), load_wide(pack, about + c),
                                        load_wide(pack, about + width + c), count);
        double *to_mean = mean + tile.c0 + c, *to_m2 = m2 + tile.c0 + c;
        const Moments<decltype(band.mean)> old{load(pack, to_mean), load(pack, to_m2)};
        const auto all = joined(old, seen, band, count);
        store(pack, to_mean, unless_covered(pack, all.mean, old.mean));
        store(pack, to_m2, unless_covered(pack, all.m2, old.m2));
      });
      seen += count;
    }
  }

 private:
  static constexpr int64_t kStrip = 8;  // rows that a register sums at a time; more would evict one another's cache lines
  static constexpr int64_t kBand = 128;  // rows whose sum is kept in the accumulation type

  // Whole samples follow one another.
  int64_t first_row(const Tile& tile) const { return tile.n0 * part.S + tile.s0; }
  int64_t last_row(const Tile& tile) const {
    return tile.n1 > tile.n0 ? (tile.n1 - 1) * part.S + tile.s1 : first_row(tile);
  }

  // sums [K, width] of the terms of rows [row, end)
  template <class A, int K, class Body>
  TAYLORKERN_INLINE void reduce_band(const Tile& tile, int64_t row, int64_t end, A* sums, const Body& body) const {
    std::fill_n(sums, K * (tile.c1 - tile.c0), A{});
    for (; row + kStrip <= end; row += kStrip) {
      reduce_strip<A, K>(tile, row, std::integral_constant<int64_t, kStrip>{}, sums, body);
    }
    if (row < end) reduce_strip<A, K>(tile, row, end - row, sums, body);
  }

  // `rows` is a number that the compiler knows, but for the last ones.
  template <class A, int K, class Rows, class Body>
  TAYLORKERN_INLINE void reduce_strip(const Tile& tile, int64_t row, Rows rows, A* sums, const Body& body) const {
    const int64_t C = part.C, width = tile.c1 - tile.c0;
    for_packs<A>(tile.c0, tile.c1, [&](auto pack, int64_t c) TAYLORKERN_LAMBDA {
      typename decltype(pack)::type out[K] = {};
      const int64_t first = row * C + c;
      unrolled(rows, [&](int64_t r) TAYLORKERN_LAMBDA { body(pack, first + r * C, c, out); });
      for (int k = 0; k < K; ++k) {
        A* to = sums + k * width + (c - tile.c0);
        const auto old = load(pack, to);
        store(pack, to, unless_covered(pack, old + out[k], old));
      }
    });
  }
};

}  // namespace taylorkern::cpu
