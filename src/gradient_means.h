#pragma once

#include <anabranch/communicator.h>
#include <anabranch/parameters.h>

#include <vector>

namespace anabranch {

/// What of a list of gradients travels in one message, by place in the list: of one device, and as they
/// travel of one type.
using Bucket = std::vector<size_t>;

/// All of `gradients`, from the last to the first, as backward comes to them; each bucket of at least
/// `bucket_bytes` but for the last of its kind. Depends only on sizes, types and order, so that ranks with
/// the same parameters make the same ones.
std::vector<Bucket> make_buckets(const std::vector<torch::Tensor>& gradients, int64_t bucket_bytes);

/// Gradients that travel together: 16-bit types in fp32, as a sum may overflow where the mean does not, and
/// rounding happens once.
class MeanMessage {
 public:
  /// Copies them.
  explicit MeanMessage(std::vector<torch::Tensor> gradients);
  /// The sum over the ranks of `communicator`, divided by `divisor`. Collective.
  void average(Communicator& communicator, int64_t divisor);
  void bring_back() const;

 private:
  std::vector<torch::Tensor> gradients_;
  torch::Tensor message_;
  std::vector<torch::Tensor> parts_;
};

/// [1] 0, or NaN if a number in `gradients` is not finite; of a type and on a device that travel with
/// `beside`. The host does not wait for the device.
torch::Tensor nan_unless_finite(const std::vector<torch::Tensor>& gradients,
                                const std::vector<torch::Tensor>& beside);

/// Adds what nan_unless_finite has found on all ranks to a number of each expert's gradient, and of the first
/// replicated one: a rank may have no experts.
void tell(const torch::Tensor& not_finite, const std::vector<torch::Tensor>& experts,
          const std::vector<torch::Tensor>& replicated);

/// The parameter's gradient, zeros made for one that is undefined. Throws InputError if it is not dense.
torch::Tensor gradient_of(const ParallelParameter& parameter);

}  // namespace anabranch
