// V-JEPA's masks: the targets are the union of blocks of patches and frames, the context is the rest.
#include <algorithm>
#include <utility>

#include "masks/masks.h"

namespace jepa {

namespace {

struct Block {
  int64_t frames;
  BlockSize size;
};

Block draw_block(const MultiBlock3dParams& p, Random& random) {
  const auto frames = static_cast<int64_t>(p.frames * p.temporal_scale.at(random.uniform()));
  const auto patches =
      static_cast<int64_t>(p.grid.height * p.grid.width * p.spatial_scale.at(random.uniform()));
  return {std::max<int64_t>(frames, 1), block_size(patches, p.aspect.at(random.uniform()), p.grid)};
}

// One clip at a time.
class Sampler {
public:
  Sampler(const MultiBlock3dParams& p, Block block)
      : p_(p), block_(block), patches_(p.frames * p.grid.height * p.grid.width), visible_(patches_),
        context_(patches_), target_(patches_) {}

  // False where no draw leaves a context.
  bool draw(Random& random, Masks& out) {
    for (int64_t i = 0; i < p_.MAX_TRIES; ++i) {
      const int64_t kept = draw_once(random);
      if (kept == 0) continue;
      out.context.add(context_, kept);
      out.target.add(target_, patches_ - kept);
      return true;
    }
    return false;
  }

private:
  int64_t draw_once(Random& random) {
    std::fill(visible_.begin(), visible_.end(), true);
    for (int64_t i = 0; i < p_.num_blocks; ++i) hide_block(random);
    const int64_t frame = p_.grid.height * p_.grid.width;
    std::fill(visible_.begin() + p_.context_frames * frame, visible_.end(), false);
    return split();
  }

  void hide_block(Random& random) {
    const int64_t top = random.below(p_.grid.height - block_.size.height + 1);
    const int64_t left = random.below(p_.grid.width - block_.size.width + 1);
    const int64_t start = random.below(p_.frames - block_.frames + 1);
    for (int64_t t = start; t < start + block_.frames; ++t) {
      for (int64_t y = top; y < top + block_.size.height; ++y) {
        const auto row = visible_.begin() + (t * p_.grid.height + y) * p_.grid.width + left;
        std::fill(row, row + block_.size.width, false);
      }
    }
  }

  int64_t split() {
    int64_t kept = 0;
    for (int64_t id = 0; id < patches_; ++id) {
      context_[kept] = id; // one of the two stays
      target_[id - kept] = id;
      kept += visible_[id];
    }
    return kept;
  }

  const MultiBlock3dParams& p_;
  const Block block_;
  const int64_t patches_;
  std::vector<uint8_t> visible_;
  std::vector<int64_t> context_, target_;
};

// A random choice of at most `most` ids of each row, in order.
void thin(MaskRows& rows, int64_t most, Random& random) {
  const int64_t* from = rows.ids.data();
  int64_t* to = rows.ids.data();
  for (int64_t& length : rows.lengths) {
    int64_t wanted = std::min(length, most);
    const int64_t kept = wanted;
    for (int64_t left = length; left > 0; --left, ++from) {
      if (left == wanted || (wanted > 0 && random.below(left) < wanted)) {
        *to++ = *from;
        --wanted;
      }
    }
    length = kept;
  }
  rows.ids.resize(to - rows.ids.data());
}

// The ids below `patches` that each row lacks.
MaskRows complement(const MaskRows& rows, int64_t patches) {
  MaskRows out;
  const int64_t* ids = rows.ids.data();
  for (int64_t length : rows.lengths) {
    const int64_t* const end = ids + length;
    for (int64_t id = 0; id < patches; ++id) {
      if (ids != end && *ids == id)
        ++ids;
      else
        out.ids.push_back(id);
    }
    out.lengths.push_back(patches - length);
  }
  return out;
}

} // namespace

Masks multiblock3d(const MultiBlock3dParams& p, Random& sizes, Random& places) {
  Sampler sampler(p, draw_block(p, sizes));
  Masks out;
  for (int64_t clip = 0; clip < p.batch; ++clip)
    if (!sampler.draw(places, out)) return {};
  if (p.truncate) {
    out.context.truncate(p.max_keep);
    out.target.truncate();
  } else {
    thin(out.context, p.max_keep, places);
  }
  const int64_t patches = p.frames * p.grid.height * p.grid.width;
  if (p.full_complement)
    out.target = complement(out.context, patches);
  else if (p.pred_full_complement)
    out.context = complement(out.target, patches);
  if (p.inv_block) std::swap(out.context, out.target);
  return out;
}

} // namespace jepa
