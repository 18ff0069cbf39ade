#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

alignas(16) unsigned char dynamic_memory[emulator::kSharedBytes];  // what a block has of it

namespace emulator {
namespace {

constexpr unsigned char kNotANumber = 0xff;  // a byte of one, in every floating point type
constexpr unsigned kMostThreads = 1024;

enum class State { ready, at_barrier, at_warp, returned };

struct Thread {
  Fiber fiber;
  State state = State::returned;
  Site site{};
  unsigned mask = 0, source = 0;  // of a shuffle
  uint64_t value = 0;             // brought, and then found
  explicit Thread(void (*entry)()) : fiber(entry) {}
};

struct Emulator {
  uint64_t seed = 0, launches = 0;
  std::mt19937_64 random;
  std::string failure;
  cudaError_t last_error = cudaSuccess;

  std::deque<Thread> threads;  // of the block that runs, and more; they stay from block to block
  Fiber scheduler;
  unsigned count = 0;    // of threads in a block
  unsigned current = 0;  // the one that runs
  std::vector<unsigned> order;
  bool ahead = true;  // whether a thread that can go on does so before those behind it
  bool released = false;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
};

Emulator the;

std::string text(dim3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

dim3 coordinates(uint64_t index, dim3 of) {
  const uint64_t row = index / of.x;
  return {static_cast<unsigned>(index % of.x), static_cast<unsigned>(row % of.y), static_cast<unsigned>(row / of.y)};
}

uint3 plain(dim3 v) { return {v.x, v.y, v.z}; }

std::string text(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(site.name) + " (" + (name ? name + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && !std::strcmp(a.name, b.name) && !std::strcmp(a.file, b.file);
}

std::string here() { return "block " + text(dim3(blockIdx.x, blockIdx.y, blockIdx.z)); }

std::string hexadecimal(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "%08x", mask);
  return digits;
}

std::string doing(const Thread& thread) {
  if (thread.state == State::returned) return "returned";
  if (thread.state == State::at_barrier) return "at " + text(thread.site);
  return "at " + text(thread.site) + " for the lanes " + hexadecimal(thread.mask);
}

// A thread's life, over and over: a kernel's call for each block
void live() {
  while (true) {
    the.kernel(the.arguments);
    Thread& thread = the.threads[the.current];
    thread.state = State::returned;
    thread.fiber.switch_to(the.scheduler);
  }
}

void pause(State state) {
  Thread& thread = the.threads[the.current];
  thread.state = state;
  thread.fiber.switch_to(the.scheduler);
}

void draw_order() {
  the.order.resize(the.count);
  std::iota(the.order.begin(), the.order.end(), 0u);
  if (the.seed == 1) std::reverse(the.order.begin(), the.order.end());
  the.ahead = true;
  if (the.seed <= 1) return;
  std::vector<uint64_t> rank((the.count + kWarp - 1) / kWarp);
  for (uint64_t& r : rank) r = the.random();
  std::shuffle(the.order.begin(), the.order.end(), the.random);
  std::stable_sort(the.order.begin(), the.order.end(),
                   [&](unsigned a, unsigned b) { return rank[a / kWarp] < rank[b / kWarp]; });
  the.ahead = the.random() & 1;
}

void run(unsigned index) {
  the.current = index;
  threadIdx = plain(coordinates(index, blockDim));
  the.threads[index].state = State::ready;
  the.scheduler.switch_to(the.threads[index].fiber);
}

// Whether the lanes that the last arrival waits for have all come, and to the same place; then they go on.
void meet_in_warp(unsigned index) {
  const Thread& last = the.threads[index];
  const unsigned first = index / kWarp * kWarp;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(last.mask >> i & 1)) continue;
    if (first + i >= the.count) return;
    const Thread& other = the.threads[first + i];
    if (other.state != State::at_warp || other.mask != last.mask || !same(other.site, last.site)) return;
  }
  uint64_t values[kWarp];
  for (unsigned i = 0; i < kWarp; ++i) values[i] = first + i < the.count ? the.threads[first + i].value : 0;
  const unsigned mask = last.mask;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread& lane = the.threads[first + i];
    if (!(mask >> lane.source & 1)) {
      the.failure = here() + ": lane " + std::to_string(i) + " reads from lane " + std::to_string(lane.source) +
                    ", which is not in the mask " + hexadecimal(mask) + ", at " + text(lane.site);
      return;
    }
    lane.value = values[lane.source];
    lane.state = State::ready;
  }
  the.released = true;
}

