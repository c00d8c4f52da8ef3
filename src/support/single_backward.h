#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

namespace anabranch {

/// To be called where a backward begins that has no gradient of its own: throws where one is asked for,
/// which would be zeros otherwise. Python sees a NotImplementedError.
inline void refuse_double_backward(const char* what) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), what,
                              ": the gradient cannot be differentiated again "
                              "(backward was called with create_graph = true)");
}

}  // namespace anabranch
