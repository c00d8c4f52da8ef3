#include "data.h"

#include <ATen/ATen.h>

#include <vector>

#include "random.h"
#include "require.h"

namespace train_lm {
namespace {

constexpr int64_t kHeldOutPart = 20;  // one in twenty

uint64_t fnv1a(const torch::Tensor& bytes) {
  const auto* data = bytes.const_data_ptr<uint8_t>();
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (int64_t i = 0; i < bytes.numel(); ++i) {
    hash = (hash ^ data[i]) * 0x100000001b3ULL;
  }
  return hash;
}

/// The sequences of `text` that start at `offsets`.
Batch gather(const torch::Tensor& text, const std::vector<int64_t>& offsets, int64_t length) {
  const auto batch_size = static_cast<int64_t>(offsets.size());
  torch::Tensor windows = at::empty({batch_size, length + 1}, at::kLong);
  for (int64_t i = 0; i < batch_size; ++i) {
    windows[i].copy_(text.narrow(0, offsets[static_cast<size_t>(i)], length + 1));
  }
  return {windows.narrow(1, 0, length).contiguous(), windows.narrow(1, 1, length).contiguous()};
}

}  // namespace

Text load_text(const std::filesystem::path& file, int64_t sequence_length) {
  std::error_code error;
  const auto size = static_cast<int64_t>(std::filesystem::file_size(file, error));
  require(!error, "--data ", file.string(), ": ", error.message());
  const int64_t held_out = size / kHeldOutPart;
  require(held_out > sequence_length, "--data ", file.string(), " has ", size,
          " bytes; at --sequence-length ", sequence_length, " at least ",
          (sequence_length + 1) * kHeldOutPart, " are needed");
  const torch::Tensor bytes = at::from_file(file.string(), /*shared=*/false, size, at::kByte);
  return {bytes.narrow(0, 0, size - held_out), bytes.narrow(0, size - held_out, held_out),
          fnv1a(bytes)};
}

Share share_of(int64_t items, int64_t rank, int64_t ranks) {
  const int64_t rest = items % ranks;
  return {rank * (items / ranks) + std::min(rank, rest), items / ranks + (rank < rest ? 1 : 0)};
}

Batch training_batch(const Text& text, int64_t batch_size, int64_t sequence_length, uint64_t seed,
                     int64_t step, const Share& share) {
  const torch::Tensor all =
      at::randint(text.training.size(0) - sequence_length, {batch_size},
                  make_generator(seed, Stream::kBatch, static_cast<uint64_t>(step)), at::kLong);
  const auto* first = all.const_data_ptr<int64_t>() + share.first;
  return gather(text.training, {first, first + share.count}, sequence_length);
}

Batch validation_batch(const Text& text, int64_t count, int64_t sequence_length,
                       const Share& share) {
  const int64_t last_offset = text.validation.size(0) - sequence_length - 1;
  std::vector<int64_t> offsets;
  for (int64_t i = share.first; i < share.first + share.count; ++i) {
    offsets.push_back(count > 1 ? last_offset * i / (count - 1) : 0);
  }
  return gather(text.validation, offsets, sequence_length);
}

}  // namespace train_lm
