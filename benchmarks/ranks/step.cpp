// One MoE layer on several ranks, forward and backward: a step's time, its stages, the bytes on every
// link, and the experts' load, with routing of a given skew. launch/scaling.py runs it over a grid.
#include <ATen/Parallel.h>
#include <anabranch/anabranch.h>
#include <c10/core/DeviceGuard.h>
#include <torch/torch.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <iostream>

#include "experts/feed_forward.h"
#include "experts/permute.h"
#include "ranks.h"

namespace anabranch::benchmark {
namespace {

struct Options {
  int64_t tokens = 512;
  int64_t hidden = 256;
  int64_t expert_hidden = 512;
  int64_t experts = 8;
  int64_t top_k = 2;
  double skew = 0;
  int rounds = 7;
  uint64_t seed = 1;
  AllToAll all_to_all = AllToAll::kFlat;
  std::string device = "cpu";
  std::string dtype = "fp32";
  std::string json;
};

constexpr std::array<const char*, 8> kStages = {"route",
                                                "plan",
                                                "dispatch",
                                                "experts",
                                                "combine",
                                                "dispatch_backward",
                                                "experts_backward",
                                                "combine_backward"};

/// Routing of this rank's tokens: distinct experts, the r-th of a hidden order drawn ∝ r^−skew
/// (Gumbel's trick: the largest of log-weights plus Gumbel noise).
Routing draw_routing(const Options& options, int rank, torch::Device device) {
  const auto shared = at::detail::createCPUGenerator(options.seed);
  const auto own = at::detail::createCPUGenerator(options.seed * 1000003 + 1 + rank);
  const auto places = torch::randperm(options.experts, shared, torch::kFloat64) + 1;
  const auto uniform = torch::rand({options.tokens, options.experts}, own, torch::kFloat64);
  const auto scores = -options.skew * places.log() - (-uniform.log()).log();
  Routing routing;
  routing.expert_ids = std::get<1>(scores.topk(options.top_k, 1)).to(device);
  routing.weights = torch::full({options.tokens, options.top_k}, 1.0 / options.top_k, device);
  return routing;
}

torch::TensorOptions tensor_options(const Options& options, torch::Device device) {
  return torch::TensorOptions(device).dtype(options.dtype == "bf16" ? torch::kBFloat16
                                                                    : torch::kFloat32);
}

MoEOptions layer_options(const Options& options, torch::Device device) {
  MoEOptions layer;
  layer.hidden_size = options.hidden;
  layer.expert_hidden_size = options.expert_hidden;
  layer.num_experts = options.experts;
  layer.top_k = options.top_k;
  layer.seed = options.seed;
  layer.dtype = tensor_options(options, device).dtype().toScalarType();
  layer.device = device;
  return layer;
}

class Step {
 public:
  Step(const Options& options, std::shared_ptr<Communicator> world, torch::Device device)
      : options_(options),
        world_(std::move(world)),
        device_(device),
        layer_(layer_options(options, device), world_),
        router_(layer_options(options, device)),
        expert_{make_grouped_gemm_engine(device), Activation::kGeluTanh, false},
        routing_(draw_routing(options, world_->rank(), device)),
        x_(torch::randn({options.tokens, options.hidden}, tensor_options(options, device))),
        dy_(torch::randn_like(x_)) {
    const auto parameters = layer_->named_parameters();
    parameters_.up.weight = parameters["experts.up_weight"].detach();
    parameters_.down.weight = parameters["experts.down_weight"].detach();
  }

  /// The layer as a training step runs it, gate and auxiliary losses left out.
  double whole() {
    return seconds_from_barrier(*world_, device_, [&] {
      auto x = x_.detach().requires_grad_();
      layer_->forward(x, routing_).output.backward(dy_);
      layer_->zero_grad();
    });
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
      dvalues = gradient.dvalues;
      dx = unpermute(gradient.dx, {}, plan_);
    });
    timed([&] { layer_->exchange().combine({dx, dvalues}, plan_); });
    return seconds;
  }

  /// [W, W] bytes of rows from each rank to each other in a step: x and dy to the experts' ranks, y and
  /// dx back.
  torch::Tensor link_bytes() const {
    auto rows = torch::tensor(plan_.send_rows, torch::kInt64);
    rows[world_->rank()] = 0;
    const auto matrix = world_->all_gather(rows);
    return (matrix + matrix.t()) * 2 * options_.hidden * x_.element_size();
  }
  torch::Tensor assignments() const {
    return world_->all_gather(torch::tensor(plan_.assignments(), torch::kInt64));
  }
  torch::Tensor expert_load() const {
    auto load = torch::bincount(routing_.expert_ids.cpu().flatten(), {}, options_.experts);
    world_->all_reduce(load);
    return load;
  }

