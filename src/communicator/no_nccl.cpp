#include <anabranch/communicator.h>

#include <stdexcept>

// Built in the place of nccl.cpp where there is no NCCL.
namespace anabranch {

std::shared_ptr<Communicator> make_nccl_communicator(std::shared_ptr<Communicator> /*bootstrap*/,
                                                     torch::Device /*device*/,
                                                     const CommunicatorOptions& /*options*/) {
  throw std::runtime_error("make_nccl_communicator: this build of anabranch has no NCCL");
}

}  // namespace anabranch
