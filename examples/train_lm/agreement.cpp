#include "agreement.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace train_lm {
namespace {

constexpr size_t kMessageBytes = 2048;

}  // namespace

void together(anabranch::Communicator& world, const std::function<void()>& work) {
  torch::Tensor message = at::zeros({kMessageBytes}, at::kByte);
  try {
    work();
  } catch (const std::exception& error) {
    const std::string what = *error.what() == '\0' ? "unknown error" : error.what();
    std::memcpy(message.data_ptr(), what.data(), std::min(what.size(), kMessageBytes - 1));
  }
  const torch::Tensor messages = world.all_gather(message);
  for (int64_t rank = 0; rank < world.size(); ++rank) {
    const auto* text = static_cast<const char*>(messages[rank].const_data_ptr());
    if (*text != '\0') {
      throw Refusal(text);
    }
  }
}

void on_rank_zero(anabranch::Communicator& world, const std::function<void()>& work) {
  together(world, [&] {
    if (world.rank() == 0) {
      work();
    }
  });
}

}  // namespace train_lm
