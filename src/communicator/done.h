#pragma once

#include <anabranch/communicator.h>

namespace anabranch {

/// What was complete, or ordered on the current stream, when it was started.
class Done final : public Pending {
 public:
  void finish() override {}
};

}  // namespace anabranch
