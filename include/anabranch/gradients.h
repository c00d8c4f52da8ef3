#pragma once

#include <anabranch/parameters.h>

namespace anabranch {

/// Makes every gradient that of the mean of the ranks' losses, after backward and before the
/// optimizer. Replicated parameters: averaged over the world. Expert parameters: they already hold
/// every token of their expert-parallel group, so they are summed over their replicas and divided by
/// the world's size. A gradient that is undefined on this rank counts as zero and is defined
/// afterwards; a parameter that requires none is left alone. Experts' main_grad is meant where it is
/// defined, also below. Collective over the world, in a few
/// coalesced messages of about `bucket_bytes`; 16-bit types travel in fp32 and are rounded once.
void finish_gradients(torch::nn::Module& model, const ParallelGroups& groups,
                      int64_t bucket_bytes = 64 << 20);

/// L2 norm of the whole model's finished gradient, each expert counted once. The same value on
/// every rank, summed in fp64. Collective.
double gradient_norm(const torch::nn::Module& model, const ParallelGroups& groups);

/// Scales the gradients so that their norm is at most `max_norm`; returns the norm before.
/// Collective. Throws InputError if the norm is not finite or `max_norm` is not positive.
double clip_gradient_norm(torch::nn::Module& model, double max_norm, const ParallelGroups& groups);

// The same for gradients that no torch::nn::Module holds.

/// Replaces each with its sum over the ranks of `communicator` divided by `divisor`. Collective.
void average_gradients(const std::vector<torch::Tensor>& gradients, Communicator& communicator,
                       int64_t divisor, int64_t bucket_bytes = 64 << 20);

/// `experts`: of this rank's experts, all of which are spread over `expert_parallel_size` consecutive
/// ranks of the world. Collective.
double gradient_norm(const std::vector<torch::Tensor>& experts,
                     const std::vector<torch::Tensor>& replicated, Communicator& world,
                     int64_t expert_parallel_size);

}  // namespace anabranch
