// query_attention on the CPU. A task is one head of one image: its keys and values are packed once, scores exist for a block of
// rows at a time and stay in the core's cache, and no other task adds to its gradients.
// Rows of features are stored in panels of 32 channels, [width / 32][rows][32], and keys also transposed, [keys / 32][width][32]: each
// of the products (two forward, five backward) then reads one side in place and the other in panels.
// Scores are in units of log2, so that exponentials are powers of two.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../native.h"
#include "../product.h"
#include "../simd.h"

namespace patchlight {
namespace {

constexpr int64_t kTileRows = 8;  // products are fast at multiples of this; rows of zeros fill a block up
constexpr int64_t kForwardRows = 32;
constexpr int64_t kBackwardRows = 64;  // gradients of keys are read and written once per block
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// Adjacent tokens that read the same keys: the raw ones, or a crop of queries. Their rows are from `slot` on, filled up to whole panels.
struct Segment {
  int64_t token, count, slot;
  int64_t slots() const { return round_up(count, kPanel); }
};

struct Problem {
  int64_t images, tokens, heads, width, slots = 0;
  std::vector<Segment> segments;  // the raw tokens first
  bool own;                       // whether queries read their segment too

  Problem(const Tensor& qkv, int64_t raw, int64_t crop)
      : images(qkv.size(0)), tokens(qkv.size(1)), heads(qkv.size(3)), width(qkv.size(4)), own(crop > 0) {
    STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && (width == 1 || qkv.stride(4) == 1),
                    "query_attention: qkv must be [images, tokens, 3, heads, width] with dense rows, got another layout; call the Python function.");
    for (int64_t first = 0; first < tokens;) {
      const int64_t count = first == 0 ? raw : crop ? crop : tokens - raw;
      segments.push_back({first, count, slots});
      slots += segments.back().slots();
      first += count;
    }
  }
  int64_t panels() const { return (width + kPanel - 1) / kPanel; }
  float scale() const { return 1.0f / std::sqrt(float(width)); }
  // The segments that the rows of a segment read: the raw tokens, and for queries their own if `own`.
  std::vector<Segment> read_by(const Segment& rows) const {
    if (rows.token == 0 || !own) return {segments[0]};
    return {segments[0], rows};
  }
  // Calls f(first, end) over tasks; task / heads is the image, task % heads the head.
  template <class F>
  void parallel(F f) const { torch::stable::parallel_for(0, images * heads, 1, f); }
};

// fp32 rows in panels of 32 channels; channels behind the width are zero.
struct Panels {
  int64_t rows, panels;
  std::vector<float> values;
  Panels(int64_t row_count, int64_t panel_count) : rows(row_count), panels(panel_count), values(row_count * panel_count * kPanel) {}
  float* at(int64_t panel, int64_t row) { return values.data() + (panel * rows + row) * kPanel; }
};

CLONES void scale(const float* from, float* to, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
}

template <class T>
struct HeadRows {  // rows of one head in memory
  T* data;
  int64_t stride, width;
  T* row(int64_t i) const { return data + i * stride; }

