// Who is missing, as the ranks find out beside NCCL: by datagrams, without a GPU.
#include "communicator/nccl/heartbeats.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>
#include <thread>

#include "communicator/agreement.h"
#include "support/collectives.h"
#include "support/random.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

using std::chrono::milliseconds;

/// Says for so long that this rank lives and has begun its `started`th collective.
void live_on(NcclHeartbeats& heartbeats, int64_t started, milliseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
    heartbeats.publish(started, 0);
    std::this_thread::sleep_for(milliseconds(5));
  }
}

class HeartbeatsTest : public ::testing::Test {
 protected:
  static constexpr milliseconds kHeartbeat{100};

  /// What rank 0 finds missing at the 7th collective, or at one up to the `newest`, while rank 1 is at `first` and
  /// the last rank at `last`, or says nothing.
  std::vector<int> found_missing(int64_t first, std::optional<int64_t> last, int64_t newest = 7) {
    NcclHeartbeats heartbeats(*world_);
    std::vector<int> missing;
    if (world_->rank() == 0) {
      missing = heartbeats.missing(7, newest, kHeartbeat);
    } else if (world_->rank() < world_->size() - 1) {
      live_on(heartbeats, first, 5 * kHeartbeat);
    } else if (last.has_value()) {
      live_on(heartbeats, *last, 5 * kHeartbeat);
    }
    world_->barrier();
    return missing;
  }

  std::shared_ptr<Communicator> world_ = world();
};

TEST_F(HeartbeatsTest, ASilentRankIsMissing) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto missing = found_missing(7, std::nullopt);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

// It may be waiting for the silent one, as this rank does.
TEST_F(HeartbeatsTest, ARankThatIsBehindIsNotMissingBesideASilentOne) {
  ANABRANCH_NEEDS_RANKS(3);
  const auto missing = found_missing(6, std::nullopt);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

TEST_F(HeartbeatsTest, ALivingRankThatIsBehindIsMissingWhereNobodyIsSilent) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto missing = found_missing(7, 6);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

TEST_F(HeartbeatsTest, WhereAllHaveComeNobodyIsMissing) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto missing = found_missing(7, 8);
  if (world_->rank() == 0) {
    EXPECT_TRUE(missing.empty());
  }
}

// CUDA may not answer beside a later collective that does not end.
TEST_F(HeartbeatsTest, WhereAllHaveComeToTheFirstWhoIsBehindInALaterOneIsMissing) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto missing = found_missing(9, 8, 9);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

