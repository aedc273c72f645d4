#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

// How the rows of a linear layer's batch are taken together. No ISA unit may include this.
namespace personafast {
namespace {

// Rows first to first + count - 1 of a batch in tiles: rows of one slot side by side, and in pairs those that share a
// mask with no other. What a row is multiplied with, and in which order, does not depend on its tile.
class TiledRows {
 public:
  TiledRows(const int32_t* slots, int64_t first, int64_t count, bool soft) : order_(static_cast<size_t>(count)) {
    const auto slot = [&](int64_t t) { return slots == nullptr ? -1 : slots[t]; };
    const auto shared = [&](int64_t t) {
      int64_t rows = 0;
      for (int64_t s = first; s < first + count; ++s) rows += slot(s) == slot(t);
      return rows > 1;
    };
    for (int64_t k = 0; k < count; ++k) order_[k] = first + k;
    std::sort(order_.begin(), order_.end(),
              [&](int64_t s, int64_t t) { return slot(s) != slot(t) ? slot(s) < slot(t) : s < t; });
    const auto alone =
        std::stable_partition(order_.begin(), order_.end(), [&](int64_t t) { return slot(t) < 0 || shared(t); });
    const int64_t pairs_from = alone - order_.begin();
    for (int64_t k = 0; k < pairs_from;) {
      const int32_t mine = slot(order_[k]);
      int64_t end = k + 1;
      while (end < pairs_from && slot(order_[end]) == mine) ++end;
      const int64_t most = mine >= 0 && soft ? kSoftTileRows : kTileRows;
      const int64_t parts = (end - k + most - 1) / most;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = k + (end - k) * part / parts;
        const int64_t to = k + (end - k) * (part + 1) / parts;
        tiles_.push_back({&order_[from], to - from, mine < 0 ? Keep::all : Keep::shared, {mine, mine}});
      }
      k = end;
    }
    for (int64_t k = pairs_from; k < count; k += 2) {
      const int32_t mine = slot(order_[k]);
      const bool pair = k + 1 < count;
      const int32_t other = pair ? slot(order_[k + 1]) : mine;
      tiles_.push_back({&order_[k], pair ? 2 : 1, pair ? Keep::each : Keep::shared, {mine, other}});
    }
    plan_ = {tiles_.data(), static_cast<int64_t>(tiles_.size()), order_.data(), count};
  }

  const LinearPlan& plan() const { return plan_; }

 private:
  std::vector<int64_t> order_;
  std::vector<LinearTile> tiles_;
  LinearPlan plan_;
};

}  // namespace
}  // namespace personafast
