#pragma once

#include <anabranch/gradients.h>
#include <anabranch/parameters.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace anabranch {

// Training in 16 bits: parameters and activations of bf16 (fp16), gradients summed in fp32 main gradients,
// masters of fp32 that the optimizer updates and rounds into the parameters. For parameters of fp32 and
// fp64 the same code works on the parameters and their grad() themselves. Nothing here waits for a GPU.

/// The trained parameters of `model`, those of 16 bits with a main gradient of zeros: that of experts'
/// weights is added to by the layer's backward, unrounded, the others' by `accumulate_gradients`.
std::vector<ParallelParameter> trained_parameters(torch::nn::Module& model,
                                                  const ParallelGroups& groups);

/// After each backward: what lies in grad() beside a main gradient is added to it, and dropped.
void accumulate_gradients(const std::vector<ParallelParameter>& parameters);

/// After the step: main gradients become zero, and the others' grad() undefined.
void zero_gradients(const std::vector<ParallelParameter>& parameters);

/// Their gradients, for finish_gradients and the norms; zeros made for those that are undefined.
Gradients gradients_of(const std::vector<ParallelParameter>& parameters);

/// What updates parameters by their gradients. Its state is made when it is, and lies over the ranks as
/// the parameters do.
class ParallelOptimizer {
 public:
  virtual ~ParallelOptimizer() = default;

  /// One update by gradient() · `scale` [] fp64 on the parameters' device, as GradientScale has it. A scale
  /// that is not finite: no change, on this and every rank alike, and the step does not count.
  virtual void step(double learning_rate, const torch::Tensor& scale) = 0;

  /// For checkpoints, under the names of CheckpointContents; loading writes into the same tensors.
  virtual std::vector<ParallelParameter> state() const = 0;
  /// Its class, in checkpoints.
  virtual std::string name() const = 0;
};

/// Of AdamW; the learning rate comes with each step.
struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.1;  ///< of parameters with two dimensions or more
  /// bf16: means and squares of gradients of 16-bit and fp32 parameters take half the memory, and are
  /// rounded stochastically, by noise that depends on the seed, the step and the number's place in the
  /// model alone.
  torch::Dtype state = torch::kFloat32;
  uint64_t seed = 0;
};

/// AdamW (arXiv:1711.05101). Checkpoints have its state by the names of LibTorch's AdamW, and masters.
std::unique_ptr<ParallelOptimizer> make_adamw(const std::vector<ParallelParameter>& parameters,
                                              const AdamWOptions& options);

/// Near the nearest matrix with orthonormal rows or columns: of each of `matrices` [.., m, n], all singular
/// values become about 1, by Newton and Schulz's iteration with Jordan's coefficients (Muon,
/// https://kellerjordan.github.io/posts/muon). In bf16 on a GPU, otherwise in fp32 at least; returned in the
/// type given. A zero matrix stays zero.
torch::Tensor orthogonalized(const torch::Tensor& matrices, int64_t iterations = 5);

/// A parameter of matrices: its last two dimensions, those before, experts among them, number them.
struct MuonParameter {
  ParallelParameter parameter;  ///< [.., m, n]
  /// Matrices of equal size one below the other in each: 2 of a GLU's up-projection.
  int64_t parts = 1;
};

/// Of Muon; the learning rate, one for its matrices and AdamW's parameters, comes with each step.
struct MuonOptions {
  double momentum = 0.95;
  int64_t iterations = 5;
  double weight_decay = 0.1;
  AdamWOptions adamw;  ///< of the others
};

/// Muon for matrices of hidden layers, each expert's its own, and AdamW for all other parameters: embedding,
/// head, norms, biases. The step is 0.2 · √max(m, n) times the orthogonalized momentum (Nesterov's), as large
/// as AdamW's usually is, so that both take one learning rate (Moonlight, arXiv:2502.16982). On a GPU its bits
/// depend on how many of a parameter's matrices this rank has, as those of a batch's products do.
std::unique_ptr<ParallelOptimizer> make_muon(const std::vector<MuonParameter>& matrices,
                                             const std::vector<ParallelParameter>& others,
                                             const MuonOptions& options);

/// Makes the optimizer of a part of the parameters: of those that this rank updates.
using OptimizerMaker =
    std::function<std::unique_ptr<ParallelOptimizer>(const std::vector<ParallelParameter>&)>;

/// ZeRO's first stage (arXiv:1910.02054) over what `make` makes: every parameter is updated by one of the
/// ranks that have it, which alone has its master and state, and then sent to the others. Replicated
/// parameters lie over the world, each as a whole; experts over their replicas, each for itself. Parameters,
/// state and checkpoints have the bits they have without. `step` is collective over the world.
std::unique_ptr<ParallelOptimizer> make_sharded_optimizer(
    const std::vector<ParallelParameter>& parameters, const ParallelGroups& groups,
    const OptimizerMaker& make);

}  // namespace anabranch
