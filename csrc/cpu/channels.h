// What batch normalisation keeps per channel, and loops over channels.
#pragma once

#include <memory>

#include "layout.h"

namespace taylorkern::cpu {

// Numbers that the passes over the elements read, each [C]
template <class A>
class Channels {
  std::unique_ptr<A[]> memory;
  std::unique_ptr<double[]> wide;

 public:
  A *weight, *bias, *scale, *shift, *level, *slope;
  double* invstd;

  explicit Channels(int64_t C) : memory(new A[6 * C]), wide(new double[C]) {
    weight = memory.get(), bias = weight + C, scale = bias + C, shift = scale + C, level = shift + C, slope = level + C;
    invstd = wide.get();
  }

  // All but level and slope
  template <class Args>
  void fill(const Args& args, const Range& range) const {
    const A* var = static_cast<const A*>(args.var);
    const A* mean = static_cast<const A*>(args.mean);
    copy_or_fill(args.weight, A{1}, range, weight);
    copy_or_fill(args.bias, A{0}, range, bias);
    for (int64_t c = range.c0; c < range.c1; ++c) invstd[c] = inverse_std(var[c], args.eps);
    for (int64_t c = range.c0; c < range.c1; ++c) {
      scale[c] = weight[c] * (args.training ? static_cast<A>(invstd[c]) : running_inverse_std(var[c], args.eps));
    }
    for (int64_t c = range.c0; c < range.c1; ++c) shift[c] = normalise(-mean[c], scale[c], bias[c]);
  }

 private:
  static void copy_or_fill(const void* given, A missing, const Range& range, A* to) {
    if (given) {
      std::copy(static_cast<const A*>(given) + range.c0, static_cast<const A*>(given) + range.c1, to + range.c0);
    } else {
      std::fill(to + range.c0, to + range.c1, missing);
    }
  }
};

// body(pack, c) over a range's channels, in registers of doubles
template <class Body>
void for_channels(const Range& range, const Body& body) {
  constexpr int64_t kColumn = 256;  // channels that one thread combines at a time
  parallel_for(ceil_div(range.c1 - range.c0, kColumn), range.threads, [&](int64_t column, int) {
    const int64_t c = range.c0 + column * kColumn;
    for_packs<double>(c, std::min(c + kColumn, range.c1), body);
  });
}

template <class P, class A>
TAYLORKERN_INLINE void store_rounded(P, A* to, typename P::type value) {
  const Pack<A, P::lanes> narrow{};
  store(narrow, to, convert<typename decltype(narrow)::type>(value));
}

}  // namespace taylorkern::cpu
