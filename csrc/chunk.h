// Rows of features in shared memory, 128 bytes of each at a time ("a chunk"), copied asynchronously.
// The 16-byte units of a row are swizzled by the row number, so that eight neighboring rows never use the same bank.
#pragma once

#include "device.h"

namespace patchlight {

constexpr int kChunkBytes = 128;
constexpr int kUnitBytes = 16;
constexpr int kUnits = kChunkBytes / kUnitBytes;

template <class T>
constexpr int kChunkChannels = kChunkBytes / int(sizeof(T));

__device__ __forceinline__ int chunk_offset(int row, int unit) {
  return row * kChunkBytes + ((unit ^ (row & (kUnits - 1))) << 4);
}

// Copies one 16-byte unit of a row that has `channels` values; zeros behind its end. Rows that are not 16-byte aligned
// (an odd width, an odd offset) are copied value by value.
template <class T>
__device__ __forceinline__ void stage_unit(char* shared, const T* row, int channel, int channels, bool aligned) {
  constexpr int kValues = kUnitBytes / int(sizeof(T));
  const int left = channels - channel < 0 ? 0 : (channels - channel < kValues ? channels - channel : kValues);
  if (aligned) {
    copy16_async(shared, left ? row + channel : row, left * int(sizeof(T)));
  } else {
    T* out = reinterpret_cast<T*>(shared);
    for (int i = 0; i < kValues; ++i) out[i] = i < left ? row[channel + i] : T(0.0f);
  }
}

// Whether all rows of a tensor with these strides (in values) start at multiples of 16 bytes.
template <class T>
bool rows_aligned(const T* pointer, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(pointer) % kUnitBytes == 0;
  for (int64_t stride : strides) aligned = aligned && stride * int64_t(sizeof(T)) % kUnitBytes == 0;
  return aligned;
}

// Sum of squares of the values in one unit.
template <class T>
__device__ __forceinline__ float unit_squares(const char* shared) {
  const T* values = reinterpret_cast<const T*>(shared);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kUnitBytes / int(sizeof(T)); ++i) sum += float(values[i]) * float(values[i]);
  return sum;
}

}  // namespace patchlight
