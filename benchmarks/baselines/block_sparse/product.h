#pragma once

namespace anabranch::block_sparse {

/// See products.h.
enum class Product { kSdd, kDsd, kDds };

}  // namespace anabranch::block_sparse