// Whether all threads are at one barrier; then they go on.
bool meet_in_block() {
  for (unsigned i = 0; i < the.count; ++i) {
    const Thread& thread = the.threads[i];
    if (thread.state != State::at_barrier || !same(thread.site, the.threads[0].site)) return false;
  }
  for (unsigned i = 0; i < the.count; ++i) the.threads[i].state = State::ready;
  races::next_phase();
  draw_order();
  return true;
}

bool all_returned() {
  return std::all_of(the.threads.begin(), the.threads.begin() + the.count,
                     [](const Thread& thread) { return thread.state == State::returned; });
}

// Who is where, when none can go on
std::string standstill() {
  std::vector<std::pair<std::string, unsigned>> places;
  std::string told;
  for (unsigned i = 0; i < the.count; ++i) {
    const std::string place = doing(the.threads[i]);
    auto found = std::find_if(places.begin(), places.end(), [&](const auto& p) { return p.first == place; });
    if (found == places.end()) found = places.insert(found, {place, 0});
    if (++found->second > 1) continue;
    told += (told.empty() ? "" : ", ") + std::string("thread ") + std::to_string(i) + ": " + place;
  }
  told += " (";
  for (const auto& [place, number] : places) told += (&place == &places[0].first ? "" : ", ") + std::to_string(number) + " " + place;
  return "the threads of " + here() + " do not meet: " + told + ")";
}

// Runs every thread that can, until none can
void run_ready() {
  for (bool again = true; again;) {
    again = false;
    for (size_t i = 0; i < the.order.size() && the.failure.empty(); ++i) {
      const unsigned index = the.order[i];
      if (the.threads[index].state != State::ready) continue;
      again = true;
      the.released = false;
      run(index);
      if (the.threads[index].state == State::at_warp) meet_in_warp(index);
      if (the.released && the.ahead) break;
    }
    again &= the.failure.empty();
  }
}

void prepare_shared(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(dynamic_memory, kSharedBytes);
#endif
  std::memset(dynamic_memory, kNotANumber, kSharedBytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(dynamic_memory + bytes, kSharedBytes - bytes);
#endif
  (void)bytes;
}

void check_shared(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(dynamic_memory, kSharedBytes);
#endif
  const unsigned char *begin = dynamic_memory + bytes, *end = dynamic_memory + kSharedBytes;
  if (begin == end || !the.failure.empty()) return;
  if (*begin == kNotANumber && !std::memcmp(begin, begin + 1, static_cast<size_t>(end - begin) - 1)) return;
  const auto* wrong = std::find_if(begin, end, [](unsigned char byte) { return byte != kNotANumber; });
  the.failure = here() + " has written to byte " + std::to_string(wrong - dynamic_memory) +
                " of its shared memory, which has " + std::to_string(bytes);
}

void run_block(size_t shared_bytes) {
  prepare_shared(shared_bytes);
  races::next_block();
  for (unsigned i = 0; i < the.count; ++i) the.threads[i].state = State::ready;
  draw_order();
  do {
    run_ready();
  } while (the.failure.empty() && meet_in_block());
  if (the.failure.empty() && !all_returned()) the.failure = standstill();
  check_shared(shared_bytes);
}

// The blocks of a grid, in the order that the seed has
class Blocks {
 public:
  explicit Blocks(dim3 grid) : count_(uint64_t{grid.x} * grid.y * grid.z) {
    if (the.seed <= 1) return;
    shuffled_.resize(count_);
    std::iota(shuffled_.begin(), shuffled_.end(), uint64_t{0});
    std::shuffle(shuffled_.begin(), shuffled_.end(), the.random);
  }
  uint64_t count() const { return count_; }
  uint64_t operator[](uint64_t i) const {
    return the.seed == 0 ? i : the.seed == 1 ? count_ - 1 - i : shuffled_[i];
  }

 private:
  uint64_t count_;
  std::vector<uint64_t> shuffled_;
};

std::mutex one_launch;

}  // namespace

