// Where ranks find each other beside NCCL: numbers of devices, not names of hosts.
#include "communicator/nccl/address.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace anabranch::test {
namespace {

TEST(SocketAddress, IsOfIPv4OrIPv6) {
  const SocketAddress four("10.1.2.3", 4567);
  EXPECT_EQ(four.family(), AF_INET);
  EXPECT_EQ(four.host(), "10.1.2.3");
  EXPECT_EQ(four.port(), 4567);
  const SocketAddress six("2001:db8::7", 65535);
  EXPECT_EQ(six.family(), AF_INET6);
  EXPECT_EQ(six.host(), "2001:db8::7");
  EXPECT_EQ(six.port(), 65535);
  EXPECT_TRUE(four == SocketAddress("10.1.2.3", 4567));
  EXPECT_FALSE(four == SocketAddress("10.1.2.3", 4568));
  EXPECT_FALSE(four == SocketAddress("10.1.2.4", 4567));
  EXPECT_FALSE(six == SocketAddress("2001:db8::8", 65535));
  EXPECT_FALSE(four == six);
}

TEST(SocketAddress, IsInNumbers) {
  EXPECT_THROW(SocketAddress("localhost", 1), std::runtime_error);
  EXPECT_THROW(SocketAddress("", 1), std::runtime_error);
}

TEST(SocketAddress, DatagramsComeFromWhereTheirSocketIsBound) {
  for (const std::string host : {"127.0.0.1", "::1"}) {
    const SocketAddress any(host, 0);
    const int from = socket(any.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const int to = socket(any.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (bind(from, any.get(), any.length()) == 0 && bind(to, any.get(), any.length()) == 0) {
      const SocketAddress target = SocketAddress::of_socket(to);
      ASSERT_EQ(sendto(from, "x", 1, 0, target.get(), target.length()), 1);
      sockaddr_storage source = {};
      socklen_t length = sizeof(source);
      char byte = 0;
      ASSERT_EQ(recvfrom(to, &byte, 1, 0, reinterpret_cast<sockaddr*>(&source), &length), 1);
      EXPECT_TRUE(SocketAddress(source, length) == SocketAddress::of_socket(from)) << host;
    } else {
      EXPECT_EQ(host, "::1");  // a machine need not have that
    }
    close(from);
    close(to);
  }
}

TEST(NetworkInterfaces, HaveTheLoopDevice) {
  const auto interfaces = network_interfaces();
  EXPECT_TRUE(std::any_of(interfaces.begin(), interfaces.end(), [](const Interface& one) {
    return one.is_loopback && (one.host == "127.0.0.1" || one.host == "::1");
  }));
}

const std::vector<Interface> kHost = {
    {"lo", "127.0.0.1", false, true},        {"lo", "::1", true, true},
    {"docker0", "172.17.0.1", false, false}, {"eth0", "10.0.0.7", false, false},
    {"eth1", "10.1.0.7", false, false},      {"eth1", "2001:db8::7", true, false},
    {"ib0", "192.168.0.7", false, false}};

TEST(AddressForOthers, IsOfTheDevicesThatNcclIsToTake) {
  const auto of = [](const std::string& wanted, bool ipv6 = false) {
    return address_for_others(kHost, wanted, {"10.1.0.7"}, ipv6).value_or("none");
  };
  EXPECT_EQ(of("ib"), "192.168.0.7");
  EXPECT_EQ(of("ib,eth"), "10.0.0.7");
  EXPECT_EQ(of("=eth1"), "10.1.0.7");
  EXPECT_EQ(of("=eth"), "none");
  EXPECT_EQ(of("^lo,docker,eth"), "192.168.0.7");
  EXPECT_EQ(of("^=lo,docker0"), "10.0.0.7");
  EXPECT_EQ(of("lo"), "127.0.0.1");
  EXPECT_EQ(of("eth", true), "2001:db8::7");
  EXPECT_EQ(of("ib", true), "none");
}

TEST(AddressForOthers, NeedsNoNameThatLeadsAnywhere) {
  EXPECT_EQ(address_for_others(kHost, "", {"10.1.0.7"}, false), "10.1.0.7");
  EXPECT_EQ(address_for_others(kHost, "", {"127.0.1.1"}, false), "10.0.0.7");
  EXPECT_EQ(address_for_others(kHost, "", {}, false), "10.0.0.7");
  EXPECT_EQ(address_for_others(kHost, "", {}, true), "2001:db8::7");
  const std::vector<Interface> container = {kHost[0], kHost[2]};
  EXPECT_EQ(address_for_others(container, "", {}, false), "172.17.0.1");
  EXPECT_EQ(address_for_others({kHost[0]}, "", {}, false), std::nullopt);
}

TEST(LoopbackAddress, IsIPv6OnlyWhereNothingElseIs) {
  EXPECT_EQ(loopback_address(kHost), "127.0.0.1");
  EXPECT_EQ(loopback_address({kHost[1], kHost[5]}), "::1");
  EXPECT_EQ(loopback_address({}), "127.0.0.1");
}

}  // namespace
}  // namespace anabranch::test
