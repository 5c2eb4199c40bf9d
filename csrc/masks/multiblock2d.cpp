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
  Sampler(const MultiBlock2dParams& p, BlockSize target, BlockSize context, Masks& out)
      : p_(p), target_(target), context_(context), first_(p.grid.height * p.grid.width),
        corners_(p.num_targets), out_(out), row_(out.context.ids.get()) {}

  void draw(int64_t image, Random& random) {
    for (Corner& corner : corners_) corner = draw_corner(p_, target_, random);
    std::fill(first_.begin(), first_.end(), static_cast<int32_t>(p_.num_targets));
    for (int64_t mask = p_.num_targets - 1; mask >= 0; --mask)
      draw_target(mask, &out_.target.ids[(mask * p_.batch + image) * target_.height * target_.width]);
    row_ += out_.context.lengths.emplace_back(draw_context(random));
  }

private:
  void draw_target(int64_t mask, int64_t* ids) {
    const auto [top, left] = corners_[mask];
    for (int64_t y = top; y < top + target_.height; ++y) {
      const int64_t begin = y * p_.grid.width + left;
      std::fill_n(&first_[begin], target_.width, static_cast<int32_t>(mask));
      for (int64_t x = 0; x < target_.width; ++x) *ids++ = begin + x;
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
    int64_t *const row = row_, kept = 0;
    for (int64_t y = corner.top; y < corner.top + context_.height; ++y) {
      const int64_t begin = y * p_.grid.width + corner.left, end = begin + context_.width;
      for (int64_t id = begin; id < end; ++id) {
        row[kept] = id;
        kept += first_[id] >= respected;
      }
    }
    return kept;
  }

  const MultiBlock2dParams& p_;
  const BlockSize target_, context_;
  std::vector<int32_t> first_; // of each patch, the first target that holds it
  std::vector<Corner> corners_;
  Masks& out_;
  int64_t* row_; // the image's context
};

} // namespace

Masks multiblock2d(const MultiBlock2dParams& p, Random& sizes, Random& places) {
  const BlockSize target = p.target_size(sizes.uniform()), context = p.context_size(sizes.uniform());
  const int64_t length = target.height * target.width;
  Masks out;
  out.target.make_room(p.num_targets * p.batch * length);
  out.target.lengths.assign(p.num_targets * p.batch, length);
  out.context.make_room(p.batch * context.height * context.width);
  Sampler sampler(p, target, context, out);
  for (int64_t image = 0; image < p.batch; ++image) sampler.draw(image, places);
  if (p.truncate) out.context.truncate();
  return out;
}

} // namespace jepa
