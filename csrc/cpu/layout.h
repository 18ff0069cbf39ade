// The two layouts behind one interface, so that an operation is written once. Each class offers
//   coefficient(pack, values, c)     what a [C] tensor holds for the lanes of a register that starts at channel c
//   each(tile, body)                 body(pack, i, c) for all elements of the tile, from offset i and channel c on
//   reduce(tile, n, sums, body)      sums[k][c] += sample n's terms, which body(pack, i, c, out) adds to out[k]
//   moments(tile, x, mean, m2)       mean[c] and summed squared deviation m2[c] of the tile
#pragma once

#include "threads.h"
#include "vector.h"

namespace taylorkern::cpu {

struct ChannelsFirst {
  const Partition& part;

  template <class P>
  static TAYLORKERN_INLINE auto coefficient(P pack, const typename P::acc* values, int64_t c) {
    return splat(pack, values[c]);
  }

  template <class A, class Body>
  void each(const Tile& tile, const Body& body) const {
    for (int64_t n = tile.n0; n < tile.n1; ++n) {
      for (int64_t c = tile.c0; c < tile.c1; ++c) {
        const int64_t row = (n * part.C + c) * part.S;
        for_packs<A>(row + tile.s0, row + tile.s1, [&](auto pack, int64_t i) { body(pack, i, c); });
      }
    }
  }

  template <class A, int K, class Body>
  void reduce(const Tile& tile, int64_t n, double* const (&sums)[K], const Body& body) const {
    for (int64_t c = tile.c0; c < tile.c1; ++c) {
      const int64_t row = (n * part.C + c) * part.S;
      for (int64_t s = tile.s0; s < tile.s1; s += kSpan) {
        double span[K] = {};
        reduce_span<A>(row + s, row + std::min(s + kSpan, tile.s1), span,
                       [&](auto pack, int64_t i, auto& out) { body(pack, i, c, out); });
        for (int k = 0; k < K; ++k) sums[k][c] += span[k];
      }
    }
  }

  template <class T>
  void moments(const Tile& tile, const T* x, double* mean, double* m2) const {
    for (int64_t c = tile.c0; c < tile.c1; ++c) {
      Moments<double> all{0, 0};
      double seen = 0;
      for (int64_t n = tile.n0; n < tile.n1; ++n) {
        const int64_t row = (n * part.C + c) * part.S;
        for (int64_t s = tile.s0; s < tile.s1; s += kSpan) {
          const int64_t end = std::min(s + kSpan, tile.s1);
          const auto count = static_cast<double>(end - s);
          all = joined(all, seen, span_moments(x, row + s, row + end), count);
          seen += count;
        }
      }
      mean[c] = all.mean;
      m2[c] = all.m2;
    }
  }

 private:
  static constexpr int64_t kSpan = 2048;  // stays in the first-level cache between two passes

  template <class A, int K, class Body>
  static TAYLORKERN_INLINE void reduce_span(int64_t begin, int64_t end, double (&sums)[K], const Body& body) {
    with_width<A>(end - begin, [&](auto pack) {
      using V = typename decltype(pack)::type;
      constexpr int kWays = 4;  // hides the latency of an addition
      constexpr int64_t lanes = pack.lanes;
      V ways[kWays][K] = {};
      int64_t i = begin;
      for (; i + kWays * lanes <= end; i += kWays * lanes) {
        for (int way = 0; way < kWays; ++way) body(pack, i + way * lanes, ways[way]);
      }
      step(pack, i, end, [&](auto last, int64_t j) {
        V out[K] = {};
        body(last, j, out);
        for (int k = 0; k < K; ++k) ways[0][k] += unless_covered(last, out[k], V{});
      });
      for (int k = 0; k < K; ++k) {
        sums[k] += lane_sum<lanes>(widen(pack, (ways[0][k] + ways[1][k]) + (ways[2][k] + ways[3][k])));
      }
    });
  }

