#include <cstring>

#include "../ops.h"

namespace taylorkern::cpu {
namespace {

bool finite(const Addend& of) {
  constexpr uint64_t exponent = 0x7ff0000000000000;  // all of its bits are set in infinities and NaN alone
  uint64_t found = 0;
  for (int64_t i = 0; i < of.count; ++i) {
    uint64_t bits;
    std::memcpy(&bits, of.from + i, sizeof bits);
    found |= (bits & exponent) == exponent;
  }
  return found == 0;
}

}  // namespace

bool accumulate(const Addend* addends, int64_t count) {
  for (const Addend* of = addends; of != addends + count; ++of) {
    if (!finite(*of)) return false;
  }
  for (const Addend* of = addends; of != addends + count; ++of) {
    for (int64_t i = 0; i < of->count; ++i) of->to[i] += of->from[i];
  }
  return true;
}

}  // namespace taylorkern::cpu
