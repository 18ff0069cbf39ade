#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !EMULATOR_BY_UCONTEXT
// Keeps what a call must keep, and goes on where the other stack stopped.
extern "C" void emulator_switch(void** stopped_at, void* go_on_at);
asm(R"(
.text
.type emulator_switch, @function
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");
#endif

namespace emulator {

Fiber* Fiber::came_from_ = nullptr;
Fiber* Fiber::going_to_ = nullptr;

Fiber::Fiber(void (*entry)()) : entry_(entry) {
  void* map = mmap(nullptr, kMap, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(map, kGuard, PROT_NONE)) throw std::bad_alloc();
  map_ = static_cast<char*>(map);
#if defined(__SANITIZE_ADDRESS__)
  bottom_ = map_ + kGuard;
  size_ = kMap - kGuard;
#endif
#if EMULATOR_BY_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = map_ + kGuard;
  context_.uc_stack.ss_size = kMap - kGuard;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::start, 0);
#else
  // Six registers, start's address, and what start takes for the address to return to
  void** top = reinterpret_cast<void**>(map_ + kMap);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(&Fiber::start);
  stack_pointer_ = top - 8;
#endif
}

Fiber::~Fiber() {
  if (!map_) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(map_, kMap);  // where a function was left that never returned
#endif
  munmap(map_, kMap);
}

void Fiber::switch_to(Fiber& to) {
  announce(to);
  came_from_ = this;
  going_to_ = &to;
#if EMULATOR_BY_UCONTEXT
  swapcontext(&context_, &to.context_);
#else
  emulator_switch(&stack_pointer_, to.stack_pointer_);
#endif
  arrived();
}

void Fiber::start() {
  Fiber& here = *going_to_;
  here.arrived();
  here.entry_();
}

#if defined(__SANITIZE_ADDRESS__)
void Fiber::announce(Fiber& to) { __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_); }

void Fiber::arrived() {
  // The system's own stack is known only from leaving it.
  __sanitizer_finish_switch_fiber(fake_stack_, &came_from_->bottom_, &came_from_->size_);
}
#else
void Fiber::announce(Fiber&) {}
void Fiber::arrived() {}
#endif

}  // namespace emulator
