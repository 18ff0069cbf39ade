// Elements in memory and in registers: loads and stores of up to 16 bytes, and the sums' own type, which is float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../formula.h"

// What a block's threads share; a launch says how much
extern __shared__ __align__(16) unsigned char dynamic_memory[];

namespace taylorkern::cuda {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float v) {
  return __float2bfloat16_rn(v);
}

// Elements of T that one 16-byte access holds
template <class T>
constexpr int kWhole = 16 / static_cast<int>(sizeof(T));

// What holds so many bytes
template <int Bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<1> {
  using type = unsigned char;
};

// V elements that lie together, as one access brings them. Taken apart no earlier than they are used: narrow elements would
// need a register each.
template <class T, int V>
struct Pack {
  typename Word<sizeof(T) * V>::type word;

  __device__ __forceinline__ T at(int j) const {
    T element;
    memcpy(&element, reinterpret_cast<const char*>(&word) + j * sizeof(T), sizeof(T));
    return element;
  }
  __device__ __forceinline__ void put(int j, T element) {
    memcpy(reinterpret_cast<char*>(&word) + j * sizeof(T), &element, sizeof(T));
  }
};

// The elements [from, to) of a pack that begins at offset `at`; the others are of another row, or of none
struct Slice {
  int64_t at;
  int from, to;

  __device__ __forceinline__ bool holds(int j) const { return j >= from && j < to; }
};

// Nought where the slice has no element
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from, const Slice& slice) {
  using W = decltype(Pack<T, V>::word);
  if (slice.to - slice.from == V) return {*reinterpret_cast<const W*>(from + slice.at)};
  Pack<T, V> pack{};
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (slice.holds(j)) pack.put(j, from[slice.at + j]);
  }
  return pack;
}

// streams: what is written will not be read while it is in a cache, and should not drive out what will.
template <class T, int V>
__device__ __forceinline__ void store(T* to, const Slice& slice, const Pack<T, V>& pack, bool streams) {
  using W = decltype(Pack<T, V>::word);
  if (slice.to - slice.from == V && streams) {
    __stcs(reinterpret_cast<W*>(to + slice.at), pack.word);
  } else if (slice.to - slice.from == V) {
    *reinterpret_cast<W*>(to + slice.at) = pack.word;
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (slice.holds(j)) to[slice.at + j] = pack.at(j);
    }
  }
}

}  // namespace taylorkern::cuda
