#pragma once

#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <c10/util/accumulate.h>
#include <torch/types.h>

#include <algorithm>

namespace anabranch {

/// A tensor over a part of another's memory, made without LibTorch's dispatcher, whose views cost the host
/// microseconds each. For values that autograd does not follow: the two know nothing of each other. `offset`, in
/// bytes from the other's first element, is a multiple of this one's elements.
inline torch::Tensor part_of(const torch::Tensor& whole, int64_t offset, torch::Dtype dtype,
                             at::IntArrayRef sizes, at::IntArrayRef strides) {
  auto part = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(whole.storage()), whole.key_set(), c10::scalarTypeToTypeMeta(dtype));
  const int64_t first =
      whole.storage_offset() * static_cast<int64_t>(whole.element_size()) + offset;
  part.unsafeGetTensorImpl()->set_sizes_and_strides(
      sizes, strides, first / static_cast<int64_t>(c10::elementSize(dtype)));
  return part;
}

/// One allocation for several tensors that are needed for equally long. First room is asked for, in the order in
/// which parts are then taken.
class Block {
 public:
  /// For a tensor of so many elements.
  Block& room(int64_t count, torch::Dtype dtype) {
    bytes_ += rounded(count * static_cast<int64_t>(c10::elementSize(dtype)));
    return *this;
  }
  void allocate(torch::Device device) {
    whole_ = at::empty({bytes_}, at::TensorOptions(device).dtype(torch::kByte));
  }
  torch::Tensor take(at::IntArrayRef sizes, torch::Dtype dtype) {
    const int64_t offset = taken_;
    taken_ +=
        rounded(c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype)));
    TORCH_INTERNAL_ASSERT(taken_ <= bytes_);
    c10::SmallVector<int64_t, 4> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) {
      strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
    }
    return part_of(whole_, offset, dtype, sizes, strides);
  }

 private:
  /// Every part begins where an allocation of its own could.
  static int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  int64_t bytes_ = 0;
  int64_t taken_ = 0;
  torch::Tensor whole_;
};

}  // namespace anabranch
