// Bandwidth of each memory-bound CUDA kernel beside that of a plain device copy in the same run.
// Bytes are those that cannot be avoided: each input read once, each output written once.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/sort.h>
#include <torch/csrc/autograd/autograd.h>
#include <anabranch/router.h>

#include <cstdio>

#include "gpu/measure.h"
#include "kernels/activation.h"
#include "kernels/bias.h"
#include "kernels/plan.h"
#include "kernels/routing.h"
#include "kernels/rows.h"
#include "option_fields.h"

namespace anabranch::benchmark {
namespace {

constexpr int kSets = 4;  // rotated through, so that no input is still in the cache
constexpr int64_t kTopK = 8;
constexpr int64_t kSequences = 8;

const at::TensorOptions kBf16 = at::TensorOptions(at::kCUDA).dtype(at::kBFloat16);
const at::TensorOptions kFloat = kBf16.dtype(at::kFloat);
const at::TensorOptions kIndex = kBf16.dtype(at::kLong);

class Bench {
 public:
  /// `call(set)` moves `bytes`, in which it is compared with a copy.
  void run(const std::string& kernel, int64_t rows, int64_t width, double bytes,
           const std::function<void(int)>& call) {
    int set = 0;
    note(kernel, rows, width, bytes, gpu_milliseconds([&] { call(set++ % kSets); }));
  }

  /// The same of what is over before a host has launched the next: recorded into a CUDA graph.
  void run_recorded(const std::string& kernel, int64_t rows, int64_t width, double bytes,
                    const std::function<void(int)>& call) {
    Replayed all([&] {
      for (int set = 0; set < kSets; ++set) call(set);
    });
    note(kernel, rows, width, bytes, gpu_milliseconds([&] { all(); }) / kSets);
  }

  Json results = Json::array();

 private:
  void note(const std::string& kernel, int64_t rows, int64_t width, double bytes, double ms) {
    const double bandwidth = bytes / ms / 1e6;
    if (kernel == "copy") {
      copy_ = bandwidth;
    }
    std::printf("%-28s %7ld x %-6ld %9.1f us %8.0f GB/s %6.1f %% of copy\n", kernel.c_str(),
                static_cast<long>(rows), static_cast<long>(width), ms * 1e3, bandwidth,
                100 * bandwidth / copy_);
    results.push_back(Json{{"kernel", kernel},
                           {"rows", rows},
                           {"width", width},
                           {"us", ms * 1e3},
                           {"GB_per_s", bandwidth},
                           {"of_copy", bandwidth / copy_}});
  }

