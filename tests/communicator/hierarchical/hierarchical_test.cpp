#include <anabranch/communicator.h>
#include <anabranch/hierarchical.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "communicator/hierarchical/node_layout.h"
#include "support/devices.h"
#include "support/random.h"
#include "support/thrown.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using Rows = std::vector<int64_t>;

/// Names of the ranks' nodes in arrangements of all kinds.
std::vector<std::vector<std::string>> arrangements(int size) {
  std::vector<std::vector<std::string>> all(5);
  for (int rank = 0; rank < size; ++rank) {
    all[0].push_back("one");
    all[1].push_back(std::to_string(rank));
    all[2].push_back(std::to_string(rank / 2));        // pairs; an odd number leaves one alone
    all[3].push_back(std::to_string(rank % 2));        // round robin
    all[4].push_back(rank == 0 ? "first" : "others");  // unequal
  }
  return all;
}

std::shared_ptr<Communicator> hierarchical(const std::string& node, AllToAll way) {
  HierarchicalOptions options;
  options.all_to_all = way;
  options.node = node;
  return make_hierarchical_communicator(world(), options);
}

/// Counts [from][to], equal on every rank.
std::vector<Rows> random_counts(Random& random, int size) {
  const int64_t most = random.pick<int64_t>({0, 1, 3, 50});
  const bool all_to_one = random.chance(0.25);
  const int64_t target = random.integer(0, size - 1);
  std::vector<Rows> counts(size, Rows(size));
  for (int from = 0; from < size; ++from) {
    for (int to = 0; to < size; ++to) {
      const bool nothing = random.chance(0.2) || (all_to_one && to != target);
      counts[from][to] = nothing ? 0 : random.integer(0, most);
    }
  }
  return counts;
}

/// Rows of random bits, among them patterns of NaN, and where each peer's go to and come from.
Transfer random_transfer(Random& random, const std::vector<Rows>& counts, torch::Dtype dtype) {
  const int rank = world()->rank();
  Transfer transfer;
  transfer.send_rows = counts[rank];
  for (const Rows& from : counts) {
    transfer.receive_rows.push_back(from[rank]);
  }
  const auto sum = [](const Rows& rows) {
    return std::accumulate(rows.begin(), rows.end(), int64_t{0});
  };
  const std::vector<int64_t> shape = random.pick<std::vector<int64_t>>({{}, {1}, {7}, {2, 3}});
  const auto sized = [&](int64_t rows) {
    std::vector<int64_t> sizes = shape;
    sizes.insert(sizes.begin(), rows);
    return sizes;
  };
  transfer.send = torch::empty(sized(sum(transfer.send_rows)), dtype);
  Random own(random.next() + static_cast<uint64_t>(rank));
  auto* bytes = static_cast<uint8_t*>(transfer.send.data_ptr());
  for (size_t i = 0; i < transfer.send.nbytes(); ++i) {
    bytes[i] = static_cast<uint8_t>(own.integer(0, 255));
  }
  transfer.send = on_device(transfer.send);
  transfer.receive = on_device(torch::empty(sized(sum(transfer.receive_rows)), dtype));
  return transfer;
}

std::string bytes_of(const torch::Tensor& tensor) {
  const auto on_host = tensor.cpu();
  return {static_cast<const char*>(on_host.const_data_ptr()), on_host.nbytes()};
}

/// Exchanges the same rows through `communicator` and flat, and compares every bit.
void expect_the_same(Communicator& communicator, std::vector<Transfer> transfers) {
  std::vector<Transfer> flat = transfers;
  for (size_t i = 0; i < transfers.size(); ++i) {
    flat[i].receive = torch::empty_like(transfers[i].receive);
  }
  communicator.start_all_to_all_v(transfers)->finish();
  world()->all_to_all_v(flat);
  for (size_t i = 0; i < transfers.size(); ++i) {
    EXPECT_EQ(bytes_of(transfers[i].receive), bytes_of(flat[i].receive));
  }
}

