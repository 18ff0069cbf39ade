// A stack of its own and a place where it stopped. x86-64 switches by hand: swapcontext asks the system for the signal
// mask each time, and a kernel's threads switch by the million.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_BY_UCONTEXT 1
#include <ucontext.h>
#else
#define EMULATOR_BY_UCONTEXT 0
#endif

namespace emulator {

// The operating system's own stack, or one of mapped memory
class Fiber {
 public:
  Fiber() = default;
  explicit Fiber(void (*entry)());
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Goes on in `to` where that stopped; returns when something switches back here
  void switch_to(Fiber& to);

  bool holds(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return map_ && at >= map_ && at < map_ + kMap;
  }

 private:
  static constexpr size_t kGuard = 4096, kMap = 128 * 1024 + kGuard;

  char* map_ = nullptr;  // the guard page, then the stack
#if EMULATOR_BY_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif

  void (*entry_)() = nullptr;
  static Fiber *came_from_, *going_to_;

  void announce(Fiber& to);
  void arrived();
  static void start();
};

}  // namespace emulator
