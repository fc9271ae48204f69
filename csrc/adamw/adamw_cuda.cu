// adamw on the GPU, two kernels: a thread per parameter computes the numbers of its step, then a block works on a chunk.
#include "../device.h"
#include "../four.h"
#include "update.h"

namespace patchlight {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) numbers_kernel(Table table, Inputs in, Betas betas, Numbers* numbers) {
  const int tensor = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (*in.refused > 0 || tensor >= table.count) return;
  numbers[tensor] = numbers_of(table, tensor, in, betas);
}

template <class G, class C>
__global__ void __launch_bounds__(kThreads) sweep_kernel(Table table, Blocks blocks, const Numbers* numbers, const float* refused, Betas betas) {
  if (*refused > 0) return;
  const int tensor = blocks.tensor(int(blockIdx.x));
  const int64_t first = blocks.first(int(blockIdx.x));
  const Numbers n = numbers[tensor];
  const int count = chunk_values(table.at(kCount, tensor) - first);
  float* p = table.pointer<float>(kParameter, tensor, first);
  const G* g = table.pointer<const G>(kGradient, tensor, first);
  float* m = table.pointer<float>(kMean, tensor, first);
  float* v = table.pointer<float>(kSquare, tensor, first);
  float* t = table.pointer<float>(kTeacher, tensor, first);
  C* copy = table.pointer<C>(kCopy, tensor, first);
  C* t_copy = table.pointer<C>(kTeacherCopy, tensor, first);
  // Addresses of tensors that are not there are aligned.
  const bool aligned = is_aligned(p) && is_aligned(g) && is_aligned(m) && is_aligned(v) && is_aligned(t) && is_aligned(copy) && is_aligned(t_copy);
#pragma unroll 2
  for (int start = 0; start < kChunkValues; start += kThreads * kFour) {
    const int at = start + int(threadIdx.x) * kFour;
    Four<float> parameter = read_four(p, at, count, aligned), teacher = {};
    if (t) teacher = read_four(t, at, count, aligned);
    if (n.moves) {
      const Four<G> gradient = read_four(g, at, count, aligned);
      Four<float> mean = read_four(m, at, count, aligned), square = read_four(v, at, count, aligned);
#pragma unroll
      for (int i = 0; i < kFour; ++i) move(float(gradient.value[i]), parameter.value[i], mean.value[i], square.value[i], n, betas);
      write_four(p, at, count, aligned, parameter);
      write_four(m, at, count, aligned, mean);
      write_four(v, at, count, aligned, square);
    }
    if (copy) write_four(copy, at, count, aligned, parameter);
    if (t) {
#pragma unroll
      for (int i = 0; i < kFour; ++i) teacher.value[i] = followed(teacher.value[i], parameter.value[i], n.share);
      write_four(t, at, count, aligned, teacher);
      if (t_copy) write_four(t_copy, at, count, aligned, teacher);
    }
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
  const OnDevice device(table_tensor);
  Tensor scratch = torch::stable::new_empty(steps, {int64_t(table.count * sizeof(Numbers) / sizeof(float))});
  auto* numbers = static_cast<Numbers*>(scratch.data_ptr());
  const unsigned groups = unsigned(table.count + kThreads - 1) / kThreads;
  launch(device, numbers_kernel, dim3{groups, 1, 1}, kThreads, 0, table, in, betas, numbers);
  with_float_type(gradient, "adamw", [&](auto gradient_type) {
    using G = typename decltype(gradient_type)::type;
    const auto sweep = copy == ScalarType::Half ? sweep_kernel<G, Half> : sweep_kernel<G, BFloat16>;
    launch(device, sweep, dim3{unsigned(blocks.count), 1, 1}, kThreads, 0, table, blocks, static_cast<const Numbers*>(numbers), in.refused, betas);
  });
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) { m.impl("adamw_fwd", TORCH_BOX(&patchlight::adamw_fwd)); }
