#include "sample.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "random.h"

namespace train_lm {
namespace {

/// [1, S] the last bytes of `text`, at most a sequence of them.
torch::Tensor context_of(const std::string& text, int64_t sequence_length) {
  const int64_t length = std::min(static_cast<int64_t>(text.size()), sequence_length);
  const torch::Tensor tokens = at::empty({1, length}, at::kLong);
  auto* data = tokens.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < length; ++i) {
    data[i] = static_cast<unsigned char>(text[text.size() - static_cast<size_t>(length - i)]);
  }
  return tokens;
}

}  // namespace

std::string sample_text(LanguageModel& model, const Options& options,
                        anabranch::Communicator& world) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const torch::Device device(options.device);
  const torch::Tensor no_tokens = at::empty({0, 1}, at::TensorOptions(at::kLong).device(device));
  auto generator = make_generator(options.training.seed, Stream::kSample, 0);
  std::string text = world.rank() == 0 ? options.sample.prompt : "";
  for (int64_t i = 0; i < options.sample.length; ++i) {
    if (world.rank() != 0) {
      model(no_tokens);
      continue;
    }
    const auto hidden = model(context_of(text, options.training.sequence_length).to(device)).hidden;
    const auto logits = at::linear(hidden, model->head());
    const auto last = logits.select(1, -1).squeeze(0).to(at::kCPU, at::kDouble);
    const auto probabilities = at::softmax(last / options.sample.temperature, 0);
    const auto drawn = at::multinomial(probabilities, 1, /*replacement=*/false, generator);
    text.push_back(static_cast<char>(drawn.item<int64_t>()));
  }
  model->train();
  return text;
}

}  // namespace train_lm
