#pragma once

#include <map>

#include "huggingface/config.h"
#include "huggingface/keys.h"
#include "model/model_options.h"

namespace train_lm {

/// Of models that transformers has a class for.
struct Family {
  const char* architecture;
  void (*keys)(Keys&, ModelOptions&);  ///< but for `common_keys`
};

const std::map<HfFamily, Family>& families();

/// What all families say alike.
void common_keys(Keys& keys, ModelOptions& model);

}  // namespace train_lm
