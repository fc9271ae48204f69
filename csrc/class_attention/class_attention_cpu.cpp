// class_attention on the CPU. A task is one head of one image: what it reads fits the core's cache, what it writes nobody
// else writes. So the backward may add to a patch's gradient state after state: the order is fixed whatever the threads.
// Three loops do all the work, forward and backward: products with the rows a state reads, mixtures of those rows, and
// their transpose, which spreads a state's row over the patches it read.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "../native.h"
#include "../simd.h"

namespace patchlight {
namespace {

constexpr int kTogether = 4;  // rows read at once, so that the state's own row is loaded once for them

struct Rows {  // fp32 rows of one head
  float* data;
  int64_t stride;
  float* row(int64_t i) const { return data + i * stride; }
};

// Which patches each state of one image reads; without an index, all of them.
struct Reads {
  const int32_t* index;  // [states, slots] or null
  int64_t states, slots, patches;
  // The patch in a slot, or -1.
  int64_t at(int64_t state, int64_t slot) const {
    if (slot >= slots) return -1;
    if (!index) return slot;
    const int64_t patch = index[state * slots + slot];
    return patch < patches ? std::max<int64_t>(patch, -1) : -1;
  }
  int64_t columns() const { return 1 + slots; }  // of a table of weights: the state itself, then the slots
};

// The next rows that a state reads, from `slot` on. Where there is none, its own row takes the place.
struct Together {
  const float* row[kTogether];
  int64_t patch[kTogether];
  __attribute__((always_inline)) Together(const Reads& reads, int64_t state, int64_t slot, const Rows& others, const float* own) {
    for (int t = 0; t < kTogether; ++t) {
      patch[t] = reads.at(state, slot + t);
      row[t] = patch[t] < 0 ? own : others.row(patch[t]);
    }
  }
};

// table[i, 0] = a_i . own_i, table[i, 1 + s] = a_i . others[patch in slot s], and `missing` where the slot has none.
CLONES void multiply(const Reads& reads, Rows a, Rows own, Rows others, int64_t width, float scale, float missing, float* table) {
  for (int64_t i = 0; i < reads.states; ++i) {
    const float* __restrict x = a.row(i);
    float* out = table + i * reads.columns();
    float sum = 0;
    for (int64_t d = 0; d < width; ++d) sum += x[d] * own.row(i)[d];
    out[0] = sum * scale;
    for (int64_t slot = 0; slot < reads.slots; slot += kTogether) {
      const Together t(reads, i, slot, others, own.row(i));
      const float *r0 = t.row[0], *r1 = t.row[1], *r2 = t.row[2], *r3 = t.row[3];
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (int64_t d = 0; d < width; ++d) {
        s0 += x[d] * r0[d];
        s1 += x[d] * r1[d];
        s2 += x[d] * r2[d];
        s3 += x[d] * r3[d];
      }
      const float sums[kTogether] = {s0, s1, s2, s3};
      for (int j = 0; j < std::min<int64_t>(kTogether, reads.slots - slot); ++j)
        out[1 + slot + j] = t.patch[j] < 0 ? missing : sums[j] * scale;
    }
  }
}

// out_i = table[i, 0] own_i + sum_s table[i, 1 + s] others[patch in slot s].
CLONES void mix(const Reads& reads, const float* table, Rows own, Rows others, int64_t width, Rows out) {
  for (int64_t i = 0; i < reads.states; ++i) {
    const float* weight = table + i * reads.columns();
    const float* self = own.row(i);
    float* __restrict y = out.row(i);
    for (int64_t d = 0; d < width; ++d) y[d] = weight[0] * self[d];
    for (int64_t slot = 0; slot < reads.slots; slot += kTogether) {
      const Together t(reads, i, slot, others, self);
      const float *r0 = t.row[0], *r1 = t.row[1], *r2 = t.row[2], *r3 = t.row[3];
      float w[kTogether];
      for (int j = 0; j < kTogether; ++j) w[j] = t.patch[j] < 0 ? 0.0f : weight[1 + slot + j];
      for (int64_t d = 0; d < width; ++d) y[d] += w[0] * r0[d] + w[1] * r1[d] + w[2] * r2[d] + w[3] * r3[d];
    }
  }
}

// out[patch in slot s] += table[i, 1 + s] a_i, for every state that reads it, in the order of the states.
CLONES void spread(const Reads& reads, const float* table, Rows a, int64_t width, Rows out) {
  for (int64_t i = 0; i < reads.states; ++i)
    for (int64_t slot = 0; slot < reads.slots; ++slot) {
      const int64_t patch = reads.at(i, slot);
      if (patch < 0) continue;
      const float weight = table[i * reads.columns() + 1 + slot];
      const float* x = a.row(i);
      float* __restrict y = out.row(patch);
      for (int64_t d = 0; d < width; ++d) y[d] += weight * x[d];
    }
}

// out_i = table[i, 0] a_i.
CLONES void scale_rows(const Reads& reads, const float* table, Rows a, int64_t width, Rows out) {
  for (int64_t i = 0; i < reads.states; ++i)
    for (int64_t d = 0; d < width; ++d) out.row(i)[d] = table[i * reads.columns()] * a.row(i)[d];
}

CLONES void exponentials(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = exp_inline(values[i]);
}

// Scores become weights, each row's log-sum-exp goes to lse[i * stride].
void softmax(const Reads& reads, float* table, float* lse, int64_t stride) {
  const int64_t columns = reads.columns();
  for (int64_t i = 0; i < reads.states; ++i) {
    float* row = table + i * columns;
    const float largest = *std::max_element(row, row + columns);
    lse[i * stride] = largest;
    for (int64_t c = 0; c < columns; ++c) row[c] -= largest;
  }
  exponentials(table, reads.states * columns);
  for (int64_t i = 0; i < reads.states; ++i) {
    float* row = table + i * columns;
    float sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += row[c];
    lse[i * stride] += std::log(sum);
    for (int64_t c = 0; c < columns; ++c) row[c] /= sum;
  }
}

// Scores become the weights that the forward had.
void softmax_again(const Reads& reads, float* table, const float* lse, int64_t stride) {
  for (int64_t i = 0; i < reads.states; ++i)
    for (int64_t c = 0; c < reads.columns(); ++c) table[i * reads.columns() + c] -= lse[i * stride];
  exponentials(table, reads.states * reads.columns());
}

// Gradients by the weights become gradients by the scores: weight (d - sum(weight d)) scale.
void softmax_backward(const Reads& reads, const float* weights, float scale, float* d_table) {
  const int64_t columns = reads.columns();
  for (int64_t i = 0; i < reads.states; ++i) {
    const float* weight = weights + i * columns;
    float* d = d_table + i * columns;
    float mean = 0;
    for (int64_t c = 0; c < columns; ++c) mean += weight[c] * d[c];
    for (int64_t c = 0; c < columns; ++c) d[c] = weight[c] * (d[c] - mean) * scale;
  }
}

// A tensor [images, rows, heads, width] as fp32 rows of one head: in place if it is fp32, else through a buffer.
template <class T>
class HeadRows {
 public:
  HeadRows(const Tensor& x)
      : data_(static_cast<T*>(x.data_ptr())), images_(x.size(0)), rows_(x.size(1)), width_(x.size(3)),
        stride_{x.stride(0), x.stride(1), x.stride(2)} {
    if constexpr (!std::is_same_v<T, float>) buffer_.resize(rows_ * width_);
  }
  // To read; a size of 1 stands for all.
  Rows read(int64_t image, int64_t head) {
    T* from = at(image, head);
    if constexpr (std::is_same_v<T, float>) return {from, rows_ == 1 ? 0 : stride_[1]};
    else {
      for (int64_t i = 0; i < rows_; ++i) widen(from + i * stride_[1], buffer_.data() + i * width_, width_);
      return {buffer_.data(), rows_ == 1 ? 0 : width_};
    }
  }
  // To write; `finish` brings what was written home.
  Rows write(int64_t image, int64_t head) {
    if constexpr (std::is_same_v<T, float>) return {at(image, head), stride_[1]};
    else return {buffer_.data(), width_};
  }
  Rows write_sums(int64_t image, int64_t head) {
    const Rows rows = write(image, head);
    for (int64_t i = 0; i < rows_; ++i) std::fill_n(rows.row(i), width_, 0.0f);
    return rows;
  }
  void finish(int64_t image, int64_t head) {
    if constexpr (!std::is_same_v<T, float>)
      for (int64_t i = 0; i < rows_; ++i)
        for (int64_t d = 0; d < width_; ++d) at(image, head)[i * stride_[1] + d] = T(buffer_[i * width_ + d]);
  }

