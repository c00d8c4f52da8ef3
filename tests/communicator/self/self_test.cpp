#include <anabranch/communicator.h>
#include <gtest/gtest.h>

#include "support/thrown.h"
#include "support/tolerance.h"

namespace anabranch::test {
namespace {

TEST(SelfCommunicator, SendsToItself) {
  const auto self = make_self_communicator();
  EXPECT_EQ(self->rank(), 0);
  EXPECT_EQ(self->size(), 1);
  EXPECT_EQ(self->name(), "self");

  const auto send = torch::arange(12).view({4, 3});
  const auto receive = torch::full_like(send, -1);
  self->all_to_all_v({{send, {4}, receive, {4}}});
  EXPECT_TRUE(identical(receive, send));
  EXPECT_TRUE(identical(self->all_gather(send), send.unsqueeze(0)));
  auto tensor = send.clone();
  self->all_reduce(tensor);
  self->broadcast(tensor, 0);
  self->barrier();
  EXPECT_TRUE(identical(tensor, send));
  EXPECT_EQ(self->split(5, -1)->size(), 1);

  EXPECT_EQ(self->traffic().bytes_sent, 0);
  EXPECT_EQ(self->traffic().bytes_received, 0);
  EXPECT_EQ(self->traffic().collectives, 5);
}

TEST(SelfCommunicator, ChecksItsArguments) {
  const auto self = make_self_communicator();
  const auto rows = torch::ones({4, 3});
  EXPECT_INPUT_ERROR(self->all_to_all_v({{rows, {3}, torch::ones({4, 3}), {4}}}),
                     "send has 4 rows, but send_rows sum to 3");
  auto tensor = rows;
  EXPECT_INPUT_ERROR(self->broadcast(tensor, 1), "root is 1, expected 0 to 0");
}

}  // namespace
}  // namespace anabranch::test
