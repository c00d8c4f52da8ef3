// One Mixture-of-Experts layer over all ranks: forward, backward, and what went from whom to whom.
//   mpirun -n 4 quickstart      or, alone:      quickstart

#include <anabranch/anabranch.h>
#include <torch/torch.h>

#include <iostream>

namespace {

void run() {
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
  const auto loss = result.output.square().sum() / 100 + 0.01 * result.balance_loss;
  loss.backward();
  anabranch::finish_gradients(*layer, anabranch::make_parallel_groups(world));

  // The layer made the same plan in its forward.
  const auto router = layer->named_children()["router"]->as<anabranch::Router>();
  const auto plan = layer->exchange().plan(router->forward(x));
  for (int rank = 0; rank < world->size(); ++rank) {
    if (world->barrier(); rank == world->rank()) {  // one after another
      std::cout << "rank " << rank << ": " << tokens
                << " tokens; rows sent to each rank: " << c10::Join(" ", plan.send_rows)
                << "; received from each: " << c10::Join(" ", plan.receive_rows)
                << "; gradient of x: " << x.grad().norm().item<double>() << std::endl;
    }
  }
  if (world->barrier(); world->rank() == 0) {
    const auto load =
        at::IntArrayRef(result.expert_load.const_data_ptr<int64_t>(), options.num_experts);
    std::cout << "assignments of each expert: " << c10::Join(" ", load.vec()) << "; imbalance "
              << anabranch::imbalance(result.expert_load) << std::endl;
  }
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 1;
  }
}
