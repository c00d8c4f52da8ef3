#include "checkpoint/collective.h"

#include <ATen/ATen.h>
#include <anabranch/error.h>

#include <algorithm>

#include "communicator/agreement.h"

namespace anabranch {

void do_together(Communicator& communicator, const std::function<void()>& work) {
  const auto failures = run_together(communicator, work);
  const auto first = std::find_if(failures.begin(), failures.end(),
                                  [](const std::string& text) { return !text.empty(); });
  if (first == failures.end()) return;
  throw CheckpointError(c10::str("rank ", first - failures.begin(), ": ", *first));
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
