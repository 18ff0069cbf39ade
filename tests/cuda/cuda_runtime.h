// What csrc/cuda uses of CUDA's own header of this name; see emulator.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

template <class T>
T __ldcs(const T* from) {
  emulator::check_aligned(from, sizeof(T), "__ldcs");
  return *from;
}
template <class T>
T __ldg(const T* from) {
  emulator::check_aligned(from, sizeof(T), "__ldg");
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  emulator::check_aligned(to, sizeof(T), "__stcs");
  *to = value;
}

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::wait_for_block({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::wait_for_warp({"__syncwarp", file, line}, mask);
}

namespace emulator {

template <class T>
T shuffled(Site site, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(site, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// A lane that would look past its segment of `width` lanes keeps its own value.
inline unsigned inside(unsigned source, int width) {
  const unsigned lanes = static_cast<unsigned>(width), end = lane() / lanes * lanes + lanes;
  return source < end ? source : lane();
}

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const unsigned source = emulator::inside(emulator::lane() ^ static_cast<unsigned>(lane_mask), width);
  return emulator::shuffled({"__shfl_xor_sync", file, line}, mask, value, source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const unsigned source = emulator::inside(emulator::lane() + delta, width);
  return emulator::shuffled({"__shfl_down_sync", file, line}, mask, value, source);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const unsigned lanes = static_cast<unsigned>(width);
  const unsigned source = emulator::lane() / lanes * lanes + static_cast<unsigned>(source_lane) % lanes;
  return emulator::shuffled({"__shfl_sync", file, line}, mask, value, source);
}

// The numbers are CUDA's.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaPeekAtLastError();

struct cudaLaunchAttribute;  // none is known here
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulator {
cudaError_t launched(const cudaLaunchConfig_t& config, void (*kernel)(const void*), const void* arguments);
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  using Arguments = std::tuple<void (*)(Expected...), std::tuple<Expected...>>;
  const Arguments given{kernel, std::tuple<Expected...>{static_cast<Expected>(std::forward<Actual>(arguments))...}};
  const auto thread = [](const void* of) {
    const auto& [function, values] = *static_cast<const Arguments*>(of);
    std::apply(function, values);  // every thread has a copy of its own
  };
  return emulator::launched(*config, thread, &given);
}
