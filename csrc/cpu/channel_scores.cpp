#include <memory>

#include "dispatch.h"

namespace taylorkern::cpu {
namespace {

template <class T, class L>
void run(const ChannelScores& args, const Partition& part, const L& layout, int threads) {
  using A = Acc<T>;
  const T* a = static_cast<const T*>(args.a);
  const T* g = static_cast<const T*>(args.g);
  A* s = static_cast<A*>(args.s);
  const int64_t rows = part.whole_samples() ? threads : part.slots();
  const auto scratch = std::make_unique<double[]>(rows * part.C);

  parallel_for(part.tiles(), threads, [&](int64_t index, int worker) {
    const Tile tile = part.tile(index);
    double* sums[1] = {scratch.get() + (part.whole_samples() ? worker : tile.slot) * part.C};
    for (int64_t n = tile.n0; n < tile.n1; ++n) {
      std::fill(sums[0] + tile.c0, sums[0] + tile.c1, 0.0);
      layout.template reduce<A>(tile, n, sums, [&](auto pack, int64_t i, int64_t, auto& out) {
        out[0] += load(pack, a + i) * load(pack, g + i);
      });
      if (!part.whole_samples()) continue;
      for (int64_t c = tile.c0; c < tile.c1; ++c) s[n * part.C + c] = static_cast<A>(sums[0][c]);
    }
  });
  if (part.whole_samples()) return;

  parallel_for(part.N, threads, [&](int64_t n, int) {
    for (int64_t c = 0; c < part.C; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < part.slots_s; ++k) sum += scratch[(n * part.slots_s + k) * part.C + c];
      s[n * part.C + c] = static_cast<A>(sum);
    }
  });
}

}  // namespace

void channel_scores(const ChannelScores& args, int threads) {
  const Partition part(args.shape);
  dispatch(args.shape, part, [&](auto element, const auto& layout) {
    run<decltype(element)>(args, part, layout, part.useful(threads));
  });
}

}  // namespace taylorkern::cpu
