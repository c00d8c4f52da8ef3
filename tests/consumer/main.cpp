// A project of its own that uses an installed anabranch.
#include <anabranch/anabranch.h>

#include <ATen/ops/randn.h>

#include <iostream>

int main() {
  anabranch::MoEOptions options;
  options.hidden_size = 16;
  options.expert_hidden_size = 32;
  options.num_experts = 4;
  options.top_k = 2;
  anabranch::MoELayer layer(options);
  const auto x = at::randn({10, 16}).requires_grad_();
  const auto result = layer->forward(x);
  result.output.sum().backward();
  const bool works = result.output.sizes() == x.sizes() && x.grad().defined() &&
                     result.expert_load.sum().item<int64_t>() == 20;
  std::cout << (works ? "works" : "does not work") << std::endl;
  return works ? 0 : 1;
}
