#include "model/heads.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "fused_kernels/kernels.h"
#include "model/yarn.h"

namespace train_lm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

HeadsOptions options_of(const ModelOptions& model) {
  return {model.heads, model.key_heads(), model.head_width(), model.qk_norm == "all",
          model.norm_epsilon};
}

struct ModelHolder : torch::CustomClassHolder {
  explicit ModelHolder(HeadsOptions options) : options(options) {}
  HeadsOptions options;
};

torch::Tensor values_of(const torch::Tensor& qkv, const HeadsOptions& options) {
  return qkv.narrow(2, options.heads + options.key_heads, options.key_heads);
}

/// On a GPU, in one kernel. Norms that there are not are empty.
struct InOneKernel : torch::autograd::Function<InOneKernel> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& qkv,
                               const std::optional<torch::Tensor>& query_norm,
                               const std::optional<torch::Tensor>& key_norm,
                               const torch::Tensor& rotation,
                               const c10::intrusive_ptr<ModelHolder>& holder) {
    const auto query_weight = query_norm.value_or(torch::Tensor());
    const auto key_weight = key_norm.value_or(torch::Tensor());
    const auto [query, key] = heads_of(qkv, query_weight, key_weight, rotation, holder->options);
    context->save_for_backward({qkv, query_weight, key_weight, rotation});
    context->saved_data["options"] = torch::IValue::make_capsule(holder);
    return {query, key, values_of(qkv, holder->options)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const auto holder =
        c10::static_intrusive_pointer_cast<ModelHolder>(context->saved_data["options"].toCapsule());
    const auto& query_norm = saved[1];
    const auto& key_norm = saved[2];
    auto gradient = heads_backward(gradients[0], gradients[1], gradients[2], saved[0], query_norm,
                                   key_norm, saved[3], holder->options);
    if (query_norm.defined()) {
      gradient.query_norm = gradient.query_norm.to(query_norm.scalar_type());
      gradient.key_norm = gradient.key_norm.to(key_norm.scalar_type());
    }
    return {gradient.qkv, gradient.query_norm, gradient.key_norm, {}, {}};
  }
};

torch::Tensor normalized(const torch::Tensor& heads, const torch::Tensor& weight,
                         const HeadsOptions& options) {
  const auto x = options.norm_of_all ? heads.flatten(2) : heads;
  return at::rms_norm(x, weight.sizes(), weight, options.epsilon).view(heads.sizes());
}

}  // namespace

torch::Tensor rotate(const torch::Tensor& heads, const torch::Tensor& rotation) {
  const auto pairs = at::view_as_complex(
      heads.to(c10::toRealValueType(rotation.scalar_type())).unflatten(-1, {-1, 2}));
  return at::view_as_real(pairs * rotation).flatten(-2).to(heads.scalar_type());
}

torch::Tensor rotation_of(int64_t first, int64_t length, const ModelOptions& model,
                          torch::Device device) {
  const int64_t width = model.rotated_width();
  const auto type = model.parameter_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = at::TensorOptions(type).device(device);
  const auto positions = at::arange(first, first + length, options);
  const auto angles = at::outer(positions, frequencies_of(model, options));
  return at::polar(at::full_like(angles, rotation_scale(model)), angles)
      .view({length, 1, width / 2});
}

AttentionHeads attention_heads(const torch::Tensor& qkv, const torch::Tensor& query_norm,
                               const torch::Tensor& key_norm, const torch::Tensor& rotation,
                               const ModelOptions& model) {
  const auto options = options_of(model);
  const auto all = qkv.unflatten(-1, {-1, options.width});
  const bool of_kernel_width = options.width == 64 || options.width == 128 || options.width == 256;
  if (has_kernels_for(qkv) && of_kernel_width) {
    const auto given = [](const torch::Tensor& weight) {
      return weight.defined() ? std::optional(weight) : std::nullopt;
    };
    const auto parts = InOneKernel::apply(all, given(query_norm), given(key_norm), rotation,
                                          c10::make_intrusive<ModelHolder>(options));
    return {parts[0], parts[1], parts[2]};
  }
  const auto value = values_of(all, options);
  if (query_norm.defined()) {
    const auto query = all.narrow(2, 0, options.heads);
    const auto key = all.narrow(2, options.heads, options.key_heads);
    return {rotate(normalized(query, query_norm, options), rotation),
            rotate(normalized(key, key_norm, options), rotation), value};
  }
  const auto turned = rotate(all.narrow(2, 0, options.heads + options.key_heads), rotation);
  return {turned.narrow(2, 0, options.heads), turned.narrow(2, options.heads, options.key_heads),
          value};
}

}  // namespace train_lm
