#include "communicator/nccl/heartbeats.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <sstream>
#include <thread>

#include "communicator/agreement.h"
#include "communicator/host_name.h"

namespace anabranch {
namespace {

constexpr size_t kMostCulprits = 64;
constexpr int kRepeats = 3;  // of a failure, as a datagram may be lost

[[noreturn]] void fail(const char* call) {
  throw std::runtime_error(std::string(call) + " failed: " + std::strerror(errno));
}

int open_socket() {
  const int descriptor = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (descriptor < 0) {
    fail("socket");
  }
  sockaddr_in any = {};
  any.sin_family = AF_INET;
  if (bind(descriptor, reinterpret_cast<const sockaddr*>(&any), sizeof(any)) != 0) {
    close(descriptor);
    fail("bind");
  }
  return descriptor;
}

int port_of(int descriptor) {
  sockaddr_in own = {};
  socklen_t length = sizeof(own);
  if (getsockname(descriptor, reinterpret_cast<sockaddr*>(&own), &length) != 0) {
    fail("getsockname");
  }
  return ntohs(own.sin_port);
}

sockaddr_in resolve(const std::string& host, int port) {
  addrinfo hints = {};
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), nullptr, &hints, &found);
  if (error != 0) {
    throw std::runtime_error("getaddrinfo finds no address of " + host + ": " +
                             gai_strerror(error));
  }
  sockaddr_in address = {};
  std::memcpy(&address, found->ai_addr, sizeof(address));
  freeaddrinfo(found);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

uint64_t random_number() {
  std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

}  // namespace

struct NcclHeartbeats::Datagram {
  uint64_t group = 0;
  int64_t started = 0;
  int32_t rank = 0;
  int32_t failed = 0;
  int32_t num_culprits = 0;
  int32_t culprits[kMostCulprits] = {};
  char text[768] = {};  ///< zero-terminated
};

NcclHeartbeats::NcclHeartbeats(Communicator& bootstrap)
    : rank_(bootstrap.rank()), socket_(open_socket()), states_(bootstrap.size()) {
  const std::string host = host_name();
  const auto introductions =
      all_gather_strings(bootstrap, c10::str(host, ' ', port_of(socket_), ' ', random_number()));
  succeed_together(bootstrap, [&] {
    for (const std::string& introduction : introductions) {
      std::string name;
      int port = 0;
      uint64_t number = 0;
      std::istringstream(introduction) >> name >> port >> number;
      group_ ^= number;
      addresses_.push_back(resolve(reachable_name(name, host), port));
    }
  });
}

NcclHeartbeats::~NcclHeartbeats() { close(socket_); }

void NcclHeartbeats::send_to_all(const Datagram& datagram) const {
  for (size_t peer = 0; peer < addresses_.size(); ++peer) {
    if (static_cast<int>(peer) != rank_) {
      // A dead peer is no error of this rank's.
      static_cast<void>(sendto(socket_, &datagram, sizeof(datagram), MSG_NOSIGNAL,
                               reinterpret_cast<const sockaddr*>(&addresses_[peer]),
                               sizeof(addresses_[peer])));
    }
  }
}

void NcclHeartbeats::publish(int64_t started) {
  Datagram datagram;
  datagram.group = group_;
  datagram.rank = rank_;
  datagram.started = started;
  send_to_all(datagram);
}

void NcclHeartbeats::listen() {
  Datagram datagram;
  for (;;) {
    const ssize_t length = recv(socket_, &datagram, sizeof(datagram), 0);
    if (length < 0 && errno != ECONNREFUSED) {  // refused: an earlier one, by a dead peer
      return;
    }
    const bool ours = length == sizeof(datagram) && datagram.group == group_ &&
                      datagram.rank >= 0 && datagram.rank < static_cast<int>(states_.size());
    if (!ours) {
      continue;
    }
    State& state = states_[datagram.rank];
    ++state.beats;
    state.started = std::max(state.started, datagram.started);
    if (datagram.failed != 0 && !announced_.has_value()) {
      announced_ = {datagram.text, {datagram.culprits, datagram.culprits + datagram.num_culprits}};
    }
  }
}

std::vector<int> NcclHeartbeats::missing(int64_t sequence, std::chrono::milliseconds heartbeat) {
  listen();
  const std::vector<State> before = states_;
  for (int i = 0; i < 6; ++i) {
    publish(sequence);  // this rank is alive
    std::this_thread::sleep_for(heartbeat / 2);
    listen();
  }
  std::vector<int> silent;
  std::vector<int> behind;
  for (int rank = 0; rank < static_cast<int>(states_.size()); ++rank) {
    if (rank != rank_ && states_[rank].beats == before[rank].beats) {
      silent.push_back(rank);
    } else if (rank != rank_ && states_[rank].started < sequence) {
      behind.push_back(rank);
    }
  }
  return silent.empty() ? behind : silent;
}

void NcclHeartbeats::announce(const Failure& failure) {
  Datagram datagram;
  datagram.group = group_;
  datagram.rank = rank_;
  datagram.failed = 1;
  datagram.num_culprits = static_cast<int32_t>(std::min(failure.culprits.size(), kMostCulprits));
  std::copy_n(failure.culprits.begin(), datagram.num_culprits, datagram.culprits);
  failure.text.copy(datagram.text, sizeof(datagram.text) - 1);
  for (int i = 0; i < kRepeats; ++i) {
    send_to_all(datagram);
  }
}

}  // namespace anabranch