TEST_F(HeartbeatsTest, WhoIsBehindInTheFirstIsMissingAndNotWhoWaitsForItInALaterOne) {
  ANABRANCH_NEEDS_RANKS(3);
  const auto missing = found_missing(7, 6, 9);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

TEST_F(HeartbeatsTest, WhoLeavesLearnsThatAllHaveEnded) {
  ANABRANCH_NEEDS_RANKS(2);
  NcclHeartbeats heartbeats(*world_);
  ASSERT_EQ(heartbeats.obstacle(), "");
  const bool last = world_->rank() == world_->size() - 1;
  const auto all_have_ended = [&](int64_t wanted) {
    for (int i = 0; i < 400 && !heartbeats.all_have_ended(wanted, 1000); ++i) {
      heartbeats.listen();
      std::this_thread::sleep_for(milliseconds(5));
    }
    return heartbeats.all_have_ended(wanted, 1000);
  };
  heartbeats.publish(7, last ? 6 : 7);
  EXPECT_TRUE(all_have_ended(6));
  EXPECT_EQ(heartbeats.all_have_ended(7, 1000), last);
  world_->barrier();
  if (last) {
    heartbeats.publish(7, 7);
  }
  EXPECT_TRUE(all_have_ended(7));
  EXPECT_FALSE(heartbeats.all_have_ended(8, 1000));
  world_->barrier();
}

TEST_F(HeartbeatsTest, WhoLeavesDoesNotWaitForASilentRank) {
  ANABRANCH_NEEDS_RANKS(2);
  NcclHeartbeats heartbeats(*world_);
  ASSERT_EQ(heartbeats.obstacle(), "");
  if (world_->rank() == 0) {
    heartbeats.publish(7, 7);
    EXPECT_FALSE(heartbeats.all_have_ended(7, 20));
    for (int i = 0; i < 20; ++i) {
      heartbeats.publish(7, 7);
    }
    EXPECT_TRUE(heartbeats.all_have_ended(7, 20));
  }
  world_->barrier();
}

TEST_F(HeartbeatsTest, AnAnnouncedFailureReachesAll) {
  ANABRANCH_NEEDS_RANKS(2);
  NcclHeartbeats heartbeats(*world_);
  world_->barrier();
  if (world_->rank() == 0) {
    heartbeats.announce({"rank 0: no more", {1}});
  }
  world_->barrier();
  if (world_->rank() != 0) {
    for (int i = 0; i < 400 && !heartbeats.announced().has_value(); ++i) {
      heartbeats.listen();
      std::this_thread::sleep_for(milliseconds(5));
    }
    ASSERT_TRUE(heartbeats.announced().has_value());
    EXPECT_EQ(heartbeats.announced()->text, "rank 0: no more");
    EXPECT_EQ(heartbeats.announced()->culprits, std::vector<int>{1});
  }
  world_->barrier();
}

// Whoever is not of the group: other addresses, no key.
TEST_F(HeartbeatsTest, StrangersAreNotHeard) {
  ANABRANCH_NEEDS_RANKS(2);
  NcclHeartbeats heartbeats(*world_);
  ASSERT_EQ(heartbeats.obstacle(), "");
  const auto& own = heartbeats.address();
  const auto ends = all_gather_strings(*world_, c10::str(own.host(), ' ', own.port()));
  if (world_->rank() == 0) {
    Random random(test_seed());
    const int stranger = socket(own.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0);
    for (size_t peer = 1; peer < ends.size(); ++peer) {
      std::string host;
      int port = 0;
      std::istringstream(ends[peer]) >> host >> port;
      const SocketAddress target(host, port);
      for (int64_t i = 0; i < 300; ++i) {
        std::string bytes(static_cast<size_t>(random.integer(0, 3000)), '\0');
        for (char& byte : bytes) {
          byte = static_cast<char>(random.integer(0, 255));
        }
        static_cast<void>(
            sendto(stranger, bytes.data(), bytes.size(), 0, target.get(), target.length()));
      }
      HeartbeatDatagram forged;  // of another key
      forged.number = std::numeric_limits<uint64_t>::max();
      forged.failure = NcclFailure{"rank 0: forged", {1}};
      const std::string bytes = encode(forged, {1, 2});
      sendto(stranger, bytes.data(), bytes.size(), 0, target.get(), target.length());
    }
    close(stranger);
  }
  world_->barrier();
  heartbeats.listen();
  EXPECT_FALSE(heartbeats.announced().has_value());
  world_->barrier();
  if (world_->rank() == 0) {
    heartbeats.announce({"rank 0: no more", {0}});
  }
  world_->barrier();
  for (int i = 0; i < 400 && world_->rank() != 0 && !heartbeats.announced().has_value(); ++i) {
    heartbeats.listen();
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_EQ(heartbeats.announced().has_value(), world_->rank() != 0);
  world_->barrier();
}

TEST_F(HeartbeatsTest, AFloodHoldsNobodyForLong) {
  ANABRANCH_NEEDS_RANKS(2);
  NcclHeartbeats heartbeats(*world_);
  const auto& own = heartbeats.address();
  std::atomic<bool> stop = false;
  std::thread flood([&] {
    const int stranger = socket(own.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0);
    while (!stop) {
      sendto(stranger, "x", 1, 0, own.get(), own.length());
    }
    close(stranger);
  });
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 20; ++i) {
    heartbeats.listen();
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
  stop = true;
  flood.join();
  world_->barrier();
}

/// While this lives, this thread is in a new network, alone, that has nothing but the loop device; or in one
/// that another thread has made.
class NetworkOfItsOwn {
 public:
  NetworkOfItsOwn() : former_(open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC)) {
    made_ = former_ >= 0 && unshare(CLONE_NEWNET) == 0;
  }
  explicit NetworkOfItsOwn(const std::string& place)
      : former_(open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC)) {
    const int joined = open(place.c_str(), O_RDONLY | O_CLOEXEC);
    made_ = former_ >= 0 && joined >= 0 && setns(joined, CLONE_NEWNET) == 0;
    close(joined);
  }
  ~NetworkOfItsOwn() {
    if (made_) {
      EXPECT_EQ(setns(former_, CLONE_NEWNET), 0);
    }
    close(former_);
  }
  NetworkOfItsOwn(const NetworkOfItsOwn&) = delete;
  NetworkOfItsOwn& operator=(const NetworkOfItsOwn&) = delete;

  bool is_made() const { return made_; }
  /// Where another thread finds this one's.
  static std::string place() { return c10::str("/proc/", getpid(), "/task/", gettid(), "/ns/net"); }
  static void use_loop_device() {
    ifreq request = {};
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    of_loop_device(SIOCSIFFLAGS, request);
  }
  static void take_ipv4_away() {
    ifreq request = {};
    request.ifr_addr.sa_family = AF_INET;  // and 0.0.0.0
    of_loop_device(SIOCSIFADDR, request);
  }

 private:
  static void of_loop_device(unsigned long what, ifreq& request) {
    const int any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    std::strcpy(request.ifr_name, "lo");
    EXPECT_EQ(ioctl(any, what, &request), 0);
    close(any);
  }

  int former_;
  bool made_ = false;
};

