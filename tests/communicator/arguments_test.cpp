// What is refused before anything is sent, and what is counted when it is.
#include <anabranch/communicator.h>
#include <gtest/gtest.h>

#include <limits>

#include "support/devices.h"
#include "support/thrown.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

/// Sends one row of three to every rank; tests spoil it.
Transfer valid_transfer() {
  const std::vector<int64_t> rows(world()->size(), 1);
  const auto ones = on_device(torch::ones({world()->size(), 3}));
  return {ones, rows, ones.clone(), rows};
}

template <typename Spoil>
void expect_refused(const Spoil& spoil, const std::string& text) {
  Transfer transfer = valid_transfer();
  spoil(transfer);
  EXPECT_INPUT_ERROR(world()->all_to_all_v({valid_transfer(), transfer}), text);
}

TEST(Arguments, AllToAllVRefusesTensors) {
  const int size = world()->size();
  expect_refused([](Transfer& t) { t.send.reset(); }, "send is undefined");
  expect_refused([](Transfer& t) { t.receive.reset(); }, "receive is undefined");
  expect_refused([](Transfer& t) { t.send = t.send.to_sparse(); }, "expected a dense tensor");
  expect_refused(
      [&](Transfer& t) {
        t.send = on_device(torch::ones({size, 6})).slice(1, 0, 6, 2);
      },
      "is not contiguous");
  expect_refused(
      [&](Transfer& t) {
        t.receive = on_device(torch::ones({size + 1, 6})).slice(1, 0, 3);
      },
      "is not contiguous");
  expect_refused([](Transfer& t) { t.receive = t.receive.to(torch::kBFloat16); },
                 "send is Float, receive is BFloat16");
  expect_refused([](Transfer& t) { t.receive = t.receive.to(torch::kMeta); },
                 c10::str("send is on ", device(), ", receive is on meta"));
  expect_refused(
      [&](Transfer& t) {
        t.receive = on_device(torch::ones({size, 4}));
      },
      "send has rows of [3], receive has rows of [4]");
  expect_refused([](Transfer& t) { t.send = on_device(torch::tensor(1.0F)); },
                 "no dimension of rows");
  expect_refused([](Transfer& t) { t.receive = t.send; }, "overlap in memory");
}

TEST(Arguments, AllToAllVRefusesCounts) {
  const int size = world()->size();
  expect_refused([](Transfer& t) { t.send_rows.push_back(0); }, "expected one for each of");
  expect_refused([](Transfer& t) { t.receive_rows.pop_back(); }, "expected one for each of");
  expect_refused([](Transfer& t) { t.send_rows[0] = -1; }, "send_rows[0] is -1");
  expect_refused([&](Transfer& t) { t.receive_rows[size - 1] = -5; }, "] is -5");
  expect_refused([](Transfer& t) { t.send_rows[0] = 2; }, "but send_rows sum to");
  expect_refused([](Transfer& t) { t.receive_rows[0] = 0; }, "but receive_rows sum to");
  if (size > 1) {
    expect_refused(
        [](Transfer& t) { t.send_rows[0] = t.send_rows[1] = std::numeric_limits<int64_t>::max(); },
        "does not fit into 64 bits");
    expect_refused(
        [](Transfer& t) {
          const int rank = world()->rank();
          t.send_rows[rank] = 2;
          t.send_rows[(rank + 1) % world()->size()] = 0;
        },
        "sends itself 2 rows, but receives 1");
  }
}

TEST(Arguments, AllToAllVRefusesTensorsOfDifferentDevices) {
  if (device().is_cpu()) {
    GTEST_SKIP() << "needs a GPU";
  }
  const std::vector<int64_t> rows(world()->size(), 1);
  const auto in_host = torch::ones({world()->size(), 3});
  EXPECT_INPUT_ERROR(
      world()->all_to_all_v({valid_transfer(), {in_host, rows, in_host.clone(), rows}}),
      c10::str("tensors on ", device(), " and on cpu"));
}

TEST(Arguments, AllToAllVRefusesAnIndex) {
  const auto index = [](torch::Tensor values) {
    return [values](Transfer& t) { t.send_index = on_device(values); };
  };
  const auto all = torch::arange(2 * world()->size());
  expect_refused(index(all.to(torch::kInt32)), "send_index is Int");
  expect_refused(index(all.unsqueeze(1)), "expected one dimension of Long");
  const auto elsewhere = all.to(device().is_cpu() ? torch::kMeta : torch::kCPU);
  expect_refused([&](Transfer& t) { t.send_index = elsewhere; },
                 c10::str("on ", elsewhere.device()));
  expect_refused(index(torch::zeros({world()->size() * 100}, torch::kInt64)), "send_rows sum to");
  if (device().is_cpu()) {
    const auto size = world()->size();
    expect_refused(index(torch::arange(size) + 1), c10::str("to ", size, ", but send is"));
    expect_refused(index(-torch::arange(size) - 1), c10::str("goes from ", -size));
  }
}

TEST(Arguments, OtherCollectivesRefuseTensors) {
  torch::Tensor undefined;
  auto strided = on_device(torch::ones({4, 6})).slice(1, 0, 6, 2);
  auto flags = on_device(torch::ones({3}, torch::kBool));
  auto valid = on_device(torch::ones({3}));
  EXPECT_INPUT_ERROR(world()->all_reduce(undefined), "undefined");
  EXPECT_INPUT_ERROR(world()->all_reduce(strided), "not contiguous");
  EXPECT_INPUT_ERROR(world()->all_reduce(flags), "cannot sum Bool");
  EXPECT_INPUT_ERROR(world()->all_gather(undefined), "undefined");
  EXPECT_INPUT_ERROR(world()->all_gather(strided), "not contiguous");
  EXPECT_INPUT_ERROR(world()->broadcast(undefined, 0), "undefined");
  EXPECT_INPUT_ERROR(world()->broadcast(strided, 0), "not contiguous");
  EXPECT_INPUT_ERROR(world()->broadcast(valid, -1), "root is -1");
  EXPECT_INPUT_ERROR(world()->broadcast(valid, world()->size()), "expected 0 to");
}

