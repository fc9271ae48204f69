// Tensor-core steps of one warp, and the same for a CPU: D[16, 8] += A[16, 16] B[8, 16]^T in fp32.
// Fragments (g = lane / 4, t = lane % 4): A rows g and g + 8, B row g, columns 2t, 2t + 1 and those + 8;
// D[0..1] = row g, columns 2t, 2t + 1; D[2..3] = row g + 8.
#pragma once

#include <type_traits>

#include "device.h"

namespace patchlight {

#ifdef PATCHLIGHT_CPU_DEVICE

inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
  struct Loaded {
    uint32_t r[4];
  };
  const int lane = cpu_device::lane();
  const Loaded loaded = cpu_device::exchange(row, [&](auto row_of) {
    Loaded result;
    for (int matrix = 0; matrix < 4; ++matrix)
      std::memcpy(&result.r[matrix], static_cast<const char*>(row_of(matrix * 8 + lane / 4)) + lane % 4 * 4, 4);
    return result;
  });
  std::memcpy(fragment, loaded.r, sizeof fragment);
}

inline void load_transposed(uint32_t (&fragment)[4], const void* row) {
  struct Loaded {
    uint16_t r[4][2];
  };
  const int g = cpu_device::lane() / 4, t = cpu_device::lane() % 4;
  const Loaded loaded = cpu_device::exchange(row, [&](auto row_of) {
    Loaded result;
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int i = 0; i < 2; ++i)
        std::memcpy(&result.r[matrix][i], static_cast<const char*>(row_of(matrix * 8 + 2 * t + i)) + g * 2, 2);
    return result;
  });
  std::memcpy(fragment, loaded.r, sizeof fragment);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
  struct Operands {
    T a[8], b[4];
  } own;
  const uint32_t b[2] = {b0, b1};
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  struct Sums {
    float s[4];
  };
  const int g = cpu_device::lane() / 4, t = cpu_device::lane() % 4;
  const Sums sums = cpu_device::exchange(own, [&](auto operands) {
    Sums result{};
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * t + i % 2;
      for (int k = 0; k < 16; ++k) {
        const Operands left = operands(g * 4 + k % 8 / 2), right = operands(column * 4 + k % 8 / 2);
        result.s[i] += float(left.a[(i / 2 + 2 * (k / 8)) * 2 + k % 2]) * float(right.b[k / 8 * 2 + k % 2]);
      }
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) d[i] += sums.s[i];
}

#else

// Lane l gives the address of a 16-byte row: row l % 8 of matrix l / 8. fragment[m] is the lane's part of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row)));
}

// The same of the transposed matrices: for a right factor stored with the summed dimension as rows.
__device__ __forceinline__ void load_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row)));
}

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace patchlight
