// class_attention on the CPU. A task is one head of one image, and no other task writes its results. So the backward can add to
// a patch's gradient state after state: the order is fixed, whatever the number of threads. A thread computes its heads of an
// image together, state by state, in the order of memory.
// Three loops do all the work, forward and backward: products with the rows that a state reads, weighted sums of those rows, and
// their transpose, which adds a state's row to the patches that it read.
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

constexpr int kRowsAtOnce = 4;  // the state's own row is loaded once for so many others

struct Heads {  // adjacent heads of one image that one thread computes together
  int64_t image, first, count;
};

struct Rows {  // their fp32 rows
  float* data;
  int64_t stride, head_stride;
  float* row(int64_t i, int64_t head) const { return data + i * stride + head * head_stride; }
};

// Which patches each state of one image reads; without an index, all of them.
struct Reads {
  const int32_t* index;  // [states, slots] or null
  int64_t states, slots, patches, heads;
  // The patch in a slot, or -1.
  int64_t at(int64_t state, int64_t slot) const {
    if (slot >= slots) return -1;
    if (!index) return slot;
    const int64_t patch = index[state * slots + slot];
    return patch < patches ? std::max<int64_t>(patch, -1) : -1;
  }
  // The size of a table of weights: a row per state and head, with the state itself first, then the slots.
  int64_t columns() const { return 1 + slots; }
  int64_t rows() const { return states * heads; }
  int64_t size() const { return rows() * columns(); }
};

// The next rows that a state reads, from `slot` on; its own row where there is none.
struct RowsAtOnce {
  const float* row[kRowsAtOnce];
  int64_t patch[kRowsAtOnce];
  __attribute__((always_inline)) RowsAtOnce(const Reads& reads, int64_t state, int64_t head, int64_t slot, const Rows& others, const float* own) {
    for (int t = 0; t < kRowsAtOnce; ++t) {
      patch[t] = reads.at(state, slot + t);
      row[t] = patch[t] < 0 ? own : others.row(patch[t], head);
    }
  }
};

// table[i, 0] = a_i . own_i, table[i, 1 + s] = a_i . others[patch in slot s], and `missing` where the slot has none.
CLONES void multiply(const Reads& reads, Rows a, Rows own, Rows others, int64_t width, float scale, float missing, float* table) {
  for (int64_t row = 0; row < reads.rows(); ++row) {
    const int64_t i = row / reads.heads, head = row % reads.heads;
    const float* __restrict x = a.row(i, head);
    const float* self = own.row(i, head);
    float* out = table + row * reads.columns();
    float sum = 0;
    for (int64_t d = 0; d < width; ++d) sum += x[d] * self[d];
    out[0] = sum * scale;
    for (int64_t slot = 0; slot < reads.slots; slot += kRowsAtOnce) {
      const RowsAtOnce t(reads, i, head, slot, others, self);
      const float *r0 = t.row[0], *r1 = t.row[1], *r2 = t.row[2], *r3 = t.row[3];
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (int64_t d = 0; d < width; ++d) {
        s0 += x[d] * r0[d];
        s1 += x[d] * r1[d];
        s2 += x[d] * r2[d];
        s3 += x[d] * r3[d];
      }
      const float sums[kRowsAtOnce] = {s0, s1, s2, s3};
      for (int j = 0; j < std::min<int64_t>(kRowsAtOnce, reads.slots - slot); ++j)
        out[1 + slot + j] = t.patch[j] < 0 ? missing : sums[j] * scale;
    }
  }
}

