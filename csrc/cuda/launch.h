// From runtime codes to template arguments, and from there onto a stream.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "tiles.cuh"

namespace taylorkern::cuda {

template <class... Parameters, class... Arguments>
void start(const Launch& launch, int64_t blocks, size_t shared_bytes, void (*kernel)(Parameters...), Arguments&&... of) {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) throw std::runtime_error("taylorkern: a tensor needs too many blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(of)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and nobody else's call should find it
  throw std::runtime_error(std::string("taylorkern: a CUDA kernel could not be launched: ") + cudaGetErrorString(error));
}

// An element's type, the width of an access and a layout, as types
template <class E, class Tile>
struct Access {
  using element = E;
  using tile = Tile;
};

template <class T, int V, class Run>
void with_layout(Layout layout, const Run& run) {
  if (layout == Layout::channels_last) return run(Access<T, ChannelsLast<T, V>>{}, std::integral_constant<int, V>{});
  run(Access<T, ChannelsFirst<T, V>>{}, std::integral_constant<int, V>{});
}

template <class T, class Run>
void with_width(const Shape& shape, bool aligned, const Run& run) {
  const bool rows = shape.layout == Layout::channels_first || shape.C % kWhole<T> == 0;
  if (aligned && rows) return with_layout<T, kWhole<T>>(shape.layout, run);
  with_layout<T, 1>(shape.layout, run);
}

// run(Access, width); aligned: whether all tensors begin where 16 bytes can be taken at once
template <class Run>
void dispatch(const Shape& shape, bool aligned, const Run& run) {
  switch (shape.dtype) {
    case Dtype::f32: return with_width<float>(shape, aligned, run);
    case Dtype::bf16: return with_width<__nv_bfloat16>(shape, aligned, run);
    case Dtype::f16: return with_width<__half>(shape, aligned, run);
    case Dtype::f64: throw std::runtime_error("taylorkern: the CUDA kernels have no float64");
  }
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// From here on, tensors are so large that what is written is gone from the cache before anybody reads it.
inline bool streams(const Shape& shape) {
  constexpr int64_t kLarge = 64 << 20;
  return shape.N * shape.C * shape.S * bytes_of(shape.dtype) >= kLarge;
}

}  // namespace taylorkern::cuda
