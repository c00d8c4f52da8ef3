#include "support/process_group.h"

#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include "communicator/store/store.h"
#include "support/devices.h"

namespace anabranch::test {
namespace {

using c10d::ProcessGroup;

void add_gloo(ProcessGroup& group, const c10::intrusive_ptr<c10d::Store>& store,
              std::chrono::milliseconds deadline) {
  auto options = c10d::ProcessGroupGloo::Options::create(deadline);
  options->devices = {c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1")};
  const auto gloo =
      c10::make_intrusive<c10d::ProcessGroupGloo>(store, group.getRank(), group.getSize(), options);
  group.setBackend(torch::kCPU, ProcessGroup::BackendType::GLOO, {gloo});
  group.setDefaultBackend(ProcessGroup::BackendType::GLOO);
}

void add_nccl([[maybe_unused]] ProcessGroup& group,
              [[maybe_unused]] const c10::intrusive_ptr<c10d::Store>& store) {
#ifdef USE_C10D_NCCL
  const auto nccl =
      c10::make_intrusive<c10d::ProcessGroupNCCL>(store, group.getRank(), group.getSize());
  group.setBackend(torch::kCUDA, ProcessGroup::BackendType::NCCL, {nccl});
#endif
}

}  // namespace

c10::intrusive_ptr<c10d::Store> open_shared_store(Communicator& harness,
                                                  std::chrono::milliseconds deadline) {
  int number = 0;
  auto port = torch::zeros({1}, torch::kInt64);
  c10::intrusive_ptr<c10d::Store> store;
  if (harness.rank() == 0) {
    store = open_tcp_store("127.0.0.1", number, /*serves=*/true, deadline);
    port.fill_(number);
  }
  harness.broadcast(port, 0);
  number = static_cast<int>(port.item<int64_t>());
  if (harness.rank() != 0) {
    store = open_tcp_store("127.0.0.1", number, /*serves=*/false, deadline);
  }
  return store;
}

c10::intrusive_ptr<ProcessGroup> make_process_group(Communicator& harness,
                                                    std::chrono::milliseconds deadline) {
  auto store = open_shared_store(harness, deadline);
  auto group = c10::make_intrusive<ProcessGroup>(store, harness.rank(), harness.size());
  group->setGroupName("tests");
  add_gloo(*group, store, deadline);
  if (device().is_cuda()) {
    group->setBoundDeviceId(device());
    add_nccl(*group, store);
  }
  return group;
}

}  // namespace anabranch::test
