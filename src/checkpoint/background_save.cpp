#include <anabranch/checkpoint.h>

#include <chrono>
#include <future>
#include <utility>

#include "checkpoint/collective.h"
#include "checkpoint/save.h"

namespace anabranch {
namespace {

/// In host memory of their own.
void copy_to_host(std::vector<NamedTensor>& tensors) {
  for (auto& [name, tensor] : tensors) {
    tensor = tensor.detach().to(torch::kCPU, /*non_blocking=*/false, /*copy=*/true);
  }
}

}  // namespace

struct BackgroundSave::State {
  std::filesystem::path directory;
  std::string tag;
  CheckpointMetadata metadata;
  std::shared_ptr<Communicator> world;
  CheckpointShare share;  // whose tensors the thread has
  std::future<std::string> report;
};

BackgroundSave::BackgroundSave(const std::filesystem::path& directory,
                               const torch::nn::Module& model, const ParallelOptimizer& optimizer,
                               const CheckpointMetadata& metadata, const ParallelGroups& groups) {
  const auto tag = common_tag(*groups.world);
  auto share = share_of(
      directory, tag, [&] { return contents_of(model, optimizer, groups); }, groups);
  auto tensors = std::move(share.tensors);
  state_ =
      std::make_unique<State>(State{directory, tag, metadata, groups.world, std::move(share), {}});
  do_together(*groups.world, [&] {
    copy_to_host(tensors);
    state_->report =
        std::async(std::launch::async, write_share, state_->share.path, std::move(tensors));
  });
}

BackgroundSave::~BackgroundSave() {
  if (!state_->report.valid()) return;
  state_->report.wait();
  std::error_code ignored;  // a file of no checkpoint, which the next save removes too
  std::filesystem::remove(state_->share.path, ignored);
}

bool BackgroundSave::is_written() const {
  return state_->report.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

void BackgroundSave::finish() {
  auto& [directory, tag, metadata, world, share, report] = *state_;
  const auto index = index_of(
      share, [&] { return report.get(); }, metadata, *world);
  commit(directory, tag, index, *world);
}

}  // namespace anabranch
