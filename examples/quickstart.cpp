// One MoE layer over all ranks: forward, backward, who sent what to whom.  mpirun -n 4 quickstart
// With --dump FILE, each rank writes what it has computed into FILE.RANK: bits to compare builds by.

#include <anabranch/anabranch.h>
#include <torch/torch.h>

#include <iostream>
#include <string>
#include <vector>

namespace {

std::string numbers(const torch::Tensor& tensor) {
  const auto values = tensor.contiguous();
  return c10::Join(" ", at::IntArrayRef(values.const_data_ptr<int64_t>(), values.numel()).vec());
}

void run(const std::string& dump_file) {
  const auto world = anabranch::make_mpi_communicator();

  anabranch::MoEOptions options;
  options.hidden_size = 64;
  options.expert_hidden_size = 128;
  options.num_experts = 8;
  options.top_k = 2;
  anabranch::MoELayer layer(options, world);

  torch::manual_seed(world->rank());
  // Every rank has another number of tokens; rank 1 has none.
  const int64_t tokens = world->rank() == 1 ? 0 : 100 + 10 * world->rank();
  const auto x = torch::randn({tokens, options.hidden_size}, torch::requires_grad());

  const anabranch::MoEOutput result = layer->forward(x);
  (result.output.square().sum() / 100 + 0.01 * result.balance_loss).backward();
  anabranch::finish_gradients(*layer, anabranch::make_parallel_groups(world));

  // The layer made the same plan in its forward. Rank 0 prints for all: their output would mix.
  const auto router = layer->named_children()["router"]->as<anabranch::Router>();
  const auto plan = layer->exchange().plan(router->forward(x));
  const auto rows = world->all_gather(torch::tensor(plan.send_rows));  // [from, to]
  const auto all_tokens = world->all_gather(torch::tensor(tokens));
  for (int rank = 0; world->rank() == 0 && rank < world->size(); ++rank) {
    std::cout << "rank " << rank << ": " << all_tokens[rank].item<int64_t>()
              << " tokens; rows sent to each rank: " << numbers(rows[rank])
              << "; received from each: " << numbers(rows.select(1, rank)) << '\n';
  }
  if (world->rank() == 0) {
    std::cout << "assignments of each expert: " << numbers(result.expert_load) << "; imbalance "
              << anabranch::imbalance(result.expert_load) << std::endl;
  }
  if (!dump_file.empty()) {
    std::vector<torch::Tensor> computed = {result.output, result.balance_loss, x.grad()};
    for (const auto& parameter : layer->parameters()) {
      computed.insert(computed.end(), {parameter, parameter.grad()});
    }
    torch::save(computed, dump_file + "." + std::to_string(world->rank()));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (!arguments.empty() && (arguments.size() != 2 || arguments[0] != "--dump")) {
    std::cerr << "usage: quickstart [--dump FILE]" << std::endl;
    return 2;
  }
  try {
    run(arguments.empty() ? "" : arguments[1]);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 1;
  }
}
