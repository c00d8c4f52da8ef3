#pragma once

#include <anabranch/error.h>
#include <torch/library.h>

#include <utility>
#include <vector>

namespace anabranch::operators {

/// torch::Library, of whose operators InputError is a ValueError in Python. It is thrown as torch's own error of that
/// name, since a std::invalid_argument is Python's ValueError or, as of torch 2.15, its RuntimeError.
class Operators {
 public:
  explicit Operators(torch::Library& library) : library_(library) {}

  void def(const char* schema, const std::vector<at::Tag>& tags) { library_.def(schema, tags); }
  void def(const char* schema) { library_.def(schema); }
  /// `function`: a pointer to one, or a lambda that holds nothing.
  template <typename Function>
  void def(const char* schema, Function function) {
    library_.def(schema, refusing(+function));
  }
  template <typename Function>
  void impl(const char* name, Function function) {
    library_.impl(name, refusing(+function));
  }

 private:
  template <typename Result, typename... Arguments>
  static auto refusing(Result (*function)(Arguments...)) {
    return [function](Arguments... arguments) -> Result {
      try {
        return function(std::forward<Arguments>(arguments)...);
      } catch (const InputError& error) {
        C10_THROW_ERROR(ValueError, error.what());
      }
    };
  }

  torch::Library& library_;
};

}  // namespace anabranch::operators
