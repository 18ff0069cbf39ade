// Which accesses of a launch no barrier orders. Of two threads that touch a byte, one of them writing, one must come
// first by a __syncthreads between them, or a __syncwarp in one warp; a shuffle orders no memory. Nothing orders two blocks.
#pragma once

#include <string>

namespace emulator::races {

// Watches while it lives.
class Launch {
 public:
  Launch();
  ~Launch();
};

void next_block();
void next_phase();               // a barrier has been passed
void warp_met(unsigned thread);  // by this thread's warp, as the thread sees it

// The emulator's
bool private_memory(const void* address);  // the running thread's own stack
bool shared_memory(const void* address);
unsigned running_thread();
void found(const std::string& message);

}  // namespace emulator::races
