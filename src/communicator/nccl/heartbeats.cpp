#include "communicator/nccl/heartbeats.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <sstream>
#include <thread>

#include "communicator/agreement.h"
#include "communicator/host.h"

namespace anabranch {
namespace {

constexpr std::chrono::milliseconds kGreetings{500};
/// Datagrams taken in at once; whoever floods the socket holds the thread no longer.
constexpr int kMostAtOnce = 1024;

/// What a rank says of itself through the bootstrap.
struct Introduction {
  std::string network;
  std::string ipv4;  ///< "-": it has none
  std::string ipv6;
  SipHashKey key = {};  ///< its part of the group's

  std::string text() const {
    return c10::str(network, ' ', ipv4, ' ', ipv6, ' ', key[0], ' ', key[1]);
  }
  static Introduction of_text(const std::string& text) {
    Introduction introduction;
    std::istringstream(text) >> introduction.network >> introduction.ipv4 >> introduction.ipv6 >>
        introduction.key[0] >> introduction.key[1];
    return introduction;
  }
  static Introduction own() {
    std::random_device device;
    const auto random = [&] { return (uint64_t{device()} << 32) | device(); };
    return {network_identity(),
            own_address(false).value_or("-"),
            own_address(true).value_or("-"),
            {random(), random()}};
  }
};

/// The own address at which all ranks reach each other, of a kind that all have; empty: there is none.
std::string meeting_address(const std::vector<Introduction>& ranks, int rank) {
  const auto all = [&](const auto& condition) {
    return std::all_of(ranks.begin(), ranks.end(), condition);
  };
  if (all([&](const Introduction& one) { return one.network == ranks[0].network; })) {
    return loopback_address(network_interfaces());
  }
  if (all([](const Introduction& one) { return one.ipv4 != "-"; })) {
    return ranks[rank].ipv4;
  }
  return all([](const Introduction& one) { return one.ipv6 != "-"; }) ? ranks[rank].ipv6 : "";
}

[[noreturn]] void fail(const char* call) {
  throw std::runtime_error(std::string(call) + " failed: " + std::strerror(errno));
}

}  // namespace

NcclHeartbeats::NcclHeartbeats(Communicator& bootstrap)
    : rank_(bootstrap.rank()), states_(bootstrap.size()) {
  obstacle_ = meet(bootstrap);
  if (!obstacle_.empty() && rank_ == 0) {
    TORCH_WARN_ONCE("where NCCL fails, the rank to blame cannot be named: ", obstacle_);
  }
}

NcclHeartbeats::Socket::~Socket() {
  if (descriptor >= 0) {
    close(descriptor);
  }
}

/// The obstacle, if there is one on any rank; the same on all.
std::string NcclHeartbeats::meet(Communicator& bootstrap) {
  std::string own;
  std::string obstacle =
      first_failure(run_together(bootstrap, [&] { own = Introduction::own().text(); }));
  if (!obstacle.empty()) {
    return obstacle;
  }
  std::vector<Introduction> ranks;
  for (const std::string& text : all_gather_strings(bootstrap, own)) {
    ranks.push_back(Introduction::of_text(text));
    key_[0] ^= ranks.back().key[0];
    key_[1] ^= ranks.back().key[1];
  }
  obstacle = first_failure(run_together(bootstrap, [&] {
    const std::string host = meeting_address(ranks, rank_);
    if (host.empty()) {
      throw std::runtime_error("the ranks' hosts have no kind of address in common");
    }
    open_socket(host);
  }));
  if (!obstacle.empty()) {
    return obstacle;
  }
  const SocketAddress address = SocketAddress::of_socket(socket_.descriptor);
  for (const std::string& text :
       all_gather_strings(bootstrap, c10::str(address.host(), ' ', address.port()))) {
    std::string host;
    int port = 0;
    std::istringstream(text) >> host >> port;
    addresses_.emplace_back(host, port);
  }
  return greet(bootstrap);
}

void NcclHeartbeats::open_socket(const std::string& host) {
  const SocketAddress address(host, 0);
  socket_.descriptor = socket(address.family(), SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (socket_.descriptor < 0) {
    fail("socket");
  }
  if (bind(socket_.descriptor, address.get(), address.length()) != 0) {
    fail("bind");
  }
}

/// Every rank tells every other that it lives, and then all tell who has not been heard.
std::string NcclHeartbeats::greet(Communicator& bootstrap) {
  for (int i = 0; i < kRepeats; ++i) {
    publish(0, 0);
  }
  bootstrap.barrier();
  std::vector<int> unheard;
  const auto end = std::chrono::steady_clock::now() + kGreetings;
  do {
    listen();
    unheard.clear();
    for (int peer = 0; peer < static_cast<int>(states_.size()); ++peer) {
      if (peer != rank_ && states_[peer].number == 0) {
        unheard.push_back(peer);
      }
    }
    if (!unheard.empty()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  } while (!unheard.empty() && std::chrono::steady_clock::now() < end);
  return first_failure(run_together(bootstrap, [&] {
    if (!unheard.empty()) {
      throw std::runtime_error(c10::str("no datagram has come from rank ", c10::Join(", ", unheard),
                                        ", which may be blocked"));
    }
  }));
}

void NcclHeartbeats::send_to_all(HeartbeatDatagram datagram) {
  datagram.rank = rank_;
  datagram.number = ++sent_;
  const std::string bytes = encode(datagram, key_);
  for (size_t peer = 0; peer < addresses_.size(); ++peer) {
    if (static_cast<int>(peer) != rank_) {
      // A dead peer is no error of this rank's.
      static_cast<void>(sendto(socket_.descriptor, bytes.data(), bytes.size(), MSG_NOSIGNAL,
                               addresses_[peer].get(), addresses_[peer].length()));
    }
  }
}

void NcclHeartbeats::publish(int64_t started, int64_t ended) {
  HeartbeatDatagram datagram;
  datagram.started = started;
  datagram.ended = ended;
  send_to_all(std::move(datagram));
  ++signs_;
}

void NcclHeartbeats::listen() {
  std::string bytes(HeartbeatDatagram::kMostBytes + 1, '\0');
  for (int i = 0; socket_.descriptor >= 0 && i < kMostAtOnce; ++i) {
    sockaddr_storage source = {};
    socklen_t source_length = sizeof(source);
    const ssize_t length = recvfrom(socket_.descriptor, bytes.data(), bytes.size(), 0,
                                    reinterpret_cast<sockaddr*>(&source), &source_length);
    if (length < 0 && errno != ECONNREFUSED) {  // refused: an earlier one, by a dead peer
      return;
    }
    if (length < 0) {
      continue;
    }
    auto datagram = decode(bytes.substr(0, length), key_, static_cast<int>(states_.size()));
    if (!datagram.has_value() || datagram->number <= states_[datagram->rank].number ||
        !(addresses_[datagram->rank] == SocketAddress(source, source_length))) {
      continue;
    }
    State& state = states_[datagram->rank];
    state.number = datagram->number;
    state.started = std::max(state.started, datagram->started);
    state.ended = std::max(state.ended, datagram->ended);
    state.heard = signs_;
    if (datagram->failure.has_value() && !announced_.has_value()) {
      announced_ = std::move(datagram->failure);
    }
  }
}

std::vector<int> NcclHeartbeats::missing(int64_t first, int64_t last,
                                         std::chrono::milliseconds heartbeat) {
  if (!obstacle_.empty()) {
    return {};
  }
  listen();
  const std::vector<State> before = states_;
  for (int i = 0; i < 6; ++i) {
    publish(last, 0);  // this rank is alive
    std::this_thread::sleep_for(heartbeat / 2);
    listen();
  }
  const auto others = [&](const auto& condition) {
    std::vector<int> ranks;
    for (int rank = 0; rank < static_cast<int>(states_.size()); ++rank) {
      if (rank != rank_ && condition(rank)) {
        ranks.push_back(rank);
      }
    }
    return ranks;
  };
  auto found = others([&](int rank) { return states_[rank].number == before[rank].number; });
  for (int64_t sequence = first; found.empty() && sequence <= last; ++sequence) {
    found = others([&](int rank) { return states_[rank].started < sequence; });
  }
  return found;
}

bool NcclHeartbeats::all_have_ended(int64_t sequence, int64_t silence) const {
  for (int rank = 0; rank < static_cast<int>(states_.size()); ++rank) {
    const State& state = states_[rank];
    if (rank != rank_ && state.ended < sequence && signs_ - state.heard < silence) {
      return false;
    }
  }
  return true;
}

void NcclHeartbeats::announce(const NcclFailure& failure) {
  for (int i = 0; i < kRepeats; ++i) {
    HeartbeatDatagram datagram;
    datagram.failure = failure;
    send_to_all(std::move(datagram));
  }
}

std::string blame(const std::vector<int>& culprits, const NcclHeartbeats& heartbeats) {
  if (!heartbeats.obstacle().empty()) {
    return "; the rank to blame cannot be named: " + heartbeats.obstacle();
  }
  return culprits.empty() ? "; every rank is alive and has made the call"
                          : c10::str("; no sign of rank ", c10::Join(", ", culprits),
                                     " (dead, stalled, or not making the call)");
}

}  // namespace anabranch
