// The arithmetic that all backends share: no loops, no memory. V is a scalar, or a vector register of the CPU backend.
#pragma once

#include <cmath>

#include "ops.h"

#if defined(__CUDACC__)
#define TAYLORKERN_INLINE __host__ __device__ __forceinline__
#else
#define TAYLORKERN_INLINE inline __attribute__((always_inline))
#endif

namespace taylorkern {

// a*b + c, rounded once; specialised for vector registers
template <class V, class = void>
struct MultiplyAdd {
  static TAYLORKERN_INLINE V of(V a, V b, V c) { return std::fma(a, b, c); }
};

// 1 / sqrt(var + eps), from the variance as it is saved, so that forward and backward agree
template <class A>
TAYLORKERN_INLINE double inverse_std(A var, double eps) {
  return 1.0 / std::sqrt(static_cast<double>(var) + eps);
}

// The same from a running variance, in A all the way, as torch's forward has it
template <class A>
TAYLORKERN_INLINE A running_inverse_std(A var, double eps) {
  return A{1} / std::sqrt(var + static_cast<A>(eps));
}

// normalise(x, scale, shift) with shift = normalise(-mean, scale, bias) rounds as torch's forward does, so that the two
// agree to the last bit where their statistics do, and relus cut at the same elements.
template <class V>
TAYLORKERN_INLINE V normalise(V x, V scale, V shift) {
  return MultiplyAdd<V>::of(x, scale, shift);
}

// e^x, to two units in the last place; specialised for vector registers
template <class V, class = void>
struct Exponential {
  static TAYLORKERN_INLINE V of(V x) { return std::exp(x); }
};

// Activations y = act(z), with dL/dz = gradient(z, dy). Those made of straight lines (none, relu, relu6, leaky_relu) can
// do with a mask in the place of z: the gradient is dy where passes(z) holds, and stopped(dy) elsewhere.
// A NaN stays NaN, and relu and relu6 pass a gradient there; at a kink the gradient is torch's. A is the accumulation type.
template <class A>
struct NoActivation {
  template <class V>
  TAYLORKERN_INLINE V apply(V z) const {
    return z;
  }
  template <class V>
  TAYLORKERN_INLINE auto passes(V) const {
    return V{} == V{};
  }
  template <class V>
  TAYLORKERN_INLINE V stopped(V dy) const {
    return dy;
  }
  template <class V>
  TAYLORKERN_INLINE V gradient(V, V dy) const {
    return dy;
  }
};

template <class A>
struct Relu {
  template <class V>
  TAYLORKERN_INLINE V apply(V z) const {
    return z <= V{} ? V{} : z;
  }
  template <class V>
  TAYLORKERN_INLINE auto passes(V z) const {
    return !(z <= V{});
  }
  template <class V>
  TAYLORKERN_INLINE V stopped(V) const {
    return V{};
  }
  template <class V>
  TAYLORKERN_INLINE V gradient(V z, V dy) const {
    return passes(z) ? dy : stopped(dy);
  }
};

template <class A>
struct Relu6 {
  template <class V>
  TAYLORKERN_INLINE V apply(V z) const {
    const V six = V{} + A{6}, low = z <= V{} ? V{} : z;
    return low >= six ? six : low;
  }
  template <class V>
  TAYLORKERN_INLINE auto passes(V z) const {
    return !((z <= V{}) | (z >= V{} + A{6}));
  }
  template <class V>
  TAYLORKERN_INLINE V stopped(V) const {
    return V{};
  }
  template <class V>
  TAYLORKERN_INLINE V gradient(V z, V dy) const {
    return passes(z) ? dy : stopped(dy);
  }
};

template <class A>
struct LeakyRelu {
  A slope;
  template <class V>
  TAYLORKERN_INLINE V apply(V z) const {
    const V less = z * slope;
    return z > V{} ? z : less;
  }
  template <class V>
  TAYLORKERN_INLINE auto passes(V z) const {
    return z > V{};
  }
  template <class V>
  TAYLORKERN_INLINE V stopped(V dy) const {
    return dy * slope;
  }
  template <class V>
  TAYLORKERN_INLINE V gradient(V z, V dy) const {
    const V less = stopped(dy);
    return passes(z) ? dy : less;
  }
};

template <class A>
struct Silu {
  template <class V>
  TAYLORKERN_INLINE V apply(V z) const {
    return z / (V{} + A{1} + Exponential<V>::of(-z));
  }
  template <class V>
  TAYLORKERN_INLINE V gradient(V z, V dy) const {
    const V one = V{} + A{1}, sigmoid = one / (one + Exponential<V>::of(-z));
    return dy * sigmoid * (one + z * (one - sigmoid));
  }
};

template <class A>
struct Hardswish {
  template <class V>
  TAYLORKERN_INLINE V apply(V z) const {
    return z * Relu6<A>{}.apply(z + A{3}) / A{6};
  }
  template <class V>
  TAYLORKERN_INLINE V gradient(V z, V dy) const {
    const V three = V{} + A{3}, between = dy * (z / A{3} + A{0.5});
    const V low = z <= -three ? V{} : between;
    return z >= three ? dy : low;
  }
};

// Any with a mask, chosen register by register
template <class A>
struct AnyKinked {
  Activation kind;
  A slope;
  template <class V>
  TAYLORKERN_INLINE V apply(V z) const {
    return with([&](auto act) { return act.apply(z); });
  }
  template <class V>
  TAYLORKERN_INLINE auto passes(V z) const {
    return with([&](auto act) { return act.passes(z); });
  }
  template <class V>
  TAYLORKERN_INLINE V stopped(V dy) const {
    return with([&](auto act) { return act.stopped(dy); });
  }
  template <class V>
  TAYLORKERN_INLINE V gradient(V z, V dy) const {
    const V otherwise = stopped(dy);
    return passes(z) ? dy : otherwise;
  }

