#include "probe.h"

#include <map>

#include "operators.h"
#include "support/check.h"

namespace anabranch::operators {
namespace {

struct Probes {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Probe>> by_number;
  int64_t last = 0;
};

Probes& probes() {
  static auto* const all = new Probes;
  return *all;
}

int64_t number_of(const torch::Tensor& probe) {
  check_input(probe.is_cpu() && probe.scalar_type() == torch::kInt64 && probe.numel() == 1,
              "probe: expected one int64 in host memory");
  return *probe.const_data_ptr<int64_t>();
}

int64_t new_probe() {
  const std::scoped_lock lock(probes().mutex);
  probes().by_number.emplace(++probes().last, std::make_shared<Probe>());
  return probes().last;
}

void release_probe(int64_t number) {
  const std::scoped_lock lock(probes().mutex);
  probes().by_number.erase(number);
}

void reset_probe(const torch::Tensor& probe, bool timed) {
  const auto found = probe_of(probe);
  check_input(found != nullptr, "reset_probe: there is no probe ", number_of(probe));
  const std::scoped_lock lock(found->mutex);
  found->forwards = found->bytes_sent = found->bytes_received = found->collectives = 0;
  found->timed = timed;
  found->times.reset();
}

/// Forwards, bytes sent, bytes received, collectives; stages and their seconds; the experts' load in the last
/// forward, [0] before it.
std::tuple<int64_t, int64_t, int64_t, int64_t, std::vector<std::string>, std::vector<double>,
           torch::Tensor>
read_probe(const torch::Tensor& probe) {
  const auto found = probe_of(probe);
  check_input(found != nullptr, "read_probe: there is no probe ", number_of(probe));
  std::vector<std::string> stages;
  std::vector<double> seconds;
  for (const auto& [stage, taken] : found->times.seconds()) {
    stages.push_back(stage);
    seconds.push_back(taken);
  }
  const std::scoped_lock lock(found->mutex);
  return {
      found->forwards,
      found->bytes_sent,
      found->bytes_received,
      found->collectives,
      stages,
      seconds,
      found->expert_load.defined() ? found->expert_load.clone() : torch::empty({0}, torch::kInt64)};
}

}  // namespace

std::shared_ptr<Probe> probe_of(const torch::Tensor& probe) {
  const int64_t number = number_of(probe);
  const std::scoped_lock lock(probes().mutex);
  const auto found = probes().by_number.find(number);
  return found == probes().by_number.end() ? nullptr : found->second;
}

TORCH_LIBRARY_FRAGMENT(anabranch, library) {
  Operators operators(library);
  operators.def("new_probe() -> int", new_probe);
  operators.def("release_probe(int number) -> ()", release_probe);
  operators.def("reset_probe(Tensor probe, bool timed) -> ()", reset_probe);
  operators.def("read_probe(Tensor probe) -> (int, int, int, int, str[], float[], Tensor)",
                read_probe);
}

}  // namespace anabranch::operators
