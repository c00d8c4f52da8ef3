#include "support/layer_case.h"

#include <c10/util/StringUtil.h>

#include <cmath>
#include <stdexcept>

#include "support/collectives.h"
#include "support/devices.h"
#include "support/placements.h"
#include "support/tolerance.h"

namespace anabranch::test {
namespace {

// fp32 rounding moves a logit or a hidden value by less than this.
constexpr double kMargin = 1e-5;
constexpr int kMaximumDraws = 1000;

NamedTensors draw_parameters(Random& random, const MoEOptions& options) {
  NamedTensors parameters;
  const auto draw = [&](const std::string& name, torch::IntArrayRef sizes, int64_t fan_in,
                        torch::Dtype dtype) {
    parameters[name] = (random.normal(sizes) / std::sqrt(static_cast<double>(fan_in))).to(dtype);
  };
  const auto draw_experts = [&](const std::string& prefix, int64_t experts, int64_t inner) {
    const int64_t up = options.glu ? 2 * inner : inner;
    const int64_t hidden = options.hidden_size;
    draw(prefix + ".up_weight", {experts, up, hidden}, hidden, options.dtype);
    draw(prefix + ".down_weight", {experts, hidden, inner}, inner, options.dtype);
    if (options.bias) {
      draw(prefix + ".up_bias", {experts, up}, 1, options.dtype);
      draw(prefix + ".down_bias", {experts, hidden}, 1, options.dtype);
    }
  };
  draw("router.weight", {options.num_experts, options.hidden_size}, options.hidden_size,
       accumulation_type(options.dtype));
  draw_experts("experts", options.num_experts, options.expert_hidden_size);
  if (options.shared_expert_hidden_size > 0) {
    draw_experts("shared_expert", 1, options.shared_expert_hidden_size);
  }
  if (options.shared_expert_gate) {
    draw("shared_expert_gate", {1, options.hidden_size}, options.hidden_size, options.dtype);
  }
  return parameters;
}

// The gate sees one coordinate that is the same in all tokens: through it experts are preferred as
// `skew` says, by at most e^8.
void skew_the_gate(Random& random, LayerCase& drawn) {
  if (drawn.skew == Skew::kUniform) {
    return;
  }
  auto preferences =
      skewed_preferences(random, drawn.options.num_experts, drawn.options.top_k, drawn.skew)
          .clamp(-8, 8);
  auto& gate = drawn.parameters.at("router.weight");
  gate.select(1, 0).copy_(preferences / 2);
}

torch::Tensor draw_tokens(Random& random, const LayerCase& drawn, int64_t count) {
  auto x = random.normal({count, drawn.options.hidden_size});
  if (drawn.skew != Skew::kUniform) {
    x.select(1, 0).fill_(2);
  }
  return x.to(drawn.options.dtype);
}

// Token by token: a large batch has a switch somewhere in nearly every draw.
torch::Tensor draw_smooth_input(Random& random, const LayerCase& drawn) {
  const auto reference = make_reference(drawn.parameters, drawn.options, drawn.expert_bias);
  std::vector<torch::Tensor> rows = {draw_tokens(random, drawn, 0)};
  for (int64_t t = 0; t < drawn.tokens; ++t) {
    torch::Tensor row;
    int draws = 0;
    do {
      row = draw_tokens(random, drawn, 1);
      if (++draws > kMaximumDraws) {
        throw std::runtime_error("no input away from a switch: " + drawn.describe());
      }
    } while (reference.margin(row.to(torch::kFloat64), !drawn.routing_from_outside) < kMargin);
    rows.push_back(row);
  }
  return torch::cat(rows);
}

}  // namespace

std::string LayerCase::describe() const {
  return c10::str(
      "h ", options.hidden_size, " n ", options.expert_hidden_size, " E ", options.num_experts,
      " k ", options.top_k, " activation ", static_cast<int>(options.activation),
      options.glu ? " glu" : "", options.bias ? " bias" : "", " shared ",
      options.shared_expert_hidden_size, options.shared_expert_gate ? " (gated)" : "",
      options.renormalize ? " renormalize" : "",
      options.router_score == RouterScore::kSigmoid ? " sigmoid" : "", " scale ",
      options.routing_scale, options.expert_bias ? " expert bias" : "", " groups ",
      options.top_groups, " of ", options.expert_groups,
      options.group_score == GroupScore::kMaximum ? " by maximum" : "",
      options.recompute ? " recompute" : "", " rows at a time ", options.receive_rows_limit,
      " balance ", options.balance, " ", to_string(options.dtype), " tokens ", tokens, " (",
      c10::Join("+", counts), ") ", to_string(skew), " ", to_string(split),
      routing_from_outside ? " routing from outside" : "", " placement ", options.placement);
}

LayerCase draw_layer_case(Random& random, int ranks, const MoEOptions& options, int64_t tokens,
                          Skew skew, Split split, bool routing_from_outside) {
  LayerCase drawn;
  drawn.options = options;
  drawn.options.device = device();
  drawn.tokens = tokens;
  // A single coordinate cannot be the same in all tokens and tell them apart.
  drawn.skew = options.hidden_size == 1 && !routing_from_outside ? Skew::kUniform : skew;
  drawn.split = split;
  drawn.routing_from_outside = routing_from_outside;
  drawn.counts = split_tokens(random, tokens, ranks, split);
  drawn.parameters = draw_parameters(random, options);
  if (options.expert_bias) {
    drawn.expert_bias =
        (0.3 * random.normal({options.num_experts})).to(accumulation_type(options.dtype));
  }
  skew_the_gate(random, drawn);
  drawn.x = draw_smooth_input(random, drawn);
  drawn.doutput = random.normal({tokens, options.hidden_size}, options.dtype);
  if (routing_from_outside) {
    drawn.expert_ids = random_expert_ids(random, tokens, options.num_experts, options.top_k, skew);
    drawn.weights = random.normal({tokens, options.top_k}, accumulation_type(options.dtype));
  }
  return drawn;
}

std::vector<LayerCase> layer_cases(Random& random, int ranks, int64_t sample) {
  std::vector<LayerCase> cases;
  const auto add = [&](const MoEOptions& options, int64_t tokens, Skew skew, Split split,
                       bool routing_from_outside = false) {
    cases.push_back(
        draw_layer_case(random, ranks, options, tokens, skew, split, routing_from_outside));
  };
  MoEOptions plain;
  plain.hidden_size = 16;
  plain.expert_hidden_size = 24;
  plain.num_experts = 8;
  plain.top_k = 2;
  auto everything = plain;
  everything.glu = everything.bias = true;
  everything.shared_expert_hidden_size = 12;
  everything.activation = Activation::kSilu;
  auto one = plain;
  one.num_experts = one.top_k = 1;
  auto all = everything;
  all.num_experts = all.top_k = 5;
  auto single = everything;
  single.top_k = 1;
  single.renormalize = false;
  auto recomputed = everything;
  recomputed.recompute = true;
  add(plain, 0, Skew::kUniform, Split::kEven);  // nobody has anything
  add(everything, 0, Skew::kUniform, Split::kEven);
  add(one, 11, Skew::kUniform, Split::kUneven);  // most ranks own no expert
  add(all, 9, Skew::kUniform, Split::kSomeEmpty);
  add(single, 30, Skew::kOneExpert, Split::kEven);
  single.receive_rows_limit = ranks + 2;
  add(single, 30, Skew::kOneExpert, Split::kEven);
  add(recomputed, 30, Skew::kOneExpert, Split::kOnOneRank);
  everything.receive_rows_limit = ranks;
  add(everything, 25, Skew::kZipf, Split::kUneven);
  everything.receive_rows_limit = 0;
  auto shadowed = everything;  // small experts of many tokens
  shadowed.balance = "shadow";
  shadowed.hidden_size = shadowed.expert_hidden_size = 4;
  add(shadowed, 90, Skew::kOneExpert, Split::kUneven);
  shadowed.balance = "replicas";
  add(shadowed, 90, Skew::kOneExpert, Split::kSomeEmpty);
  shadowed.balance = ranks % 2 == 0 ? "gather:2" : "gather";
  add(shadowed, 40, Skew::kUniform, Split::kUneven);
  shadowed.balance = "shadow";
  shadowed.receive_rows_limit = ranks + 3;
  shadowed.recompute = true;
  add(shadowed, 90, Skew::kZipf, Split::kSomeEmpty, true);
  shadowed.balance = "replicas";
  add(shadowed, 60, Skew::kZipf, Split::kOnOneRank, true);
  add(everything, 1, Skew::kZipf, Split::kOnOneRank);
  auto sliced = everything;  // of 2 and more ranks each has a slice of one expert
  sliced.placement = "sliced";
  sliced.num_experts = sliced.top_k = 1;
  add(sliced, 21, Skew::kUniform, Split::kUneven);
  sliced.num_experts = 2;  // of 3 ranks two have halves, and one all of an expert
  sliced.renormalize = false;
  add(sliced, 30, Skew::kOneExpert, Split::kSomeEmpty);
  add(sliced, 0, Skew::kUniform, Split::kEven);
  add(plain, 20, Skew::kEmptyExperts, Split::kUneven, true);
  auto grouped = everything;  // as DeepSeek-V3
  grouped.router_score = RouterScore::kSigmoid;
  grouped.expert_bias = grouped.shared_expert_gate = true;
  grouped.expert_groups = 4;
  grouped.top_groups = 2;
  grouped.top_k = 3;
  grouped.routing_scale = 2.5;
  add(grouped, 25, Skew::kUniform, Split::kUneven);
  for (int64_t i = 0; i < sample; ++i) {
    MoEOptions options;
    options.hidden_size = random.integer(1, 40);
    options.expert_hidden_size = random.integer(1, 40);
    options.num_experts = random.pick<int64_t>({1, 2, 3, 5, 8, 16});
    options.top_k = random.integer(1, options.num_experts);
    options.activation = static_cast<Activation>(random.integer(0, 3));
    options.glu = random.chance();
    options.bias = random.chance();
    options.shared_expert_hidden_size = random.chance() ? random.integer(1, 20) : 0;
    options.shared_expert_gate = options.shared_expert_hidden_size > 0 && random.chance();
    options.renormalize = random.chance() && (options.top_k > 1 || options.num_experts == 1);
    options.router_score = random.pick<RouterScore>({RouterScore::kSoftmax, RouterScore::kSigmoid});
    options.routing_scale = random.pick<double>({1, 2.5});
    options.expert_bias = random.chance(0.3);
    options.recompute = random.chance();
    options.receive_rows_limit = random.chance(0.3) ? ranks + random.integer(0, 20) : 0;
    options.balance = random.pick<std::string>({"off", "off", "shadow", "replicas", "gather"});
    options.dtype = random.pick(all_dtypes());
    if (options.activation == Activation::kRelu && options.bias) {
      // In 16 bits the product is rounded before the bias joins it: near 0 their sum's sign is open.
      options.dtype = accumulation_type(options.dtype);
    }
    options.seed = random.next();
    add(options, random.integer(0, 60), random.pick(all_skews()), random.pick(all_splits()),
        random.chance(0.25));
    if (random.chance(0.4)) {
      auto& placed = cases.back().options;
      const auto placement =
          random_placement(random, options.num_experts, ranks, options.expert_hidden_size);
      placed.placement = placement.describe();
      if (placement.most_slices() > 1) placed.balance = "off";
    }
  }
  return cases;
}

namespace {

/// [E, ..] of a parameter of all experts.
std::vector<int64_t> whole_shape(const std::string& name, const MoEOptions& options) {
  const int64_t inner = options.expert_hidden_size;
  const int64_t hidden = options.latent_size > 0 ? options.latent_size : options.hidden_size;
  const int64_t up = options.glu ? 2 * inner : inner;
  if (name == "experts.up_weight") return {options.num_experts, up, hidden};
  if (name == "experts.down_weight") return {options.num_experts, hidden, inner};
  return {options.num_experts, name == "experts.up_bias" ? up : hidden};
}

}  // namespace

void set_parameters(MoELayer& layer, const NamedTensors& parameters) {
  const torch::NoGradGuard no_grad;
  const auto& placement = layer->exchange().placement();
  const auto rank = layer->exchange().communicator().rank();
  const auto& options = layer->options();
  for (auto& parameter : layer->named_parameters()) {
    auto values = parameters.at(parameter.key());
    if (parameter.key().rfind("experts.", 0) == 0) {
      values = part_of(values, parameter.key(), placement, rank, options.expert_hidden_size,
                       options.glu);
    }
    parameter.value().copy_(values);
  }
}

void set_expert_bias(MoELayer& layer, const torch::Tensor& expert_bias) {
  for (auto& buffer : layer->named_buffers()) {
    buffer.value().copy_(expert_bias);  // the only one
  }
}

MoELayer make_layer(const LayerCase& layer_case, std::shared_ptr<Communicator> communicator) {
  MoELayer layer(layer_case.options, std::move(communicator));
  set_parameters(layer, layer_case.parameters);
  set_expert_bias(layer, layer_case.expert_bias);
  return layer;
}

torch::Tensor loss_of(const LayerCase& layer_case, const MoEOutput& output,
                      const torch::Tensor& doutput) {
  auto loss = (output.output.to(torch::kFloat64) * doutput.to(torch::kFloat64)).sum();
  if (output.balance_loss.defined()) {
    loss = loss + layer_case.balance_coefficient * output.balance_loss +
           layer_case.z_coefficient * output.z_loss;
  }
  return loss;
}

Step run_step(MoELayer& layer, const LayerCase& layer_case, const std::vector<int64_t>& counts,
              int rank) {
  Step step;
  step.x = shard(layer_case.x, counts, rank).requires_grad_();
  if (layer_case.routing_from_outside) {
    Routing routing;
    routing.expert_ids = shard(layer_case.expert_ids, counts, rank);
    step.weights = shard(layer_case.weights, counts, rank).requires_grad_();
    routing.weights = step.weights;
    step.output = layer->forward(step.x, routing);
  } else {
    step.output = layer->forward(step.x);
  }
  loss_of(layer_case, step.output, shard(layer_case.doutput, counts, rank)).backward();
  return step;
}

NamedTensors gather_gradients(MoELayer& layer, Communicator& communicator) {
  const auto& options = layer->options();
  NamedTensors gradients;
  for (const auto& parameter : layer->named_parameters()) {
    const auto& name = parameter.key();
    const auto& value = parameter.value();
    auto gradient =
        (value.grad().defined() ? value.grad().detach() : torch::zeros_like(value).detach())
            .to(torch::kCPU, torch::kFloat64);
    if (name.rfind("experts.", 0) == 0) {
      auto whole = torch::zeros(whole_shape(name, options), torch::kFloat64);
      add_part(whole, gradient, name, layer->exchange().placement(), communicator.rank(),
               options.expert_hidden_size, options.glu);
      gradient = whole;
    }
    gradients[name] = sum_over_ranks(communicator, gradient);
  }
  return gradients;
}

reference::DenseMoE make_reference(const NamedTensors& parameters, const MoEOptions& options,
                                   const torch::Tensor& expert_bias) {
  const auto find = [&](const std::string& name) {
    const auto found = parameters.find(name);
    return found == parameters.end() ? torch::Tensor() : found->second.to(torch::kFloat64);
  };
  reference::DenseMoE dense;
  dense.gate = find("router.weight");
  dense.up_weight = find("experts.up_weight");
  dense.up_bias = find("experts.up_bias");
  dense.down_weight = find("experts.down_weight");
  dense.down_bias = find("experts.down_bias");
  dense.shared_up_weight = find("shared_expert.up_weight");
  dense.shared_up_bias = find("shared_expert.up_bias");
  dense.shared_down_weight = find("shared_expert.down_weight");
  dense.shared_down_bias = find("shared_expert.down_bias");
  dense.shared_gate = find("shared_expert_gate");
  dense.routing = reference::formula_of(
      options, expert_bias.defined() ? expert_bias.to(torch::kFloat64) : expert_bias);
  dense.activation = options.activation;
  dense.glu = options.glu;
  return dense;
}

namespace {

torch::Tensor gradient_of(const torch::Tensor& leaf) {
  return leaf.grad().defined() ? leaf.grad() : torch::zeros_like(leaf);
}

// The layer is made of products and sums, so with everything squared it gives sums of squares.
Scale scale_of(const LayerCase& layer_case, const torch::Tensor& expert_ids,
               const torch::Tensor& weights) {
  const auto squared = [](const torch::Tensor& tensor) {
    return tensor.detach().to(torch::kFloat64).square().requires_grad_();
  };
  NamedTensors leaves;
  for (const auto& [name, value] : layer_case.parameters) {
    leaves[name] = squared(value);
  }
  auto dense = make_reference(leaves, layer_case.options);
  dense.linear = true;
  const auto x = squared(layer_case.x);
  const auto squared_weights = squared(weights);
  const auto output = dense.forward(x, expert_ids, squared_weights).output;
  (output * squared(layer_case.doutput).detach()).sum().backward();
  const auto root = [](const torch::Tensor& squares) { return std::sqrt(max_abs(squares)); };
  Scale scale = {root(output), root(gradient_of(x)), root(gradient_of(squared_weights)), {}};
  for (const auto& [name, leaf] : leaves) {
    scale.gradients[name] = root(gradient_of(leaf));
  }
  return scale;
}

}  // namespace

Expected run_reference(const LayerCase& layer_case, int ranks) {
  NamedTensors leaves;
  for (const auto& [name, value] : layer_case.parameters) {
    leaves[name] = value.to(torch::kFloat64).clone().requires_grad_();
  }
  const auto dense = make_reference(leaves, layer_case.options, layer_case.expert_bias);
  const auto x = layer_case.x.to(torch::kFloat64).clone().requires_grad_();
  Expected expected;
  if (layer_case.routing_from_outside) {
    const auto weights = layer_case.weights.to(torch::kFloat64).clone().requires_grad_();
    expected.result = dense.forward(x, layer_case.expert_ids, weights);
  } else {
    expected.result = dense.forward(x);
    expected.result.weights.retain_grad();
  }
  // Every rank adds the same auxiliary losses to its own.
  auto loss = (expected.result.output * layer_case.doutput.to(torch::kFloat64)).sum();
  if (expected.result.balance_loss.defined()) {
    loss = loss + ranks * (layer_case.balance_coefficient * expected.result.balance_loss +
                           layer_case.z_coefficient * expected.result.z_loss);
  }
  loss.backward();
  expected.dx = gradient_of(x);
  expected.dweights = gradient_of(expected.result.weights);
  for (const auto& [name, leaf] : leaves) {
    expected.gradients[name] = gradient_of(leaf);
  }
  expected.scale = scale_of(layer_case, expected.result.expert_ids, expected.result.weights);
  return expected;
}

}  // namespace anabranch::test
