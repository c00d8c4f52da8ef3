#include "metrics/cost.h"

#include <anabranch/parameters.h>

#include <array>

namespace train_lm {
namespace {

/// Dense TFLOP/s in bf16 and fp16, from NVIDIA's data sheets; tf32 has half of it. A name may be part of
/// a later one.
struct DataSheet {
  const char* name;  // a part of CUDA's
  double tera;
};
constexpr std::array kDataSheets = {
    DataSheet{"B200", 2250},     DataSheet{"H200 NVL", 835}, DataSheet{"H200", 989.4},
    DataSheet{"H100 PCIe", 756}, DataSheet{"H100 NVL", 835}, DataSheet{"H100", 989.4},
    DataSheet{"A100", 312},
};

}  // namespace

double flops_per_token(const torch::nn::Module& model, int64_t top_k, int64_t attention_width,
                       int64_t sequence_length) {
  double weights = 0;
  const bool tied = !model.named_parameters().contains("head");
  for (const auto& parameter : anabranch::parallel_parameters(model)) {
    const auto& tensor = parameter.tensor;
    if (parameter.is_expert && tensor.dim() == 3) {
      weights += static_cast<double>(tensor[0].numel() * top_k);
    } else if (tensor.dim() >= 2 && !parameter.is_expert &&
               (tied || parameter.name != "embedding")) {
      weights += static_cast<double>(tensor.numel());
    }
  }
  return 6 * (weights + static_cast<double>(attention_width * sequence_length));
}

std::optional<double> peak_flops_of(const std::string& gpu, torch::Dtype dtype) {
  if (dtype == at::kDouble) {
    return std::nullopt;
  }
  for (const auto& sheet : kDataSheets) {
    if (gpu.find(sheet.name) != std::string::npos) {
      return sheet.tera * 1e12 / (dtype == at::kFloat ? 2 : 1);
    }
  }
  return std::nullopt;
}

}  // namespace train_lm
