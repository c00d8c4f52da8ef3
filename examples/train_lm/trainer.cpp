#include "trainer.h"

#include <ATen/ATen.h>
#include <anabranch/gradients.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <utility>

#include "evaluation.h"
#include "interrupt.h"
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

Trainer::Trainer(const Options& options, const Text& text, const anabranch::ParallelGroups& groups,
                 LanguageModel model, torch::optim::Optimizer& optimizer,
                 const RunDirectory& directory)
    : options_(options),
      text_(text),
      groups_(groups),
      model_(std::move(model)),
      optimizer_(optimizer),
      directory_(directory) {}

Trainer::StepResult Trainer::step(int64_t step) {
  const TrainingOptions& training = options_.training;
  anabranch::Communicator& world = *groups_.world;
  const Batch batch =
      training_batch(text_, training.batch_size, training.sequence_length, training.seed, step,
                     share_of(training.batch_size, world.rank(), world.size()));
  const ModelOutput output = model_(batch.inputs);

  // finish_gradients takes the mean over ranks, whose shares differ: this makes that mean the one
  // over the global batch.
  const torch::Tensor loss_sum = summed_loss(output.logits, batch.targets);
  const auto global_tokens = static_cast<double>(training.batch_size * training.sequence_length);
  const torch::Tensor loss = loss_sum * (world.size() / global_tokens) +
                             output.balance_loss * training.balance_loss +
                             output.z_loss * training.z_loss;
  loss.backward();
  anabranch::finish_gradients(*model_, groups_);

  Metrics metrics;
  metrics.gradient_norm = training.clip > 0
                              ? anabranch::clip_gradient_norm(*model_, training.clip, groups_)
                              : anabranch::gradient_norm(*model_, groups_);
  metrics.learning_rate = learning_rate_at(step, training);
  set_learning_rate(optimizer_, metrics.learning_rate);
  optimizer_.step();
  optimizer_.zero_grad();

  // One message carries the loss and whether some rank is to stop, so that all do after this step.
  const int signal = pending_interrupt();
  torch::Tensor shared = at::tensor(
      {loss_sum.item<double>(), signal == SIGINT ? 1.0 : 0.0, signal == SIGTERM ? 1.0 : 0.0},
      at::kDouble);
  world.all_reduce(shared);
  const auto* sums = shared.const_data_ptr<double>();
  const auto layers = static_cast<double>(options_.model.layers);
  metrics.step = step;
  metrics.ranks = world.size();
  metrics.loss = sums[0] / global_tokens;
  metrics.balance_loss = output.balance_loss.item<double>() / layers;
  metrics.z_loss = output.z_loss.item<double>() / layers;
  metrics.expert_load = output.expert_load;
  if (!std::isfinite(metrics.loss)) {
    throw std::runtime_error(c10::str("the loss of step ", step, " is not finite"));
  }
  return {metrics, sums[1] > 0 ? SIGINT : sums[2] > 0 ? SIGTERM : 0};
}

bool Trainer::is_due(int64_t step, int64_t interval) const {
  return step == options_.training.steps || (interval > 0 && step % interval == 0);
}

void Trainer::report(const Metrics& metrics, Progress& progress) {
  if (metrics_file_) {
    metrics_file_->write(metrics);
  }
  progress.say(to_line(metrics, options_.training.steps) + "  " + progress.time_left(metrics.step) +
               " left");
}

Outcome Trainer::run(RunState state, Progress& progress) {
  const Stopwatch run_time;
  const double seconds_before = state.seconds;
  if (groups_.world->rank() == 0) {
    metrics_file_.emplace(directory_.metrics(), state.step);
  }
  const auto step_tokens =
      static_cast<double>(options_.training.batch_size * options_.training.sequence_length);
  double tokens = 0, seconds = 0;  // since the last line of metrics
  Outcome outcome;
  while (state.step < options_.training.steps) {
    const Stopwatch step_time;
    auto [metrics, signal] = step(++state.step);
    tokens += step_tokens;
    seconds += step_time.seconds();
    metrics.tokens_per_second = tokens / seconds;
    const bool stop = signal != 0 || state.step == options_.stop_at;
    if (is_due(state.step, options_.validation_interval)) {
      metrics.validation_bpb = validation_bits_per_byte(model_, text_, options_, *groups_.world);
    }
    metrics.seconds = state.seconds = seconds_before + run_time.seconds();
    if (metrics.validation_bpb || is_due(state.step, options_.log_interval)) {
      report(metrics, progress);
      tokens = seconds = 0;
    }
    progress.show(state.step, progress.time_left(state.step) + " left");
    if (stop || is_due(state.step, options_.checkpoint_interval)) {
      directory_.save(state, *model_, optimizer_, groups_);
    }
    outcome.last = std::move(metrics);
    outcome.signal = signal;
    if (stop) {
      break;
    }
  }
  outcome.complete = state.step >= options_.training.steps;
  return outcome;
}

}  // namespace train_lm
