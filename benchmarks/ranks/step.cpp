// One MoE layer on several ranks, forward and backward: a step's time, its stages, the bytes on every
// link, and the experts' load, with routing of a given skew. launch/scaling.py runs it over a grid.
#include <ATen/Parallel.h>
#include <anabranch/anabranch.h>
#include <c10/core/DeviceGuard.h>
#include <torch/torch.h>
#include <torch/version.h>

#include <algorithm>
#include <array>

#include "experts/feed_forward.h"
#include "experts/permute.h"
#include "ranks/ranks.h"
#include "support/stage_times.h"

namespace anabranch::benchmark {
namespace {

constexpr std::array<const char*, 8> kStages = {"route",
                                                "plan",
                                                "dispatch",
                                                "experts",
                                                "combine",
                                                "dispatch_backward",
                                                "experts_backward",
                                                "combine_backward"};

/// Routing of this rank's tokens: distinct experts, drawn ∝ their shares (Gumbel's trick: the largest of
/// log-weights plus Gumbel noise).
Routing draw_routing(const Arguments& arguments, int rank, torch::Device device) {
  const auto own = at::detail::createCPUGenerator(arguments.seed * 1000003 + 1 + rank);
  const auto shares = torch::tensor(zipf_shares(arguments.experts, arguments.skew, arguments.seed),
                                    torch::kFloat64);
  const auto uniform = torch::rand({arguments.tokens, arguments.experts}, own, torch::kFloat64);
  const auto scores = shares.log() - (-uniform.log()).log();
  Routing routing;
  routing.expert_ids = std::get<1>(scores.topk(arguments.top_k, 1)).to(device);
  routing.weights = torch::full({arguments.tokens, arguments.top_k}, 1.0 / arguments.top_k, device);
  return routing;
}

torch::TensorOptions tensor_options(const Arguments& arguments, torch::Device device) {
  return torch::TensorOptions(device).dtype(arguments.dtype == "bf16" ? torch::kBFloat16
                                                                      : torch::kFloat32);
}

MoEOptions layer_options(const Arguments& arguments, torch::Device device) {
  MoEOptions layer;
  layer.hidden_size = arguments.hidden;
  layer.expert_hidden_size = arguments.expert_hidden;
  layer.num_experts = arguments.experts;
  layer.top_k = arguments.top_k;
  layer.renormalize = arguments.top_k > 1;
  layer.seed = arguments.seed;
  layer.overlap = arguments.overlap;
  layer.balance = arguments.balance;
  layer.receive_rows_limit = arguments.receive_rows_limit;
  layer.dtype = tensor_options(arguments, device).dtype().toScalarType();
  layer.device = device;
  return layer;
}

class Step {
 public:
  Step(const Arguments& arguments, std::shared_ptr<Communicator> world, torch::Device device)
      : arguments_(arguments),
        world_(std::move(world)),
        device_(device),
        layer_(layer_options(arguments, device), world_),
        router_(layer_options(arguments, device)),
        expert_{make_grouped_gemm_engine(device), Activation::kGeluTanh, false},
        routing_(draw_routing(arguments, world_->rank(), device)),
        x_(torch::randn({arguments.tokens, arguments.hidden}, tensor_options(arguments, device))),
        dy_(torch::randn_like(x_)) {
    const auto parameters = layer_->named_parameters();
    parameters_.up.weight = parameters["experts.up_weight"].detach();
    parameters_.down.weight = parameters["experts.down_weight"].detach();
  }

  /// The layer as a training step runs it, gate and auxiliary losses left out.
  double whole() {
    stage_times_.reset();
    world_->reset_traffic();
    return seconds_from_barrier(*world_, device_, [&] {
      const StageTimes::Measuring measuring(&stage_times_, device_);
      auto x = x_.detach().requires_grad_();
      layer_->forward(x, routing_).output.backward(dy_);
      layer_->zero_grad();
    });
  }
  /// Of the last whole step, seconds in which lent weights were on their way or their gradients on the way back. The
  /// latter on a CPU alone, whose backward runs on the thread that is measured.
  double lending() {
    const auto seconds = stage_times_.seconds();
    const auto of = [&](const char* name) {
      const auto found = seconds.find(name);
      return found == seconds.end() ? 0 : found->second;
    };
    return of("anabranch.loans") + of("anabranch.loans.backward");
  }
  /// Of the last whole step, by all ranks.
  int64_t bytes_sent() {
    auto bytes = torch::tensor(world_->traffic().bytes_sent);
    world_->all_reduce(bytes);
    return bytes.item<int64_t>();
  }

  /// The same in stages, each from a common start.
  std::vector<double> stages() {
    const torch::NoGradGuard no_grad;
    std::vector<double> seconds;
    const auto timed = [&](const auto& call) {
      seconds.push_back(seconds_from_barrier(*world_, device_, call));
    };
    Payload arrived, dy_arrived;
    torch::Tensor results, dx, dvalues;
    timed([&] { router_->forward(x_); });
    timed([&] { plan_ = layer_->exchange().plan(routing_); });
    const auto& counts = plan_.expert_counts;
    timed([&] { arrived = layer_->exchange().dispatch({x_, routing_.weights}, plan_); });
    FeedForwardOutput output;
    timed([&] {
      output = feed_forward(expert_, permuted(arrived.rows, plan_), parameters_, counts, true);
      results = unpermute(output.results, arrived.values, plan_);
    });
    timed([&] { layer_->exchange().combine({results, {}}, plan_); });
    timed([&] { dy_arrived = layer_->exchange().dispatch({dy_, {}}, plan_); });
    timed([&] {
      const auto gradient = feed_forward_backward(expert_, permuted(dy_arrived.rows, plan_),
                                                  permuted(arrived.rows, plan_), output.hidden,
                                                  arrived.values, parameters_, counts);
      dvalues = gradient.drouting_weights;
      dx = unpermute(gradient.dx, {}, plan_);
    });
    timed([&] { layer_->exchange().combine({dx, dvalues}, plan_); });
    return seconds;
  }

