#include <anabranch/communicator.h>

namespace anabranch {
namespace {

/// One rank, which has nobody to exchange messages with.
class SelfCommunicator final : public Communicator {
 public:
  SelfCommunicator() : Communicator(/*rank=*/0, /*size=*/1) {}

  std::string name() const override { return "self"; }

 protected:
  void exchange(Collective /*call*/, const Messages& /*messages*/,
                const std::function<void()>& meanwhile) override {
    meanwhile();
  }
  std::shared_ptr<Communicator> regroup(const std::vector<int>& /*members*/,
                                        int /*rank*/) override {
    return make_self_communicator();
  }
  void check_device(torch::Device /*device*/) const override {}
};

}  // namespace

std::shared_ptr<Communicator> make_self_communicator() {
  return std::make_shared<SelfCommunicator>();
}

}  // namespace anabranch
