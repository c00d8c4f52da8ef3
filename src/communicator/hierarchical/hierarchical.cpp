#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>
#include <anabranch/hierarchical.h>
#include <anabranch/rank_discovery.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <utility>

#include "communicator/agreement.h"
#include "communicator/done.h"
#include "communicator/hierarchical/two_hops.h"
#include "communicator/sum.h"
#include "communicator/transfer_rows.h"
#include "support/check.h"
#include "support/median.h"
#include "support/cuda/stream.h"

namespace anabranch {
namespace {

/// The bytes of a row of each transfer: the same on every rank, whatever it holds.
std::vector<int64_t> kind_of(const std::vector<Transfer>& transfers) {
  std::vector<int64_t> kinds;
  for (const Transfer& transfer : transfers) {
    kinds.push_back(row_bytes(transfer.send));
  }
  return kinds;
}

class HierarchicalCommunicator final : public Communicator {
 public:
  HierarchicalCommunicator(std::shared_ptr<Communicator> flat, const HierarchicalOptions& options,
                           NodeLayout layout)
      : Communicator(flat->rank(), flat->size()),
        flat_(flat),
        options_(options),
        two_hops_(std::move(flat), std::move(layout)) {}

  std::string name() const override { return flat_->name(); }
  void check() override { flat_->check(); }
  SplitOrder split_order(torch::Device device) const override { return flat_->split_order(device); }
  const std::vector<AllToAllChoice>& choices() const { return choices_; }

 protected:
  std::unique_ptr<Pending> do_all_to_all_v(std::vector<Transfer> transfers) override;
  void do_all_reduce(torch::Tensor& tensor) override {
    const auto levels = two_hops_.layout().levels_of_sum(rank(), tensor.nbytes());
    by_flat([&] {
      if (options_.all_to_all == AllToAll::kFlat || levels.size() == 1) {
        flat_->all_reduce(tensor);
        return;
      }
      sum_in_levels(tensor, rank(), levels, [&](const Messages& messages) {
        start_by(*flat_, Collective::kAllReduce, messages)->finish();
      });
    });
  }
  void do_all_gather(const torch::Tensor& tensor, torch::Tensor& gathered) override {
    by_flat([&] { gathered.copy_(flat_->all_gather(tensor)); });
  }
  void do_broadcast(torch::Tensor& tensor, int root) override {
    by_flat([&] { flat_->broadcast(tensor, root); });
  }
  void do_barrier() override {
    by_flat([&] { flat_->barrier(); });
  }
  std::unique_ptr<Pending> start(Collective call, Messages messages) override {
    return start_by(*flat_, call, std::move(messages));
  }
  std::shared_ptr<Communicator> regroup(const std::vector<int>& members, int rank) override {
    return make_hierarchical_communicator(regroup_by(*flat_, members, rank), options_);
  }
  /// `flat_` checks when it is called.
  void check_device(torch::Device /*device*/) const override {}

 private:
  /// What `flat_` moves is moved by this one, and counted where it is started.
  template <typename Work>
  void by_flat(const Work& work) {
    const Traffic before = flat_->traffic();
    work();
    count(flat_->traffic().bytes_sent - before.bytes_sent,
          flat_->traffic().bytes_received - before.bytes_received);
  }
  std::unique_ptr<Pending> start(const std::vector<Transfer>& transfers, AllToAll way);
  void measure(const std::vector<Transfer>& transfers);
  void choose(const std::vector<int64_t>& kind, const std::vector<double>& seconds);

