#include <ATen/core/Tensor.h>
#include <anabranch/communicator.h>

namespace anabranch {
namespace {

/// One rank: what it sends, it receives; copies run on the current stream.
class SelfCommunicator final : public Communicator {
 public:
  SelfCommunicator() : Communicator(/*rank=*/0, /*size=*/1) {}

  std::string name() const override { return "self"; }

  std::shared_ptr<Communicator> split(int /*color*/, int /*key*/) override {
    return make_self_communicator();
  }

 protected:
  void do_all_to_all_v(const std::vector<Transfer>& transfers) override {
    for (const Transfer& transfer : transfers) {
      transfer.receive.copy_(transfer.send);
    }
  }
  void do_all_reduce(torch::Tensor& /*tensor*/) override {}
  void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) override {
    gathered[0].copy_(tensor);
  }
  void do_broadcast(torch::Tensor& /*tensor*/, int /*root*/) override {}
  void do_barrier() override {}
  void check_device(torch::Device /*device*/) const override {}
};

}  // namespace

std::shared_ptr<Communicator> make_self_communicator() {
  return std::make_shared<SelfCommunicator>();
}

}  // namespace anabranch
