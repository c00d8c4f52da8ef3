#pragma once

#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <c10/util/accumulate.h>
#include <torch/types.h>

#include <algorithm>
#include <cstddef>

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

/// Rows `first` to `first + count` of a matrix, and of them the columns from `first_column` on, by part_of.
inline torch::Tensor rows_of(const torch::Tensor& matrix, int64_t first, int64_t count,
                             int64_t first_column, int64_t columns) {
  const int64_t element = first * matrix.stride(0) + first_column * matrix.stride(1);
  return part_of(matrix, element * static_cast<int64_t>(matrix.element_size()),
                 matrix.scalar_type(), {count, columns}, matrix.strides());
}

/// All of those rows.
inline torch::Tensor rows_of(const torch::Tensor& matrix, int64_t first, int64_t count) {
  return rows_of(matrix, first, count, 0, matrix.size(1));
}

/// One allocation for several tensors, which lives as long as any of them. First room is asked for, in the order in
/// which parts are then taken. Each part has a storage of its own: no two alias, as LibTorch sees it, and an
/// operator may return them.
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
    const auto bytes =
        c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
    taken_ += rounded(bytes);
    TORCH_INTERNAL_ASSERT(taken_ <= bytes_);
    c10::SmallVector<int64_t, 4> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) {
      strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
    }
    auto part = at::detail::make_tensor<c10::TensorImpl>(
        storage_of(offset, bytes), whole_.key_set(), c10::scalarTypeToTypeMeta(dtype));
    part.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
    return part;
  }

 private:
  /// Bytes of the whole, which it holds.
  c10::Storage storage_of(int64_t offset, int64_t bytes) const {
    auto* const whole = c10::Storage(whole_.storage()).unsafeReleaseStorageImpl();
    const auto release = [](void* held) {
      c10::intrusive_ptr<c10::StorageImpl>::reclaim(static_cast<c10::StorageImpl*>(held));
    };
    return {c10::Storage::use_byte_size_t(), static_cast<size_t>(bytes),
            c10::DataPtr(static_cast<std::byte*>(whole->mutable_data()) + offset, whole, release,
                         whole->device())};
  }

  /// Every part begins where an allocation of its own could.
  static int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  int64_t bytes_ = 0;
  int64_t taken_ = 0;
  torch::Tensor whole_;
};

}  // namespace anabranch
