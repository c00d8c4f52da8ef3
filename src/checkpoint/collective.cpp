#include "checkpoint/collective.h"

#include <ATen/ATen.h>
#include <anabranch/error.h>

#include <algorithm>

#include "communicator/agreement.h"

namespace anabranch {

void do_together(Communicator& communicator, const std::function<void()>& work) {
  const std::string failure = first_failure(run_together(communicator, work));
  if (!failure.empty()) throw CheckpointError(failure);
}

std::string broadcast_string(Communicator& communicator, const std::string& text) {
  auto length = at::empty({}, at::kLong).fill_(static_cast<int64_t>(text.size()));
  communicator.broadcast(length, /*root=*/0);
  auto bytes = at::empty({length.item<int64_t>()}, at::kByte);
  auto* data = bytes.mutable_data_ptr<uint8_t>();
  if (communicator.rank() == 0) std::copy(text.begin(), text.end(), data);
  communicator.broadcast(bytes, /*root=*/0);
  return {data, data + bytes.numel()};
}

}  // namespace anabranch