// out_i = table[i, 0] own_i + sum_s table[i, 1 + s] others[patch in slot s].
CLONES void weighted_sums(const Reads& reads, const float* table, Rows own, Rows others, int64_t width, Rows out) {
  for (int64_t row = 0; row < reads.rows(); ++row) {
    const int64_t i = row / reads.heads, head = row % reads.heads;
    const float* weight = table + row * reads.columns();
    const float* self = own.row(i, head);
    float* __restrict y = out.row(i, head);
    for (int64_t d = 0; d < width; ++d) y[d] = weight[0] * self[d];
    for (int64_t slot = 0; slot < reads.slots; slot += kRowsAtOnce) {
      const RowsAtOnce t(reads, i, head, slot, others, self);
      const float *r0 = t.row[0], *r1 = t.row[1], *r2 = t.row[2], *r3 = t.row[3];
      float w[kRowsAtOnce];
      for (int j = 0; j < kRowsAtOnce; ++j) w[j] = t.patch[j] < 0 ? 0.0f : weight[1 + slot + j];
      for (int64_t d = 0; d < width; ++d) y[d] += w[0] * r0[d] + w[1] * r1[d] + w[2] * r2[d] + w[3] * r3[d];
    }
  }
}

// out[patch in slot s] += table[i, 1 + s] a_i, for every state that reads it, in the order of the states.
CLONES void add_to_patches(const Reads& reads, const float* table, Rows a, int64_t width, Rows out) {
  for (int64_t row = 0; row < reads.rows(); ++row) {
    const int64_t i = row / reads.heads, head = row % reads.heads;
    const float* x = a.row(i, head);
    for (int64_t slot = 0; slot < reads.slots; ++slot) {
      const int64_t patch = reads.at(i, slot);
      if (patch < 0) continue;
      const float weight = table[row * reads.columns() + 1 + slot];
      float* __restrict y = out.row(patch, head);
      for (int64_t d = 0; d < width; ++d) y[d] += weight * x[d];
    }
  }
}

// out_i = table[i, 0] a_i.
CLONES void scale_rows(const Reads& reads, const float* table, Rows a, int64_t width, Rows out) {
  for (int64_t row = 0; row < reads.rows(); ++row) {
    const int64_t i = row / reads.heads, head = row % reads.heads;
    const float* x = a.row(i, head);
    float* __restrict y = out.row(i, head);
    for (int64_t d = 0; d < width; ++d) y[d] = table[row * reads.columns()] * x[d];
  }
}

CLONES void exponentials(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = exp_inline(values[i]);
}

// The log-sum-exps of adjacent heads; null if they are not wanted.
struct LogSumExps {
  float* data;
  int64_t all_heads;
  float& at(const Reads& reads, int64_t row) const { return data[row / reads.heads * all_heads + row % reads.heads]; }
};

// Scores to weights, in place. The backward computes them so again: where scores are large, the rounding of the
// log-sum-exp alone would multiply all weights of a row.
void softmax(const Reads& reads, float* table, LogSumExps lse) {
  const int64_t columns = reads.columns();
  for (int64_t r = 0; r < reads.rows(); ++r) {
    float* row = table + r * columns;
    const float largest = *std::max_element(row, row + columns);
    if (lse.data) lse.at(reads, r) = largest;
    for (int64_t c = 0; c < columns; ++c) row[c] -= largest;
  }
  exponentials(table, reads.size());
  for (int64_t r = 0; r < reads.rows(); ++r) {
    float* row = table + r * columns;
    float sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += row[c];
    if (lse.data) lse.at(reads, r) += std::log(sum);
    for (int64_t c = 0; c < columns; ++c) row[c] /= sum;
  }
}

// Gradients of the weights to gradients of the scores, in place: weight (d - sum(weight d)) scale.
void softmax_backward(const Reads& reads, const float* weights, float scale, float* d_table) {
  const int64_t columns = reads.columns();
  for (int64_t r = 0; r < reads.rows(); ++r) {
    const float* weight = weights + r * columns;
    float* d = d_table + r * columns;
    float mean = 0;
    for (int64_t c = 0; c < columns; ++c) mean += weight[c] * d[c];
    for (int64_t c = 0; c < columns; ++c) d[c] = weight[c] * (d[c] - mean) * scale;
  }
}