  /// Of the layer's last step.
  std::string explain() const { return layer_->explain(); }

  /// [W, W] bytes of rows from each rank to each other in a step: x and dy to the experts' ranks, y and
  /// dx back.
  torch::Tensor link_bytes() const {
    auto rows = torch::tensor(plan_.send_rows, torch::kInt64);
    rows[world_->rank()] = 0;
    const auto matrix = world_->all_gather(rows);
    return (matrix + matrix.t()) * 2 * arguments_.hidden * x_.element_size();
  }
  torch::Tensor assignments() const {
    return world_->all_gather(torch::tensor(plan_.assignments(), torch::kInt64));
  }
  /// [W, E] of each rank's tokens.
  torch::Tensor counts() const {
    return world_->all_gather(
        torch::bincount(routing_.expert_ids.cpu().flatten(), {}, arguments_.experts));
  }

 private:
  Arguments arguments_;
  std::shared_ptr<Communicator> world_;
  torch::Device device_;
  MoELayer layer_;
  Router router_;
  FeedForward expert_;
  ExpertProjections parameters_;
  StageTimes stage_times_;
  Routing routing_;
  torch::Tensor x_, dy_;
  ExchangePlan plan_;
};

std::vector<int64_t> to_vector(const torch::Tensor& tensor) {
  const auto flat = tensor.contiguous();
  const auto* data = flat.const_data_ptr<int64_t>();
  return {data, data + flat.numel()};
}

Json describe(const Arguments& arguments, Communicator& world) {
  return {{"ranks", world.size()},
          {"nodes", nodes(world)},
          {"tokens_per_rank", arguments.tokens},
          {"hidden", arguments.hidden},
          {"expert_hidden", arguments.expert_hidden},
          {"experts", arguments.experts},
          {"top_k", arguments.top_k},
          {"skew", arguments.skew},
          {"seed", arguments.seed},
          {"rounds", arguments.rounds},
          {"all_to_all", to_string(arguments.all_to_all)},
          {"overlap", arguments.overlap},
          {"balance", arguments.balance},
          {"receive_rows_limit", arguments.receive_rows_limit},
          {"device", arguments.device},
          {"dtype", arguments.dtype},
          {"threads", at::get_num_threads()},
          {"torch", TORCH_VERSION}};
}

double least(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

void run(const Arguments& arguments) {
  const torch::Device device = rank_device(arguments.device);
  const c10::DeviceGuard guard(device);
  const auto world = make_world(arguments.all_to_all, device);
  Step step(arguments, world, device);
  std::vector<double> whole, lending;
  std::vector<std::vector<double>> stages(kStages.size());
  constexpr int kWarmUp = 2;
  for (int round = -kWarmUp; round < arguments.rounds; ++round) {
    auto seconds = step.stages();
    seconds.push_back(step.whole());
    seconds.push_back(step.lending());
    const auto slowest = over_ranks_max(*world, seconds);
    for (size_t i = 0; round >= 0 && i < kStages.size(); ++i) {
      stages[i].push_back(slowest[i]);
    }
    if (round >= 0) {
      whole.push_back(slowest[kStages.size()]);
      lending.push_back(slowest.back());
    }
  }
  const int64_t bytes_sent = step.bytes_sent();
  const auto links = step.link_bytes();
  const auto counts = step.counts();
  const auto load = counts.sum(0);
  Json record = describe(arguments, *world);
  record["step_ms"] = median(whole) * 1e3;
  record["step_ms_least"] = least(whole) * 1e3;
  record["lending_ms"] = median(lending) * 1e3;
  record["bytes_sent"] = bytes_sent;
  for (size_t i = 0; i < kStages.size(); ++i) {
    record["stage_ms"][kStages[i]] = median(stages[i]) * 1e3;
    record["stage_ms_least"][kStages[i]] = least(stages[i]) * 1e3;
  }
  for (const auto& row : links.unbind()) {
    record["link_bytes"].push_back(to_vector(row));
  }
  record["assignments"] = to_vector(step.assignments());
  record["expert_load"] = to_vector(load);
  for (const auto& row : counts.unbind()) {
    record["counts"].push_back(to_vector(row));
  }
  record["expert_imbalance"] = imbalance(load);
  record["explain"] = step.explain();
  if (world->rank() == 0) {
    write_record(record, arguments.json);
  }
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  return run_benchmark(
      argc, argv,
      {"One MoE layer on several ranks, forward and backward, with its stages",
       {"tokens", "hidden", "expert-hidden", "experts", "top-k", "skew", "rounds", "seed",
        "all-to-all", "overlap", "balance", "receive-rows-limit", "device", "dtype", "json"}},
      run);
}
