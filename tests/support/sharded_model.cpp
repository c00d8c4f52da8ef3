#include "support/sharded_model.h"

#include <torch/nn/modules/container/moduledict.h>

namespace anabranch::test {
namespace {

MoEOptions expert_options(const ShardedModel::Options& options, int64_t num_experts) {
  MoEOptions moe;
  moe.hidden_size = options.hidden_size;
  moe.expert_hidden_size = 4;
  moe.num_experts = num_experts;
  moe.dtype = options.dtype;
  moe.device = options.device;
  moe.bias = num_experts > 1;
  moe.glu = num_experts > 1;
  return moe;
}

}  // namespace

ShardedModel::ShardedModel(const Options& options, int64_t ranks, int64_t rank, uint64_t seed) {
  const auto add_experts = [&](torch::nn::Module& parent, const char* name, int64_t count,
                               bool sharded) {
    const ExpertPlacement placement{count, sharded ? ranks : 1};
    return parent.register_module(
        name, Experts(expert_options(options, count), placement, sharded ? rank : 0, sharded));
  };
  const auto tensor_options = torch::TensorOptions(options.dtype).device(options.device);
  auto gate = register_parameter(
      "gate", torch::zeros({options.num_experts, options.hidden_size}, tensor_options));
  register_parameter("frozen", torch::zeros({7}, tensor_options), /*requires_grad=*/false);
  experts_ = add_experts(*this, "experts", options.num_experts, true);
  add_experts(*this, "shared_expert", 1, false);
  auto block = register_module("block", std::make_shared<torch::nn::Module>());
  block->register_parameter("bias", torch::zeros({}, tensor_options));
  single_expert_ = add_experts(*block, "experts", 1, true);
  block->register_parameter("tied", gate);
  register_buffer("table", torch::zeros({3}, tensor_options.dtype(torch::kInt64)));
  block->register_buffer("mask", torch::zeros({2, 2}, tensor_options.dtype(torch::kBool)));
  fill(seed);
}

const ExpertsImpl* ShardedModel::experts_of(const std::string& name) const {
  if (name.starts_with("experts.")) return experts_.get();
  if (name.starts_with("block.experts.")) return single_expert_.get();
  return nullptr;
}

std::vector<int64_t> ShardedModel::whole_sizes(const std::string& name,
                                               const torch::Tensor& parameter) const {
  auto sizes = parameter.sizes().vec();
  if (const auto* experts = experts_of(name)) sizes.front() = experts->num_experts();
  return sizes;
}

torch::Tensor ShardedModel::part(const std::string& name, const torch::Tensor& whole) const {
  const auto* experts = experts_of(name);
  if (experts == nullptr) return whole;
  return whole.narrow(0, experts->first_place(), experts->up_weight.size(0));
}

void ShardedModel::fill(uint64_t seed) {
  const torch::NoGradGuard no_grad;
  Random random(seed);
  for (auto& item : named_parameters()) {
    const auto whole = random.normal(whole_sizes(item.key(), item.value()));
    item.value().copy_(part(item.key(), whole));
  }
  for (auto& buffer : named_buffers()) {
    const auto drawn = torch::empty(buffer.value().sizes(), buffer.value().scalar_type());
    buffer.value().copy_(drawn.random_(0, 2, at::detail::createCPUGenerator(random.next())));
  }
}

void ShardedModel::set_gradients(uint64_t seed, bool holes) {
  const torch::NoGradGuard no_grad;
  Random random(seed);
  for (auto& item : named_parameters()) {
    auto& parameter = item.value();
    const auto whole = random.normal(whole_sizes(item.key(), parameter), parameter.scalar_type());
    const bool hole = random.chance(0.3) && holes;
    if (!parameter.requires_grad()) continue;
    parameter.mutable_grad() =
        hole ? torch::Tensor() : part(item.key(), whole).to(parameter.device()).clone();
  }
}

std::shared_ptr<ShardedModel> make_sharded_model(const ShardedModel::Options& options,
                                                 const Communicator& expert_parallel,
                                                 uint64_t seed) {
  return std::make_shared<ShardedModel>(options, expert_parallel.size(), expert_parallel.rank(),
                                        seed);
}

std::shared_ptr<ShardedModel> make_whole_model(const ShardedModel::Options& options,
                                               uint64_t seed) {
  return std::make_shared<ShardedModel>(options, 1, 0, seed);
}

}  // namespace anabranch::test
