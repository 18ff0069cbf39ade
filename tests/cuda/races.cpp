#include "races.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <unordered_map>

#include "emulator.h"

namespace emulator::races {

#if defined(EMULATOR_RACES)
namespace {

// When and by whom
struct Access {
  uint32_t launch = 0, block = 0, phase = 0, thread = 0;
  uint32_t meeting = 0;  // how often the thread's warp has met in this phase
};

struct Byte {
  Access writer, reader, other_reader;
};

constexpr uintptr_t kPage = 4096;
constexpr size_t kMostPages = 1000;  // kept from launch to launch
using Page = std::array<Byte, kPage>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
bool watching = false;
uint32_t launch = 0, block = 0, phase = 0;
std::array<uint32_t, 1024> meetings;

// Of the launch that runs, and for shared memory of the block that does: what was before is over.
bool current(const Access& access, bool shared) {
  return access.launch == launch && (!shared || access.block == block);
}

bool same_warp(const Access& a, const Access& b) { return a.thread / kWarp == b.thread / kWarp; }

bool ordered(const Access& before, const Access& after, bool shared) {
  if (!current(before, shared)) return true;
  if (before.block != after.block) return false;
  if (before.phase != after.phase || before.thread == after.thread) return true;
  return same_warp(before, after) && before.meeting != after.meeting;
}

// Keeps two readers of the byte so that a write which is ordered behind both is ordered behind all there were.
void keep(Byte& byte, const Access& reader, bool shared) {
  Access &first = byte.reader, &second = byte.other_reader;
  if (current(second, shared) && second.block != first.block) return;
  if (current(first, shared) && first.block != reader.block) {
    second = reader;
  } else if (!current(first, shared) || first.phase != reader.phase) {
    first = reader;
    second = {};
  } else if (current(second, shared) && !same_warp(first, second)) {
    return;
  } else if (same_warp(first, reader) && first.meeting != reader.meeting) {
    first = reader;
    second = {};
  } else if (first.thread != reader.thread) {
    second = reader;
  }
}

const char* kind(bool write) { return write ? "writes" : "reads"; }

void report(const Access& before, bool wrote, bool writes, bool shared, const void* at) {
  char address[32];
  std::snprintf(address, sizeof address, "%p", at);
  found(std::string("race: it ") + kind(writes) + (shared ? " shared" : " global") + " memory at " + address +
        ", which thread " + std::to_string(before.thread) + (before.block == block ? " of this" : " of another") +
        " block " + (wrote ? "writes" : "reads") + ", and no barrier orders the two");
}

void touch(const void* address, size_t size, bool writes) {
  if (!watching || private_memory(address)) return;
  const bool shared = shared_memory(address);
  const uint32_t thread = running_thread();
  const Access access{launch, block, phase, thread, meetings[thread]};
  for (size_t i = 0; i < size; ++i) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address) + i;
    std::unique_ptr<Page>& page = pages[at / kPage];
    if (!page) page = std::make_unique<Page>();
    Byte& byte = (*page)[at % kPage];
    const void* place = static_cast<const char*>(address) + i;
    if (!ordered(byte.writer, access, shared)) return report(byte.writer, true, writes, shared, place);
    if (!writes) {
      keep(byte, access, shared);
      continue;
    }
    for (const Access* reader : {&byte.reader, &byte.other_reader}) {
      if (!ordered(*reader, access, shared)) return report(*reader, false, writes, shared, place);
    }
    byte.writer = access;
  }
}

}  // namespace

Launch::Launch() {
  watching = true;
  ++launch;
  if (pages.size() > kMostPages) pages.clear();
}
Launch::~Launch() { watching = false; }
void next_block() {
  ++block;
  next_phase();
}
void next_phase() {
  ++phase;
  meetings.fill(0);
}
void warp_met(unsigned thread) { ++meetings[thread]; }

#else

Launch::Launch() {}
Launch::~Launch() {}
void next_block() {}
void next_phase() {}
void warp_met(unsigned) {}

#endif

}  // namespace emulator::races

#if defined(EMULATOR_RACES)
// What g++ -fsanitize=thread calls before every access to memory
using emulator::races::touch;

#define EMULATOR_ACCESS(size)                                                       \
  void __tsan_read##size(void* address) { touch(address, size, false); }            \
  void __tsan_write##size(void* address) { touch(address, size, true); }            \
  void __tsan_unaligned_read##size(void* address) { touch(address, size, false); }  \
  void __tsan_unaligned_write##size(void* address) { touch(address, size, true); }

extern "C" {
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
void __tsan_read_range(void* address, size_t size) { touch(address, size, false); }
void __tsan_write_range(void* address, size_t size) { touch(address, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#endif
