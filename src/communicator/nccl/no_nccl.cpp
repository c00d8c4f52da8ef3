#include <anabranch/communicator.h>
#include <anabranch/error.h>

#include "communicator/describe.h"

// Built in the place of nccl.cpp where there is no NCCL.
namespace anabranch {
namespace {

[[noreturn]] void refuse(const char* call) {
  throw NotBuiltError(std::string(call) + ": this build of anabranch has no NCCL");
}

}  // namespace

std::shared_ptr<Communicator> make_nccl_communicator(std::shared_ptr<Communicator> /*bootstrap*/,
                                                     torch::Device /*device*/,
                                                     const CommunicatorOptions& /*options*/) {
  refuse("make_nccl_communicator");
}

std::shared_ptr<Communicator> make_nccl_communicator(const std::string& /*unique_id*/, int /*rank*/,
                                                     int /*size*/, torch::Device /*device*/,
                                                     const CommunicatorOptions& /*options*/) {
  refuse("make_nccl_communicator");
}

std::string make_nccl_unique_id() { refuse("make_nccl_unique_id"); }

std::string describe_nccl() { return "NCCL: not built"; }

}  // namespace anabranch
