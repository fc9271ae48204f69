// Portable SIMD: a CLONES function is compiled for AVX-512, AVX2 and plain x86-64, and one is chosen when the library is loaded.
// Tests build the library for one of these levels alone: PATCHLIGHT_CPU_LEVEL is 4, 3 or 1.
#pragma once

#include <cstdint>
#include <cstring>

#include "native.h"

#if !(defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__))
#define CLONES
#elif !defined(PATCHLIGHT_CPU_LEVEL)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif PATCHLIGHT_CPU_LEVEL == 4
#define CLONES __attribute__((target("arch=x86-64-v4")))
#elif PATCHLIGHT_CPU_LEVEL == 3
#define CLONES __attribute__((target("arch=x86-64-v3")))
#else
#define CLONES
#endif

#ifndef PATCHLIGHT_CPU_LEVEL
#define PATCHLIGHT_CPU_LEVEL 4  // the highest that is offered; the machine may have less
#endif

namespace patchlight {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The conversions are integer arithmetic and single steps in fp32, so the compiler has nothing to regroup. torch's own
// multiplies by 2^112 and then by 2^-110 to find what overflows, which regrouped finds nothing. They vectorize without F16C.

// A multiplication by 2^112 moves the exponent.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t finite_max = 0x7bffu << 13;
  uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  bits = magnitude > finite_max ? magnitude | 0x7f800000u : bits;  // inf and NaN keep their payload
  return bits_to_float(bits | (uint32_t(half & 0x8000u) << 16));
}

// To nearest, ties to even. One unit in the last place of 0.5 is the least subnormal half, so an addition rounds to those.
inline uint16_t float_to_half(float value) {
  const uint32_t magnitude = float_to_bits(value) & 0x7fffffffu, sign = float_to_bits(value) >> 16 & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;  // 65520 becomes inf
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(half | sign);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// e^x without a branch or a call, so that loops over it vectorize. Results below the normal numbers are 0, x above
// 88.72 gives inf, NaN stays NaN. Within 2 ulp.
inline float exp_inline(float x) {
  const float within = x > -87.33f && x < 88.73f ? x : 0.0f;
  const float halves = within * 1.44269504f;  // x = n ln 2 + r with |r| <= ln 2 / 2
  const int n = int(halves < 0 ? halves - 0.5f : halves + 0.5f);
  const float r = float(double(within) - double(n) * 0.69314718055994531);  // in two floats the compiler would regroup it
  float p = 1.9875691500e-4f;  // e^r = 1 + r + r^2 p(r), Cephes' coefficients
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float scaled = bits_to_float(float_to_bits(p) + (uint32_t(n) << 23));  // times 2^n
  const float limit = x > 0 ? bits_to_float(0x7f800000u) : x == x ? 0.0f : x;
  return x > -87.33f && x < 88.722839f ? scaled : limit;
}

// 2^x for x <= 0 (up to 127 in fact) without a branch or a call, so that loops over it vectorize. Results below the normal
// numbers are 0, NaN stays NaN. x - n is exact, so reassociation cannot change it. Within 2 ulp.
inline float exp2_inline(float x) {
  const float within = x > -126.0f ? x : x == x ? -126.0f : x;
  const int n = int(within < 0 ? within - 0.5f : within + 0.5f);
  const float r = within - float(n);
  float p = 1.5353362e-4f;  // fitted to the relative error on [-1/2, 1/2], 2e-9
  p = p * r + 1.3398875e-3f;
  p = p * r + 9.6184369e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const float scaled = bits_to_float(float_to_bits(p) + (uint32_t(n) << 23));
  return x > -126.0f ? scaled : x == x ? 0.0f : x;
}

CLONES static void widen(const Half* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from[i].x);
}

CLONES static void widen(const BFloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = bits_to_float(uint32_t(from[i].x) << 16);
}

inline void narrow(const float* from, float* to, int64_t count) { std::memcpy(to, from, size_t(count) * sizeof(float)); }

CLONES static void narrow(const float* from, Half* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i].x = float_to_half(from[i]);
}

CLONES static void narrow(const float* from, BFloat16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i].x = float_to_bfloat16(from[i]);
}

}  // namespace patchlight
