// Which of all ranks' rows are whose, and how they travel. All ranks ask for the same, in the same
// order.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace mcn {

class Ranks {
 public:
  // sizes: rows of each rank, in their order; none: there is no group, and n rows are all.
  Ranks(std::vector<int64_t> sizes, int64_t rank, std::string group, int64_t n)
      : sizes_(std::move(sizes)), group_(std::move(group)), n_(n),
        begin_(std::accumulate(sizes_.begin(), sizes_.begin() + rank, int64_t(0))),
        rows_(sizes_.empty() ? n : std::accumulate(sizes_.begin(), sizes_.end(), int64_t(0))) {}

  explicit operator bool() const { return !sizes_.empty(); }  // is there a group
  int64_t count() const { return sizes_.empty() ? 1 : sizes_.size(); }
  int64_t rows() const { return rows_; }
  int64_t begin() const { return begin_; }  // rows before this rank's

  // This rank's part of what all ranks know.
  at::Tensor own(const at::Tensor& all) const { return all.narrow(0, begin_, n_); }
  // This rank's rows of something, to every rank: all ranks' rows.
  at::Tensor rows_to_all(const at::Tensor& own) const { return repeated(own, sizes_); }
  // Numbers, as many on each rank, to every rank: all ranks' numbers.
  at::Tensor to_all(const at::Tensor& own) const { return repeated(own, each(own.size(0))); }
  // What all ranks have for all rows (N, ...), to the rows' owners: (ranks, n, ...).
  at::Tensor to_owners(const at::Tensor& all) const {
    std::vector<int64_t> shape{count(), n_};
    for (int64_t d = 1; d < all.dim(); ++d) shape.push_back(all.size(d));
    return all_to_all(all, sizes_, each(n_)).view(shape);
  }

 private:
  std::vector<int64_t> each(int64_t size) const { return std::vector<int64_t>(count(), size); }
  at::Tensor repeated(const at::Tensor& own, const std::vector<int64_t>& sizes) const {
    std::vector<int64_t> copies(own.dim(), 1);
    copies[0] = count();
    return all_to_all(own.repeat(copies), each(own.size(0)), sizes);
  }
  // Blocks of `in`'s rows, `send` to each rank; returns `receive` rows from each, in rank order. By
  // torch's dispatcher, so that the extension links to no communication library.
  at::Tensor all_to_all(const at::Tensor& in, const std::vector<int64_t>& send,
                        const std::vector<int64_t>& receive) const {
    const auto call = [](const char* name, torch::jit::Stack stack) {
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
      return stack.at(0).toTensor();
    };
    const at::Tensor out =
        call("_c10d_functional::all_to_all_single", {in.contiguous(), receive, send, group_});
    return call("_c10d_functional::wait_tensor", {out});
  }

  std::vector<int64_t> sizes_;
  std::string group_;
  int64_t n_, begin_, rows_;  // this rank's rows, those before them, those of all ranks
};

}  // namespace mcn
