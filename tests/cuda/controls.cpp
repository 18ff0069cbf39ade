// What tests call in a module of emulated kernels, by ctypes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

#define EMULATOR_VISIBLE extern "C" __attribute__((visibility("default")))

EMULATOR_VISIBLE void emulator_order(uint64_t seed) { emulator::set_order(seed); }

EMULATOR_VISIBLE uint64_t emulator_launches() { return emulator::launches(); }

EMULATOR_VISIBLE void emulator_to_half(const float* from, unsigned short* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __half_as_ushort(__float2half_rn(from[i]));
}

EMULATOR_VISIBLE void emulator_from_half(const unsigned short* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __half2float(__ushort_as_half(from[i]));
}

EMULATOR_VISIBLE void emulator_to_bfloat16(const float* from, unsigned short* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __bfloat16_as_ushort(__float2bfloat16_rn(from[i]));
}

EMULATOR_VISIBLE void emulator_from_bfloat16(const unsigned short* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __bfloat162float(__ushort_as_bfloat16(from[i]));
}