TEST(Hierarchical, MovesTheSameBitsAsFlat) {
  Random random(test_seed());
  for (const auto& names : arrangements(world()->size())) {
    const auto communicator = hierarchical(names[world()->rank()], AllToAll::kHierarchical);
    for (int64_t round = effort(12); round > 0; --round) {
      std::vector<Transfer> transfers;
      for (int64_t i = random.integer(1, 3); i > 0; --i) {
        const auto dtype = random.pick<torch::Dtype>(
            {torch::kFloat32, torch::kBFloat16, torch::kFloat64, torch::kInt64, torch::kUInt8});
        const auto counts = random_counts(random, world()->size());
        transfers.push_back(random_transfer(random, counts, dtype));
        // Drawn alike on all ranks, whatever each has.
        Random own(random.next() + static_cast<uint64_t>(world()->rank()));
        const int64_t rows = transfers.back().send.size(0);
        if (random.chance(0.5) && rows > 0) {
          transfers.back().send_index = on_device((own.uniform({rows}) * rows).to(torch::kInt64));
        }
      }
      expect_the_same(*communicator, std::move(transfers));
    }
  }
}

TEST(Hierarchical, NoTransfersAreFine) {
  hierarchical("one", AllToAll::kHierarchical)->all_to_all_v({});
}

/// Flat, and remembers to whom messages went in each exchange.
class Recording final : public Communicator {
 public:
  Recording() : Communicator(world()->rank(), world()->size()) {}
  std::string name() const override { return "recording"; }
  std::vector<std::set<int>> receivers;
  std::map<int, int64_t> bytes_to;

 protected:
  std::unique_ptr<Pending> start(Collective call, Messages messages) override {
    receivers.emplace_back();
    for (const Message& message : messages.outgoing) {
      receivers.back().insert(message.peer);
      bytes_to[message.peer] += message.bytes;
    }
    return start_by(*world(), call, std::move(messages));
  }
  std::shared_ptr<Communicator> regroup(const std::vector<int>&, int) override { return nullptr; }
  void check_device(torch::Device) const override {}
};

TEST(Hierarchical, SendsOneMessageToEachOtherNode) {
  ANABRANCH_NEEDS_RANKS(4);
  const int rank = world()->rank();
  const auto flat = std::make_shared<Recording>();
  HierarchicalOptions options;
  options.all_to_all = AllToAll::kHierarchical;
  options.node = std::to_string(rank / 2);
  const auto communicator = make_hierarchical_communicator(flat, options);
  const Rows ones(world()->size(), 1);
  const auto send = torch::full({world()->size(), 3}, rank, torch::kFloat32);
  const auto receive = torch::empty_like(send);
  flat->receivers.clear();
  communicator->reset_traffic();
  communicator->all_to_all_v({{send, ones, receive, ones}});

  const std::set<int> neighbour = {rank ^ 1};
  std::set<int> counterparts;  // the rank in the same place on each other node
  for (int peer = rank % 2; peer < world()->size(); peer += 2) {
    if (peer != rank) {
      counterparts.insert(peer);
    }
  }
  ASSERT_EQ(flat->receivers.size(), 3U);  // counts, within the node, between nodes
  EXPECT_EQ(flat->receivers[0], neighbour);
  EXPECT_EQ(flat->receivers[1], neighbour);
  EXPECT_EQ(flat->receivers[2], counterparts);
  // To the neighbour counts and rows for itself and for one rank of the other node; there, two rows.
  EXPECT_EQ(communicator->traffic().bytes_sent, 2 * 8 + 2 * 12 + 2 * 12);
  EXPECT_EQ(communicator->traffic().bytes_received, 2 * 8 + 2 * 12 + 2 * 12);
  EXPECT_EQ(communicator->traffic().collectives, 1);
}

/// The terms of each node in rank order, then the nodes' sums in the order of their first ranks.
torch::Tensor sum_by_nodes(const torch::Tensor& terms, const std::vector<std::string>& names) {
  const auto type = terms.scalar_type();
  const auto wide = torch::isIntegralType(type, false) ? type : accumulation_type(type);
  std::vector<std::string> seen;
  torch::Tensor total;
  for (const auto& name : names) {
    if (std::find(seen.begin(), seen.end(), name) != seen.end()) {
      continue;
    }
    seen.push_back(name);
    torch::Tensor of_node;
    for (size_t rank = 0; rank < names.size(); ++rank) {
      if (names[rank] == name) {
        const auto term = terms[static_cast<int64_t>(rank)].to(wide);
        of_node = of_node.defined() ? of_node + term : term;
      }
    }
    total = total.defined() ? total + of_node : of_node;
  }
  return total.to(type);
}