  // `count` rows from `token` on, times `factor`, to the panels' rows from `slot` on; then rows of zeros up to a whole tile.
  void load(int64_t token, int64_t count, Panels& to, int64_t slot, float factor = 1.0f) const {
    for (int64_t panel = 0; panel < to.panels; ++panel) {
      for (int64_t i = 0; i < count; ++i) {
        const T* from = row(token + i) + panel * kPanel;
        float* out = to.at(panel, slot + i);
        if constexpr (std::is_same_v<T, float>) {
          scale(from, out, channels(panel), factor);
        } else {
          widen(from, out, channels(panel));
          scale(out, out, channels(panel), factor);
        }
        std::fill(out + channels(panel), out + kPanel, 0.0f);
      }
      std::fill_n(to.at(panel, slot + count), (round_up(count, kTileRows) - count) * kPanel, 0.0f);
    }
  }
  // Writes a row to memory.
  void store(int64_t token, Panels& from, int64_t slot, float factor) const {
    for (int64_t panel = 0; panel < from.panels; ++panel) {
      float scaled[kPanel];
      scale(from.at(panel, slot), scaled, channels(panel), factor);
      narrow(scaled, row(token) + panel * kPanel, channels(panel));
    }
  }
  int64_t channels(int64_t panel) const { return std::min<int64_t>(width - panel * kPanel, kPanel); }
};

// Part 0, 1 or 2 (query, key, value) of one head of qkv or of its gradient.
template <class T>
HeadRows<T> part(const Tensor& qkv, int64_t which, int64_t image, int64_t head) {
  T* data = static_cast<T*>(qkv.data_ptr());
  return {data + image * qkv.stride(0) + which * qkv.stride(2) + head * qkv.stride(3), qkv.stride(1), qkv.size(4)};
}

// One head of a tensor [images, tokens, heads, width].
template <class T>
HeadRows<T> rows_of(const Tensor& x, int64_t image, int64_t head) {
  return {static_cast<T*>(x.data_ptr()) + image * x.stride(0) + head * x.stride(2), x.stride(1), x.size(3)};
}

// The transpose of 32 rows of 32 values. A panel's rows are adjacent, so both sides stay in L1.
CLONES void transpose_block(const float* __restrict from, float* __restrict to) {
  for (int d = 0; d < kPanel; ++d)
    for (int row = 0; row < kPanel; ++row) to[d * kPanel + row] = from[row * kPanel + d];
}

// Keys or values of all segments, transposed: [slots / 32][width][32].
struct Columns {
  int64_t height;
  std::vector<float> values;
  explicit Columns(const Problem& p) : height(p.panels() * kPanel), values(p.slots * height) {}
  float* at(int64_t slot) { return values.data() + slot * height; }

  void transpose(Panels& rows) {
    for (int64_t slot = 0; slot < rows.rows; slot += kPanel)
      for (int64_t panel = 0; panel < rows.panels; ++panel) transpose_block(rows.at(panel, slot), at(slot) + panel * kPanel * kPanel);
  }
};

// The products of a block of rows with the rows that they read: [rows][columns], one segment after the other.
struct Scores {
  int64_t columns;
  std::vector<float> values;
  Scores(const Problem& p, int64_t rows) {
    columns = p.segments[0].slots() + (p.own && p.segments.size() > 1 ? p.segments[1].slots() : 0);
    values.resize(rows * columns);
  }
  float* row(int64_t i) { return values.data() + i * columns; }