  double copy_ = 0;
};

std::vector<at::Tensor> sets(at::IntArrayRef sizes) {
  std::vector<at::Tensor> tensors;
  for (int i = 0; i < kSets; ++i) {
    tensors.push_back(at::randn(sizes, kBf16));
  }
  return tensors;
}

void measure_rows(Bench& bench, int64_t rows, int64_t width) {
  const RowKernels& row_kernels = RowKernels::cuda();
  const PlanKernels& plan_kernels = PlanKernels::cuda();
  const BiasKernels& bias_kernels = BiasKernels::cuda();
  const double row_bytes = 2.0 * static_cast<double>(width);
  const double total = row_bytes * static_cast<double>(rows);
  const auto many = sets({rows, width});
  auto target = at::empty({rows, width}, kBf16);
  bench.run("copy", rows, width, 2 * total, [&](int set) { target.copy_(many[set]); });

  const auto permutation = at::randperm(rows, kIndex);
  bench.run("gather_rows", rows, width, 2 * total + 8.0 * rows,
            [&](int set) { row_kernels.gather_rows(many[set], permutation); });
  // As in permute: each token's row goes to top_k places, and is read from memory once.
  const int64_t tokens = rows / kTopK;
  const auto groups = plan_kernels.group(at::randperm(rows, kIndex).remainder(tokens), tokens);
  bench.run("scatter_rows, to 8 places", rows, width, total + total / kTopK + 8.0 * rows,
            [&](int set) { row_kernels.scatter_rows(many[set].narrow(0, 0, tokens), groups); });
  const auto weights = at::randn({rows}, kFloat);
  bench.run("sum_rows, 8 weighted", rows, width, total + total / kTopK + 20.0 * rows,
            [&](int set) { row_kernels.sum_rows(many[set], groups, weights); });
  const auto pairs = plan_kernels.group(at::randperm(rows, kIndex).remainder(rows / 2), rows / 2);
  bench.run("sum_rows, 2", rows, width, 1.5 * total + 12.0 * rows,
            [&](int set) { row_kernels.sum_rows(many[set], pairs, {}); });

  const std::vector<int64_t> counts(64, rows / 64);
  const auto bias = at::randn({64, width}, kBf16);
  auto biased = sets({rows, width});
  bench.run("add_bias", rows, width, 2 * total,
            [&](int set) { bias_kernels.add_bias(biased[set], bias, counts); });
  bench.run("bias_dot", rows, width, total,
            [&](int set) { bias_kernels.bias_dot(many[set], bias, counts); });
  bench.run("bias_gradient, weighted", rows, width, total,
            [&](int set) { bias_kernels.bias_gradient(many[set], weights, counts); });
}

void measure_activations(Bench& bench, int64_t rows, int64_t n) {
  const ActivationKernels& activation_kernels = ActivationKernels::cuda();
  const double total = 2.0 * static_cast<double>(n * rows);
  const auto hidden = sets({rows, n});
  const auto gated = sets({rows, 2 * n});
  auto dactivated = sets({rows, n});
  const auto weights = at::randn({rows}, kFloat);
  struct Case {
    const char* name;
    Activation activation;
    bool glu;
  };
  for (const auto& [name, activation, glu] :
       {Case{"gelu_tanh", Activation::kGeluTanh, false}, Case{"gelu", Activation::kGelu, false},
        Case{"silu glu", Activation::kSilu, true}}) {
    const auto& input = glu ? gated : hidden;
    bench.run(std::string("activate ") + name, rows, n, (glu ? 3 : 2) * total, [&](int set) {
      activation_kernels.activate(input[set], {activation, glu});
    });
    const ActivationGradient gradient{at::empty_like(input[0]), at::empty_like(weights)};
    bench.run(std::string("activate_backward ") + name, rows, n, (glu ? 6 : 4) * total,
              [&](int set) {
                activation_kernels.activate_backward(dactivated[set], input[set], weights,
                                                     {activation, glu}, gradient);
              });
  }
}

/// Small tensors: microseconds count here, not bandwidth.
void measure_routing(Bench& bench, int64_t tokens, int64_t experts, int64_t top_k) {
  const RoutingKernels& routing_kernels = RoutingKernels::cuda();
  const PlanKernels& plan_kernels = PlanKernels::cuda();
  RoutingRule rule;
  rule.top_k = top_k;
  std::vector<at::Tensor> logits;
  for (int i = 0; i < kSets; ++i) {
    logits.push_back(at::randn({tokens, experts}, kFloat));
  }
  const double bytes = 4.0 * static_cast<double>(tokens * experts);
  bench.run("route k " + std::to_string(top_k), tokens, experts, 2 * bytes,
            [&](int set) { routing_kernels.route(logits[set], rule, {}); });
  const auto routed = routing_kernels.route(logits[0], rule, {});
  const auto dweights = at::randn({tokens, top_k}, kFloat);
  const auto dsum = at::randn({experts}, kFloat);
  const auto dsquared = at::randn({}, kFloat);
  bench.run("route_backward k " + std::to_string(top_k), tokens, experts, 2 * bytes,
            [&](int) { routing_kernels.route_backward(routed, rule, dweights, dsum, dsquared); });
  const double ids = 8.0 * static_cast<double>(tokens * top_k);
  bench.run("plan_local", tokens, top_k, 2 * ids,
            [&](int) { plan_kernels.plan_local(routed.expert_ids, {}, experts); });
  std::vector<int64_t> first;
  for (int64_t r = 0; r <= 8; ++r) {
    first.push_back(r * experts / 8);
  }
  bench.run("plan_send W 8", tokens, top_k, 2 * ids,
            [&](int) { plan_kernels.plan_send(routed.expert_ids, first); });
  const auto rows = plan_kernels.plan_local(routed.expert_ids, {}, experts).assignment_rows;
  bench.run("group by token", tokens, top_k, 2 * ids,
            [&](int) { plan_kernels.group(rows, tokens); });
  const auto sums = routing_kernels.routing_sums(routed.probabilities, routed.logsumexp);
  bench.run("losses", experts, 1, 8.0 * static_cast<double>(experts), [&](int) {
    const auto of_batch = routing_kernels.batch_sums(routed.counts, tokens, sums);
    routing_kernels.batch_losses(of_batch, of_batch.narrow(0, 0, experts), top_k, torch::kFloat32);
  });
}

/// Of a rule, forward and backward.
struct RoutingInputs {
  std::vector<at::Tensor> logits;  ///< [T, E], kSets times
  double bytes = 0;                ///< of one
  at::Tensor dweights, dsum, dsquared;
};

RoutingInputs inputs_of(int64_t tokens, int64_t experts, int64_t top_k) {
  RoutingInputs inputs;
  for (int i = 0; i < kSets; ++i) {
    inputs.logits.push_back(at::randn({tokens, experts}, kFloat));
  }
  inputs.bytes = static_cast<double>(inputs.logits[0].nbytes());
  inputs.dweights = at::randn({tokens, top_k}, kFloat);
  inputs.dsum = at::randn({experts}, kFloat);
  inputs.dsquared = at::randn({}, kFloat);
  return inputs;
}

/// Rules by which a token's experts depend on all tokens.
void measure_rules_of_all(Bench& bench, int64_t tokens, int64_t experts, int64_t top_k) {
  const RoutingKernels& routing_kernels = RoutingKernels::cuda();
  const auto [logits, bytes, dweights, dsum, dsquared] = inputs_of(tokens, experts, top_k);
  RoutingRule plain;
  plain.top_k = top_k;
  // Of experts that choose: whom, and the weights of as many places as there are experts.
  RoutingConditions by_experts;
  by_experts.expert_ids = routing_kernels.choose_tokens(logits[0], plain, {}, kSequences);
  RoutingRule all = plain;
  all.top_k = experts;
  all.renormalize = false;
  for (const int64_t s : {int64_t{1}, kSequences}) {
    bench.run_recorded("choose_tokens of " + std::to_string(s) + " sequences", tokens, experts,
                       3 * bytes,
                       [&](int set) { routing_kernels.choose_tokens(logits[set], plain, {}, s); });
  }
  RoutingConditions biased;
  biased.expert_bias = 0.1 * at::randn({experts}, kFloat);
  // Of a rule that scales: how much each expert's logits are raised, and the choice by them. Where experts' loads are
  // far apart it takes its last round.
  const auto apart = 4 * (logits[0] + at::randn({experts}, kFloat));
  bench.run_recorded("sinkhorn_bias", tokens, experts, bytes,
                     [&](int set) { routing_kernels.sinkhorn_bias(logits[set], {}); });
  bench.run_recorded("sinkhorn_bias of loads far apart", tokens, experts, bytes,
                     [&](int) { routing_kernels.sinkhorn_bias(apart, {}); });
  bench.run_recorded("route by biased logits", tokens, experts, 2 * bytes, [&](int set) {
    routing_kernels.route(logits[set], plain, biased, Choice::kByBiasedLogits);
  });
  bench.run_recorded("route of experts' choice", tokens, experts, 4 * bytes, [&](int set) {
    routing_kernels.route(logits[set], all, by_experts, Choice::kMade);
  });
  const auto chosen_by_experts = routing_kernels.route(logits[0], all, by_experts);
  const auto dall = at::randn({tokens, experts}, kFloat);
  bench.run_recorded("route_backward of experts' choice", tokens, experts, 4 * bytes, [&](int) {
    routing_kernels.route_backward(chosen_by_experts, all, dall, dsum, dsquared);
  });
  bench.run_recorded("both ways, experts' choice", tokens, experts, 8 * bytes, [&](int set) {
    RoutingConditions own;
    own.expert_ids = routing_kernels.choose_tokens(logits[set], plain, {}, 1);
    const auto routed = routing_kernels.route(logits[set], all, own, Choice::kMade);
    routing_kernels.route_backward(routed, all, dall, dsum, dsquared);
  });
  bench.run_recorded("both ways, sinkhorn", tokens, experts, 4 * bytes, [&](int set) {
    RoutingConditions own;
    own.expert_bias = routing_kernels.sinkhorn_bias(logits[set], {});
    const auto routed = routing_kernels.route(logits[set], plain, own, Choice::kByBiasedLogits);
    routing_kernels.route_backward(routed, plain, dweights, dsum, dsquared);
  });
}

/// Every other rule and condition, forward and backward.
void measure_rules(Bench& bench, int64_t tokens, int64_t experts, int64_t top_k) {
  const RoutingKernels& routing_kernels = RoutingKernels::cuda();
  const auto [logits, bytes, dweights, dsum, dsquared] = inputs_of(tokens, experts, top_k);
  const auto measure = [&](const std::string& name, const RoutingRule& rule,
                           const RoutingConditions& conditions, const at::Tensor& dsums) {
    bench.run_recorded("route " + name, tokens, experts, 2 * bytes,
                       [&](int set) { routing_kernels.route(logits[set], rule, conditions); });
    auto routed = routing_kernels.route(logits[0], rule, conditions);
    if (rule.router_score != RouterScore::kSoftmax) {
      routed.probabilities = logits[0];
    }
    bench.run_recorded("route_backward " + name, tokens, experts, 2 * bytes, [&](int) {
      routing_kernels.route_backward(routed, rule, dweights, dsums, dsquared);
    });
  };
  RoutingRule plain;
  plain.top_k = top_k;
  RoutingRule sigmoid = plain;
  sigmoid.router_score = RouterScore::kSigmoid;
  measure("sigmoid", sigmoid, {}, dsum);
  RoutingRule softplus = plain;
  softplus.router_score = RouterScore::kSqrtSoftplus;
  measure("sqrt_softplus", softplus, {}, dsum);
  RoutingRule groups = sigmoid;
  groups.expert_groups = 8;
  groups.top_groups = 4;
  groups.group_score = GroupScore::kTopShareSum;
  RoutingConditions biased;
  biased.expert_bias = 0.1 * at::randn({experts}, kFloat);
  measure("sigmoid, biased, 4 of 8 groups", groups, biased, dsum);
  RoutingConditions padded;
  padded.padding_mask = at::rand({tokens}, kFloat) < 0.1;
  measure("with padding", plain, padded, dsum);
  RoutingConditions chosen;
  chosen.expert_ids = routing_kernels.route(logits[0], plain, {}).expert_ids;
  measure("of given experts", plain, chosen, dsum);
  RoutingConditions sequences;
  sequences.sequences = kSequences;
  measure("backward of sequences", plain, {}, at::randn({kSequences, experts}, kFloat));
  std::vector<at::Tensor> scores;
  for (const auto& logit : logits) scores.push_back(logit.sigmoid());
  bench.run_recorded("bias_histogram", tokens, experts, bytes, [&](int set) {
    routing_kernels.bias_histogram(scores[set], sigmoid, biased);
  });
  bench.run_recorded("route, whole, with sequences", tokens, experts, 2 * bytes,
                     [&](int set) { route(logits[set], plain, sequences); });
  bench.run_recorded("route, whole", tokens, experts, 2 * bytes,
                     [&](int set) { route(logits[set], plain, RoutingConditions()); });
}

/// Whole routers with the gate's product, of rows of 16 bits: a gate costs what it takes more than top_k.
void measure_gates(Bench& bench, int64_t tokens, int64_t experts, int64_t top_k) {
  MoEOptions plain;
  plain.hidden_size = 2048;
  plain.expert_hidden_size = 64;
  plain.num_experts = experts;
  plain.top_k = top_k;
  plain.device = torch::kCUDA;
  auto x = at::randn({tokens, plain.hidden_size}, kBf16).requires_grad_();
  const auto dsum = at::randn({experts}, kFloat);
  const auto measure = [&](const std::string& name, const MoEOptions& options) {
    Router router(options);
    const bool by_experts = options.gate == Gate::kExpertChoice;
    const auto dweights = at::randn({tokens, by_experts ? experts : options.top_k}, kFloat);
    RoutingConditions conditions;
    conditions.sequences = by_experts || options.sequence_balance_coefficient > 0 ? kSequences : 0;
    Replayed step([&] {
      x.mutable_grad().reset();
      router->weight.mutable_grad().reset();
      const auto routing = router->forward(x, conditions);
      torch::autograd::backward({routing.weights, routing.probability_sum}, {dweights, dsum});
    });
    bench.run("router, both ways, " + name, tokens, experts,
              4.0 * static_cast<double>(tokens * plain.hidden_size), [&](int) { step(); });
  };
  for (const auto gate : {Gate::kTopK, Gate::kNoisyTopK, Gate::kSinkhorn, Gate::kExpertChoice}) {
    auto options = plain;
    options.gate = gate;
    options.renormalize = gate != Gate::kExpertChoice;
    measure(name_of(gate), options);
  }
  auto gshard = plain;
  gshard.gate = Gate::kGShard;
  gshard.top_k = 2;
  measure("gshard, top 2", gshard);
  for (const auto forced : {ForcedRouting::kBalanced, ForcedRouting::kRandom}) {
    auto options = plain;
    options.forced_routing = forced;
    measure(std::string("forced ") + name_of(forced), options);
  }
  auto biased = plain;
  biased.router_score = RouterScore::kSigmoid;
  biased.expert_bias = true;
  measure("sigmoid, biased", biased);
  biased.expert_bias_update = BiasUpdate::kQuantile;
  measure("sigmoid, biased by quantile", biased);
  auto sequences = plain;
  sequences.sequence_balance_coefficient = 0.01;
  measure("top_k, sums of sequences", sequences);
  auto wide = plain;
  wide.router_fp64 = true;
  measure("top_k in fp64", wide);
  x = x.detach().to(at::kHalf).requires_grad_();
  measure("top_k of fp16", plain);
}

void run(const Arguments& arguments) {
  Bench bench;
  constexpr int64_t kRows = 65536;
  for (const int64_t width : {1024, 2048, 4096, 7168}) {
    measure_rows(bench, kRows, width);
    if (arguments.quick) {
      break;
    }
  }
  for (const int64_t n : {768, 1024, 2048, 14336}) {
    measure_activations(bench, n > 4096 ? kRows / 4 : kRows, n);
    if (arguments.quick) {
      break;
    }
  }
  measure_routing(bench, 32768, 128, 8);
  measure_routing(bench, 65536, 8, 2);
  measure_rules(bench, 32768, 128, 8);
  measure_rules_of_all(bench, 32768, 128, 8);
  measure_gates(bench, 32768, 128, 8);
  write_gpu_results(arguments, bench.results);
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  return run_benchmark(argc, argv,
                       {"Bandwidth of the memory-bound CUDA kernels beside a device copy",
                        {"json", "commit", "quick"}},
                       run);
}
