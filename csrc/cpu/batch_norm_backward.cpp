#include "channels.h"
#include "dispatch.h"

namespace taylorkern::cpu {
namespace {

// With a residual the activation's gradient is told by the forward's mask, or by relu's y, not by a z computed from x, and
// dz is written to dresidual.
template <class T, class L, class Act, class Residual>
class Backward {
  using A = Acc<T>;
  const BatchNormActBackward& args;
  const Partition& part;
  const L& layout;
  const Act act;
  const Channels<A> channels;
  // [slots, C] each, then [C] each for one sample at a time: per worker where they share channels
  const std::unique_ptr<double[]> centred, plain;

  const T* const x = static_cast<const T*>(args.x);
  const T* const dy = static_cast<const T*>(args.dy);
  const T* const y = static_cast<const T*>(args.y);
  const uint8_t* const mask = static_cast<const uint8_t*>(args.mask);
  T* const dx = static_cast<T*>(args.dx);
  T* const dresidual = static_cast<T*>(args.dresidual);
  const A* const mean = static_cast<const A*>(args.mean);
  A* const s = static_cast<A*>(args.s);
  // Lines that have just been read are in the cache, and need not be written past it.
  const bool streams = part.streams(args.shape), streams_dx = streams && dx != dy, streams_dz = streams && dresidual != dy;
  // The first pass has written dz over dy: the second one reads it instead of dy and y.
  const bool replaced = args.training && dresidual == dy;

 public:
  Backward(const BatchNormActBackward& args, const Partition& part, const L& layout, Act act, int threads)
      : args(args),
        part(part),
        layout(layout),
        act(act),
        channels(part.C),
        centred(new double[(part.slots() + threads) * part.C]),
        plain(new double[(part.slots() + threads) * part.C]) {}

  void run(int threads) const {
    if (part.slots() == 0) std::fill_n(s, part.N * part.C, A{});
    for_ranges(part, threads, [&](const Range& range, int) {
      channels.fill(args, range);
      parallel_for(part.slots(), range.threads,
                   [&](int64_t slot, int worker) {
                     reduce(part.tile(slot, range), worker);
                     finish_streams();
                   });
      combine(range);
      if (!args.training) return;
      parallel_for(
          part.slots(), range.threads, [&](int64_t slot, int) { write_input_gradient(part.tile(slot, range)); }, true);
    });
  }

 private:
  // dz of the elements at offset i, channel c
  template <class P, class V>
  TAYLORKERN_INLINE V activation_gradient(P pack, int64_t i, int64_t c, V x_value) const {
    const V dy_value = load(pack, dy + i);
    if (given<Residual>(y)) return act.gradient(load(pack, y + i), dy_value);
    if constexpr (kMasked<Act>) {
      if (given<Residual>(mask)) {
        const V stopped = act.stopped(dy_value);
        return load_mask(pack, mask + i) ? dy_value : stopped;
      }
    }
    const auto of = [&](const A* values) TAYLORKERN_LAMBDA { return layout.coefficient(pack, values, c); };
    return act.gradient(normalise(x_value, of(channels.scale), of(channels.shift)), dy_value);
  }

  // Sums of one tile, s of samples that it holds whole, and dx and dresidual of evaluation mode, which need no more
  void reduce(const Tile& tile, int worker) const {
    const int64_t C = part.C;
    double* const total[2] = {centred.get() + tile.slot * C, plain.get() + tile.slot * C};
    double* const sample[2] = {centred.get() + (part.slots() + worker) * C, plain.get() + (part.slots() + worker) * C};
    for (double* sums : total) std::fill(sums + tile.c0, sums + tile.c1, 0.0);
    if constexpr (L::kBrief) {
      if (layout.brief()) return reduce_brief(tile, total);
    }
    for (int64_t n = tile.n0; n < tile.n1; ++n) {
      for (double* sums : sample) std::fill(sums + tile.c0, sums + tile.c1, 0.0);
      reduce_sample(tile, n, sample);
      for_packs<double>(tile.c0, tile.c1, [&](auto pack, int64_t c) {
        const auto of_centred = load(pack, sample[0] + c), of_plain = load(pack, sample[1] + c);
        add_to(pack, total[0] + c, of_centred);
        add_to(pack, total[1] + c, of_plain);
        if (part.whole_samples()) write_score(pack, n, c, of_centred, of_plain);
      });
    }
  }

  // The same where samples are brief: their sums need no memory.
  void reduce_brief(const Tile& tile, double* const (&total)[2]) const {
    const bool last = !args.training;
    const auto terms = [&](auto pack, int64_t i, int64_t c, auto& out)
                           TAYLORKERN_LAMBDA { add_terms(pack, i, c, out, last); };
    layout.template each_sum<A, 2>(tile, terms, [&](auto pack, int64_t n, int64_t first, auto& out) TAYLORKERN_LAMBDA {
      constexpr int64_t lanes = decltype(pack)::lanes;
      A sums[2][kLanes<A>] = {};
      for (int k = 0; k < 2; ++k) store(pack, sums[k], out[k]);
      for_packs<double>(first + pack.overlap, first + lanes, [&](auto wide, int64_t c) TAYLORKERN_LAMBDA {
        const auto of_centred = load_wide(wide, sums[0] + (c - first)), of_plain = load_wide(wide, sums[1] + (c - first));
        add_to(wide, total[0] + c, of_centred);
        add_to(wide, total[1] + c, of_plain);
        write_score(wide, n, c, of_centred, of_plain);
      });
    });
  }