// A tensor [images, rows, heads, width] as fp32 rows of adjacent heads: in place if it is fp32, else through a buffer.
template <class T>
class HeadRows {
 public:
  HeadRows(const Tensor& x)
      : data_(static_cast<T*>(x.data_ptr())), images_(x.size(0)), rows_(x.size(1)), width_(x.size(3)),
        stride_{x.stride(0), x.stride(1), x.stride(2)} {}
  // Rows to read; a size of 1 stands for all.
  Rows read(const Heads& heads) {
    Rows rows = write(heads);
    if constexpr (!std::is_same_v<T, float>)
      for (int64_t i = 0; i < rows_; ++i)
        for (int64_t h = 0; h < heads.count; ++h) widen(at(heads, i, h), rows.row(i, h), width_);
    if (rows_ == 1) rows.stride = 0;
    return rows;
  }
  // Rows to write; `finish` copies them to the tensor.
  Rows write(const Heads& heads) {
    if constexpr (std::is_same_v<T, float>) return {at(heads, 0, 0), stride_[1], stride_[2]};
    else {
      buffer_.resize(rows_ * heads.count * width_);
      return {buffer_.data(), heads.count * width_, width_};
    }
  }
  Rows write_sums(const Heads& heads) {
    const Rows rows = write(heads);
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t h = 0; h < heads.count; ++h) std::fill_n(rows.row(i, h), width_, 0.0f);
    return rows;
  }
  void finish(const Heads& heads) {
    if constexpr (!std::is_same_v<T, float>) {
      const float* from = buffer_.data();
      for (int64_t i = 0; i < rows_; ++i)
        for (int64_t h = 0; h < heads.count; ++h, from += width_) narrow(from, at(heads, i, h), width_);
    }
  }

 private:
  T* at(const Heads& heads, int64_t row, int64_t head) const {
    return data_ + (images_ == 1 ? 0 : heads.image) * stride_[0] + row * stride_[1] + (heads.first + head) * stride_[2];
  }
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
                      "class_attention: arguments must be [images, rows, heads, width] with dense rows, got another layout; call the Python function.");
  }
  float scale() const { return 1.0f / std::sqrt(float(width)); }
  Reads reads(const Heads& at) const {
    return {index ? index + at.image * states * slots : nullptr, states, slots, patches, at.count};
  }
  // The log-sum-exps of these heads in a tensor [images, states, heads].
  LogSumExps log_sum_exps(const Tensor& lse, const Heads& at) const {
    return {static_cast<float*>(lse.data_ptr()) + at.image * states * heads + at.first, heads};
  }
  // Calls prepare() once a thread, and its result with the heads of each of the thread's images.
  template <class Prepare>
  void parallel(Prepare prepare) const {
    torch::stable::parallel_for(0, images * heads, 1, [&](int64_t begin, int64_t end) {
      auto work = prepare();
      for (int64_t task = begin; task < end;) {
        const int64_t first = task % heads;
        const Heads at{task / heads, first, std::min(heads - first, end - task)};
        work(at);
        task += at.count;
      }
    });
  }
};

std::tuple<Tensor, Tensor> class_attention_fwd(
    const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches, const Tensor& v_patches,
    const std::optional<Tensor>& index) {
  const Sizes sizes(q, k_self, v_self, k_patches, index);
  Tensor out = torch::stable::new_empty(q, {sizes.images, sizes.states, sizes.heads, sizes.width});
  Tensor lse = torch::stable::new_empty(q, {sizes.images, sizes.states, sizes.heads}, ScalarType::Float);
  with_float_type(q, "class_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    sizes.parallel([&] {
      return [&, queries = HeadRows<T>(q), own_keys = HeadRows<T>(k_self), own_values = HeadRows<T>(v_self),
              keys = HeadRows<T>(k_patches), values = HeadRows<T>(v_patches), outputs = HeadRows<T>(out),
              weights = std::vector<float>()](const Heads& at) mutable {
        const Reads reads = sizes.reads(at);
        weights.resize(reads.size());
        multiply(reads, queries.read(at), own_keys.read(at), keys.read(at), sizes.width, sizes.scale(),
                 -std::numeric_limits<float>::infinity(), weights.data());
        softmax(reads, weights.data(), sizes.log_sum_exps(lse, at));
        weighted_sums(reads, weights.data(), own_values.read(at), values.read(at), sizes.width, outputs.write(at));
        outputs.finish(at);
      };
    });
  });
  return {out, lse};
}

