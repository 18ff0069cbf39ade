// Small kernels, most of them wrong, that the emulator of tests/cuda must tell apart. Usage: PROGRAM kernel seed
// Prints what the kernel has written, or why its launch failed.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

extern __shared__ __align__(16) unsigned char dynamic_memory[];

namespace {

constexpr int kThreads = 96;
constexpr unsigned kAll = 0xffffffffu;

float* shared() { return reinterpret_cast<float*>(dynamic_memory); }

__device__ float warp_sum(float v) {
  for (int distance = 16; distance; distance /= 2) v += __shfl_xor_sync(kAll, v, distance);
  return v;
}

// Sums of 1, 2, ... over a block, `rounds` times over
template <bool BehindWriting, bool BehindReading>
__global__ void block_sums(float* out, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const float sum = warp_sum(static_cast<float>(threadIdx.x + 1));
    if (threadIdx.x % 32 == 0) shared()[threadIdx.x / 32] = sum * static_cast<float>(round + 1);
    if (BehindWriting) __syncthreads();
    float all = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) all += shared()[warp];
    if (BehindReading) __syncthreads();
    if (threadIdx.x == 64) out[blockIdx.x * static_cast<unsigned>(rounds) + static_cast<unsigned>(round)] = all;
  }
}

// Every lane takes its neighbour's number through shared memory.
template <bool Meets>
__global__ void neighbours(float* out, int) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (Meets) __syncwarp();
  out[threadIdx.x] = shared()[threadIdx.x ^ 1];
}

__global__ void shuffles(float* out, int) {
  const float own = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = __shfl_down_sync(kAll, own, 3, 8) + 100 * __shfl_sync(kAll, own, 5, 16) +
                     10000 * __shfl_xor_sync(kAll, own, 9, 8);
}

// The last block to run decides.
__global__ void block_order(float* out, int) {
  if (threadIdx.x == 0) out[0] = static_cast<float>(blockIdx.x);
}

__global__ void some_return(float* out, int) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers(float* out, int) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void barrier_and_shuffle(float* out, int) {
  if (threadIdx.x == 7) __syncthreads();
  out[threadIdx.x] = warp_sum(1);
  if (threadIdx.x != 7) __syncthreads();
}

__global__ void lane_missing(float* out, int) {
  if (threadIdx.x == 33) return;
  out[threadIdx.x] = warp_sum(1);
}

__global__ void masks_differ(float* out, int) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 2 ? kAll : 0x55555555u, 1.0f, 2);
}

__global__ void lane_outside_the_mask(float* out, int) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void reads_behind_shared(float* out, int) { out[threadIdx.x] = shared()[threadIdx.x + 1]; }

__global__ void writes_behind_shared(float* out, int) {
  shared()[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void reads_unwritten(float* out, int) { out[threadIdx.x] = shared()[threadIdx.x]; }

__global__ void misaligned(float* out, int) {
  __stcs(reinterpret_cast<uint2*>(out + 1 + 2 * threadIdx.x), make_uint2(1, 1));
}

__global__ void three_dimensions(float* out, int) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = static_cast<float>(thread + 100 * block);
}

struct Case {
  void (*kernel)(float*, int);
  dim3 grid = dim3(1), block = dim3(kThreads);
  int rounds = 1;
  size_t shared_bytes = kThreads * sizeof(float);
};

const std::map<std::string, Case> cases{
    {"block_sums", {block_sums<true, true>, 3, kThreads, 4}},
    {"no_barrier_behind_writing", {block_sums<false, true>, 3, kThreads, 4}},
    {"no_barrier_behind_reading", {block_sums<true, false>, 3, kThreads, 4}},
    {"neighbours", {neighbours<true>}},
    {"neighbours_do_not_meet", {neighbours<false>}},
    {"shuffles", {shuffles}},
    {"block_order", {block_order, 5}},
    {"some_return", {some_return}},
    {"two_barriers", {two_barriers}},
    {"barrier_and_shuffle", {barrier_and_shuffle}},
    {"lane_missing", {lane_missing}},
    {"half_a_warp", {lane_missing, 1, 48}},
    {"masks_differ", {masks_differ}},
    {"lane_outside_the_mask", {lane_outside_the_mask}},
    {"reads_behind_shared", {reads_behind_shared}},
    {"writes_behind_shared", {writes_behind_shared}},
    {"reads_unwritten", {reads_unwritten}},
    {"misaligned", {misaligned}},
    {"three_dimensions", {three_dimensions, dim3(2, 3, 1), dim3(4, 2, 3)}},
    {"too_many_threads", {block_order, 1, dim3(1025)}},
    {"too_many_rows", {block_order, dim3(1, 65536)}},
    {"too_much_shared", {block_order, 1, kThreads, 1, 48 * 1024 + 1}},
    {"no_blocks", {block_order, 0}},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 || !cases.count(arguments[1])) return 2;
  const Case& of = cases.at(arguments[1]);
  emulator::set_order(std::strtoull(arguments[2], nullptr, 10));
  std::vector<float> out(3 * kThreads, -1);
  cudaLaunchConfig_t config{};
  config.gridDim = of.grid;
  config.blockDim = of.block;
  config.dynamicSmemBytes = of.shared_bytes;
  // Twice: a failure must not spoil what comes after it.
  const bool right_before = cudaLaunchKernelEx(&config, of.kernel, out.data(), of.rounds) == cudaSuccess;
  const cudaError_t error = cudaLaunchKernelEx(&config, of.kernel, out.data(), of.rounds);
  if (right_before != (error == cudaSuccess) || error != cudaGetLastError() || cudaGetLastError()) return 3;
  if (error != cudaSuccess) {
    std::printf("%s: %s\n", cudaGetErrorName(error), cudaGetErrorString(error));
    return 0;
  }
  for (const float v : out) std::printf("%g ", static_cast<double>(v));
  std::puts("");
}