 private:
  T* at(int64_t image, int64_t head) const { return data_ + (images_ == 1 ? 0 : image) * stride_[0] + head * stride_[2]; }
  T* data_;
  int64_t images_, rows_, width_;
  std::array<int64_t, 3> stride_;
  std::vector<float> buffer_;
};

struct Sizes {
  int64_t images, states, patches, heads, width, slots;
  const int32_t* index;

  Sizes(const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches, const std::optional<Tensor>& table)
      : images(k_patches.size(0)), patches(k_patches.size(1)), heads(k_patches.size(2)), width(k_patches.size(3)) {
    states = table ? table->size(1) : std::max({q.size(1), k_self.size(1), v_self.size(1)});
    slots = table ? table->size(2) : patches;
    index = table ? static_cast<const int32_t*>(table->data_ptr()) : nullptr;
    for (const Tensor* x : {&q, &k_self, &v_self, &k_patches})
      STD_TORCH_CHECK(x->dim() == 4 && x->size(3) == width && (width == 1 || x->stride(3) == 1),
                      "class_attention: expected [images, rows, heads, width] with dense rows; call the Python function");
  }
  float scale() const { return 1.0f / std::sqrt(float(width)); }
  Reads reads(int64_t image) const { return {index ? index + image * states * slots : nullptr, states, slots, patches}; }
  // Calls f(begin, end) over tasks; task / heads is the image, task % heads the head.
  template <class F>
  void parallel(F f) const { torch::stable::parallel_for(0, images * heads, 1, f); }
  // The first of the state's numbers in a tensor [images, states, heads].
  int64_t first(int64_t task) const { return task / heads * states * heads + task % heads; }
};

std::tuple<Tensor, Tensor> class_attention_fwd(
    const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches, const Tensor& v_patches,
    const std::optional<Tensor>& index) {
  const Sizes sizes(q, k_self, v_self, k_patches, index);
  Tensor out = torch::stable::new_empty(q, {sizes.images, sizes.states, sizes.heads, sizes.width});
  Tensor lse = torch::stable::new_empty(q, {sizes.images, sizes.states, sizes.heads}, ScalarType::Float);
  auto* lse_ptr = static_cast<float*>(lse.data_ptr());
  with_float_type(q, "class_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    sizes.parallel([&](int64_t begin, int64_t end) {
      HeadRows<T> queries(q), own_keys(k_self), own_values(v_self), keys(k_patches), values(v_patches), outputs(out);
      std::vector<float> weights(sizes.states * (1 + sizes.slots));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / sizes.heads, head = task % sizes.heads;
        const Reads reads = sizes.reads(image);
        multiply(reads, queries.read(image, head), own_keys.read(image, head), keys.read(image, head), sizes.width, sizes.scale(),
                 -std::numeric_limits<float>::infinity(), weights.data());
        softmax(reads, weights.data(), lse_ptr + sizes.first(task), sizes.heads);
        mix(reads, weights.data(), own_values.read(image, head), values.read(image, head), sizes.width,
            outputs.write(image, head));
        outputs.finish(image, head);
      }
    });
  });
  return {out, lse};
}