 private:
  Options options_;
  std::shared_ptr<Communicator> world_;
  torch::Device device_;
  MoELayer layer_;
  Router router_;
  FeedForward expert_;
  ExpertProjections parameters_;
  Routing routing_;
  torch::Tensor x_, dy_;
  ExchangePlan plan_;
};

std::vector<int64_t> to_vector(const torch::Tensor& tensor) {
  const auto flat = tensor.contiguous();
  const auto* data = flat.const_data_ptr<int64_t>();
  return {data, data + flat.numel()};
}

nlohmann::json describe(const Options& options, Communicator& world) {
  return {{"ranks", world.size()},
          {"nodes", nodes(world)},
          {"tokens_per_rank", options.tokens},
          {"hidden", options.hidden},
          {"expert_hidden", options.expert_hidden},
          {"experts", options.experts},
          {"top_k", options.top_k},
          {"skew", options.skew},
          {"seed", options.seed},
          {"rounds", options.rounds},
          {"all_to_all", to_string(options.all_to_all)},
          {"device", options.device},
          {"dtype", options.dtype},
          {"threads", at::get_num_threads()},
          {"torch", TORCH_VERSION}};
}

double least(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

void run(const Options& options) {
  const torch::Device device = rank_device(options.device);
  const c10::DeviceGuard guard(device);
  const auto world = make_world(options.all_to_all, device);
  Step step(options, world, device);
  std::vector<double> whole;
  std::vector<std::vector<double>> stages(kStages.size());
  constexpr int kWarmUp = 2;
  for (int round = -kWarmUp; round < options.rounds; ++round) {
    auto seconds = step.stages();
    seconds.push_back(step.whole());
    const auto slowest = over_ranks_max(*world, seconds);
    for (size_t i = 0; round >= 0 && i < kStages.size(); ++i) {
      stages[i].push_back(slowest[i]);
    }
    if (round >= 0) {
      whole.push_back(slowest.back());
    }
  }
  const auto links = step.link_bytes();
  const auto load = step.expert_load();
  nlohmann::json record = describe(options, *world);
  record["step_ms"] = median(whole) * 1e3;
  record["step_ms_least"] = least(whole) * 1e3;
  for (size_t i = 0; i < kStages.size(); ++i) {
    record["stage_ms"][kStages[i]] = median(stages[i]) * 1e3;
    record["stage_ms_least"][kStages[i]] = least(stages[i]) * 1e3;
  }
  for (const auto& row : links.unbind()) {
    record["link_bytes"].push_back(to_vector(row));
  }
  record["assignments"] = to_vector(step.assignments());
  record["expert_load"] = to_vector(load);
  record["expert_imbalance"] = imbalance(load);
  if (world->rank() == 0) {
    write_record(record, options.json);
  }
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  Options options;
  CLI::App app("One MoE layer on several ranks, forward and backward, with its stages");
  app.option_defaults()->always_capture_default();
  app.add_option("--tokens", options.tokens, "of each rank")->check(CLI::PositiveNumber);
  app.add_option("--hidden", options.hidden)->check(CLI::PositiveNumber);
  app.add_option("--expert-hidden", options.expert_hidden)->check(CLI::PositiveNumber);
  app.add_option("--experts", options.experts, "over all ranks")->check(CLI::PositiveNumber);
  app.add_option("--top-k", options.top_k)->check(CLI::PositiveNumber);
  app.add_option("--skew", options.skew, "s of Zipf's law for the experts' popularity; 0: uniform")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--rounds", options.rounds, "timed steps")->check(CLI::PositiveNumber);
  app.add_option("--seed", options.seed);
  app.add_option("--all-to-all", options.all_to_all, "flat, hierarchical or auto")
      ->transform(CLI::CheckedTransformer(all_to_all_names()));
  app.add_option("--device", options.device, "cpu, or cuda: a GPU for each rank, by NCCL")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--dtype", options.dtype, "of rows and parameters")
      ->check(CLI::IsMember({"fp32", "bf16"}));
  app.add_option("--json", options.json, "file to append the record to (default: print it)");
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
