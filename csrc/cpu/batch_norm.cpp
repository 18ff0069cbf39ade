#include <memory>

#include "dispatch.h"

namespace taylorkern::cpu {
namespace {

constexpr int64_t kColumn = 256;  // channels that one thread combines at a time

// Per-channel numbers that the passes over the elements read, each [C]
template <class A>
class Channels {
  std::unique_ptr<A[]> memory;
  std::unique_ptr<double[]> wide;

 public:
  A *weight, *bias, *scale, *shift, *level, *slope;
  double* invstd;

  template <class Args>
  explicit Channels(const Args& args) : memory(new A[6 * args.shape.C]), wide(new double[args.shape.C]) {
    const int64_t C = args.shape.C;
    const A* var = static_cast<const A*>(args.var);
    const A* mean = static_cast<const A*>(args.mean);
    weight = memory.get(), bias = weight + C, scale = bias + C, shift = scale + C, level = shift + C, slope = level + C;
    invstd = wide.get();
    copy_or_fill(args.weight, A{1}, C, weight);
    copy_or_fill(args.bias, A{0}, C, bias);
    for (int64_t c = 0; c < C; ++c) {
      invstd[c] = inverse_std(var[c], args.eps);
      scale[c] = weight[c] * rounded_inverse_std(var[c], args.eps, args.training);
      shift[c] = normalise(-mean[c], scale[c], bias[c]);
    }
  }

 private:
  static void copy_or_fill(const void* given, A missing, int64_t C, A* to) {
    if (given) {
      std::copy_n(static_cast<const A*>(given), C, to);
    } else {
      std::fill_n(to, C, missing);
    }
  }
};

// body(pack, c) over all channels, in registers of doubles
template <class Body>
void for_channels(int64_t C, int threads, const Body& body) {
  parallel_for(ceil_div(C, kColumn), threads, [&](int64_t column, int) {
    for_packs<double>(column * kColumn, std::min((column + 1) * kColumn, C), body);
  });
}

template <class P, class A>
void store_rounded(P, A* to, typename P::type value) {
  const Pack<A, P::lanes> narrow{};
  store(narrow, to, convert<typename decltype(narrow)::type>(value));
}

template <class P, class A>
void store_variance(P, A* to, typename P::type m2, double count) {
  const Pack<A, P::lanes> narrow{};
  store(narrow, to, biased_variance<A>(convert<typename decltype(narrow)::type>(m2), count));
}

// The tiles of one slot hold this many values of each channel.
double values_in_slot(const Partition& part, int64_t slot) {
  const Tile tile = part.tile(slot * part.columns);
  return static_cast<double>((tile.n1 - tile.n0) * (tile.s1 - tile.s0));
}

template <class T, class L>
void batch_statistics(const BatchNormAct& args, const Partition& part, const L& layout, int threads) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(args.x);
  A* mean = static_cast<A*>(args.mean);
  A* var = static_cast<A*>(args.var);
  const int64_t C = part.C;
  const std::unique_ptr<double[]> means(new double[part.slots() * C]), m2s(new double[part.slots() * C]);

  parallel_for(part.tiles(), threads, [&](int64_t index, int) {
    const Tile tile = part.tile(index);
    layout.moments(tile, x, means.get() + tile.slot * C, m2s.get() + tile.slot * C);
  });
  for_channels(C, threads, [&](auto pack, int64_t c) {
    Moments<typename decltype(pack)::type> all{};
    double seen = 0;
    for (int64_t slot = 0; slot < part.slots(); ++slot) {
      const double more = values_in_slot(part, slot);
      all = joined(all, seen, {load(pack, means.get() + slot * C + c), load(pack, m2s.get() + slot * C + c)}, more);
      seen += more;
    }
    store_rounded(pack, mean + c, all.mean);
    store_variance(pack, var + c, all.m2, seen);
  });
}

template <class T, class L>
void forward(const BatchNormAct& args, const Partition& part, const L& layout, int threads) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  const bool relu_after = args.activation == Activation::relu;

  if (args.training) batch_statistics<T>(args, part, layout, threads);
  const Channels<A> channels(args);

  parallel_for(part.tiles(), threads, [&](int64_t index, int) {
    layout.template each<A>(part.tile(index), [&](auto pack, int64_t i, int64_t c) {
      const auto of = [&](const A* values) { return layout.coefficient(pack, values, c); };
      auto z = normalise(load(pack, x + i), of(channels.scale), of(channels.shift));
      if (residual) z += load(pack, residual + i);
      store(pack, y + i, relu_after ? relu(z) : z);
    });
  });
}

template <class T, class L>
struct Backward {
  using A = Acc<T>;
  const BatchNormActBackward& args;
  const Partition& part;
  const L& layout;
  const Channels<A>& channels;

  const T* x = static_cast<const T*>(args.x);
  const T* dy = static_cast<const T*>(args.dy);
  const T* y = static_cast<const T*>(args.y);
  T* dx = static_cast<T*>(args.dx);
  T* dresidual = static_cast<T*>(args.dresidual);
  const A* mean = static_cast<const A*>(args.mean);
  const bool masked = args.activation == Activation::relu;

  // dz of the elements at offset i, channel c
  template <class P, class V>
  TAYLORKERN_INLINE V activation_gradient(P pack, int64_t i, int64_t c, V x_value) const {
    const V dy_value = load(pack, dy + i);
    if (!masked) return dy_value;
    if (y) return relu_backward(load(pack, y + i), dy_value);
    const auto of = [&](const A* values) { return layout.coefficient(pack, values, c); };
    return relu_backward(normalise(x_value, of(channels.scale), of(channels.shift)), dy_value);
  }