// The gradient of a tensor that may share rows: one row per state, in fp32 where rows remain to be summed.
Tensor gradient_for_every_state(const Tensor& x, const Sizes& sizes) {
  const bool shares = x.size(0) != sizes.images || x.size(1) != sizes.states;
  return torch::stable::new_empty(x, {sizes.images, sizes.states, sizes.heads, sizes.width},
                                  shares ? std::optional(ScalarType::Float) : std::nullopt);
}

// Rows to write in whichever type the gradient has.
template <class T>
struct GradientRows {
  explicit GradientRows(const Tensor& x) {
    if (x.scalar_type() == ScalarType::Float) wide.emplace(x);
    else narrow.emplace(x);
  }
  Rows write(int64_t image, int64_t head) { return wide ? wide->write(image, head) : narrow->write(image, head); }
  void finish(int64_t image, int64_t head) {
    if (narrow) narrow->finish(image, head);
  }
  std::optional<HeadRows<float>> wide;
  std::optional<HeadRows<T>> narrow;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> class_attention_bwd(
    const Tensor& grad, const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches,
    const Tensor& v_patches, const std::optional<Tensor>& index, const Tensor& lse) {
  const Sizes sizes(q, k_self, v_self, k_patches, index);
  Tensor dq = gradient_for_every_state(q, sizes), dk_self = gradient_for_every_state(k_self, sizes);
  Tensor dv_self = gradient_for_every_state(v_self, sizes);
  const std::vector<int64_t> shape{sizes.images, sizes.patches, sizes.heads, sizes.width};
  Tensor dk_patches = torch::stable::new_empty(q, shape), dv_patches = torch::stable::new_empty(q, shape);
  const auto* lse_ptr = static_cast<const float*>(lse.data_ptr());
  with_float_type(q, "class_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    sizes.parallel([&](int64_t begin, int64_t end) {
      HeadRows<T> upstream(grad), queries(q), own_keys(k_self), own_values(v_self), keys(k_patches), values(v_patches);
      GradientRows<T> d_queries(dq), d_own_keys(dk_self), d_own_values(dv_self);
      HeadRows<T> d_keys(dk_patches), d_values(dv_patches);
      std::vector<float> weights(sizes.states * (1 + sizes.slots)), d_scores(weights.size());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / sizes.heads, head = task % sizes.heads, width = sizes.width;
        const Reads reads = sizes.reads(image);
        const Rows g = upstream.read(image, head), own_query = queries.read(image, head), own_key = own_keys.read(image, head);
        const Rows key = keys.read(image, head);
        multiply(reads, own_query, own_key, key, width, sizes.scale(), -std::numeric_limits<float>::infinity(), weights.data());
        softmax_again(reads, weights.data(), lse_ptr + sizes.first(task), sizes.heads);
        multiply(reads, g, own_values.read(image, head), values.read(image, head), width, 1.0f, 0.0f, d_scores.data());
        softmax_backward(reads, weights.data(), sizes.scale(), d_scores.data());
        mix(reads, d_scores.data(), own_key, key, width, d_queries.write(image, head));
        scale_rows(reads, d_scores.data(), own_query, width, d_own_keys.write(image, head));
        scale_rows(reads, weights.data(), g, width, d_own_values.write(image, head));
        spread(reads, d_scores.data(), own_query, width, d_keys.write_sums(image, head));
        spread(reads, weights.data(), g, width, d_values.write_sums(image, head));
        for (auto* rows : {&d_queries, &d_own_keys, &d_own_values}) rows->finish(image, head);
        for (auto* rows : {&d_keys, &d_values}) rows->finish(image, head);
      }
    });
  });
  return {dq, dk_self, dv_self, dk_patches, dv_patches};
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) {
  m.impl("class_attention_fwd", TORCH_BOX(&patchlight::class_attention_fwd));
  m.impl("class_attention_bwd", TORCH_BOX(&patchlight::class_attention_bwd));
}
