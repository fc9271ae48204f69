// What the C++ and the CUDA implementation of adamw share: the rows of the table, the numbers of a step, the arithmetic of a value.
#pragma once

#include <cmath>

#include "../addresses.h"

namespace patchlight {

enum Row { kCount, kFlags, kParameter, kGradient, kMean, kSquare, kTeacher, kCopy, kTeacherCopy, kRows };
constexpr int64_t kDecayed = 1, kFrozen = 2, kWithGradient = 4;  // flags

struct Betas {
  double log1, log2;
  float rest1, beta2, rest2, eps;  // rest = 1 - beta

  Betas(double beta1, double beta2, double eps)
      : log1(std::log(beta1)), log2(std::log(beta2)), rest1(float(1 - beta1)), beta2(float(beta2)), rest2(float(1 - beta2)), eps(float(eps)) {}
};

// The device tensors of a call.
struct Inputs {
  float* steps;
  const float *scale, *refused;
  const double *lr, *decay, *momentum, *freeze;
};

inline Inputs inputs_of(
    Tensor& steps, const Tensor& scale, const Tensor& lr, const Tensor& decay, const Tensor& momentum, const Tensor& freeze,
    const Tensor& refused) {
  for (const Tensor* number : {&lr, &decay, &momentum, &freeze})
    STD_TORCH_CHECK(number->scalar_type() == ScalarType::Double, "adamw: the rates must be float64, got another dtype; call the Python function.");
  auto exact = [](const Tensor& number) { return static_cast<const double*>(number.data_ptr()); };
  return {static_cast<float*>(steps.data_ptr()), static_cast<const float*>(scale.data_ptr()), static_cast<const float*>(refused.data_ptr()),
          exact(lr), exact(decay), exact(momentum), exact(freeze)};
}

// What a step needs of one parameter.
struct Numbers {
  float scale, decay, rate, root, share;  // share: of the new parameter in the teacher
  int moves;
};

// Also moves the parameter's step count.
PATCHLIGHT_HOST_DEVICE Numbers numbers_of(const Table& table, int tensor, const Inputs& in, const Betas& betas) {
  const int64_t flags = table.at(kFlags, tensor);
  Numbers n;
  n.moves = (flags & kWithGradient) && !((flags & kFrozen) && *in.freeze > 0);
  n.scale = in.scale[tensor];
  n.decay = flags & kDecayed ? float(1 - *in.lr * *in.decay) : 1.0f;
  n.share = float(1 - *in.momentum);
  n.rate = n.root = 0;
  if (n.moves) {
    const double step = double(in.steps[tensor] += 1);
    n.rate = float(*in.lr / -expm1(step * betas.log1));
    n.root = float(1 / sqrt(-expm1(step * betas.log2)));
  }
  return n;
}

// One value, its gradient and its moments.
PATCHLIGHT_HOST_DEVICE void move(float g, float& p, float& m, float& v, const Numbers& n, const Betas& betas) {
  g *= n.scale;
  m += (g - m) * betas.rest1;
  v = v * betas.beta2 + g * g * betas.rest2;
  p = p * n.decay - n.rate * (m / (sqrtf(v) * n.root + betas.eps));
}

// Exact where nothing or all of the teacher is new, as torch's lerp.
PATCHLIGHT_HOST_DEVICE float followed(float t, float p, float share) {
  return share < 0.5f ? t + share * (p - t) : p - (p - t) * (1 - share);
}

}  // namespace patchlight
