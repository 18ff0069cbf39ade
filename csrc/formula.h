// The arithmetic that all backends share: no loops, no memory. V is a scalar, or a vector register of the CPU backend.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define TAYLORKERN_INLINE __host__ __device__ __forceinline__
#else
#define TAYLORKERN_INLINE inline __attribute__((always_inline))
#endif

namespace taylorkern {

// 1 / sqrt(var + eps), from the variance as it is saved, so that forward and backward agree
template <class A>
TAYLORKERN_INLINE double inverse_std(A var, double eps) {
  return 1.0 / std::sqrt(static_cast<double>(var) + eps);
}

template <class A>
TAYLORKERN_INLINE A channel_scale(A weight, double inverse_std) {
  return static_cast<A>(static_cast<double>(weight) * inverse_std);
}

// Subtracting first keeps the digits that x*scale + (bias - mean*scale) would cancel.
template <class V>
TAYLORKERN_INLINE V normalise(V x, V mean, V scale, V bias) {
  return (x - mean) * scale + bias;
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

// shift = dbias / M, slope = dweight / sqrt(var + eps) / M
template <class V>
TAYLORKERN_INLINE V input_gradient(V dz, V x, V mean, V scale, V shift, V slope) {
  return scale * (dz - shift - (x - mean) * slope);
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

// 0 for no values, and never below 0 for what rounding did; NaN stays NaN
template <class V>
TAYLORKERN_INLINE V biased_variance(V m2, double count) {
  return (m2 <= V{} ? V{} : m2) / (count > 0 ? count : 1);
}

// Chan's formula: the moments of a set of `seen` values joined by one of `more` values
template <class V>
TAYLORKERN_INLINE Moments<V> joined(Moments<V> a, double seen, Moments<V> b, double more) {
  const double share = more / (seen + more);
  const V delta = b.mean - a.mean;
  return {a.mean + delta * share, a.m2 + b.m2 + delta * (seen * share) * delta};
}

}  // namespace taylorkern
