#include "gemm/auto/product.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>

namespace anabranch {
namespace {

/// `size` by its first two binary digits.
int64_t bucket(int64_t size) {
  if (size < 2) {
    return size;
  }
  const int shift = std::bit_width(static_cast<uint64_t>(size)) - 2;
  return size >> shift << shift;
}

double octaves(int64_t a, int64_t b) {
  return std::abs(std::log2(static_cast<double>(a + 1)) - std::log2(static_cast<double>(b + 1)));
}

}  // namespace

int skew_of(const std::vector<int64_t>& counts) {
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (rows == 0) {
    return 0;
  }
  const int64_t largest = *std::max_element(counts.begin(), counts.end());
  const int64_t ratio = 2 * largest * static_cast<int64_t>(counts.size()) / (3 * rows);
  return std::bit_width(static_cast<uint64_t>(ratio));
}

Product product_of(const std::string& operation, torch::Dtype dtype, int64_t n, int64_t k,
                   int64_t experts, int64_t rows) {
  return {c10::str(operation, " ", dtype), experts, n, k, bucket(rows), 0};
}

Product product_of(const std::string& operation, torch::Dtype dtype, int64_t n, int64_t k,
                   const std::vector<int64_t>& counts) {
  Product product = product_of(operation, dtype, n, k, static_cast<int64_t>(counts.size()),
                               std::accumulate(counts.begin(), counts.end(), int64_t{0}));
  product.skew = skew_of(counts);
  return product;
}

std::string to_string(const Product& product) {
  return c10::str(product.kind, " ", product.experts, " experts ", product.n, " x ", product.k,
                  ", from ", product.rows, " rows, skew ", product.skew);
}

std::optional<Product> parse_product(const std::string& text) {
  const size_t word = text.find(" experts ");
  const size_t number = word == std::string::npos || word == 0 ? word : text.rfind(' ', word - 1);
  if (number == std::string::npos) {
    return std::nullopt;
  }
  Product product;
  product.kind = text.substr(0, number);
  long long experts = 0;
  long long n = 0;
  long long k = 0;
  long long rows = 0;
  std::sscanf(text.c_str() + number, " %lld experts %lld x %lld, from %lld rows, skew %d", &experts,
              &n, &k, &rows, &product.skew);
  product.experts = experts;
  product.n = n;
  product.k = k;
  product.rows = rows;
  return to_string(product) == text ? std::optional(product) : std::nullopt;
}

double distance(const Product& a, const Product& b) {
  if (a.kind != b.kind || a.n != b.n || a.k != b.k) {
    return std::numeric_limits<double>::infinity();
  }
  return octaves(a.rows, b.rows) + octaves(a.experts, b.experts) + std::abs(a.skew - b.skew);
}

}  // namespace anabranch
