#include <memory>

#include "dispatch.h"

namespace taylorkern::cpu {
namespace {

template <class T, class L>
void run(const ChannelScores& args, const Partition& part, const L& layout, int threads) {
  using A = Acc<T>;
  const int64_t C = part.C;
  const T* a = static_cast<const T*>(args.a);
  const T* g = static_cast<const T*>(args.g);
  A* s = static_cast<A*>(args.s);
  const auto products = [=](auto pack, int64_t i, int64_t, auto& out) TAYLORKERN_LAMBDA {
    out[0] += load(pack, a + i) * load(pack, g + i);
  };
  // [C] per worker for one sample at a time, or [slots, C] where several tiles share a sample
  const std::unique_ptr<double[]> scratch(new double[(part.whole_samples() ? threads : part.slots()) * C]);

  for_ranges(part, threads, [&](const Range& range, int) {
    parallel_for(part.slots(), range.threads, [&](int64_t slot, int worker) {
      const Tile tile = part.tile(slot, range);
      double* sums[1] = {scratch.get() + (part.whole_samples() ? worker : slot) * C};
      for (int64_t n = tile.n0; n < tile.n1; ++n) {
        std::fill(sums[0] + tile.c0, sums[0] + tile.c1, 0.0);
        layout.template reduce<A>(tile, n, sums, products);
        if (!part.whole_samples()) continue;
        for (int64_t c = tile.c0; c < tile.c1; ++c) s[n * C + c] = static_cast<A>(sums[0][c]);
      }
    });
  });
  if (part.whole_samples()) return;

  parallel_for(part.N, threads, [&](int64_t n, int) {
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < part.slots_s; ++k) sum += scratch[(n * part.slots_s + k) * C + c];
      s[n * C + c] = static_cast<A>(sum);
    }
  });
}

}  // namespace

void channel_scores(const ChannelScores& args, int threads) {
  const Partition part(args.shape, 2);
  dispatch(args.shape, part, [&](auto element, const auto& layout) {
    run<decltype(element)>(args, part, layout, part.useful(threads));
  });
}

}  // namespace taylorkern::cpu
