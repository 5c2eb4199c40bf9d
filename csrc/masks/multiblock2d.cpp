// I-JEPA's masks: a large context block minus the target blocks.
#include <algorithm>

#include "masks/masks.h"

namespace jepa {

static constexpr int MAX_TRIES = 20; // with the same targets respected

struct Corner {
  int64_t top, left;
};

static Corner draw_corner(const MultiBlock2dParams& p, BlockSize size, Random& random) {
  const int64_t places = p.short_of_edge ? 0 : 1;
  const int64_t top = random.below(p.grid.height - size.height + places);
  return {top, random.below(p.grid.width - size.width + places)};
}

BlockSize MultiBlock2dParams::target_size(double u) const {
  const auto patches = static_cast<int64_t>(grid.height * grid.width * target_scale.at(u));
  return block_size(patches, target_aspect.at(u), {grid.height - 1, grid.width - 1});
}

BlockSize MultiBlock2dParams::context_size(double u) const {
  const auto patches = static_cast<int64_t>(grid.height * grid.width * context_scale.at(u));
  return block_size(patches, context_aspect, {grid.height - 1, grid.width - 1});
}

namespace {

// One image at a time.
class Sampler {
public:
  Sampler(const MultiBlock2dParams& p, BlockSize target, BlockSize context)
      : p_(p), target_(target), context_(context), first_(p.grid.height * p.grid.width),
        corners_(p.num_targets), row_(context.height * context.width) {}

  void draw(int64_t image, Random& random, Masks& out) {
    for (Corner& corner : corners_) corner = draw_corner(p_, target_, random);
    std::fill(first_.begin(), first_.end(), p_.num_targets);
    for (int64_t mask = p_.num_targets - 1; mask >= 0; --mask)
      draw_target(mask, &out.target.ids[(mask * p_.batch + image) * target_.height * target_.width]);
    out.context.add(row_, draw_context(random));
  }

private:
  void draw_target(int64_t mask, int64_t* ids) {
    const auto [top, left] = corners_[mask];
    for (int64_t y = top; y < top + target_.height; ++y) {
      for (int64_t x = left; x < left + target_.width; ++x) {
        const int64_t id = y * p_.grid.width + x;
        first_[id] = mask;
        *ids++ = id;
      }
    }
  }

  // After MAX_TRIES blocks with too few patches left, one target more, the last first, may be overlapped.
  int64_t draw_context(Random& random) {
    for (int64_t respected = p_.num_targets;; respected = std::max<int64_t>(respected - 1, 0)) {
      for (int i = 0; i < MAX_TRIES; ++i) {
        const int64_t kept = keep_outside(respected, draw_corner(p_, context_, random));
        if (kept > p_.min_keep) return kept;
      }
    }
  }

  // The ids of a context block that lie in none of the first `respected` targets.
  int64_t keep_outside(int64_t respected, Corner corner) {
    int64_t kept = 0;
    for (int64_t y = corner.top; y < corner.top + context_.height; ++y) {
      for (int64_t x = corner.left; x < corner.left + context_.width; ++x) {
        const int64_t id = y * p_.grid.width + x;
        row_[kept] = id;
        kept += first_[id] >= respected;
      }
    }
    return kept;
  }

  const MultiBlock2dParams& p_;
  const BlockSize target_, context_;
  std::vector<int64_t> first_; // of each patch, the first target that holds it
  std::vector<Corner> corners_;
  std::vector<int64_t> row_;
};

} // namespace

Masks multiblock2d(const MultiBlock2dParams& p, Random& sizes, Random& places) {
  const BlockSize target = p.target_size(sizes.uniform()), context = p.context_size(sizes.uniform());
  const int64_t length = target.height * target.width;
  Masks out;
  out.target.ids.resize(p.num_targets * p.batch * length);
  out.target.lengths.assign(p.num_targets * p.batch, length);
  Sampler sampler(p, target, context);
  for (int64_t image = 0; image < p.batch; ++image) sampler.draw(image, places, out);
  if (p.truncate) out.context.truncate();
  return out;
}

} // namespace jepa