TEST(Hierarchical, LargeSumsAreTakenWithinNodesFirst) {
  Random random(test_seed() + static_cast<uint64_t>(world()->rank()));
  for (const auto& names : arrangements(world()->size())) {
    const auto communicator = hierarchical(names[world()->rank()], AllToAll::kHierarchical);
    const std::set<std::string> nodes(names.begin(), names.end());
    const bool equal = std::all_of(names.begin(), names.end(), [&](const auto& name) {
      return std::count(names.begin(), names.end(), name) * nodes.size() == names.size();
    });
    for (const auto dtype : {torch::kFloat32, torch::kBFloat16, torch::kInt64}) {
      const auto term = on_device((random.normal({3, 180'001}, torch::kFloat32) * 1000).to(dtype));
      auto sum = term.clone();
      communicator->all_reduce(sum);
      const bool in_levels = equal && nodes.size() > 1 && nodes.size() < names.size();
      const auto order = in_levels ? names : std::vector<std::string>(names.size(), "one");
      EXPECT_TRUE(identical(sum, sum_by_nodes(world()->all_gather(term), order)));
    }
  }
}

TEST(Hierarchical, LargeSumsCrossBetweenNodesOnce) {
  ANABRANCH_NEEDS_RANKS(4);
  const auto flat = std::make_shared<Recording>();
  HierarchicalOptions options;
  options.node = std::to_string(world()->rank() / 2);
  const auto communicator = make_hierarchical_communicator(flat, options);
  constexpr int64_t kElements = 1 << 18;
  auto sum = torch::ones({kElements});
  flat->bytes_to.clear();
  communicator->reset_traffic();
  communicator->all_reduce(sum);
  EXPECT_TRUE(sum.eq(4).all().item<bool>());
  int64_t between = 0;
  int64_t all = 0;
  for (const auto& [peer, bytes] : flat->bytes_to) {
    between += peer / 2 == world()->rank() / 2 ? 0 : bytes;
    all += bytes;
  }
  // Half of a half there, and as much back, of which each of the two ranks would send as much to both.
  EXPECT_EQ(between, 2 * kElements / 4 * 4);
  EXPECT_EQ(all, communicator->traffic().bytes_sent);
}

TEST(Hierarchical, AutoSettlesOnOneWayForAllRanks) {
  ANABRANCH_NEEDS_RANKS(3);
  Random random(test_seed());
  const auto communicator = hierarchical(std::to_string(world()->rank() / 2), AllToAll::kAuto);
  const auto calls = 2 * HierarchicalOptions().trials;
  for (const torch::Dtype dtype : {torch::kFloat32, torch::kFloat64}) {
    EXPECT_EQ(all_to_all_choices(*communicator).size(), dtype == torch::kFloat32 ? 0U : 1U);
    for (int64_t call = 0; call < calls + 2; ++call) {
      const Rows rows(world()->size(), random.integer(0, 20));
      const auto send = on_device(random.normal({world()->size() * rows[0], 5}, dtype));
      expect_the_same(*communicator, {{send, rows, torch::empty_like(send), rows}});
    }
  }
  const auto choices = all_to_all_choices(*communicator);
  ASSERT_EQ(choices.size(), 2U);
  EXPECT_EQ(choices[0].row_bytes, Rows({20}));
  EXPECT_EQ(choices[1].row_bytes, Rows({40}));
  for (const auto& choice : choices) {
    EXPECT_GT(choice.flat_seconds, 0);
    EXPECT_GT(choice.hierarchical_seconds, 0);
    EXPECT_EQ(choice.chosen == AllToAll::kHierarchical,
              choice.hierarchical_seconds < choice.flat_seconds);
    const auto all = world()->all_gather(torch::tensor(choice.chosen == AllToAll::kFlat ? 0 : 1));
    EXPECT_TRUE(all.eq(all[0]).all().item<bool>());
  }
}

TEST(Hierarchical, AutoHasNothingToMeasureOnOneNode) {
  const auto communicator = hierarchical("one", AllToAll::kAuto);
  const Rows rows(world()->size(), 1);
  for (int64_t call = 0; call < 20; ++call) {
    const auto send = on_device(torch::ones({world()->size(), 2}));
    expect_the_same(*communicator, {{send, rows, torch::empty_like(send), rows}});
  }
  EXPECT_TRUE(all_to_all_choices(*communicator).empty());
}

TEST(Hierarchical, OtherCollectivesAndGroupsAreThoseOfFlat) {
  const int rank = world()->rank();
  const auto communicator = hierarchical(std::to_string(rank / 2), AllToAll::kHierarchical);
  EXPECT_EQ(communicator->rank(), rank);
  EXPECT_EQ(communicator->size(), world()->size());
  auto sum = torch::full({2}, rank, torch::kInt64);
  communicator->all_reduce(sum);
  EXPECT_EQ(sum[0].item<int64_t>(), world()->size() * (world()->size() - 1) / 2);
  const auto gathered = communicator->all_gather(torch::tensor(rank));
  EXPECT_TRUE(gathered.equal(torch::arange(world()->size(), torch::kInt32)));
  auto last = torch::tensor(rank);
  communicator->broadcast(last, world()->size() - 1);
  EXPECT_EQ(last.item<int>(), world()->size() - 1);
  communicator->barrier();

  const auto group = communicator->split(rank % 2, 0);
  const Rows rows(group->size(), 2);
  const auto send = torch::full({2 * group->size()}, rank, torch::kInt32);
  const auto receive = torch::empty_like(send);
  group->all_to_all_v({{send, rows, receive, rows}});
  for (int peer = 0; peer < group->size(); ++peer) {
    EXPECT_EQ(receive[2 * peer + 1].item<int>(), rank % 2 + 2 * peer);
  }
}

TEST(Hierarchical, ALayerComputesTheSameBits) {
  MoEOptions options{
      .hidden_size = 12, .expert_hidden_size = 20, .num_experts = 6, .top_k = 2, .seed = 5};
  options.device = device();
  Random random(test_seed() + static_cast<uint64_t>(world()->rank()));
  const auto x = on_device(random.normal({11 * world()->rank(), 12}, torch::kFloat32));
  const auto dy = on_device(random.normal({11 * world()->rank(), 12}, torch::kFloat32));
  const auto run = [&](const std::shared_ptr<Communicator>& communicator) {
    MoELayer layer(options, communicator);
    auto input = x.clone().requires_grad_();
    const auto output = layer->forward(input).output;
    output.backward(dy);
    std::vector<torch::Tensor> results = {output.detach(), input.grad()};
    for (const auto& parameter : layer->parameters()) {
      results.push_back(parameter.grad());
    }
    return results;
  };
  const auto node = std::to_string(world()->rank() / 2);
  const auto expected = run(world());
  const auto found = run(hierarchical(node, AllToAll::kHierarchical));
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_TRUE(found[i].equal(expected[i])) << i;
  }
}

TEST(Hierarchical, RefusesWhatCannotBe) {
  EXPECT_INPUT_ERROR(make_hierarchical_communicator(nullptr), "no communicator");
  HierarchicalOptions options;
  options.trials = 1;
  EXPECT_INPUT_ERROR(make_hierarchical_communicator(world(), options), "trials is 1");
  if (world()->size() > 1) {
    options.trials = 2 + world()->rank();
    const auto thrown = thrown_by([&] { make_hierarchical_communicator(world(), options); });
    EXPECT_EQ(thrown.kind, Thrown::Kind::kCommunication) << thrown;
    EXPECT_TRUE(thrown.says("rank 1 has trials = 3 where rank 0 has 2")) << thrown;
  }
}

TEST(NodeLayout, EveryPairHasOneForwarderOnTheSendersNode) {
  Random random(test_seed());
  for (int64_t round = effort(50); round > 0; --round) {
    const auto size = random.integer(1, 12);
    std::vector<std::string> names;
    for (int64_t rank = 0; rank < size; ++rank) {
      names.push_back(std::to_string(random.integer(0, 3)));
    }
    const NodeLayout layout(names);
    for (int from = 0; from < size; ++from) {
      const int node = layout.node_of(from);
      int forwarders = 0;
      for (int to = 0; to < size; ++to) {
        const int via = layout.forwarder(node, to);
        EXPECT_EQ(names[via], names[from]);
        if (names[to] == names[from]) {
          EXPECT_EQ(via, to);
        }
        const auto list = layout.forwarded_by(from);
        forwarders += std::count(list.begin(), list.end(), to) > 0 ? 1 : 0;
        EXPECT_EQ(std::count(list.begin(), list.end(), to), via == from ? 1 : 0);
      }
      EXPECT_GE(forwarders, 1);  // at least itself
    }
  }
}

}  // namespace
}  // namespace anabranch::test
