#pragma once

#include <functional>
#include <future>

namespace anabranch {

/// Does `work` on a thread of its own, on which LibTorch's calls record no gradients and take no other thread: those
/// that the program computes with have a team already. Who has the last of the future waits for the end.
std::future<void> beside(std::function<void()> work);

}  // namespace anabranch
