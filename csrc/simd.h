// Portable SIMD: a CLONES function is compiled for AVX-512, AVX2 and plain x86-64, and the loader picks one.
#pragma once

#include <cstdint>
#include <cstring>

#include "native.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace patchlight {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Half to float in integer arithmetic, which vectorises without F16C: a scaling by 2^112 moves the exponent.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t finite_max = 0x7bffu << 13;
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  const uint32_t special = magnitude | 0x7f800000u;  // inf and NaN keep their payload
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  bits = magnitude > finite_max ? special : bits;
  return bits_to_float(bits | (uint32_t(half & 0x8000u) << 16));
}

CLONES static void widen(const Half* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from[i].x);
}

CLONES static void widen(const BFloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = bits_to_float(uint32_t(from[i].x) << 16);
}

}  // namespace patchlight
