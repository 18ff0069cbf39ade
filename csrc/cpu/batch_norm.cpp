#include "channels.h"
#include "dispatch.h"

namespace taylorkern::cpu {
namespace {

// The tiles of one slot hold this many values of each channel.
double values_in_slot(const Partition& part, int64_t slot) {
  const Tile tile = part.tile(slot, Range{});
  return static_cast<double>((tile.n1 - tile.n0) * (tile.s1 - tile.s0));
}

template <class P, class A>
void store_variance(P, A* to, typename P::type m2, double count) {
  const Pack<A, P::lanes> narrow{};
  store(narrow, to, biased_variance<A>(convert<typename decltype(narrow)::type>(m2), count));
}

// Mean and variance of the batch, written to the arguments' [C] tensors
template <class T, class L>
class Statistics {
  using A = Acc<T>;
  const BatchNormAct& args;
  const Partition& part;
  const L& layout;
  std::unique_ptr<double[]> means, m2s;  // [slots, C]

 public:
  Statistics(const BatchNormAct& args, const Partition& part, const L& layout)
      : args(args), part(part), layout(layout) {
    if (!args.training) return;
    means.reset(new double[part.slots() * part.C]);
    m2s.reset(new double[part.slots() * part.C]);
  }

  void write(const Range& range) const {
    const int64_t C = part.C, slots = part.slots();
    parallel_for(slots, range.threads, [&](int64_t slot, int) {
      const T* x = static_cast<const T*>(args.x);
      layout.moments(part.tile(slot, range), x, means.get() + slot * C, m2s.get() + slot * C);
    });
    for_channels(range, [&](auto pack, int64_t c) {
      Moments<typename decltype(pack)::type> all{};
      double seen = 0;
      for (int64_t slot = 0; slot < slots; ++slot) {
        const double more = values_in_slot(part, slot);
        all = joined(all, seen, {load(pack, means.get() + slot * C + c), load(pack, m2s.get() + slot * C + c)}, more);
        seen += more;
      }
      store_rounded(pack, static_cast<A*>(args.mean) + c, all.mean);
      store_variance(pack, static_cast<A*>(args.var) + c, all.m2, seen);
    });
  }
};

template <class T, class L, class Act, class Residual>
void forward(const BatchNormAct& args, const Partition& part, const L& layout, Act act, Residual, int threads) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  uint8_t* mask = static_cast<uint8_t*>(args.mask);
  const bool streams = part.streams(args.shape);
  const Channels<A> channels(part.C);
  const Statistics<T, L> statistics(args, part, layout);

  const auto normalised = [&](auto pack, int64_t i, int64_t c) TAYLORKERN_LAMBDA {
    const auto of = [&](const A* values) TAYLORKERN_LAMBDA { return layout.coefficient(pack, values, c); };
    auto z = normalise(load(pack, x + i), of(channels.scale), of(channels.shift));
    if (given<Residual>(residual)) z += load(pack, residual + i);
    if constexpr (kMasked<Act>) {
      if (std::is_same_v<Residual, MaybeResidual> && mask) store_mask(pack, mask + i, act.passes(z));
    }
    store(pack, y + i, act.apply(z), streams);
  };
  for_ranges(part, threads, [&](const Range& range, int) {
    if (args.training) statistics.write(range);
    channels.fill(args, range);
    const auto tile = [&](int64_t slot, int) {
      layout.template each<A>(part.tile(slot, range), normalised);
      finish_streams();
    };
    parallel_for(part.slots(), range.threads, tile, args.training);
  });
}

}  // namespace

void batch_norm_act(const BatchNormAct& args, int threads) {
  const Partition part(args.shape, 1);
  dispatch(args.shape, part, [&](auto element, const auto& layout) {
    using T = decltype(element);
    const bool alone = !args.residual && !args.mask, joined = args.residual && !args.mask;
    with_activation<Acc<T>>(args.activation, args.slope, alone, joined, [&](auto act, auto residual) {
      forward<T>(args, part, layout, act, residual, part.useful(threads));
    });
  });
}

}  // namespace taylorkern::cpu