// The gradient of a tensor whose rows states may share: one row per state, in fp32 if it is still to be summed.
Tensor gradient_per_state(const Tensor& x, const Sizes& sizes) {
  const bool shared = x.size(0) != sizes.images || x.size(1) != sizes.states;
  return torch::stable::new_empty(x, {sizes.images, sizes.states, sizes.heads, sizes.width},
                                  shared ? std::optional(ScalarType::Float) : std::nullopt);
}

// Rows to write in the type of the gradient, fp32 or T.
template <class T>
struct GradientRows {
  explicit GradientRows(const Tensor& x) {
    if (x.scalar_type() == ScalarType::Float) wide.emplace(x);
    else narrow.emplace(x);
  }
  Rows write(const Heads& at) { return wide ? wide->write(at) : narrow->write(at); }
  void finish(const Heads& at) {
    if (narrow) narrow->finish(at);
  }
  std::optional<HeadRows<float>> wide;
  std::optional<HeadRows<T>> narrow;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> class_attention_bwd(
    const Tensor& grad, const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches,
    const Tensor& v_patches, const std::optional<Tensor>& index, const Tensor&) {
  const Sizes sizes(q, k_self, v_self, k_patches, index);
  Tensor dq = gradient_per_state(q, sizes), dk_self = gradient_per_state(k_self, sizes);
  Tensor dv_self = gradient_per_state(v_self, sizes);
  const std::vector<int64_t> shape{sizes.images, sizes.patches, sizes.heads, sizes.width};
  Tensor dk_patches = torch::stable::new_empty(q, shape), dv_patches = torch::stable::new_empty(q, shape);
  with_float_type(q, "class_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    sizes.parallel([&] {
      return [&, upstream = HeadRows<T>(grad), queries = HeadRows<T>(q), own_keys = HeadRows<T>(k_self),
              own_values = HeadRows<T>(v_self), keys = HeadRows<T>(k_patches), values = HeadRows<T>(v_patches),
              d_queries = GradientRows<T>(dq), d_own_keys = GradientRows<T>(dk_self), d_own_values = GradientRows<T>(dv_self),
              d_keys = HeadRows<T>(dk_patches), d_values = HeadRows<T>(dv_patches), weights = std::vector<float>(),
              d_scores = std::vector<float>()](const Heads& at) mutable {
        const Reads reads = sizes.reads(at);
        const int64_t width = sizes.width;
        weights.resize(reads.size()), d_scores.resize(reads.size());
        const Rows g = upstream.read(at), own_query = queries.read(at), own_key = own_keys.read(at), key = keys.read(at);
        multiply(reads, own_query, own_key, key, width, sizes.scale(), -std::numeric_limits<float>::infinity(), weights.data());
        softmax(reads, weights.data(), {nullptr, 0});
        multiply(reads, g, own_values.read(at), values.read(at), width, 1.0f, 0.0f, d_scores.data());
        softmax_backward(reads, weights.data(), sizes.scale(), d_scores.data());
        weighted_sums(reads, d_scores.data(), own_key, key, width, d_queries.write(at));
        scale_rows(reads, d_scores.data(), own_query, width, d_own_keys.write(at));
        scale_rows(reads, weights.data(), g, width, d_own_values.write(at));
        add_to_patches(reads, d_scores.data(), own_query, width, d_keys.write_sums(at));
        add_to_patches(reads, weights.data(), g, width, d_values.write_sums(at));
        for (auto* rows : {&d_queries, &d_own_keys, &d_own_values}) rows->finish(at);
        for (auto* rows : {&d_keys, &d_values}) rows->finish(at);
      };
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