  template <class T>
  static Moments<double> span_moments(const T* x, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const auto count = static_cast<double>(end - begin);
    double sum[1] = {};
    reduce_span<A>(begin, end, sum, [&](auto pack, int64_t i, auto& out) { out[0] += load(pack, x + i); });
    const A pivot = static_cast<A>(sum[0] / count);
    double about[2] = {};
    reduce_span<A>(begin, end, about, [&](auto pack, int64_t i, auto& out) {
      const auto d = load(pack, x + i) - splat(pack, pivot);
      out[0] += d;
      out[1] += d * d;
    });
    return moments_about(static_cast<double>(pivot), about[0], about[1], count);
  }
};

struct ChannelsLast {
  const Partition& part;

  template <class P>
  static TAYLORKERN_INLINE auto coefficient(P pack, const typename P::acc* values, int64_t c) {
    return load(pack, values + c);
  }

  template <class A, class Body>
  void each(const Tile& tile, const Body& body) const {
    for_rows<1>(tile, [&](int64_t row, auto) {
      for_packs<A>(0, part.C, [&](auto pack, int64_t c) { body(pack, row * part.C + c, c); });
    });
  }

  template <class A, int K, class Body>
  void reduce(const Tile& tile, int64_t n, double* const (&sums)[K], const Body& body) const {
    const Tile sample{n, n + 1, tile.c0, tile.c1, tile.s0, tile.s1, tile.slot};
    for_rows<kBand>(sample, [&](int64_t row, auto rows) {
      for_packs<A>(0, part.C, [&](auto pack, int64_t c) {
        typename decltype(pack)::type out[K] = {};
        for (int64_t r = row; r < row + rows; ++r) body(pack, r * part.C + c, c, out);
        for (int k = 0; k < K; ++k) add_to(pack, sums[k] + c, out[k]);
      });
    });
  }

  template <class T>
  void moments(const Tile& tile, const T* x, double* mean, double* m2) const {
    using A = Acc<T>;
    std::fill_n(mean, part.C, 0.0);
    std::fill_n(m2, part.C, 0.0);
    double seen = 0;
    for_rows<kBand>(tile, [&](int64_t row, auto rows) {
      const auto count = static_cast<double>(int64_t{rows});
      for_packs<A>(0, part.C, [&](auto pack, int64_t c) {
        const Pack<double, pack.lanes> wide{};
        const auto band = band_moments(pack, x + row * part.C + c, rows);
        const Moments<decltype(band.mean)> old{load(wide, mean + c), load(wide, m2 + c)};
        const auto all = joined(old, seen, band, count);
        store(wide, mean + c, unless_covered(pack, all.mean, old.mean));
        store(wide, m2 + c, unless_covered(pack, all.m2, old.m2));
      });
      seen += count;
    });
  }

 private:
  static constexpr int64_t kBand = 8;  // rows whose same-numbered cache lines can't evict each other

  // body(row, rows) for the tile's rows of C values, `Band` at a time, a number the compiler knows, then the rest.
  // Whole samples follow one another.
  template <int64_t Band, class Body>
  TAYLORKERN_INLINE void for_rows(const Tile& tile, const Body& body) const {
    const int64_t end = (tile.n1 - 1) * part.S + tile.s1;
    int64_t row = tile.n0 * part.S + tile.s0;
    for (; row + Band <= end; row += Band) body(row, std::integral_constant<int64_t, Band>{});
    if constexpr (Band > 1) {
      if (row < end) body(row, end - row);
    }
  }

  template <class P, class T, class Rows>
  TAYLORKERN_INLINE auto band_moments(P pack, const T* x, Rows rows) const {
    typename P::type sum{}, sum_d{}, sum_dd{};
    for (int64_t r = 0; r < rows; ++r) sum += load(pack, x + r * part.C);
    const auto pivot = sum / static_cast<typename P::acc>(int64_t{rows});
    for (int64_t r = 0; r < rows; ++r) {
      const auto d = load(pack, x + r * part.C) - pivot;
      sum_d += d;
      sum_dd += d * d;
    }
    const auto count = static_cast<double>(int64_t{rows});
    return moments_about(widen(pack, pivot), widen(pack, sum_d), widen(pack, sum_dd), count);
  }
};

}  // namespace taylorkern::cpu
