// Tables of addresses, as kernels/patchlight_kernels/addresses.py makes them: one kernel works on the tensors of a whole network.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "native.h"

namespace patchlight {

constexpr int kChunkValues = 4096;  // of a tensor, that a block works on

// int64 [rows, tensors]; the first row says how many values each tensor has.
struct Table {
  const int64_t* values;
  int count;

  explicit Table(const Tensor& table) : values(static_cast<const int64_t*>(table.data_ptr())), count(int(table.size(1))) {}
  PATCHLIGHT_HOST_DEVICE int64_t at(int row, int tensor) const { return values[int64_t(row) * count + tensor]; }
  // A tensor from one of its values on; null if its row has no tensor.
  template <class T>
  PATCHLIGHT_HOST_DEVICE T* pointer(int row, int tensor, int64_t first) const {
    T* start = reinterpret_cast<T*>(at(row, tensor));
    return start ? start + first : nullptr;
  }
};

// int32 [2, blocks]: the tensor of each block, and which chunk of it.
struct Blocks {
  const int32_t* values;
  int count;

  explicit Blocks(const Tensor& blocks) : values(static_cast<const int32_t*>(blocks.data_ptr())), count(int(blocks.size(1))) {}
  PATCHLIGHT_HOST_DEVICE int tensor(int64_t block) const { return values[block]; }
  PATCHLIGHT_HOST_DEVICE int64_t first(int64_t block) const { return int64_t(values[count + block]) * kChunkValues; }
};

// How many values a chunk has of those that are left.
PATCHLIGHT_HOST_DEVICE int chunk_values(int64_t left) { return int(left < kChunkValues ? left : kChunkValues); }

inline void check_tables(const Tensor& table, const Tensor& blocks, int rows, const char* op) {
  STD_TORCH_CHECK(table.dim() == 2 && table.is_contiguous() && table.size(0) == rows && blocks.dim() == 2 && blocks.is_contiguous() &&
                      blocks.size(0) == 2,
                  op, ": the tables must be [", rows, ", tensors] and [2, blocks], got other shapes; call the Python function.");
}

// Calls f(Type<T>{}) with the type T of the tensors behind the addresses.
template <class F>
void with_float_type(ScalarType dtype, const char* op, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Half: return f(Type<Half>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    default: STD_TORCH_CHECK(false, op, ": the dtype must be float32, float16 or bfloat16, got another; cast the tensors.");
  }
}

}  // namespace patchlight