/// Sets a variable of the environment, and what it was at the end.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) {
    const char* former = std::getenv(name);
    former_ = former == nullptr ? std::nullopt : std::optional<std::string>(former);
    setenv(name, value, 1);
  }
  ~Variable() { former_ ? setenv(name_, former_->c_str(), 1) : unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
  std::optional<std::string> former_;
};

// NCCL may do without what these need; then it works, but nobody can be named.
TEST_F(HeartbeatsTest, WhereDatagramsDoNotComeThroughNobodyIsNamed) {
  ANABRANCH_NEEDS_RANKS(2);
  const NetworkOfItsOwn network;
  const auto made = world_->all_gather(torch::tensor(network.is_made()));
  if (!made.all().item<bool>()) {
    GTEST_SKIP() << "needs the right to make networks";
  }
  const auto expect_nobody = [&](const std::string& obstacle) {
    NcclHeartbeats heartbeats(*world_);
    EXPECT_NE(heartbeats.obstacle().find(obstacle), std::string::npos) << heartbeats.obstacle();
    EXPECT_EQ(all_gather_strings(*world_, heartbeats.obstacle()),
              std::vector<std::string>(world_->size(), heartbeats.obstacle()));
    heartbeats.publish(1, 0);
    heartbeats.listen();
    EXPECT_TRUE(heartbeats.missing(7, 7, kHeartbeat).empty());
    EXPECT_NE(blame({}, heartbeats).find("cannot be named"), std::string::npos);
  };
  expect_nobody("no kind of address in common");
  // Every rank hears itself alone, as behind a wall.
  NetworkOfItsOwn::use_loop_device();
  const Variable device("NCCL_SOCKET_IFNAME", "lo");
  expect_nobody("no datagram has come from rank");
}

// All ranks in one network that has no IPv4.
TEST_F(HeartbeatsTest, OverIPv6AloneTheSilentRankIsNamed) {
  ANABRANCH_NEEDS_RANKS(2);
  std::optional<NetworkOfItsOwn> network;
  if (world_->rank() == 0) {
    network.emplace();
  }
  const auto places = all_gather_strings(*world_, NetworkOfItsOwn::place());
  if (world_->rank() > 0) {
    network.emplace(places.front());
  }
  const auto made = world_->all_gather(torch::tensor(network->is_made()));
  if (!made.all().item<bool>()) {
    GTEST_SKIP() << "needs the right to make networks";
  }
  if (world_->rank() == 0) {
    NetworkOfItsOwn::use_loop_device();
    NetworkOfItsOwn::take_ipv4_away();
  }
  world_->barrier();
  if (network_interfaces().empty()) {
    GTEST_SKIP() << "needs IPv6";
  }
  {
    const NcclHeartbeats heartbeats(*world_);
    EXPECT_EQ(heartbeats.obstacle(), "");
    EXPECT_EQ(heartbeats.address().family(), AF_INET6);
  }
  const auto missing = found_missing(7, std::nullopt);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

// Every rank in a network of its own, as on hosts of their own, with a cable to rank 0's that knows IPv6 alone.
TEST_F(HeartbeatsTest, BetweenHostsOverIPv6AloneTheSilentRankIsNamed) {
  ANABRANCH_NEEDS_RANKS(2);
  const auto run = [](const std::string& command) {
    return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
  };
  const NetworkOfItsOwn network;
  const auto address = [&] { return c10::str("fd77::", world_->rank() + 1, "/64"); };
  const auto every = [&](bool done) {
    return world_->all_gather(torch::tensor(done)).all().item<bool>();
  };
  bool connected = every(network.is_made());
  if (connected && world_->rank() == 0) {
    connected = run("ip link add lan type bridge && ip link set lan up && ip -6 address add " +
                    address() + " dev lan nodad");
  }
  const auto processes = all_gather_strings(*world_, std::to_string(getpid()));
  for (size_t peer = 1; peer < processes.size() && connected && world_->rank() == 0; ++peer) {
    connected = run(c10::str("ip link add port", peer, " type veth peer name eth0 netns ",
                             processes[peer], " && ip link set port", peer, " master lan up"));
  }
  connected = every(connected);
  if (connected && world_->rank() > 0) {
    connected = run("ip -6 address add " + address() + " dev eth0 nodad && ip link set eth0 up");
  }
  if (!every(connected)) {
    GTEST_SKIP() << "needs the right to make networks, iproute2 and IPv6";
  }
  {
    const NcclHeartbeats heartbeats(*world_);
    EXPECT_EQ(heartbeats.obstacle(), "");
    EXPECT_EQ(heartbeats.address().host(), c10::str("fd77::", world_->rank() + 1));
  }
  const auto missing = found_missing(7, std::nullopt);
  if (world_->rank() == 0) {
    EXPECT_EQ(missing, std::vector<int>{world_->size() - 1});
  }
}

}  // namespace
}  // namespace anabranch::test
