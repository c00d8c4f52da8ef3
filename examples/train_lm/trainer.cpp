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

std::pair<Metrics, int> Trainer::step(const BatchPosition& position) {
  const Share share = share_of(position.size, groups_.world->rank(), groups_.world->size());
  Metrics metrics;
  metrics.step = position.step;
  metrics.ranks = groups_.world->size();
  const double loss_sum = backward(
      Batch::of(data_.training_windows(position, share)).to(torch::Device(options_.device)),
      metrics);
  update(metrics);
  const int signal = sum_over_ranks(loss_sum, metrics);
  if (!std::isfinite(metrics.loss)) {
    throw std::runtime_error(c10::str("the loss of step ", position.step, " is not finite"));
  }
  return {std::move(metrics), signal};
}

double Trainer::backward(const Batch& batch, Metrics& metrics) {
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
  metrics.balance_loss = output.balance_loss.item<double>() / layers;
  metrics.z_loss = output.z_loss.item<double>() / layers;
  metrics.expert_load = at::stack(output.expert_load).to(at::kCPU);
  return loss_sum.item<double>();
}

void Trainer::update(Metrics& metrics) {
  const TrainingOptions& training = options_.training;
  metrics.gradient_norm = training.clip > 0
                              ? anabranch::clip_gradient_norm(*model_, training.clip, groups_)
                              : anabranch::gradient_norm(*model_, groups_);
  metrics.learning_rate = learning_rate_at(metrics.step, training);
  set_learning_rate(optimizer_, metrics.learning_rate);
  optimizer_.step();
  optimizer_.zero_grad();
}

int Trainer::sum_over_ranks(double loss_sum, Metrics& metrics) {
  const int signal = pending_interrupt();
  const double ranks = groups_.world->size();
  // One message also carries whether some rank is to stop, so that all do after this step. The
  // auxiliary losses are the same on all ranks of an expert-parallel group.
  torch::Tensor shared =
      at::tensor({loss_sum / global_tokens_, metrics.balance_loss / ranks, metrics.z_loss / ranks,
                  signal == SIGINT ? 1.0 : 0.0, signal == SIGTERM ? 1.0 : 0.0},
                 at::kDouble);
  groups_.world->all_reduce(shared);
  groups_.expert_replicas->all_reduce(metrics.expert_load);
  const auto* sums = shared.const_data_ptr<double>();
  metrics.loss = sums[0];
  metrics.balance_loss = sums[1];
  metrics.z_loss = sums[2];
  return sums[3] > 0 ? SIGINT : sums[4] > 0 ? SIGTERM : 0;
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
  double tokens = 0, seconds = 0;  // since the last line of metrics
  Outcome outcome;
  while (state.step < options_.training.steps) {
    const Stopwatch step_time;
    auto [metrics, signal] = step({++state.step, state.sequences, options_.training.batch_size});
    state.sequences += options_.training.batch_size;
    tokens += global_tokens_;
    seconds += step_time.seconds();
    metrics.tokens_per_second = tokens / seconds;
    const bool stop = signal != 0 || state.step == options_.stop_at;
    if (is_due(state.step, options_.validation_interval)) {
      const double loss = validation_loss(model_, data_, options_, *groups_.world);
      metrics.validation_loss = loss;
      if (const auto bytes = data_.bytes_per_token()) {
        metrics.validation_bpb = loss / *bytes / std::numbers::ln2;
      }
    }
    metrics.seconds = state.seconds = seconds_before + run_time.seconds();
    if (metrics.validation_loss || is_due(state.step, options_.log_interval)) {
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
