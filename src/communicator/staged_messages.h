#pragma once

#include <anabranch/communicator.h>

namespace anabranch {

/// Messages in a memory that the transport reaches, in the place of others in one that it does not.
class StagedMessages {
 public:
  /// Copies what goes out into `memory`, a device and whether it is pinned.
  StagedMessages(Messages messages, const at::TensorOptions& memory);

  const Messages& messages() const { return staged_; }
  /// Copies what has come to where it belongs: ordered on the current stream of a GPU, which pinned
  /// memory is not used again before.
  void bring_back() const;

 private:
  Messages originals_;
  Messages staged_;
};

}  // namespace anabranch
