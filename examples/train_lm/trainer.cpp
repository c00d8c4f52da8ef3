#include "trainer.h"

#include <cmath>
#include <iomanip>
#include <numbers>
#include <sstream>
#include <utility>

#include "evaluation.h"
#include "metrics/device.h"

namespace train_lm {
namespace {

constexpr int64_t kMostSkipped = 3;   // in a row
constexpr int64_t kUntimedSteps = 3;  // the first ones: kernels are chosen, memory is asked for

}  // namespace

Trainer::Trainer(const Options& options, const TokenSource& data,
                 const anabranch::ParallelGroups& groups, LanguageModel model,
                 std::vector<anabranch::ParallelParameter> parameters,
                 anabranch::ParallelOptimizer& optimizer, const RunDirectory& directory)
    : options_(options),
      data_(data),
      groups_(groups),
      model_(model),
      optimizer_(optimizer),
      directory_(directory),
      stepper_(options, data, groups, model, std::move(parameters), optimizer) {}

bool Trainer::is_due(int64_t step, int64_t interval) const {
  return step == options_.training.steps || (interval > 0 && step % interval == 0);
}

bool Trainer::is_reported(int64_t step) const {
  return is_due(step, options_.log_interval) || is_due(step, options_.validation_interval);
}

bool Trainer::waits_for(int64_t step) const {
  return options_.device == "cpu" || in_a_row_ > 0 || step == options_.stop_at ||
         is_due(step, options_.validation_interval) || saves_after(step);
}

bool Trainer::saves_after(int64_t step) const {
  return !options_.no_save && is_due(step, options_.checkpoint_interval);
}

void Trainer::validate(StepRecord& record) {
  const double loss = validation_loss(model_, data_, options_, *groups_.world);
  record.validation_loss = loss;
  if (const auto bytes = data_.bytes_per_token()) {
    record.validation_bpb = loss / *bytes / std::numbers::ln2;
  }
}

void Trainer::report(StepRecord& record, Progress& progress) {
  const auto memory = static_cast<double>(peak_memory(torch::Device(options_.device)));
  const double milliseconds = 1e3 * head_seconds_ / static_cast<double>(head_sequences_);
  head_seconds_ = 0;
  head_sequences_ = 0;
  const auto all = groups_.world->all_gather(at::tensor({memory, milliseconds}, at::kDouble));
  record.memory = static_cast<int64_t>(all.select(1, 0).max().item<double>());
  const auto of_ranks = all.select(1, 1).contiguous();
  const auto* first = of_ranks.const_data_ptr<double>();
  record.rank_milliseconds.assign(first, first + of_ranks.numel());
  if (log_) {
    progress.say(log_->write(record, options_.training.steps) + "  " +
                 progress.time_left(record.step) + " left");
  }
}

StepCost Trainer::cost() const {
  const ModelOptions& model = options_.model;
  const auto gpu = name_of(torch::Device(options_.device));
  return {flops_per_token(*model_, model.top_k, model.layers * model.attention_width(),
                          options_.training.sequence_length),
          peak_flops_of(gpu, model.parameter_type())};
}

void Trainer::note_skipped(const StepResult& result) {
  in_a_row_ = result.record.skipped ? in_a_row_ + 1 : 0;
  outcome_.diverged = in_a_row_ == kMostSkipped;
  if (!result.record.skipped) {
    sound_.sequences += (result.record.step - sound_.step) * options_.training.batch_size;
    sound_.step = result.record.step;
  }
}

void Trainer::settle(Progress& progress) {
  StepResult result = stepper_.finish(std::move(under_way_.front()));
  under_way_.pop_front();
  note_skipped(result);
  outcome_.signal = result.signal;
  if (result.written) {
    finish_save();
  }
  StepRecord& record = outcome_.last = std::move(result.record);
  head_seconds_ += record.head_seconds;
  head_sequences_ += record.head_sequences;
  if (const auto remark = log_ ? log_->add(record) : ""; !remark.empty()) {
    progress.say(result.refusal.empty() ? remark : remark + "; " + result.refusal);
  }
  if (is_due(record.step, options_.validation_interval)) {
    end_stage_times(record.step, progress);
    validate(record);
  }
  record.run_seconds = seconds_before_ + run_time_.seconds();
  if (is_reported(record.step)) {
    report(record, progress);
  }
  progress.show(record.step, progress.time_left(record.step) + " left");
}

void Trainer::begin_stage_times(int64_t step) {
  if (options_.stage_times && step == first_step_ + kUntimedSteps) {
    model_->timeline().start(torch::Device(options_.device));
    for (auto& layer : model_->moe_layers()) layer->measure_stages();
  }
}

/// Of each layer with experts, what a step waits for other ranks' rows while it does nothing else.
std::string Trainer::exposed_exchange(double steps) {
  std::vector<double> milliseconds;
  for (auto& layer : model_->moe_layers()) {
    milliseconds.push_back(1e3 * layer->stage_seconds()["anabranch.exchange.exposed"] / steps);
    layer->measure_stages(false);
  }
  std::ostringstream line;
  line << "ms of a step that rows are waited for, layer by layer:" << std::fixed
       << std::setprecision(2);
  for (const double one : milliseconds) line << ' ' << one;
  return line.str();
}

void Trainer::end_stage_times(int64_t step, Progress& progress) {
  auto& timeline = model_->timeline();
  if (!timeline.is_on()) {
    return;
  }
  timeline.stop();
  const auto steps = static_cast<double>(step - first_step_ - kUntimedSteps);
  const double seconds = timeline.milliseconds() / steps / 1e3;
  const double per_rank =
      static_cast<double>(outcome_.last.tokens) / seconds / groups_.world->size();
  progress.say(timeline.table(steps));
  const std::string exposed = exposed_exchange(steps);
  if (groups_.expert_parallel->size() > 1) progress.say(exposed);
  progress.say(c10::str(std::llround(per_rank), " tokens/s, ",
                        std::llround(per_rank * cost().flops_per_token / 1e12),
                        " model TFLOP/s of each rank"));
}

bool Trainer::step_forward(RunState& state, Progress& progress) {
  begin_stage_times(state.step);
  const int64_t step = ++state.step;
  under_way_.push_back(stepper_.launch({step, state.sequences, options_.training.batch_size},
                                       /*with_norms=*/is_reported(step),
                                       /*written=*/saving_ && saving_->is_written()));
  state.sequences += options_.training.batch_size;
  const size_t kept = waits_for(state.step) ? 0 : 1;
  while (under_way_.size() > kept) {
    settle(progress);
  }
  return outcome_.signal == 0 && !outcome_.diverged && state.step != options_.stop_at;
}

void Trainer::save(const RunState& state) {
  finish_save();
  RunState saved = outcome_.diverged ? sound_ : state;
  saved.seconds = seconds_before_ + run_time_.seconds();
  if (options_.async_save) {
    saving_ = directory_.begin_save(saved, *model_, optimizer_, groups_);
  } else {
    directory_.save(saved, *model_, optimizer_, groups_);
  }
}

void Trainer::finish_save() {
  if (saving_) {
    saving_->finish();
    saving_.reset();
  }
}

Outcome Trainer::run(RunState state, Progress& progress) {
  if (groups_.world->rank() == 0) {
    log_.emplace(directory_.metrics(), state.step, cost());
  }
  sound_ = state;
  first_step_ = state.step;
  seconds_before_ = state.seconds;
  run_time_ = Stopwatch();
  bool goes_on = true;
  while (goes_on && state.step < options_.training.steps) {
    goes_on = step_forward(state, progress);
    while (!goes_on && !under_way_.empty()) {
      settle(progress);
    }
    if (saves_after(state.step) || (!goes_on && !options_.no_save)) {
      save(state);
    }
  }
  finish_save();
  outcome_.complete = state.step >= options_.training.steps && !outcome_.diverged;
  return outcome_;
}

}  // namespace train_lm