  void reduce_sample(const Tile& tile, int64_t n, double* const (&sums)[2]) const {
    const bool last = !args.training;
    layout.template reduce<A>(tile, n, sums, [&](auto pack, int64_t i, int64_t c, auto& out)
                                                 TAYLORKERN_LAMBDA { add_terms(pack, i, c, out, last); });
  }

  // out: (x - mean) * dz and dz; last: no other pass follows
  template <class P, class V>
  TAYLORKERN_INLINE void add_terms(P pack, int64_t i, int64_t c, V& out, bool last) const {
    const auto x_value = load(pack, x + i);
    const auto dz = activation_gradient(pack, i, c, x_value);
    out[0] += (x_value - layout.coefficient(pack, mean, c)) * dz;
    out[1] += dz;
    if (given<Residual>(dresidual) && replaced) store(pack, dresidual + i, dz);
    if (last) write(pack, i, dz, layout.coefficient(pack, channels.scale, c) * dz);
  }

  // s of one sample, from its sums
  template <class P, class D>
  TAYLORKERN_INLINE void write_score(P pack, int64_t n, int64_t c, D of_centred, D of_plain) const {
    const D A_nc = of_centred * load(pack, channels.invstd + c);
    const D score = gate_gradient(load_wide(pack, channels.weight + c), load_wide(pack, channels.bias + c), A_nc, of_plain);
    store_rounded(pack, s + n * part.C + c, score);
  }

  // The batch's sums, in the order of the slots; s of samples that several tiles share
  void combine(const Range& range) const {
    const int64_t C = part.C;
    for_channels(range, [&](auto pack, int64_t c) {
      typename decltype(pack)::type all[2] = {};
      for (int64_t slot = 0; slot < part.slots();) {
        typename decltype(pack)::type sample[2] = {};
        for (int64_t k = 0; k < part.slots_s; ++k, ++slot) {
          sample[0] += load(pack, centred.get() + slot * C + c);
          sample[1] += load(pack, plain.get() + slot * C + c);
        }
        if (!part.whole_samples()) write_score(pack, slot / part.slots_s - 1, c, sample[0], sample[1]);
        all[0] += sample[0];
        all[1] += sample[1];
      }
      write_channels(pack, c, all[0], all[1]);
    });
  }

  // Parameter gradients, and what dx needs of them
  template <class P, class D>
  TAYLORKERN_INLINE void write_channels(P pack, int64_t c, D of_centred, D of_plain) const {
    const auto M = static_cast<double>(part.N * part.S);
    const D invstd = load(pack, channels.invstd + c);
    const D dweight = of_centred * invstd;
    store_rounded(pack, static_cast<A*>(args.dweight) + c, dweight);
    store_rounded(pack, static_cast<A*>(args.dbias) + c, of_plain);
    store_rounded(pack, channels.level + c, of_plain / M);
    store_rounded(pack, channels.slope + c, dweight * invstd / M);
  }

  // The same for training mode, once the sums over the batch are known
  void write_input_gradient(const Tile& tile) const {
    layout.template each<A>(tile, [&](auto pack, int64_t i, int64_t c) TAYLORKERN_LAMBDA {
      const auto of = [&](const A* values) TAYLORKERN_LAMBDA { return layout.coefficient(pack, values, c); };
      const auto x_value = load(pack, x + i);
      const auto dz = given<Residual>(dresidual) && replaced ? load(pack, dy + i) : activation_gradient(pack, i, c, x_value);
      const auto centre = of(mean), scale = of(channels.scale), level = of(channels.level), slope = of(channels.slope);
      write(pack, i, dz, input_gradient(dz, x_value, centre, scale, level, slope));
    });
    finish_streams();
  }

  template <class P, class V>
  TAYLORKERN_INLINE void write(P pack, int64_t i, V dz, V dx_value) const {
    if (given<Residual>(dresidual) && !replaced) store(pack, dresidual + i, dz, streams_dz);
    store(pack, dx + i, dx_value, streams_dx);
  }
};

}  // namespace

void batch_norm_act_backward(const BatchNormActBackward& args, int threads) {
  const Partition part(args.shape, 2);
  dispatch(args.shape, part, [&](auto element, const auto& layout) {
    using T = decltype(element);
    const bool alone = !args.mask && !args.y && !args.dresidual, joined = args.y && args.dresidual;
    with_activation<Acc<T>>(args.activation, args.slope, alone, joined, [&](auto act, auto residual) {
      using Pass = Backward<T, std::decay_t<decltype(layout)>, decltype(act), decltype(residual)>;
      const int workers = part.useful(threads);
      Pass(args, part, layout, act, workers).run(workers);
    });
  });
}

}  // namespace taylorkern::cpu
