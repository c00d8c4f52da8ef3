#include "evaluation.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "model/loss.h"

namespace train_lm {

double validation_loss(LanguageModel& model, const TokenSource& data, const Options& options,
                       anabranch::Communicator& world) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const int64_t sequences = options.validation_sequences;
  const int64_t length = options.training.sequence_length;
  const torch::Device device(options.device);
  torch::Tensor sum = at::zeros({}, at::kDouble);
  // Every rank takes part in every piece, also where its share of it is empty.
  for (int64_t first = 0; first < sequences; first += options.training.batch_size) {
    const int64_t piece = std::min(options.training.batch_size, sequences - first);
    Share share = share_of(piece, world.rank(), world.size());
    share.first += first;
    const Batch batch = Batch::of(data.validation_windows(sequences, share)).to(device);
    const auto output = model(batch.inputs);
    const auto loss = cross_entropy(output.hidden, model->head(), batch.targets, 1);
    sum += loss.sum.to(at::kCPU, at::kDouble);
  }
  world.all_reduce(sum);
  model->train();
  return sum.item<double>() / static_cast<double>(sequences * length);
}

}  // namespace train_lm
