#include "engine_agreement.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <anabranch/agreement.h>

#include "communicator/agreement.h"
#include "support/cuda/capture.h"

namespace anabranch {
namespace {

/// `counts`, or where they are of no rows `rows` spread evenly.
ExpertCounts or_evenly(const ExpertCounts& counts, int64_t rows) {
  if (counts.rows() > 0) {
    return counts;
  }
  const int64_t experts = counts.experts();
  std::vector<int64_t> even(experts, rows / experts);
  even.front() += rows % experts;
  return even;
}

/// Rows [P, h] of numbers as they are met: a GPU is faster with zeros.
torch::Tensor some_rows(const torch::Tensor& weight, int64_t rows) {
  const auto all = weight.flatten(0, 1);
  return all.index_select(0, at::arange(rows, all.options().dtype(torch::kLong)) % all.size(0));
}

void try_out(const FeedForward& expert, const Trial& trial, bool recompute, bool backward) {
  const auto& weight = trial.parameters.up.weight;
  const int64_t count = trial.counts.rows();
  const auto index =
      at::arange(count, weight.options().dtype(torch::kLong));  // as a layer's have one
  const IndexedRows rows = {some_rows(weight, count), index};
  const auto output = feed_forward(expert, rows, trial.parameters, trial.counts, !recompute);
  if (backward) {
    WantedGradients wanted;
    const auto& [up, down] = trial.main_grad;
    wanted.sums = {up.defined() ? at::zeros_like(up) : up,
                   down.defined() ? at::zeros_like(down) : down};
    feed_forward_backward(expert, rows, rows, output.hidden, /*values=*/{}, trial.parameters,
                          trial.counts, /*overwrite_hidden=*/true, wanted);
  }
}

}  // namespace

void settle_engine(const FeedForward& expert, const std::vector<Trial>& trials, bool recompute,
                   Communicator& communicator) {
  GroupedGemmEngine& engine = *expert.engine;
  const auto& weight = trials.front().parameters.up.weight;
  if (engine.is_settled() || communicator.size() == 1 || is_captured(weight.device())) {
    return;
  }
  const auto& own = trials.front().counts;
  const auto all = communicator.all_gather(at::tensor({own.rows(), own.experts()}, torch::kLong));
  const int64_t mean =
      (all.select(1, 0).sum().item<int64_t>() + communicator.size() - 1) / communicator.size();
  if (mean == 0) {
    return;
  }
  const auto chooses =
      all.select(1, 1).gt(0).nonzero()[0].item<int64_t>();  // the first with experts
  const bool backward = at::GradMode::is_enabled() || weight.requires_grad();
  succeed_together(communicator, [&] {
    if (communicator.rank() != chooses) return;
    const torch::NoGradGuard no_grad;
    try {
      for (const Trial& trial : trials) {
        try_out(expert, {trial.parameters, trial.main_grad, or_evenly(trial.counts, mean)},
                recompute, backward);
      }
    } catch (const c10::OutOfMemoryError&) {
      // What has not been tried is chosen by rule.
    }
  });
  engine.settle_on(all_gather_strings(communicator, engine.choices()).at(chooses));
}

}  // namespace anabranch
