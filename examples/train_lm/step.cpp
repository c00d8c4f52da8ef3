#include "step.h"

#include <ATen/ATen.h>
#include <anabranch/error.h>
#include <anabranch/gradients.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <limits>
#include <utility>

#include "data/random.h"
#include "interrupt.h"
#include "model/loss.h"
#include "metrics/norms.h"
#include "optimizer.h"

namespace train_lm {
namespace {

/// Its values on the host, once the device's stream has come there.
torch::Tensor to_host(const torch::Tensor& tensor) {
  if (tensor.is_cpu()) {
    return tensor;
  }
  auto host = at::empty(tensor.sizes(), at::TensorOptions(tensor.dtype()).pinned_memory(true));
  return host.copy_(tensor, /*non_blocking=*/true);
}

torch::Tensor to_device(const torch::Tensor& tensor, torch::Device device) {
  return device.is_cpu() ? tensor : tensor.pin_memory().to(device, /*non_blocking=*/true);
}

}  // namespace

Stepper::Stepper(const Options& options, const TokenSource& data,
                 const anabranch::ParallelGroups& groups, LanguageModel model,
                 std::vector<anabranch::ParallelParameter> parameters,
                 anabranch::ParallelOptimizer& optimizer)
    : options_(options),
      data_(data),
      groups_(groups),
      model_(std::move(model)),
      parameters_(std::move(parameters)),
      optimizer_(optimizer),
      device_(options.device),
      global_tokens_(static_cast<double>(options.training.batch_size) *
                     static_cast<double>(options.training.sequence_length)) {
  if (options.move_experts > 0) {
    mover_.emplace(*model_, optimizer, groups,
                   anabranch::ExpertMoverOptions{.interval = options.move_experts});
  }
}

LaunchedStep Stepper::launch(const BatchPosition& position, bool with_norms, bool written) {
  const auto start = std::chrono::steady_clock::now();
  const Share share = share_of(position.size, groups_.world->rank(), groups_.world->size());
  LaunchedStep step{.begin = Moment(device_)};
  step.record.step = position.step;
  step.record.ranks = groups_.world->size();
  step.record.learning_rate = learning_rate_at(position.step, options_.training);
  const auto windows = to_device(data_.training_windows(position, share), device_);
  step.record.tokens = position.size * options_.training.sequence_length;
  step.record.data_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  step.record.head_sequences = windows.size(0);
  model_->timeline().mark("data");
  Sums sums = gradients_of_batch(windows, routing_seed(position.step), step.refusal);
  step.heads = std::move(sums.heads);
  const auto norm = update(step, with_norms);
  groups_.expert_replicas->all_reduce(sums.load);
  model_->update_expert_biases(sums.load, *groups_.world);
  if (mover_ && mover_->after_step(sums.load)) {
    step.record.moves = mover_->moves();
  }
  step.load = to_host(sums.load);
  step.numbers = to_host(shared_numbers(sums, norm, written));
  step.end.emplace(device_);
  model_->timeline().mark("metrics");
  return step;
}

uint64_t Stepper::routing_seed(int64_t step) const {
  const auto of_step =
      mixed_seed(options_.training.seed, Stream::kRouting, static_cast<uint64_t>(step));
  return mixed_seed(of_step, Stream::kRouting, static_cast<uint64_t>(groups_.world->rank()));
}

Stepper::Sums Stepper::gradients_of_batch(const torch::Tensor& windows, uint64_t seed,
                                          std::string& refusal) {
  // A GPU alone may hear only now that an earlier step's routing was refused.
  const int tries = groups_.world->size() == 1 && !device_.is_cpu() ? 2 : 1;
  for (int i = 0; i < tries; ++i) {
    try {
      return forward_and_backward(windows, seed);
    } catch (const anabranch::InputError& error) {
      refusal = error.what();
      zero_gradients(parameters_);
    }
  }
  // Every rank of the group comes here, others do not: all hear of it by the gradients' sums.
  const at::NoGradGuard no_grad;
  anabranch::gradients_of(parameters_)
      .replicated.front()
      .fill_(std::numeric_limits<double>::quiet_NaN());
  const auto options = at::TensorOptions(at::kDouble).device(device_);
  const auto nothing = at::full({}, std::numeric_limits<double>::quiet_NaN(), options);
  return {
      nothing, nothing, nothing,
      at::zeros({options_.model.moe_layers(), options_.model.experts}, options.dtype(at::kLong))};
}

Stepper::Sums Stepper::forward_and_backward(const torch::Tensor& windows, uint64_t seed) {
  const int64_t most = share_of(options_.training.batch_size, 0, groups_.world->size()).count;
  const int64_t size = options_.micro_batch > 0 ? options_.micro_batch : std::max<int64_t>(most, 1);
  const int64_t pieces = std::max<int64_t>((most + size - 1) / size, 1);  // on every rank
  Sums sums;
  model_->begin_step(groups_.expert_replicas);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = std::min(piece * size, windows.size(0));
    const int64_t count = std::min(size, windows.size(0) - first);
    model_->seed_routers(mixed_seed(seed, Stream::kRouting, static_cast<uint64_t>(piece)));
    add_micro_batch(windows.narrow(0, first, count), pieces, sums);
  }
  return sums;
}

