// What both samplers share.
#include <algorithm>
#include <cmath>

#include "masks/masks.h"

namespace jepa {

BlockSize block_size(int64_t patches, double aspect, BlockSize most) {
  // nearbyint rounds halves to even, as Python does
  const auto height = static_cast<int64_t>(std::nearbyint(std::sqrt(patches * aspect)));
  const auto width = static_cast<int64_t>(std::nearbyint(std::sqrt(patches / aspect)));
  return {std::clamp<int64_t>(height, 1, most.height), std::clamp<int64_t>(width, 1, most.width)};
}

void MaskRows::truncate() {
  const int64_t length = *std::min_element(lengths.begin(), lengths.end());
  const int64_t* from = ids.get();
  int64_t* to = ids.get();
  for (int64_t& row : lengths) {
    to = std::copy(from, from + length, to);
    from += row;
    row = length;
  }
}

} // namespace jepa
