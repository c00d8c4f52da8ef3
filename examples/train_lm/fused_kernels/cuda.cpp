#include <ATen/ATen.h>

#include "fused_kernels/kernels.h"
#include "fused_kernels/cuda.cuh"
#include "require.h"
#include "support/cuda/device.h"

namespace train_lm {
namespace {

cuda::HeadsShape shape_of(const torch::Tensor& qkv, const torch::Tensor& query_norm,
                          const HeadsOptions& options) {
  const auto norm = !query_norm.defined() ? cuda::HeadNorm::kNone
                    : options.norm_of_all ? cuda::HeadNorm::kAll
                                          : cuda::HeadNorm::kEach;
  return {qkv.size(0) * qkv.size(1),          qkv.size(1),
          static_cast<int>(options.heads),    static_cast<int>(options.key_heads),
          static_cast<int>(options.width),    norm,
          static_cast<float>(options.epsilon)};
}

const void* address_of(const torch::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

const float* angles_of(const torch::Tensor& rotation) {
  return reinterpret_cast<const float*>(rotation.const_data_ptr());
}

}  // namespace

Heads heads_of(const torch::Tensor& qkv, const torch::Tensor& query_norm,
               const torch::Tensor& key_norm, const torch::Tensor& rotation,
               const HeadsOptions& options) {
  const anabranch::OnDevice stream(qkv);
  const auto part = [&](int64_t heads) {
    return at::empty({qkv.size(0), qkv.size(1), heads, options.width}, qkv.options());
  };
  Heads heads{part(options.heads), part(options.key_heads)};
  cuda::launch_heads(shape_of(qkv, query_norm, options), qkv.const_data_ptr(),
                     address_of(query_norm), address_of(key_norm), angles_of(rotation),
                     heads.query.mutable_data_ptr(), heads.key.mutable_data_ptr(), stream);
  return heads;
}

HeadsGradient heads_backward(const torch::Tensor& dquery, const torch::Tensor& dkey,
                             const torch::Tensor& dvalue, const torch::Tensor& qkv,
                             const torch::Tensor& query_norm, const torch::Tensor& key_norm,
                             const torch::Tensor& rotation, const HeadsOptions& options) {
  const anabranch::OnDevice stream(qkv);
  const auto shape = shape_of(qkv, query_norm, options);
  HeadsGradient gradient{at::empty_like(qkv), {}, {}};
  torch::Tensor parts;  // [blocks, heads + key_heads, D]
  if (query_norm.defined()) {
    parts = at::empty({cuda::heads_blocks(shape), options.heads + options.key_heads, options.width},
                      qkv.options().dtype(at::kFloat));
  }
  cuda::launch_heads_backward(
      shape, dquery.contiguous().const_data_ptr(), dkey.contiguous().const_data_ptr(),
      dvalue.contiguous().const_data_ptr(), qkv.const_data_ptr(), address_of(query_norm),
      address_of(key_norm), angles_of(rotation), gradient.qkv.mutable_data_ptr(),
      parts.defined() ? parts.mutable_data_ptr<float>() : nullptr, stream);
  if (parts.defined()) {
    const auto sums = parts.sum(0);
    const auto of = [&](int64_t first, int64_t count) {
      const auto own = sums.narrow(0, first, count);
      return options.norm_of_all ? own.flatten() : own.sum(0);
    };
    gradient.query_norm = of(0, options.heads);
    gradient.key_norm = of(options.heads, options.key_heads);
  }
  return gradient;
}

torch::Tensor cross_entropy_of_rows(torch::Tensor& logits, const torch::Tensor& targets,
                                    double scale, bool with_gradient) {
  const anabranch::OnDevice stream(logits);
  auto losses = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  const auto wanted = targets.contiguous();
  cuda::launch_cross_entropy(logits.size(0), logits.size(1), logits.mutable_data_ptr(),
                             wanted.const_data_ptr<int64_t>(), static_cast<float>(scale),
                             with_gradient, losses.mutable_data_ptr<float>(), stream);
  return losses;
}

}  // namespace train_lm
