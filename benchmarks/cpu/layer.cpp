// The layer on one process's CPU, forward and backward with its router, beside the same MoE written
// plainly with LibTorch operations: index_select, an mm per expert, index_add. Same rounds.
#include <anabranch/anabranch.h>
#include <torch/torch.h>

#include <cstdio>

#include "cpu/measure.h"
#include "harness.h"

namespace anabranch::benchmark {
namespace {

constexpr int64_t kTokens = 4096;
constexpr int64_t kHidden = 512;
constexpr int64_t kInner = 1024;

/// The weight of each expert. Indexed one by one, as one would write it first, autograd adds up a
/// gradient as large as all experts for each of them; unbound, it stacks theirs once.
std::vector<torch::Tensor> weights_of(const torch::Tensor& weight, bool unbound) {
  if (unbound) {
    return weight.unbind(0);
  }
  std::vector<torch::Tensor> weights;
  for (int64_t e = 0; e < weight.size(0); ++e) {
    weights.push_back(weight[e]);
  }
  return weights;
}

/// What a user would write without this library, over the layer's own parameters.
torch::Tensor plain_moe(const torch::Tensor& x,
                        const torch::OrderedDict<std::string, torch::Tensor>& p, int64_t experts,
                        int64_t top_k, bool unbound) {
  const auto up = weights_of(p["experts.up_weight"], unbound);
  const auto down = weights_of(p["experts.down_weight"], unbound);
  const auto probabilities = torch::softmax(torch::mm(x, p["router.weight"].t()), 1);
  auto [weights, ids] = probabilities.topk(top_k, 1);
  weights = weights / weights.sum(1, true);
  auto y = torch::zeros_like(x);
  for (int64_t e = 0; e < experts; ++e) {
    const auto chosen = (ids == e).nonzero();
    if (chosen.size(0) == 0) {
      continue;
    }
    const auto token = chosen.select(1, 0);
    const auto rows = x.index_select(0, token);
    const auto hidden = torch::gelu(torch::mm(rows, up[e].t()), "tanh");
    const auto out = torch::mm(hidden, down[e].t());
    const auto weight = weights.index({token, chosen.select(1, 1)}).unsqueeze(1);
    y = y.index_add(0, token, out * weight);
  }
  return y;
}

Json measure(int64_t experts, int64_t top_k, int rounds) {
  torch::manual_seed(1);
  const MoEOptions options{
      .hidden_size = kHidden, .expert_hidden_size = kInner, .num_experts = experts, .top_k = top_k};
  MoELayer layer(options);
  const auto parameters = layer->named_parameters();
  const auto x = torch::randn({kTokens, kHidden}).requires_grad_();
  const auto dy = torch::randn({kTokens, kHidden});
  const auto clear = [&] {
    layer->zero_grad();
    x.mutable_grad().reset();
  };
  const auto ours = [&] {
    layer->forward(x).output.backward(dy);
    clear();
  };
  const auto plain = [&](bool unbound) {
    return [&, unbound] {
      plain_moe(x, parameters, experts, top_k, unbound).backward(dy);
      clear();
    };
  };
  const auto times = milliseconds({ours, plain(false), plain(true)}, rounds);
  const int64_t our_peak = peak_bytes(ours);
  const int64_t plain_peak = peak_bytes(plain(false));
  const int64_t unbound_peak = peak_bytes(plain(true));
  constexpr double kMiB = 1 << 20;
  const double gflop = 3 * 2 * 2e-9 * static_cast<double>(kTokens * top_k * kHidden * kInner);
  std::printf(
      "E %2ld k %ld: %8.1f ms %6.1f GFLOP/s %7.1f MiB; plain %8.1f ms %7.1f MiB, unbound %8.1f ms "
      "%7.1f MiB: %.2f× and %.2f× the speed, %.2f× and %.2f× the memory\n",
      experts, top_k, times[0], gflop / times[0] * 1e3, static_cast<double>(our_peak) / kMiB,
      times[1], static_cast<double>(plain_peak) / kMiB, times[2],
      static_cast<double>(unbound_peak) / kMiB, times[1] / times[0], times[2] / times[0],
      static_cast<double>(our_peak) / static_cast<double>(plain_peak),
      static_cast<double>(our_peak) / static_cast<double>(unbound_peak));
  return {{"tokens", kTokens},
          {"hidden", kHidden},
          {"expert_hidden", kInner},
          {"experts", experts},
          {"top_k", top_k},
          {"layer_ms", times[0]},
          {"plain_ms", times[1]},
          {"unbound_ms", times[2]},
          {"speedup", times[1] / times[0]},
          {"speedup_over_unbound", times[2] / times[0]},
          {"layer_peak_bytes", our_peak},
          {"plain_peak_bytes", plain_peak},
          {"unbound_peak_bytes", unbound_peak}};
}

void run(const Arguments& arguments) {
  Json results = Json::array();
  for (const int64_t experts : {8, 64}) {
    for (const int64_t top_k : {2, 8}) {
      results.push_back(measure(experts, top_k, arguments.rounds));
      if (arguments.quick) {
        return write_results(arguments, results);
      }
    }
  }
  write_results(arguments, results);
}

}  // namespace
}  // namespace anabranch::benchmark

int main(int argc, char** argv) {
  using namespace anabranch::benchmark;
  return run_benchmark(argc, argv,
                       {"MoE layer on the CPU beside plain LibTorch operations, fp32",
                        {"json", "commit", "quick", "rounds", "threads"}},
                       run);
}