  // sums: (x - mean) * dz and dz; on the way it writes what needs no sum
  void reduce(const Tile& tile, int64_t n, double* const (&sums)[2]) const {
    layout.template reduce<A>(tile, n, sums, [&](auto pack, int64_t i, int64_t c, auto& out) {
      const auto x_value = load(pack, x + i);
      const auto dz = activation_gradient(pack, i, c, x_value);
      out[0] += (x_value - layout.coefficient(pack, mean, c)) * dz;
      out[1] += dz;
      if (dresidual) store(pack, dresidual + i, dz);
      if (!args.training) store(pack, dx + i, layout.coefficient(pack, channels.scale, c) * dz);
    });
  }

  // s of one sample, from its sums
  template <class P, class D>
  void write_score(P pack, int64_t n, int64_t c, D centred, D plain) const {
    const D A_nc = centred * load(pack, channels.invstd + c);
    const D s = gate_gradient(wide(pack, channels.weight + c), wide(pack, channels.bias + c), A_nc, plain);
    store_rounded(pack, static_cast<A*>(args.s) + n * part.C + c, s);
  }

  // dx of training mode, once the sums over the batch are known; dresidual already holds dz
  void write_input_gradient(const Tile& tile) const {
    layout.template each<A>(tile, [&](auto pack, int64_t i, int64_t c) {
      const auto of = [&](const A* values) { return layout.coefficient(pack, values, c); };
      const auto x_value = load(pack, x + i);
      const auto dz = dresidual ? load(pack, dresidual + i) : activation_gradient(pack, i, c, x_value);
      store(pack, dx + i,
            input_gradient(dz, x_value, of(mean), of(channels.scale), of(channels.level), of(channels.slope)));
    });
  }

  // Parameter gradients, and what dx needs of them, from the batch's sums
  template <class P, class D>
  void write_channels(P pack, int64_t c, D centred, D plain) const {
    const auto M = static_cast<double>(part.N * part.S);
    const D invstd = load(pack, channels.invstd + c);
    const D dweight = centred * invstd;
    store_rounded(pack, static_cast<A*>(args.dweight) + c, dweight);
    store_rounded(pack, static_cast<A*>(args.dbias) + c, plain);
    store_rounded(pack, channels.level + c, plain / M);
    store_rounded(pack, channels.slope + c, dweight * invstd / M);
  }

 private:
  template <class P>
  static auto wide(P, const A* from) {
    const Pack<A, P::lanes> narrow{};
    return widen(narrow, load(narrow, from));
  }
};

template <class T, class L>
void backward(const BatchNormActBackward& args, const Partition& part, const L& layout, int threads) {
  using A = Acc<T>;
  const int64_t C = part.C, slots = part.slots();
  const Channels<A> channels(args);
  const Backward<T, L> pass{args, part, layout, channels};
  if (slots == 0) std::fill_n(static_cast<A*>(args.s), part.N * C, A{});
  // [slots, C] each, then [threads, C] each for one sample at a time
  const std::unique_ptr<double[]> centred(new double[(slots + threads) * C]), plain(new double[(slots + threads) * C]);

  parallel_for(part.tiles(), threads, [&](int64_t index, int worker) {
    const Tile tile = part.tile(index);
    double* const total[2] = {centred.get() + tile.slot * C, plain.get() + tile.slot * C};
    double* const sample[2] = {centred.get() + (slots + worker) * C, plain.get() + (slots + worker) * C};
    for (double* sums : total) std::fill(sums + tile.c0, sums + tile.c1, 0.0);
    for (int64_t n = tile.n0; n < tile.n1; ++n) {
      for (double* sums : sample) std::fill(sums + tile.c0, sums + tile.c1, 0.0);
      pass.reduce(tile, n, sample);
      for_packs<double>(tile.c0, tile.c1, [&](auto pack, int64_t c) {
        const auto of_centred = load(pack, sample[0] + c), of_plain = load(pack, sample[1] + c);
        add_to(pack, total[0] + c, of_centred);
        add_to(pack, total[1] + c, of_plain);
        if (part.whole_samples()) pass.write_score(pack, n, c, of_centred, of_plain);
      });
    }
  });
  for_channels(C, threads, [&](auto pack, int64_t c) {
    typename decltype(pack)::type all[2] = {};
    for (int64_t slot = 0; slot < slots;) {
      typename decltype(pack)::type sample[2] = {};
      for (int64_t k = 0; k < part.slots_s; ++k, ++slot) {
        sample[0] += load(pack, centred.get() + slot * C + c);
        sample[1] += load(pack, plain.get() + slot * C + c);
      }
      if (!part.whole_samples()) pass.write_score(pack, slot / part.slots_s - 1, c, sample[0], sample[1]);
      all[0] += sample[0];
      all[1] += sample[1];
    }
    pass.write_channels(pack, c, all[0], all[1]);
  });
  if (!args.training) return;
  parallel_for(part.tiles(), threads, [&](int64_t index, int) { pass.write_input_gradient(part.tile(index)); });
}

}  // namespace

void batch_norm_act(const BatchNormAct& args, int threads) {
  const Partition part(args.shape);
  dispatch(args.shape, part, [&](auto element, const auto& layout) {
    forward<decltype(element)>(args, part, layout, part.useful(threads));
  });
}

void batch_norm_act_backward(const BatchNormActBackward& args, int threads) {
  const Partition part(args.shape);
  dispatch(args.shape, part, [&](auto element, const auto& layout) {
    backward<decltype(element)>(args, part, layout, part.useful(threads));
  });
}

}  // namespace taylorkern::cpu
