// The arithmetic that all backends share: no loops, no memory. V is a scalar, or a vector register of the CPU backend.
#pragma once

#include <cmath>

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

// The same as torch's forward has it: of a batch's variance rounded once, of a running one in A all the way
template <class A>
TAYLORKERN_INLINE A rounded_inverse_std(A var, double eps, bool training) {
  return training ? static_cast<A>(inverse_std(var, eps)) : A{1} / std::sqrt(var + static_cast<A>(eps));
}

// normalise(x, scale, shift) with shift = normalise(-mean, scale, bias) rounds as torch's forward does, so that the two
// agree to the last bit where their statistics do, and relus cut at the same elements.
template <class V>
TAYLORKERN_INLINE V normalise(V x, V scale, V shift) {
  return MultiplyAdd<V>::of(x, scale, shift);
}

template <class V>
TAYLORKERN_INLINE V relu(V z) {
  return z <= V{} ? V{} : z;
}

// dz of relu, given its input or its output
template <class V>
TAYLORKERN_INLINE V relu_backward(V z, V dy) {
  return z <= V{} ? V{} : dy;
}

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