void set_order(uint64_t seed) {
  const std::lock_guard<std::mutex> alone(one_launch);
  the.seed = seed;
  the.random.seed(seed);
}

uint64_t launches() { return the.launches; }

const std::string& failure() { return the.failure; }

bool launchable(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = grid.x < (1u << 31) && grid.y < (1u << 16) && grid.z < (1u << 16) && block.z <= 64 &&
                    threads <= kMostThreads && shared_bytes <= kSharedBytes;
  return fits && threads > 0 && uint64_t{grid.x} * grid.y * grid.z > 0;
}

bool launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void*), const void* arguments) {
  const std::lock_guard<std::mutex> alone(one_launch);
  ++the.launches;
  gridDim = grid;
  blockDim = block;
  the.kernel = kernel;
  the.arguments = arguments;
  the.count = block.x * block.y * block.z;
  the.failure.clear();
  while (the.threads.size() < the.count) the.threads.emplace_back(&live);
  races::Launch watched;
  const Blocks blocks(grid);
  for (uint64_t i = 0; i < blocks.count() && the.failure.empty(); ++i) {
    blockIdx = plain(coordinates(blocks[i], grid));
    run_block(shared_bytes);
  }
  if (!the.failure.empty()) the.threads.clear();  // some have stopped for good
  return the.failure.empty();
}

void fail(std::string&& message) {
  if (the.failure.empty()) the.failure = here() + ", thread " + std::to_string(the.current) + ": " + message;
  message = std::string();  // nobody will come back to its owner
  while (true) pause(State::returned);
}

void wait_for_block(Site site) {
  the.threads[the.current].site = site;
  pause(State::at_barrier);
}

uint64_t exchange(Site site, unsigned mask, uint64_t value, unsigned source) {
  if (!(mask >> lane() & 1)) fail("it is not in the mask " + hexadecimal(mask) + " at " + text(site));
  Thread& thread = the.threads[the.current];
  thread.site = site;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  pause(State::at_warp);
  return thread.value;
}

void wait_for_warp(Site site, unsigned mask) {
  exchange(site, mask, 0, lane());
  races::warp_met(the.current);
}

unsigned lane() { return the.current % kWarp; }

namespace races {
bool private_memory(const void* address) { return the.threads[the.current].fiber.holds(address); }
bool shared_memory(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  return at >= dynamic_memory && at < dynamic_memory + kSharedBytes;
}
unsigned running_thread() { return the.current; }
void found(const std::string& message) {
  if (the.failure.empty()) the.failure = here() + ", thread " + std::to_string(the.current) + ": " + message;
}
}  // namespace races

cudaError_t launched(const cudaLaunchConfig_t& config, void (*kernel)(const void*), const void* arguments) {
  cudaError_t error = cudaSuccess;
  if (config.numAttrs) {
    error = cudaErrorInvalidValue;
  } else if (!launchable(config.gridDim, config.blockDim, config.dynamicSmemBytes)) {
    error = cudaErrorInvalidConfiguration;
  } else if (!launch(config.gridDim, config.blockDim, config.dynamicSmemBytes, kernel, arguments)) {
    error = cudaErrorLaunchFailure;
  }
  if (error != cudaSuccess) the.last_error = error;
  return error;
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return emulator::the.failure.c_str();
  }
  return "unrecognized error code";
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return emulator::the.last_error; }

cudaError_t cudaGetLastError() { return std::exchange(emulator::the.last_error, cudaSuccess); }
