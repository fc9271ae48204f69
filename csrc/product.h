// Small fp32 matrix products of the CPU kernels: c[i, j] = sum_k a[i, k] b[k, j] over a panel of 32 columns.
// The sums of a tile stay in registers over all k, so a core comes near its peak if b (32 columns of up to a few hundred k)
// fits its L1 cache. `a` is read in place, row-major or column-major; rows of 32 values of b and c are adjacent.
#pragma once

#include <cfloat>

#include "simd.h"

namespace patchlight {

constexpr int kPanel = 32;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Of each column of a panel [count][32]: highest, the panel to 2^(panel - highest) in place, and the sum of that.
CLONES static void exponentiate_panel(float* __restrict panel, int64_t count, float* __restrict highest, float* __restrict sum) {
  float top[kPanel], total[kPanel];
  for (int i = 0; i < kPanel; ++i) top[i] = -FLT_MAX, total[i] = 0;  // finite: there may be nothing above -inf
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kPanel; ++i) top[i] = panel[k * kPanel + i] > top[i] ? panel[k * kPanel + i] : top[i];
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kPanel; ++i) {
      const float power = exp2_inline(panel[k * kPanel + i] - top[i]);
      panel[k * kPanel + i] = power;
      total[i] += power;
    }
  for (int i = 0; i < kPanel; ++i) highest[i] = top[i], sum[i] = total[i];
}

// k counts `outer` times `inner`. Either the rows of `a` or the values of a row must be adjacent: a_row == 1 or a_step == 1.
struct PanelProduct {
  const float* a;  // [i * a_row + outer * a_outer + inner * a_step]
  int64_t a_row, a_step, a_outer;
  const float* b;  // [outer * b_outer + inner * b_step + j]
  int64_t b_step, b_outer;
  float* c;  // [i * c_row + j]
  int64_t c_row;
  int64_t rows, inner, outer;
  bool accumulate;  // c += instead of c =
};

// ROWS x (2 * LANES) sums in registers.
template <int LANES, int ROWS, bool ADJACENT_ROWS>
__attribute__((always_inline)) inline void product_tile(const PanelProduct& p, int64_t row, int column) {
  typedef float Vector __attribute__((vector_size(LANES * 4)));
  typedef float Anywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
  float* c = p.c + row * p.c_row + column;
  Vector sum[ROWS][2] = {};
  if (p.accumulate)
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < 2; ++v) sum[i][v] = *reinterpret_cast<const Anywhere*>(c + i * p.c_row + v * LANES);
  for (int64_t outer = 0; outer < p.outer; ++outer) {
    const float* a = p.a + row * (ADJACENT_ROWS ? 1 : p.a_row) + outer * p.a_outer;
    const float* b = p.b + outer * p.b_outer + column;
    for (int64_t inner = 0; inner < p.inner; ++inner) {
      const Vector left = *reinterpret_cast<const Anywhere*>(b), right = *reinterpret_cast<const Anywhere*>(b + LANES);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const Vector value = Vector{} + (ADJACENT_ROWS ? a[i] : a[i * p.a_row]);
        sum[i][0] += value * left;
        sum[i][1] += value * right;
      }
      a += ADJACENT_ROWS ? p.a_step : 1;
      b += p.b_step;
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < 2; ++v) *reinterpret_cast<Anywhere*>(c + i * p.c_row + v * LANES) = sum[i][v];
}

template <int LANES, int ROWS, bool ADJACENT_ROWS>
__attribute__((always_inline)) inline void product_rows(const PanelProduct& p) {
  int64_t row = 0;
  for (; row + ROWS <= p.rows; row += ROWS)
    for (int column = 0; column < kPanel; column += 2 * LANES) product_tile<LANES, ROWS, ADJACENT_ROWS>(p, row, column);
  for (; row < p.rows; ++row)
    for (int column = 0; column < kPanel; column += 2 * LANES) product_tile<LANES, 1, ADJACENT_ROWS>(p, row, column);
}

template <int LANES, int ROWS>
__attribute__((always_inline)) inline void product_either_way(const PanelProduct& p) {
  p.a_row == 1 ? product_rows<LANES, ROWS, true>(p) : product_rows<LANES, ROWS, false>(p);
}

// Each instruction set has its own tile size (two vectors wide, as many rows as there are registers), so no target_clones here.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("arch=x86-64-v4"))) inline void product_avx512(const PanelProduct& p) { product_either_way<16, 8>(p); }
__attribute__((target("arch=x86-64-v3"))) inline void product_avx2(const PanelProduct& p) { product_either_way<8, 4>(p); }
#endif
inline void product_plain(const PanelProduct& p) { product_either_way<4, 4>(p); }

inline void multiply_panel(const PanelProduct& p) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const auto best = PATCHLIGHT_CPU_LEVEL >= 4 && __builtin_cpu_supports("x86-64-v4")   ? product_avx512
                           : PATCHLIGHT_CPU_LEVEL >= 3 && __builtin_cpu_supports("x86-64-v3") ? product_avx2
                                                                                              : product_plain;
  best(p);
#else
  product_plain(p);
#endif
}

}  // namespace patchlight
