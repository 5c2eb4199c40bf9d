// numpy arrays out; the generator's state is a tensor's bytes, so that nothing of torch is linked.
#include <algorithm>
#include <optional>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "common/dlpack.h"
#include "masks/masks.h"

namespace jepa {

namespace py = pybind11;

namespace masks_bindings {

// torch's generator, in the state that a tensor of bytes holds, which `give_back` moves on; none without one.
class Places {
public:
  Places(py::handle state, uint64_t seed, uint64_t step) : seed_(seed), step_(step) {
    if (state.is_none()) return;
    const dlpack::Tensor bytes = dlpack::read(state);
    const int64_t size = dlpack::numel_of(bytes);
    if (size != sizeof *state_)
      throw std::invalid_argument("jepa_kernels: a generator's state must be 5056 bytes, got " +
                                  std::to_string(size) + "; pass that of torch's CPU generator");
    state_ = static_cast<TorchGenerator::State*>(dlpack::address_of(bytes));
    generator_.emplace(*state_);
    sizes_.emplace(seed + step);
  }

  // draw(sizes, places), as published where there is a generator of the places, else with the batch's own
  // stream.
  template <class Draw> auto with(uint32_t stream, Draw draw) {
    if (generator_) {
      TorchGenerator sizes = *sizes_;
      return draw(sizes, *generator_);
    }
    Philox random(seed_, step_, stream);
    return draw(random, random);
  }

  void give_back() const {
    if (generator_) *state_ = generator_->state();
  }

private:
  const uint64_t seed_, step_;
  TorchGenerator::State* state_ = nullptr;
  std::optional<TorchGenerator> generator_, sizes_;
};

// Ids [rows, K] or packed [T], and lengths.
static py::tuple arrays_of(const MaskRows& rows, bool rectangular, const py::capsule& owner) {
  const auto count = static_cast<py::ssize_t>(rows.lengths.size()),
             total = static_cast<py::ssize_t>(rows.total());
  std::vector<py::ssize_t> shape{total};
  if (rectangular) shape = {count, count ? total / count : 0};
  return py::make_tuple(py::array_t<int64_t>(shape, rows.ids.get(), owner),
                        py::array_t<int64_t>(count, rows.lengths.data(), owner));
}

// The masks live as long as their arrays.
static py::tuple arrays_of(Masks masks, bool rectangular) {
  const auto* const kept = new Masks(std::move(masks));
  const py::capsule owner(kept, [](void* p) { delete static_cast<Masks*>(p); });
  return arrays_of(kept->context, rectangular, owner) + arrays_of(kept->target, rectangular, owner);
}

// Options by the names that the Python classes give them.
class Options {
public:
  explicit Options(py::dict options) : options_(std::move(options)) {}
  template <class T> T get(const char* name) const { return options_[name].cast<T>(); }
  Range range(const char* name) const {
    const auto [least, most] = get<std::pair<double, double>>(name);
    return {least, most};
  }

  // Of whole batches: groups are cut in Python.
  bool truncate() const { return get<bool>("truncate") && !get<int64_t>("truncate_group"); }

private:
  const py::dict options_;
};

static MultiBlock2dParams params2d(const Options& options, int64_t batch) {
  const auto [height, width] = options.get<std::pair<int64_t, int64_t>>("grid");
  const bool upstream = options.get<bool>("upstream");
  MultiBlock2dParams p{};
  p.batch = batch;
  p.grid = {height, width};
  p.target_scale = options.range("target_scale");
  p.target_aspect = options.range("target_aspect_ratio");
  p.context_scale = options.range("context_scale");
  p.context_aspect = upstream ? 1.0 : static_cast<double>(height) / width;
  p.num_targets = options.get<int64_t>("num_targets");
  p.min_keep = options.get<int64_t>("min_keep");
  p.truncate = options.truncate();
  p.short_of_edge = upstream;
  return p;
}

// Of each spec.
static std::vector<MultiBlock3dParams> params3d(const Options& options, int64_t batch) {
  const auto [frames, height, width] = options.get<std::tuple<int64_t, int64_t, int64_t>>("grid");
  MultiBlock3dParams p{};
  p.batch = batch;
  p.frames = frames;
  p.grid = {height, width};
  p.truncate = options.truncate();
  std::vector<MultiBlock3dParams> all;
  for (const py::handle given : options.get<py::tuple>("specs")) {
    const Options spec(given.attr("__dict__"));
    p.num_blocks = spec.get<int64_t>("num_blocks");
    p.spatial_scale = spec.range("spatial_scale");
    p.temporal_scale = spec.range("temporal_scale");
    p.aspect = spec.range("aspect_ratio");
    const auto shown = static_cast<int64_t>(frames * spec.get<double>("max_context_frames_ratio"));
    p.context_frames = std::max<int64_t>(shown, 1);
    p.max_keep = spec.get<std::optional<int64_t>>("max_keep").value_or(frames * height * width);
    p.full_complement = spec.get<bool>("full_complement");
    p.pred_full_complement = spec.get<bool>("pred_full_complement");
    p.inv_block = spec.get<bool>("inv_block");
    all.push_back(p);
  }
  return all;
}

// (context ids, context lengths, target ids, target lengths). With a state the draws are torch's.
static py::tuple draw2d(const py::dict& options, int64_t batch, uint64_t step, py::handle state) {
  const MultiBlock2dParams p = params2d(Options(options), batch);
  Places generator(state, Options(options).get<uint64_t>("seed"), step);
  Masks masks;
  {
    py::gil_scoped_release nogil;
    masks = generator.with(0, [&](Random& sizes, Random& places) { return multiblock2d(p, sizes, places); });
  }
  generator.give_back();
  return arrays_of(std::move(masks), p.truncate);
}

// The same, spec after spec. No rows where a clip was left no context.
static py::tuple draw3d(const py::dict& options, int64_t batch, uint64_t step, py::handle state) {
  const std::vector<MultiBlock3dParams> params = params3d(Options(options), batch);
  Places generator(state, Options(options).get<uint64_t>("seed"), step);
  Masks masks;
  {
    py::gil_scoped_release nogil;
    MultiBlock3d sampler;
    bool complete = true;
    for (size_t i = 0; i < params.size() && complete; ++i)
      complete = generator.with(static_cast<uint32_t>(i), [&](Random& sizes, Random& places) {
        return sampler.add(params[i], sizes, places);
      });
    if (complete) masks = sampler.rows();
  }
  generator.give_back();
  return arrays_of(std::move(masks), params.size() == 1 && params[0].truncate);
}

static std::pair<int64_t, int64_t> smallest_context(const py::dict& options) {
  const BlockSize size = params2d(Options(options), 0).context_size(0);
  return {size.height, size.width};
}

} // namespace masks_bindings

void bind_masks(py::module_& m) {
  using namespace masks_bindings;
  m.def("multiblock2d", &draw2d);
  m.def("multiblock2d_smallest_context", &smallest_context);
  m.def("multiblock3d", &draw3d);
}

} // namespace jepa
