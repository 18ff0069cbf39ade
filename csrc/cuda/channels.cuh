// What batch normalisation knows of a channel, and how its passes over slots are combined.
#pragma once

#include "element.cuh"
#include "tiling.h"

namespace taylorkern::cuda {

// [C] each; weight and bias may be null: ones and zeros
struct Affine {
  const float *weight, *bias, *mean, *var;
  float eps;

  template <class Args>
  static Affine of(const Args& args) {
    return {static_cast<const float*>(args.weight), static_cast<const float*>(args.bias),
            static_cast<const float*>(args.mean), static_cast<const float*>(args.var), static_cast<float>(args.eps)};
  }

  __device__ __forceinline__ float gamma(int64_t c) const { return weight ? weight[c] : 1.0f; }
  __device__ __forceinline__ float beta(int64_t c) const { return bias ? bias[c] : 0.0f; }
  __device__ __forceinline__ float inverse_std(int64_t c) const { return running_inverse_std(var[c], eps); }
};

// The same bits in forward and backward, so that a z which is computed again lies on the same side of a kink
struct ScaleShift {
  float scale, shift;

  __device__ __forceinline__ static ScaleShift of(const Affine& affine, int64_t c) {
    const float scale = affine.gamma(c) * affine.inverse_std(c);
    return {scale, normalise(-affine.mean[c], scale, affine.beta(c))};
  }
};

// A block joins the slots of kColumns channels: each thread adds up a share of them.
constexpr int kColumns = 8, kShares = kThreads / kColumns;

inline int64_t column_blocks(const Tiling& tiling) {
  return ceil_div(tiling.last_channel() - tiling.first_channel(), kColumns);
}

struct Column {
  const int64_t c;
  const int share;
  const bool live;

  __device__ explicit Column(const Tiling& tiling)
      : c(tiling.first_channel() + static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns),
        share(threadIdx.x / kColumns),
        live(c < tiling.last_channel()) {}

  // Adds up the shares of every sum, in their order; whether this thread is the one that has got the channel's
  template <int K, class A>
  __device__ __forceinline__ bool join(A (&sums)[K]) const {
    A* const shared = reinterpret_cast<A*>(dynamic_memory);  // [K, kShares, kColumns]
    for (int k = 0; k < K; ++k) shared[k * kThreads + threadIdx.x] = sums[k];
    __syncthreads();
    if (share > 0 || !live) return false;
    for (int k = 0; k < K; ++k) {
      for (int other = 1; other < kShares; ++other) sums[k] += shared[k * kThreads + other * kColumns + threadIdx.x];
    }
    return true;
  }

  template <class A>
  static constexpr size_t shared_bytes(int K) {
    return sizeof(A) * static_cast<size_t>(K) * kThreads;
  }
};

}  // namespace taylorkern::cuda