  // Sets these to rows times the columns of each segment read, and to `outside` where there is no token.
  void multiply(Panels& rows, int64_t count, const std::vector<Segment>& read, Columns& keys, float outside) {
    float* out = values.data();
    for (const Segment& s : read) {
      for (int64_t slot = 0; slot < s.slots(); slot += kPanel)
        multiply_panel({rows.at(0, 0), kPanel, 1, rows.rows * kPanel, keys.at(s.slot + slot), kPanel, kPanel * kPanel, out + slot,
                        columns, count, kPanel, rows.panels, false});
      for (int64_t i = 0; i < count; ++i) std::fill(out + i * columns + s.count, out + i * columns + s.slots(), outside);
      out += s.slots();
    }
  }
  // out = these times the rows of each segment read.
  void weighted_sums(int64_t count, const std::vector<Segment>& read, Panels& rows, Panels& out) {
    const float* from = values.data();
    for (const Segment& s : read) {
      for (int64_t panel = 0; panel < out.panels; ++panel)
        multiply_panel({from, columns, 1, 0, rows.at(panel, s.slot), kPanel, 0, out.at(panel, 0), kPanel, count, s.count, 1,
                        s.token > 0});
      from += s.slots();
    }
  }
  // out of each segment read += the transpose of these times `rows`.
  void add_transposed(int64_t count, const std::vector<Segment>& read, Panels& rows, Panels& out) {
    const float* from = values.data();
    for (const Segment& s : read) {
      for (int64_t panel = 0; panel < out.panels; ++panel)
        multiply_panel({from, 1, columns, 0, rows.at(panel, 0), kPanel, 0, out.at(panel, s.slot), kPanel,
                        round_up(s.count, kTileRows), count, 1, true});
      from += s.slots();
    }
  }
};

// Scores to 2^(score - maximum) of each row, in place; sums[i] is their sum, highest[i] the maximum.
CLONES void exponentiate(float* scores, int64_t rows, int64_t read, int64_t columns, float* sums, float* highest) {
  for (int64_t i = 0; i < rows; ++i) {
    float* __restrict row = scores + i * columns;
    float lane_top[kPanel];
    for (int j = 0; j < kPanel; ++j) lane_top[j] = -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < read; c += kPanel)
      for (int j = 0; j < kPanel; ++j) lane_top[j] = row[c + j] > lane_top[j] ? row[c + j] : lane_top[j];
    for (int half = kPanel / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lane_top[j] = lane_top[j + half] > lane_top[j] ? lane_top[j + half] : lane_top[j];
    const float top = lane_top[0];
    float sum = 0;
    for (int64_t c = 0; c < read; ++c) row[c] = exp2_inline(row[c] - top);
    for (int64_t c = 0; c < read; ++c) sum += row[c];
    sums[i] = sum, highest[i] = top;
  }
}

// Powers of two and their sums to the probabilities P, and dP to the gradients P (dP - sum(P dP)) of the scores before scaling.
CLONES void differentiate(float* powers, float* gradients, const float* sums, int64_t rows, int64_t read, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    float *__restrict p = powers + i * columns, *__restrict d = gradients + i * columns;
    const float inverse = 1 / sums[i];
    float sum = 0;
    for (int64_t c = 0; c < read; ++c) p[c] *= inverse;
    for (int64_t c = 0; c < read; ++c) sum += p[c] * d[c];
    for (int64_t c = 0; c < read; ++c) d[c] = p[c] * (d[c] - sum);
  }
}

int64_t slots_of(const std::vector<Segment>& read) {
  int64_t slots = 0;
  for (const Segment& s : read) slots += s.slots();
  return slots;
}

std::tuple<Tensor, Tensor> query_attention_fwd(const Tensor& qkv, int64_t raw, int64_t crop) {
  const Problem p(qkv, raw, crop);
  Tensor out = torch::stable::new_empty(qkv, {p.images, p.tokens, p.heads, p.width});
  Tensor lse = torch::stable::new_empty(qkv, {p.images, p.heads, p.tokens}, ScalarType::Float);
  with_float_type(qkv, "query_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    p.parallel([&](int64_t begin, int64_t end) {
      Panels rows(p.slots, p.panels()), queries(kForwardRows, p.panels()), outputs(kForwardRows, p.panels());
      Columns keys(p);
      Scores scores(p, kForwardRows);
      float sums[kForwardRows], highest[kForwardRows];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / p.heads, head = task % p.heads;
        const auto q = part<T>(qkv, 0, image, head);
        const auto target = rows_of<T>(out, image, head);
        float* lse_ptr = static_cast<float*>(lse.data_ptr()) + task * p.tokens;
        for (const Segment& s : p.segments) part<T>(qkv, 1, image, head).load(s.token, s.count, rows, s.slot);
        keys.transpose(rows);
        for (const Segment& s : p.segments) part<T>(qkv, 2, image, head).load(s.token, s.count, rows, s.slot);
        for (const Segment& s : p.segments) {
          const auto read = p.read_by(s);
          for (int64_t first = s.token; first < s.token + s.count; first += kForwardRows) {
            const int64_t count = std::min(kForwardRows, s.token + s.count - first), padded = round_up(count, kTileRows);
            q.load(first, count, queries, 0, p.scale() * kLog2e);
            scores.multiply(queries, padded, read, keys, -std::numeric_limits<float>::infinity());
            exponentiate(scores.row(0), count, slots_of(read), scores.columns, sums, highest);
            scores.weighted_sums(padded, read, rows, outputs);
            for (int64_t i = 0; i < count; ++i) {
              lse_ptr[first + i] = (highest[i] + std::log2(sums[i])) * kLn2;
              target.store(first + i, outputs, i, 1.0f / sums[i]);
            }
          }
        }
      }
    });
  });
  return {out, lse};
}

