#include "trainer.h"

#include <ATen/ATen.h>
#include <anabranch/gradients.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <numbers>
#include <utility>

#include "evaluation.h"
#include "interrupt.h"
#include "metrics_device.h"
#include "metrics_norms.h"
#include "optimizer.h"

namespace train_lm {
namespace {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

Trainer::Trainer(const Options& options, const TokenSource& data,
                 const anabranch::ParallelGroups& groups, LanguageModel model,
                 torch::optim::Optimizer& optimizer, const RunDirectory& directory)
    : options_(options),
      data_(data),
      groups_(groups),
      model_(std::move(model)),
      optimizer_(optimizer),
      directory_(directory),
      global_tokens_(static_cast<double>(options.training.batch_size) *
                     static_cast<double>(options.training.sequence_length)) {}

std::pair<StepRecord, int> Trainer::step(const BatchPosition& position) {
  const Stopwatch time;
  const Share share = share_of(position.size, groups_.world->rank(), groups_.world->size());
  StepRecord record;
  record.step = position.step;
  record.ranks = groups_.world->size();
  record.tokens = position.size * options_.training.sequence_length;
  const auto batch =
      Batch::of(data_.training_windows(position, share)).to(torch::Device(options_.device));
  record.data_seconds = time.seconds();
  const double loss_sum = backward(batch, record);
  if (is_reported(position.step)) {
    record.gradient_norms = gradient_norms(*model_, groups_);
  }
  update(record);
  const int signal = sum_over_ranks(loss_sum, record);
  if (!std::isfinite(record.loss)) {
    throw std::runtime_error(c10::str("the loss of step ", position.step, " is not finite"));
  }
  record.seconds = time.seconds();
  return {std::move(record), signal};
}

double Trainer::backward(const Batch& batch, StepRecord& record) {
  const TrainingOptions& training = options_.training;
  const ModelOutput output = model_(batch.inputs);
  const torch::Tensor loss_sum = summed_loss(output.logits, batch.targets);
  // finish_gradients takes the mean over ranks, whose shares differ: this makes that mean the one
  // over the global batch.
  const double scale = groups_.world->size() / global_tokens_;
  const torch::Tensor loss = loss_sum * scale + output.balance_loss * training.balance_loss +
                             output.z_loss * training.z_loss;
  loss.backward();
  anabranch::finish_gradients(*model_, groups_);

  const auto layers = static_cast<double>(options_.model.layers);
  record.balance_loss = output.balance_loss.item<double>() / layers;
  record.z_loss = output.z_loss.item<double>() / layers;
  record.expert_load = at::stack(output.expert_load).to(at::kCPU);
  return loss_sum.item<double>();
}

void Trainer::update(StepRecord& record) {
  const TrainingOptions& training = options_.training;
  record.gradient_norm = training.clip > 0
                             ? anabranch::clip_gradient_norm(*model_, training.clip, groups_)
                             : anabranch::gradient_norm(*model_, groups_);
  record.learning_rate = learning_rate_at(record.step, training);
  set_learning_rate(optimizer_, record.learning_rate);
  optimizer_.step();
  optimizer_.zero_grad();
}

int Trainer::sum_over_ranks(double loss_sum, StepRecord& record) {
  const int signal = pending_interrupt();
  const double ranks = groups_.world->size();
  // One message also carries whether some rank is to stop, so that all do after this step. The
  // auxiliary losses are the same on all ranks of an expert-parallel group.
  torch::Tensor shared =
      at::tensor({loss_sum / global_tokens_, record.balance_loss / ranks, record.z_loss / ranks,
                  signal == SIGINT ? 1.0 : 0.0, signal == SIGTERM ? 1.0 : 0.0},
                 at::kDouble);
  groups_.world->all_reduce(shared);
  groups_.expert_replicas->all_reduce(record.expert_load);
  const auto* sums = shared.const_data_ptr<double>();
  record.loss = sums[0];
  record.balance_loss = sums[1];
  record.z_loss = sums[2];
  return sums[3] > 0 ? SIGINT : sums[4] > 0 ? SIGTERM : 0;
}

bool Trainer::is_due(int64_t step, int64_t interval) const {
  return step == options_.training.steps || (interval > 0 && step % interval == 0);
}

bool Trainer::is_reported(int64_t step) const {
  return is_due(step, options_.log_interval) || is_due(step, options_.validation_interval);
}

void Trainer::validate(StepRecord& record) {
  const double loss = validation_loss(model_, data_, options_, *groups_.world);
  record.validation_loss = loss;
  if (const auto bytes = data_.bytes_per_token()) {
    record.validation_bpb = loss / *bytes / std::numbers::ln2;
  }
}

void Trainer::report(StepRecord& record, Progress& progress) {
  const auto mine = at::tensor({peak_memory(torch::Device(options_.device))}, at::kLong);
  record.memory = groups_.world->all_gather(mine).max().item<int64_t>();
  if (log_) {
    progress.say(log_->write(record, options_.training.steps) + "  " +
                 progress.time_left(record.step) + " left");
  }
}

StepCost Trainer::cost() const {
  const ModelOptions& model = options_.model;
  const auto gpu = name_of(torch::Device(options_.device));
  return {flops_per_token(*model_, model.top_k, model.layers * model.hidden,
                          options_.training.sequence_length),
          peak_flops_of(gpu, model_->parameters().front().scalar_type())};
}

Outcome Trainer::run(RunState state, Progress& progress) {
  const Stopwatch run_time;
  const double seconds_before = state.seconds;
  if (groups_.world->rank() == 0) {
    log_.emplace(directory_.metrics(), state.step, cost());
  }
  Outcome outcome;
  while (state.step < options_.training.steps) {
    auto [record, signal] = step({++state.step, state.sequences, options_.training.batch_size});
    state.sequences += options_.training.batch_size;
    if (const auto remark = log_ ? log_->add(record) : ""; !remark.empty()) {
      progress.say(remark);
    }
    const bool stop = signal != 0 || state.step == options_.stop_at;
    if (is_due(state.step, options_.validation_interval)) {
      validate(record);
    }
    record.run_seconds = state.seconds = seconds_before + run_time.seconds();
    if (is_reported(state.step)) {
      report(record, progress);
    }
    progress.show(state.step, progress.time_left(state.step) + " left");
    if (stop || is_due(state.step, options_.checkpoint_interval)) {
      directory_.save(state, *model_, optimizer_, groups_);
    }
    outcome.last = std::move(record);
    outcome.signal = signal;
    if (stop) {
      break;
    }
  }
  outcome.complete = state.step >= options_.training.steps;
  return outcome;
}

}  // namespace train_lm
