#include "sample.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <sstream>
#include <vector>

#include "data/random.h"
#include "require.h"

namespace train_lm {
namespace {

using Tokens = std::vector<int64_t>;

bool has_bytes(const Options& options) { return options.model.vocabulary == 256; }

Tokens tokens_of_prompt(const Options& options) {
  const std::string& prompt = options.sample.prompt;
  if (has_bytes(options)) {
    const std::string text = prompt.empty() ? "In the beginning " : prompt;
    Tokens tokens;
    for (const unsigned char byte : text) tokens.push_back(byte);
    return tokens;
  }
  Tokens tokens;
  std::istringstream words(prompt.empty() ? "0" : prompt);
  for (int64_t token = 0; words >> token;) tokens.push_back(token);
  require(words.eof() && !tokens.empty(), "--prompt ", prompt,
          ": expected the numbers of tokens, since the vocabulary is not that of bytes");
  return tokens;
}

std::string text_of(const Tokens& tokens, const Options& options) {
  std::string text;
  for (const int64_t token : tokens) {
    if (has_bytes(options)) {
      text.push_back(static_cast<char>(token));
    } else {
      if (!text.empty()) text.push_back(' ');
      text += std::to_string(token);
    }
  }
  return text;
}

/// Probabilities without those beyond the nucleus: the likeliest tokens that have `top_p` together.
torch::Tensor nucleus(const torch::Tensor& probabilities, double top_p) {
  const auto [sorted, order] = probabilities.sort(/*dim=*/0, /*descending=*/true);
  // A token is in it if those before it do not have as much already.
  const auto kept = sorted * (sorted.cumsum(0) - sorted < top_p);
  return at::zeros_like(probabilities).scatter_(0, order, kept);
}

/// By `logits` [V] of any device.
int64_t draw(const torch::Tensor& logits, const SampleOptions& sample, at::Generator& generator) {
  const auto last = logits.to(at::kCPU, at::kDouble);
  if (sample.temperature == 0) {
    return last.argmax().item<int64_t>();
  }
  auto probabilities = at::softmax(last / sample.temperature, 0);
  if (sample.top_p < 1) {
    probabilities = nucleus(probabilities, sample.top_p);
  }
  return at::multinomial(probabilities, 1, /*replacement=*/false, generator).item<int64_t>();
}

/// [1, S] the last `count` tokens, or as many as there are.
torch::Tensor last_of(const Tokens& tokens, int64_t count, torch::Device device) {
  const auto length = std::min(static_cast<int64_t>(tokens.size()), count);
  const Tokens last(tokens.end() - length, tokens.end());
  return at::tensor(last, at::kLong).view({1, length}).to(device);
}

}  // namespace

void check_prompt(const Options& options) {
  for (const int64_t token : tokens_of_prompt(options)) {
    require(token >= 0 && token < options.model.vocabulary, "--prompt has token ", token,
            ", the vocabulary is ", options.model.vocabulary);
  }
}

std::string sample_text(LanguageModel& model, const Options& options, int64_t context,
                        anabranch::Communicator& world) {
  const torch::NoGradGuard no_grad;
  model->eval();
  const torch::Device device(options.device);
  const torch::Tensor no_tokens = at::empty({0, 1}, at::TensorOptions(at::kLong).device(device));
  auto generator = make_generator(options.training.seed, Stream::kSample, 0);
  std::vector<AttentionCache> caches(static_cast<size_t>(options.model.layers));
  Tokens tokens = world.rank() == 0 ? tokens_of_prompt(options) : Tokens{};
  for (int64_t i = 0; i < options.sample.length; ++i) {
    if (world.rank() != 0) {
      model(no_tokens);
      continue;
    }
    const auto all = static_cast<int64_t>(tokens.size());
    const int64_t seen = context > 0 ? context : i == 0 ? all : 1;
    const auto output = model(last_of(tokens, seen, device), context > 0 ? nullptr : &caches);
    const auto logits = at::linear(output.hidden, model->head()).select(1, -1).squeeze(0);
    tokens.push_back(draw(logits, options.sample, generator));
  }
  model->train();
  return text_of(tokens, options);
}

}  // namespace train_lm