TEST(Arguments, MpiRefusesOtherDevicesAndSenselessDeadlines) {
  if (world()->name() != "mpi") {
    GTEST_SKIP() << "of the mpi communicator";
  }
  auto elsewhere = torch::empty({4}, torch::kMeta);
  EXPECT_INPUT_ERROR(world()->all_reduce(elsewhere), "host or GPU memory, not on meta");
  EXPECT_INPUT_ERROR(world()->all_gather(elsewhere), "host or GPU memory, not on meta");
  EXPECT_INPUT_ERROR(world()->broadcast(elsewhere, 0), "host or GPU memory, not on meta");
  const std::vector<int64_t> rows(world()->size(), 0);
  const auto none = torch::empty({0, 3}, torch::kMeta);
  EXPECT_INPUT_ERROR(world()->all_to_all_v({{none, rows, torch::empty_like(none), rows}}),
                     "host or GPU memory, not on meta");
  EXPECT_INPUT_ERROR(make_mpi_communicator({std::chrono::milliseconds(0)}), "deadline is 0 ms");
}

TEST(Arguments, RefusedCallsLeaveTheCommunicatorUsable) {
  expect_refused([](Transfer& t) { t.send_rows[0] = -1; }, "send_rows[0] is -1");
  world()->all_to_all_v({valid_transfer()});
  auto sum = on_device(torch::ones({2}));
  world()->all_reduce(sum);
  EXPECT_EQ(sum[1].item<float>(), world()->size());
}

struct Moved {
  int64_t sent;
  int64_t received;
};

void expect_traffic(const Communicator& communicator, Moved bytes, int64_t collectives) {
  EXPECT_EQ(communicator.traffic().bytes_sent, bytes.sent);
  EXPECT_EQ(communicator.traffic().bytes_received, bytes.received);
  EXPECT_EQ(communicator.traffic().collectives, collectives);
}

TEST(Traffic, CountsRowsForOtherRanks) {
  const auto group = world()->split(0, 0);
  expect_traffic(*group, {0, 0}, 0);
  const int rank = group->rank();
  const int size = group->size();
  // Rank s sends s + 2 d rows of 5 · 8 bytes to rank d, and one row of 2 bytes to everyone.
  std::vector<int64_t> send_rows;
  std::vector<int64_t> receive_rows;
  Moved moved = {0, 0};
  Moved rows = {0, 0};
  for (int peer = 0; peer < size; ++peer) {
    send_rows.push_back(rank + 2 * peer);
    receive_rows.push_back(peer + 2 * rank);
    rows.sent += rank + 2 * peer;
    rows.received += peer + 2 * rank;
    if (peer != rank) {
      moved.sent += (rank + 2 * peer) * 5 * 8 + 2;
      moved.received += (peer + 2 * rank) * 5 * 8 + 2;
    }
  }
  const std::vector<int64_t> ones(size, 1);
  group->all_to_all_v({{on_device(torch::ones({rows.sent, 5}, torch::kFloat64)), send_rows,
                        on_device(torch::ones({rows.received, 5}, torch::kFloat64)), receive_rows},
                       {on_device(torch::ones({size}, torch::kFloat16)), ones,
                        on_device(torch::zeros({size}, torch::kFloat16)), ones}});
  expect_traffic(*group, moved, 1);
  group->reset_traffic();
  expect_traffic(*group, {0, 0}, 0);
}

TEST(Traffic, CountsTheOtherCollectives) {
  const auto group = world()->split(0, 0);
  const int64_t others = group->size() - 1;

  group->all_gather(on_device(torch::ones({7})));  // 28 bytes
  expect_traffic(*group, {others * 28, others * 28}, 1);
  group->reset_traffic();

  auto tensor = on_device(torch::ones({3}, torch::kInt64));  // 24 bytes
  group->broadcast(tensor, 0);
  expect_traffic(*group, group->rank() == 0 ? Moved{others * 24, 0} : Moved{0, others > 0 ? 24 : 0},
                 1);
  group->reset_traffic();

  // 12 elements are divisible by 1, 2, 3 and 4: every rank sends the others their chunks of
  // 12 / size, and then its sum to the others.
  auto terms = on_device(torch::ones({12}));
  group->all_reduce(terms);
  // Between GPUs that map each other's memory a small sum's terms may go to all at once.
  const int64_t moved = 2 * others * (12 / group->size()) * 4;
  const bool at_once = device().is_cuda() && group->traffic().bytes_sent == others * 12 * 4;
  expect_traffic(*group, at_once ? Moved{others * 48, others * 48} : Moved{moved, moved}, 1);
  group->reset_traffic();

  group->barrier();  // a byte to everyone
  expect_traffic(*group, {others, others}, 1);
}

TEST(Traffic, IsNotCountedForRefusedCalls) {
  const auto group = world()->split(0, 0);
  torch::Tensor undefined;
  EXPECT_INPUT_ERROR(group->all_reduce(undefined), "undefined");
  expect_traffic(*group, {0, 0}, 0);
}

}  // namespace
}  // namespace anabranch::test
