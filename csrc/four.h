// Four adjacent values at once, 16 bytes of fp32, where the address allows it.
#pragma once

#include "device.h"

namespace patchlight {

constexpr int kFour = 4;

template <class T>
struct alignas(kFour * sizeof(T)) Four {
  T value[kFour];
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Four<T>) == 0;
}

// The values at, at + 1, ... of the `count` that there are; zeros behind the last.
template <class T>
__device__ __forceinline__ Four<T> read_four(const T* from, int at, int count, bool aligned) {
  if (aligned && at + kFour <= count) return *reinterpret_cast<const Four<T>*>(from + at);
  Four<T> four;
#pragma unroll
  for (int i = 0; i < kFour; ++i) four.value[i] = at + i < count ? from[at + i] : T(0.0f);
  return four;
}

template <class T>
__device__ __forceinline__ void write_four(T* to, int at, int count, bool aligned, const Four<float>& four) {
  Four<T> rounded;
#pragma unroll
  for (int i = 0; i < kFour; ++i) rounded.value[i] = T(four.value[i]);
  if (aligned && at + kFour <= count) {
    *reinterpret_cast<Four<T>*>(to + at) = rounded;
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i)
      if (at + i < count) to[at + i] = rounded.value[i];
  }
}

}  // namespace patchlight
