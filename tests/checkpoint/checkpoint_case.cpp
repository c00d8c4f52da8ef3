#include "checkpoint/checkpoint_case.h"

#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using torch::optim::AdamWParamState;

const AdamWParamState* state_of_parameter(const Training& training, const torch::Tensor& tensor) {
  const auto& states = training.optimizer->state();
  const auto found = states.find(tensor.unsafeGetTensorImpl());
  return found == states.end() ? nullptr
                               : dynamic_cast<const AdamWParamState*>(found->second.get());
}

torch::Tensor whole_or_undefined(const Training& training, const std::string& name,
                                 const torch::Tensor& whole) {
  return whole.defined() ? training.model->part(name, whole) : whole;
}

}  // namespace

Training make_training(const ShardedModel::Options& options, const Communicator& expert_parallel,
                       uint64_t seed, bool amsgrad) {
  Training training{make_sharded_model(options, expert_parallel, seed), nullptr};
  std::vector<torch::Tensor> vectors;
  std::vector<torch::Tensor> matrices;
  for (const auto& parameter : parallel_parameters(*training.model)) {
    (parameter.tensor.dim() < 2 ? vectors : matrices).push_back(parameter.tensor);
  }
  using torch::optim::AdamWOptions;
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(vectors, std::make_unique<AdamWOptions>(AdamWOptions(0.01).weight_decay(0)));
  groups.emplace_back(matrices,
                      std::make_unique<AdamWOptions>(AdamWOptions(0.02).amsgrad(amsgrad)));
  training.optimizer = std::make_unique<torch::optim::AdamW>(groups);
  return training;
}

void train(Training& training, uint64_t seed, int count) {
  for (int step = 0; step < count; ++step) {
    training.model->set_gradients(seed + static_cast<uint64_t>(step));
    training.optimizer->step();
  }
}

void expect_part_of(const Training& actual, const Training& whole) {
  const auto parameters = whole.model->named_parameters();
  for (const auto& item : actual.model->named_parameters()) {
    SCOPED_TRACE(item.key());
    const auto& expected = parameters[item.key()];
    EXPECT_TRUE(identical(item.value(), actual.model->part(item.key(), expected)));
    const auto* state = state_of_parameter(actual, item.value());
    const auto* expected_state = state_of_parameter(whole, expected);
    ASSERT_EQ(state == nullptr, expected_state == nullptr);
    if (state == nullptr) continue;
    EXPECT_EQ(state->step(), expected_state->step());
    const auto expect_same = [&](const torch::Tensor& found, const torch::Tensor& wanted) {
      EXPECT_TRUE(identical(found, whole_or_undefined(actual, item.key(), wanted)));
    };
    expect_same(state->exp_avg(), expected_state->exp_avg());
    expect_same(state->exp_avg_sq(), expected_state->exp_avg_sq());
    expect_same(state->max_exp_avg_sq(), expected_state->max_exp_avg_sq());
  }
  const auto buffers = whole.model->named_buffers();
  for (const auto& item : actual.model->named_buffers()) {
    EXPECT_TRUE(identical(item.value(), buffers[item.key()])) << item.key();
  }
}

Snapshot::Snapshot(const Training& training) : training_(training) {
  for (const auto& tensor : tensors()) {
    before_.push_back(tensor.defined() ? tensor.detach().clone() : tensor);
  }
}

std::vector<torch::Tensor> Snapshot::tensors() const {
  auto all = training_.model->buffers();
  for (const auto& parameter : training_.model->parameters()) {
    all.push_back(parameter);
    const auto* state = state_of_parameter(training_, parameter);
    all.push_back(torch::scalar_tensor(state == nullptr ? -1 : state->step(), torch::kInt64));
    all.push_back(state == nullptr ? torch::Tensor() : state->exp_avg());
    all.push_back(state == nullptr ? torch::Tensor() : state->exp_avg_sq());
  }
  return all;
}

void Snapshot::expect_unchanged() const {
  const auto now = tensors();
  ASSERT_EQ(now.size(), before_.size());
  for (size_t i = 0; i < now.size(); ++i) EXPECT_TRUE(identical(now[i], before_[i]));
}

std::set<std::string> files_in(const std::filesystem::path& directory) {
  world()->barrier();
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    names.insert(entry.path().filename().string());
  }
  world()->barrier();
  return names;
}

}  // namespace anabranch::test