 private:
  template <class F>
  TAYLORKERN_INLINE auto with(const F& f) const {
    switch (kind) {
      case Activation::relu: return f(Relu<A>{});
      case Activation::relu6: return f(Relu6<A>{});
      case Activation::leaky_relu: return f(LeakyRelu<A>{slope});
      default: return f(NoActivation<A>{});
    }
  }
};

// Any without, chosen register by register
template <class A>
struct AnySmooth {
  Activation kind;
  template <class V>
  TAYLORKERN_INLINE V apply(V z) const {
    return kind == Activation::silu ? Silu<A>{}.apply(z) : Hardswish<A>{}.apply(z);
  }
  template <class V>
  TAYLORKERN_INLINE V gradient(V z, V dy) const {
    return kind == Activation::silu ? Silu<A>{}.gradient(z, dy) : Hardswish<A>{}.gradient(z, dy);
  }
};

// Whether a mask tells the gradient of an activation, known when compiling and by its code
template <class Act>
constexpr bool kMasked = true;
template <class A>
constexpr bool kMasked<AnySmooth<A>> = false;

TAYLORKERN_INLINE bool maskable(Activation kind) { return kind != Activation::silu && kind != Activation::hardswish; }

// level = dbias / M, slope = dweight / sqrt(var + eps) / M
template <class V>
TAYLORKERN_INLINE V input_gradient(V dz, V x, V mean, V scale, V level, V slope) {
  return scale * (dz - level - (x - mean) * slope);
}

// dL/dz of the gate behind the affine map, from A = sum xhat*dz and B = sum dz
template <class V>
TAYLORKERN_INLINE V gate_gradient(V weight, V bias, V A, V B) {
  return weight * A + bias * B;
}

// From `start` by a share of the way to `end`, which is reached at 1
template <class A>
TAYLORKERN_INLINE A moved(A start, A end, A share) {
  return share < A{0.5} ? start + share * (end - start) : end - (end - start) * (A{1} - share);
}

// Mean and summed squared deviation of a set of values; V is of doubles
template <class V>
struct Moments {
  V mean, m2;
};

// From the deviations d = x - pivot of `count` values from any pivot near their mean
template <class V>
TAYLORKERN_INLINE Moments<V> moments_about(V pivot, V sum_d, V sum_dd, double count) {
  const V offset = sum_d / count;
  return {pivot + offset, sum_dd - sum_d * offset};
}

// Of the summed squared deviations in A, as torch rounds them: 0 for no values, never below 0 for what rounding did; NaN
// stays NaN.
template <class A, class V>
TAYLORKERN_INLINE V biased_variance(V m2, double count) {
  return (m2 <= V{} ? V{} : m2) / static_cast<A>(count > 0 ? count : 1);
}

// Chan's formula: the moments of a set of `seen` values joined by one of `more` values
template <class V>
TAYLORKERN_INLINE Moments<V> joined(Moments<V> a, double seen, Moments<V> b, double more) {
  const double share = more / (seen + more);
  const V delta = b.mean - a.mean;
  return {a.mean + delta * share, a.m2 + b.m2 + delta * (seen * share) * delta};
}

}  // namespace taylorkern
