// square_sums on the CPU: a sum for every chunk, in parallel; then the chunks of each tensor are added in their order.
#include <vector>

#include "../addresses.h"
#include "../native.h"
#include "../simd.h"

namespace patchlight {
namespace {

constexpr int kRows = 3;  // of the table: values, first block, address
constexpr int kBlocksAtOnce = 4;

CLONES float chunk_sum(const float* x, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] * x[i];
  return sum;
}

template <class T>
float chunk_sum(const T* x, int64_t count) {
  float wide[kChunkValues];
  widen(x, wide, count);
  return chunk_sum(wide, count);
}

Tensor square_sums_fwd(const Tensor& table_tensor, const Tensor& blocks_tensor, ScalarType dtype) {
  check_tables(table_tensor, blocks_tensor, kRows, "square_sums");
  const Table table(table_tensor);
  const Blocks blocks(blocks_tensor);
  Tensor out = torch::stable::new_empty(table_tensor, {table.count}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(table_tensor, {blocks.count}, ScalarType::Float);
  float *to = static_cast<float*>(out.data_ptr()), *of_block = static_cast<float*>(sums.data_ptr());
  with_float_type(dtype, "square_sums", [&](auto type) {
    using T = typename decltype(type)::type;
    torch::stable::parallel_for(0, blocks.count, kBlocksAtOnce, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int tensor = blocks.tensor(b);
        const int64_t first = blocks.first(b);
        of_block[b] = chunk_sum(table.pointer<const T>(2, tensor, first), chunk_values(table.at(0, tensor) - first));
      }
    });
  });
  std::vector<double> total(table.count, 0.0);
  for (int b = 0; b < blocks.count; ++b) total[blocks.tensor(b)] += of_block[b];
  for (int t = 0; t < table.count; ++t) to[t] = float(total[t]);
  return out;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) { m.impl("square_sums_fwd", TORCH_BOX(&patchlight::square_sums_fwd)); }
