// What csrc/cuda uses of CUDA's own header of this name; see emulator.h.
#pragma once

#include <cstdint>
#include <cstring>

struct alignas(2) __half {
  unsigned short bits;
};

inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 0x1f, fraction = value.bits & 0x3ff;
  if (exponent == 0) {  // zero and subnormals: a multiple of 2^-24
    const float size = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -size : size;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// To nearest, ties to even
inline __half __float2half_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return {0x7fff};
  if (size >= 0x477ff000u) return {static_cast<unsigned short>(sign | 0x7c00)};  // from 65520 on
  if (size < 0x38800000u) {  // below 2^-14: in steps of 2^-24, which adding 2^-1 leaves at the fraction's end
    float shifted;
    std::memcpy(&shifted, &size, sizeof shifted);
    shifted += 0.5f;
    uint32_t steps;
    std::memcpy(&steps, &shifted, sizeof steps);
    return {static_cast<unsigned short>(sign | (steps - 0x3f000000u))};
  }
  const uint32_t rounded = size + 0xfffu + (size >> 13 & 1);
  return {static_cast<unsigned short>(sign | ((rounded >> 13) - (112u << 10)))};
}

inline __half __float2half(float value) { return __float2half_rn(value); }
