#pragma once

#include <torch/types.h>

#include <vector>

namespace anabranch {

// Experts' gradients are divided once. What has been finished is known by the tensor itself, whichever
// parameter holds it, and by its version, which every change in place counts up.

/// Throws InputError for those that are as mark_finished left them, or that one backward has added to
/// since (one that was set to zero before has counted two changes).
void check_unfinished(const std::vector<torch::Tensor>& gradients);

/// As they are now.
void mark_finished(const std::vector<torch::Tensor>& gradients);

/// They begin anew: whatever was added to them is not finished.
void mark_unfinished(const std::vector<torch::Tensor>& gradients);

/// Those that were marked before, now that something else than a backward has changed them.
void mark_again(const std::vector<torch::Tensor>& gradients);

}  // namespace anabranch
