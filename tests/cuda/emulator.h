// CUDA's execution model on a CPU, for tests: csrc/cuda/*.cu compile as C++ against the headers of this folder, and run
// thread by thread.
//
//   g++ -x c++ -I tests/cuda -I csrc csrc/cuda/*.cu tests/cuda/*.cpp ...
//
// Every thread of a block is a fiber of its own, and blocks run one after another, all in one thread of the operating
// system. What the hardware leaves open is drawn from a seed (set_order): which thread runs before which between two
// barriers, how far one warp may run ahead of another, and which block comes first. A kernel that is right under one
// order and not under another has a race. What it reads of shared memory before writing it is NaN, and what it writes
// behind the memory that its launch has asked for is an error; with AddressSanitizer reading it is one too. Where threads
// do not meet as they must (a barrier that some of them never reach, a shuffle that a lane has missed), the launch fails
// with a message that says who waits where; nothing ever hangs. cudaGetErrorString gives the message of the last failure.
//
// Compiled with -DEMULATOR_RACES, and kernels alone with -fsanitize=thread (no runtime of it is linked), every access to
// memory is watched (races.cpp): two that no barrier orders, one of them a write, are an error under every order.
//
// What none of this shows: fences and atomics between blocks that run at once (there are none to see), rounding of the
// device's own intrinsics, what nvcc makes of the source, and speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kSharedBytes = 48 * 1024;

// Where threads meet: the name of the intrinsic, and the line that calls it
struct Site {
  const char* name;
  const char* file;
  int line;
};

// 0: ascending. 1: descending. Others: drawn anew after every barrier. In the first two a thread that can go on does so
// before those behind it.
void set_order(uint64_t seed);

// Why the last launch failed, or ""
const std::string& failure();

// How many kernels have been launched
uint64_t launches();

// What a launch asks for, as the driver would judge it
bool launchable(dim3 grid, dim3 block, size_t shared_bytes);

// Runs kernel(arguments) once per thread; whether all went well
bool launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void* arguments), const void* arguments);

// The thread's part of the kernel is over: an error of its own, such as a misaligned address
[[noreturn]] void fail(std::string&& message);

void wait_for_block(Site site);

// Waits for the lanes of `mask`, then gives the eight bytes that lane `source` has brought
uint64_t exchange(Site site, unsigned mask, uint64_t value, unsigned source);

// Waits likewise, and orders their accesses to memory
void wait_for_warp(Site site, unsigned mask);

unsigned lane();

inline void check_aligned(const void* address, size_t to, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % to) fail(std::string(what) + " of a misaligned address");
}

}  // namespace emulator
