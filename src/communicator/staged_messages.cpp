#include "communicator/staged_messages.h"

#include <ATen/ops/empty.h>

#include <functional>
#include <utility>

namespace anabranch {
namespace {

/// The same bytes, for another rank.
bool is_again(const Message& message, const Message& former) {
  return message.tensor.is_same(former.tensor) && message.begin == former.begin &&
         message.bytes == former.bytes;
}

/// Room for all of them in one buffer, one after another; what goes to several ranks is there once.
std::vector<Message> with_room_for(const std::vector<Message>& messages,
                                   const at::TensorOptions& memory) {
  std::vector<Message> staged = messages;
  int64_t end = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    const bool again = i > 0 && is_again(messages[i], messages[i - 1]);
    staged[i].begin = again ? staged[i - 1].begin : end;
    end = staged[i].begin + staged[i].bytes;
  }
  const torch::Tensor buffer = at::empty({end}, memory.dtype(at::kByte));
  for (Message& message : staged) {
    message.tensor = buffer;
  }
  return staged;
}

torch::Tensor bytes_of(const Message& message, int64_t bytes) {
  return message.tensor.view({-1}).view(at::kByte).narrow(0, message.begin, bytes);
}

/// In as few copies as the messages' places allow.
void copy(const std::vector<Message>& from, const std::vector<Message>& to, bool non_blocking) {
  const auto goes_on = [](const std::vector<Message>& messages, size_t i) {
    return messages[i].tensor.is_same(messages[i - 1].tensor) &&
           messages[i].begin == messages[i - 1].begin + messages[i - 1].bytes;
  };
  for (size_t begin = 0; begin < from.size();) {
    size_t end = begin + 1;
    if (begin > 0 && is_again(from[begin], from[begin - 1])) {
      begin = end;
      continue;
    }
    int64_t bytes = from[begin].bytes;
    for (; end < from.size() && goes_on(from, end) && goes_on(to, end); ++end) {
      bytes += from[end].bytes;
    }
    bytes_of(to[begin], bytes).copy_(bytes_of(from[begin], bytes), non_blocking);
    begin = end;
  }
}

}  // namespace

StagedMessages::StagedMessages(Messages messages, const at::TensorOptions& memory)
    : originals_(std::move(messages)),
      staged_{memory.device(), with_room_for(originals_.outgoing, memory),
              with_room_for(originals_.incoming, memory)} {
  copy(originals_.outgoing, staged_.outgoing, /*non_blocking=*/false);
}

void StagedMessages::bring_back() const {
  const bool pinned = !staged_.incoming.empty() && staged_.incoming.front().tensor.is_pinned();
  copy(staged_.incoming, originals_.incoming, /*non_blocking=*/pinned);
}

}  // namespace anabranch
