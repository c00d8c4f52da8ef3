#pragma once

#include <torch/types.h>

#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace anabranch {

/// A grouped product, as far as it depends on it which engine is the fastest.
struct Product {
  std::string kind;  ///< operation and type, such as "dgrad with GLU BFloat16"
  int64_t experts = 0;
  int64_t n = 0;  ///< of the weights [experts, n, k]
  int64_t k = 0;
  int64_t rows = 0;  ///< of all experts, by the first two binary digits
  int skew = 0;  ///< times that the fullest expert's rows are those of the mean, as a power of two

  auto operator<=>(const Product&) const = default;
};

/// The product of an operation and type with rows `counts` of each expert.
Product product_of(const std::string& operation, torch::Dtype dtype, int64_t n, int64_t k,
                   const std::vector<int64_t>& counts);

/// The same where their skew is not known, 0.
Product product_of(const std::string& operation, torch::Dtype dtype, int64_t n, int64_t k,
                   int64_t experts, int64_t rows);
/// See Product::skew.
int skew_of(const std::vector<int64_t>& counts);

/// As it stands in the file of choices, and back; nothing for what is no such text.
std::string to_string(const Product& product);
std::optional<Product> parse_product(const std::string& text);

/// How far apart two products are of which one engine is likely the fastest for both: powers of two
/// between their rows, experts and skews. Infinite for other kinds, n or k.
double distance(const Product& a, const Product& b);

}  // namespace anabranch
