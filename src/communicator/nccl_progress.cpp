#include "communicator/nccl_progress.h"

#include <unistd.h>

#include <sstream>
#include <thread>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "communicator/agreement.h"

namespace anabranch {
namespace {

constexpr const char* kFailure = "failure";

std::string key_of(int rank) { return "rank " + std::to_string(rank); }

std::string host_name() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0) {
    throw std::runtime_error("gethostname failed");
  }
  return name;
}

c10::intrusive_ptr<c10d::Store> connect(const std::string& host, int port, bool is_server,
                                        std::chrono::milliseconds timeout) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(port);
  options.isServer = is_server;
  options.waitWorkers = false;
  options.timeout = timeout;
  return c10::make_intrusive<c10d::TCPStore>(host, options);
}

}  // namespace

NcclProgress::NcclProgress(Communicator& bootstrap, std::chrono::milliseconds deadline)
    : rank_(bootstrap.rank()), size_(bootstrap.size()) {
  // A host's name need not lead to itself in a container: ranks of one host take the loop device.
  const auto hosts = all_gather_strings(bootstrap, host_name());
  const bool one_host = std::equal(hosts.begin() + 1, hosts.end(), hosts.begin());
  const std::string host = one_host ? "127.0.0.1" : hosts[0];
  int port = 0;
  if (rank_ == 0) {
    const auto server = connect(host, 0, true, deadline);
    port = c10::static_intrusive_pointer_cast<c10d::TCPStore>(server)->getPort();
    store_ = server;
  }
  port = std::stoi(all_gather_strings(bootstrap, std::to_string(port))[0]);
  if (rank_ != 0) {
    store_ = connect(host, port, false, deadline);
  }
  publish(0);
  bootstrap.barrier();  // from here on every rank's key exists
}

NcclProgress::~NcclProgress() = default;

void NcclProgress::publish(int64_t started) {
  store_->set(key_of(rank_), std::to_string(++beats_) + " " + std::to_string(started));
}

std::vector<NcclProgress::State> NcclProgress::read() {
  std::vector<State> states;
  for (int rank = 0; rank < size_; ++rank) {
    State state;
    std::istringstream(store_->get_to_str(key_of(rank))) >> state.beats >> state.started;
    states.push_back(state);
  }
  return states;
}

std::vector<int> NcclProgress::missing(int64_t sequence, std::chrono::milliseconds heartbeat) {
  const auto before = read();
  for (int i = 0; i < 3; ++i) {
    std::this_thread::sleep_for(heartbeat);
    publish(sequence);  // this rank is alive
  }
  const auto after = read();
  std::vector<int> ranks;
  for (int rank = 0; rank < size_; ++rank) {
    const bool dead = after[rank].beats == before[rank].beats;
    if (dead || after[rank].started < sequence) {
      ranks.push_back(rank);
    }
  }
  return ranks;
}

void NcclProgress::announce(const Failure& failure) {
  std::ostringstream message;
  message << failure.culprits.size() << ' ';
  for (const int culprit : failure.culprits) {
    message << culprit << ' ';
  }
  message << failure.text;
  store_->compareSet(kFailure, std::string(), message.str());
}

std::optional<NcclProgress::Failure> NcclProgress::announced() {
  if (!store_->check({kFailure})) {
    return std::nullopt;
  }
  std::istringstream message(store_->get_to_str(kFailure));
  size_t count = 0;
  message >> count;
  Failure failure;
  failure.culprits.resize(count);
  for (int& culprit : failure.culprits) {
    message >> culprit;
  }
  message.ignore();  // the blank before the text
  failure.text.assign(std::istreambuf_iterator<char>(message), {});
  return failure;
}

}  // namespace anabranch