  std::shared_ptr<Communicator> flat_;
  HierarchicalOptions options_;
  TwoHops two_hops_;
  std::map<std::vector<int64_t>, AllToAll> chosen_;
  /// kAuto: times of the calls of a kind, flat and hierarchical in turn.
  std::map<std::vector<int64_t>, std::vector<double>> measured_;
  std::vector<AllToAllChoice> choices_;
};

std::unique_ptr<Pending> HierarchicalCommunicator::start(const std::vector<Transfer>& transfers,
                                                         AllToAll way) {
  std::unique_ptr<Pending> pending;
  const auto start_flat = [&](std::vector<Transfer> of_flat) {
    return start_rows_by(*flat_, std::move(of_flat));
  };
  by_flat([&] {
    pending = way == AllToAll::kHierarchical ? two_hops_.start(transfers, start_flat)
                                             : start_flat(transfers);
  });
  return pending;
}

std::unique_ptr<Pending> HierarchicalCommunicator::do_all_to_all_v(
    std::vector<Transfer> transfers) {
  if (options_.all_to_all != AllToAll::kAuto) {
    return start(transfers, options_.all_to_all);
  }
  if (!two_hops_.layout().has_two_levels()) {
    return start(transfers, AllToAll::kFlat);
  }
  if (const auto found = chosen_.find(kind_of(transfers)); found != chosen_.end()) {
    return start(transfers, found->second);
  }
  measure(transfers);
  return std::make_unique<Done>();
}

/// Every rank makes the same calls in the same order, so all take the same way without a word.
void HierarchicalCommunicator::measure(const std::vector<Transfer>& transfers) {
  const auto device = transfers.empty() ? torch::kCPU : transfers.front().send.device();
  const auto kind = kind_of(transfers);
  auto& seconds = measured_[kind];
  wait_for_stream(device);  // what was launched before is not this call's
  const auto begin = std::chrono::steady_clock::now();
  start(transfers, seconds.size() % 2 == 0 ? AllToAll::kFlat : AllToAll::kHierarchical)->finish();
  wait_for_stream(device);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  check();
  seconds.push_back(taken.count());
  if (static_cast<int64_t>(seconds.size()) == 2 * options_.trials) {
    choose(kind, seconds);
    measured_.erase(kind);
  }
}

/// The rank that came last waited for nobody: the least of the ranks' times is the exchange's own.
void HierarchicalCommunicator::choose(const std::vector<int64_t>& kind,
                                      const std::vector<double>& seconds) {
  torch::Tensor all;
  by_flat([&] { all = flat_->all_gather(at::tensor(seconds, at::kDouble)); });
  const auto least = std::get<0>(all.min(0));
  const double* times = least.const_data_ptr<double>();
  std::vector<double> flat, hierarchical;
  for (int64_t trial = 1; trial < options_.trials; ++trial) {
    flat.push_back(times[2 * trial]);
    hierarchical.push_back(times[2 * trial + 1]);
  }
  AllToAllChoice choice{kind, median(flat), median(hierarchical)};
  choice.chosen =
      choice.hierarchical_seconds < choice.flat_seconds ? AllToAll::kHierarchical : AllToAll::kFlat;
  chosen_[kind] = choice.chosen;
  choices_.push_back(std::move(choice));
}

}  // namespace

std::shared_ptr<Communicator> make_hierarchical_communicator(std::shared_ptr<Communicator> flat,
                                                             const HierarchicalOptions& options) {
  check_input(flat != nullptr, "make_hierarchical_communicator: no communicator given");
  check_input(options.trials >= 2, "make_hierarchical_communicator: trials is ", options.trials,
              ", expected at least 2");
  check_agreement(*flat, {{"all_to_all", std::to_string(static_cast<int>(options.all_to_all))},
                          {"trials", std::to_string(options.trials)}});
  const std::string node = options.node.empty() ? discover_rank().node : options.node;
  return std::make_shared<HierarchicalCommunicator>(flat, options,
                                                    NodeLayout(all_gather_strings(*flat, node)));
}

std::vector<AllToAllChoice> all_to_all_choices(const Communicator& communicator) {
  const auto* hierarchical = dynamic_cast<const HierarchicalCommunicator*>(&communicator);
  return hierarchical == nullptr ? std::vector<AllToAllChoice>() : hierarchical->choices();
}

}  // namespace anabranch
