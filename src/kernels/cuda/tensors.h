#pragma once

#include <anabranch/options.h>
#include <torch/types.h>

#include "kernels/cuda/launch.h"
#include "support/check.h"
#include "support/cuda/device.h"

// Between tensors and the launchers' raw pointers.

namespace anabranch::cuda {

inline Scalar scalar_of(const torch::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::kFloat32:
      return Scalar::kFloat;
    case torch::kFloat64:
      return Scalar::kDouble;
    case torch::kBFloat16:
      return Scalar::kBFloat16;
    case torch::kFloat16:
      return Scalar::kHalf;
    default:
      throw InputError(
          c10::str("CUDA kernels take fp32, fp64, bf16 and fp16, not ", tensor.scalar_type()));
  }
}

/// The type in which sums of `tensor` are taken: fp64 for fp64, fp32 otherwise.
inline torch::TensorOptions accumulate_options(const torch::Tensor& tensor) {
  const bool is_double = tensor.scalar_type() == torch::kFloat64;
  return tensor.options().dtype(is_double ? torch::kFloat64 : torch::kFloat32);
}

/// Null for an undefined tensor.
inline const void* address_or_null(const torch::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

inline ActivationKind kind_of(Activation activation) {
  switch (activation) {
    case Activation::kGeluTanh:
      return ActivationKind::kGeluTanh;
    case Activation::kGelu:
      return ActivationKind::kGelu;
    case Activation::kRelu:
      return ActivationKind::kRelu;
    case Activation::kSilu:
      return ActivationKind::kSilu;
    case Activation::kReluSquared:
      return ActivationKind::kReluSquared;
    case Activation::kQuickGelu:
      return ActivationKind::kQuickGelu;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

}  // namespace anabranch::cuda