void Stepper::add_micro_batch(const torch::Tensor& windows, int64_t pieces, Sums& sums) {
  const TrainingOptions& training = options_.training;
  const Batch batch = Batch::of(windows);
  const ModelOutput output = model_(batch.inputs);
  // finish_gradients takes the mean over ranks, whose shares differ: this makes that mean the one
  // over the global batch.
  const double scale = groups_.world->size() / global_tokens_;
  Moment before(device_);
  const TokenLoss loss = cross_entropy(output.hidden, model_->head(), batch.targets, scale);
  sums.heads.emplace_back(std::move(before), Moment(device_));
  const auto parts = static_cast<double>(pieces);
  torch::Tensor total = loss.scaled + output.balance_loss * (training.balance_loss / parts) +
                        output.z_loss * (training.z_loss / parts);
  if (output.further_losses.defined()) total = total + output.further_losses / parts;
  model_->timeline().mark("head and loss");
  total.backward();
  anabranch::accumulate_gradients(parameters_);
  model_->timeline().mark("embedding, backward");

  const at::NoGradGuard no_grad;
  const double layers = static_cast<double>(options_.model.moe_layers()) * parts;
  const auto add = [](torch::Tensor& sum, const torch::Tensor& value) {
    sum = sum.defined() ? sum + value : value;
  };
  add(sums.loss, loss.sum.to(at::kDouble));
  add(sums.balance_loss, output.balance_loss.detach().to(at::kDouble) / layers);
  add(sums.z_loss, output.z_loss.detach().to(at::kDouble) / layers);
  add(sums.load, at::stack(output.expert_load));
}

torch::Tensor Stepper::update(LaunchedStep& step, bool with_norms) {
  auto& timeline = model_->timeline();
  const auto gradients = anabranch::gradients_of(parameters_);
  if (groups_.world->size() > 1) {
    Moment before(device_);
    anabranch::finish_gradients(gradients, *groups_.world, *groups_.expert_replicas);
    step.summing.emplace(std::move(before), Moment(device_));
    timeline.mark("gradients between ranks");
  }
  const auto [norm, scale] = anabranch::gradient_scale(
      gradients, options_.training.clip, *groups_.world, groups_.expert_parallel->size());
  if (with_norms) {
    step.record.gradient_norms = gradient_norms(parameters_, groups_);
  }
  timeline.mark("gradient norm");
  optimizer_.step(step.record.learning_rate, scale);
  timeline.mark("optimizer");
  anabranch::zero_gradients(parameters_);
  timeline.mark("zero gradients");
  return norm;
}

torch::Tensor Stepper::shared_numbers(const Sums& sums, const torch::Tensor& norm, bool written) {
  const int signal = pending_interrupt();
  const double ranks = groups_.world->size();
  const auto options = at::TensorOptions(at::kDouble).device(device_);
  const auto flag = [&](bool value) { return at::full({}, value ? 1.0 : 0.0, options); };
  // One message also carries whether some rank is to stop, so that all do after this step, and how many
  // have written their part of a checkpoint, so that all complete it. The auxiliary losses are the same on all ranks of an expert-parallel group.
  torch::Tensor shared =
      at::stack({sums.loss / global_tokens_, sums.balance_loss / ranks, sums.z_loss / ranks,
                 flag(signal == SIGINT), flag(signal == SIGTERM), flag(written)});
  groups_.world->all_reduce(shared);
  return at::cat({shared, norm.view(1)});
}

StepResult Stepper::finish(LaunchedStep step) {
  step.end->wait();
  groups_.world->check();
  const auto* numbers = step.numbers.const_data_ptr<double>();
  StepResult result{std::move(step.record), 0, false, std::move(step.refusal)};
  result.record.seconds = step.begin.seconds_until(*step.end);
  for (const auto& [begin, end] : step.heads) {
    result.record.head_seconds += begin.seconds_until(end);
  }
  if (step.summing) {
    result.record.exposed_communication_seconds =
        step.summing->first.seconds_until(step.summing->second);
  }
  result.record.loss = numbers[0];
  result.record.balance_loss = numbers[1];
  result.record.z_loss = numbers[2];
  result.written = numbers[5] == groups_.world->size();
  result.record.gradient_norm = numbers[6];
  result.record.skipped = !std::isfinite(numbers[6]);
  result.record.expert_load = step.load;
  result.signal = numbers[3] > 0 ? SIGINT : numbers[4] > 0 ? SIGTERM : 0;
  return result;
}

}  // namespace train_lm