// The forward's log-sum-exps are not read: where scores are large, their rounding alone would multiply all weights of a row.
Tensor query_attention_bwd(const Tensor& grad, const Tensor& qkv, const Tensor&, const Tensor&, int64_t raw, int64_t crop) {
  const Problem p(qkv, raw, crop);
  Tensor dqkv = torch::stable::new_empty(qkv, {p.images, p.tokens, 3, p.heads, p.width});
  with_float_type(qkv, "query_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    p.parallel([&](int64_t begin, int64_t end) {
      const int64_t panels = p.panels();
      Panels rows(p.slots, panels), d_keys(p.slots, panels), d_values(p.slots, panels);
      Panels queries(kBackwardRows, panels), upstream(kBackwardRows, panels), d_queries(kBackwardRows, panels);
      Columns keys(p), values(p);
      Scores scores(p, kBackwardRows), d_scores(p, kBackwardRows);
      float sums[kBackwardRows], highest[kBackwardRows];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / p.heads, head = task % p.heads;
        const auto q = part<T>(qkv, 0, image, head), dq = part<T>(dqkv, 0, image, head);
        const auto g = rows_of<T>(grad, image, head);
        for (const Segment& s : p.segments) part<T>(qkv, 2, image, head).load(s.token, s.count, rows, s.slot);
        values.transpose(rows);
        for (const Segment& s : p.segments) part<T>(qkv, 1, image, head).load(s.token, s.count, rows, s.slot);
        keys.transpose(rows);
        for (Panels* gradient : {&d_keys, &d_values}) std::fill(gradient->values.begin(), gradient->values.end(), 0.0f);
        for (const Segment& s : p.segments) {
          const auto read = p.read_by(s);
          for (int64_t first = s.token; first < s.token + s.count; first += kBackwardRows) {
            const int64_t count = std::min(kBackwardRows, s.token + s.count - first), padded = round_up(count, kTileRows);
            q.load(first, count, queries, 0, p.scale() * kLog2e);
            g.load(first, count, upstream, 0);
            scores.multiply(queries, padded, read, keys, -std::numeric_limits<float>::infinity());
            d_scores.multiply(upstream, padded, read, values, 0.0f);
            exponentiate(scores.row(0), count, slots_of(read), scores.columns, sums, highest);
            differentiate(scores.row(0), d_scores.row(0), sums, count, slots_of(read), scores.columns);
            d_scores.weighted_sums(padded, read, rows, d_queries);
            for (int64_t i = 0; i < count; ++i) dq.store(first + i, d_queries, i, p.scale());
            d_scores.add_transposed(count, read, queries, d_keys);
            scores.add_transposed(count, read, upstream, d_values);
          }
        }
        const auto dk = part<T>(dqkv, 1, image, head), dv = part<T>(dqkv, 2, image, head);
        for (const Segment& s : p.segments)
          for (int64_t i = 0; i < s.count; ++i) {
            dk.store(s.token + i, d_keys, s.slot + i, kLn2);  // queries were in units of log2
            dv.store(s.token + i, d_values, s.slot + i, 1.0f);
          }
      }
    });
  });
  return dqkv;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) {
  m.impl("query_attention_fwd", TORCH_BOX(&patchlight::query_attention_fwd));
  m.impl("query_attention_bwd", TORCH_BOX(&patchlight::query_attention_bwd));
}
