// The parts of LibTorch's stable ABI that every source file needs: a built library loads in every torch >= 2.11.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <tuple>

// The build that runs the CUDA kernels on a CPU registers the same functions in another namespace.
#ifndef PATCHLIGHT_NAMESPACE
#define PATCHLIGHT_NAMESPACE patchlight_native
#endif
#ifdef PATCHLIGHT_CPU_DEVICE
#define PATCHLIGHT_GPU CPU
#else
#define PATCHLIGHT_GPU CUDA
#endif

#define PATCHLIGHT_EXPAND_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define PATCHLIGHT_EXPAND_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define PATCHLIGHT_LIBRARY(m) PATCHLIGHT_EXPAND_LIBRARY(PATCHLIGHT_NAMESPACE, m)
#define PATCHLIGHT_IMPL(key, m) PATCHLIGHT_EXPAND_IMPL(PATCHLIGHT_NAMESPACE, key, m)

namespace patchlight {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Half = c10::Half;
using BFloat16 = c10::BFloat16;

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the element type T of a floating tensor.
template <class F>
void with_float_type(const Tensor& tensor, const char* op, F f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Half: return f(Type<Half>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    default: STD_TORCH_CHECK(false, op, ": the dtype must be float32, float16 or bfloat16, got another; cast the tensor.");
  }
}

}  // namespace patchlight
