// adamw on the CPU: chunks in parallel, each in strips whose gradient, parameter, moments and teacher stay in L1.
#include <algorithm>
#include <vector>

#include "../simd.h"
#include "update.h"

namespace patchlight {
namespace {

constexpr int kStrip = 1024, kBlocksAtOnce = 2;

CLONES void move_strip(
    const float* __restrict g, float* __restrict p, float* __restrict m, float* __restrict v, int count, const Numbers& numbers,
    const Betas& constants) {
  const Numbers n = numbers;
  const Betas betas = constants;
  for (int i = 0; i < count; ++i) move(g[i], p[i], m[i], v[i], n, betas);
}

CLONES void follow_strip(const float* __restrict p, float* __restrict t, int count, float share) {
  if (share < 0.5f)
    for (int i = 0; i < count; ++i) t[i] = t[i] + share * (p[i] - t[i]);
  else
    for (int i = 0; i < count; ++i) t[i] = p[i] - (p[i] - t[i]) * (1 - share);
}

const float* as_float(const float* x, float*, int) { return x; }

template <class T>
const float* as_float(const T* x, float* wide, int count) {
  widen(x, wide, count);
  return wide;
}

template <class G, class C>
void sweep(const Table& table, int tensor, int64_t first, int count, const Numbers& n, const Betas& betas) {
  float wide[kStrip];
  auto* p = table.pointer<float>(kParameter, tensor, first);
  auto* g = table.pointer<const G>(kGradient, tensor, first);
  auto* m = table.pointer<float>(kMean, tensor, first);
  auto* v = table.pointer<float>(kSquare, tensor, first);
  auto* t = table.pointer<float>(kTeacher, tensor, first);
  auto* copy = table.pointer<C>(kCopy, tensor, first);
  auto* t_copy = table.pointer<C>(kTeacherCopy, tensor, first);
  for (int at = 0; at < count; at += kStrip) {
    const int size = std::min(kStrip, count - at);
    if (n.moves) move_strip(as_float(g + at, wide, size), p + at, m + at, v + at, size, n, betas);
    if (t) follow_strip(p + at, t + at, size, n.share);
    if (copy) narrow(p + at, copy + at, size);
    if (t && t_copy) narrow(t + at, t_copy + at, size);
  }
}

void adamw_fwd(
    const Tensor& table_tensor, const Tensor& blocks_tensor, Tensor steps, const Tensor& scale, const Tensor& lr, const Tensor& weight_decay,
    const Tensor& momentum, const Tensor& freeze, const Tensor& refused, double beta1, double beta2, double eps, ScalarType gradient,
    ScalarType copy) {
  check_tables(table_tensor, blocks_tensor, kRows, "adamw");
  const Table table(table_tensor);
  const Blocks blocks(blocks_tensor);
  const Inputs in = inputs_of(steps, scale, lr, weight_decay, momentum, freeze, refused);
  const Betas betas(beta1, beta2, eps);
  if (*in.refused > 0) return;
  std::vector<Numbers> numbers;
  for (int tensor = 0; tensor < table.count; ++tensor) numbers.push_back(numbers_of(table, tensor, in, betas));
  with_float_type(gradient, "adamw", [&](auto gradient_type) {
    with_float_type(copy, "adamw", [&](auto copy_type) {
      using G = typename decltype(gradient_type)::type;
      using C = typename decltype(copy_type)::type;
      torch::stable::parallel_for(0, blocks.count, kBlocksAtOnce, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int tensor = blocks.tensor(block);
          const int64_t first = blocks.first(block);
          sweep<G, C>(table, tensor, first, chunk_values(table.at(kCount, tensor) - first), numbers[tensor], betas);
        }
      });
    });
  });
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) { m.impl("adamw_fwd", TORCH_BOX(&patchlight::adamw_fwd)); }
