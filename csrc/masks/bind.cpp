// numpy arrays out; the generator's state is bytes in and out, so that nothing of torch is needed.
#include <algorithm>
#include <cstring>
#include <optional>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "masks/masks.h"

namespace jepa {

namespace py = pybind11;

namespace masks_bindings {

// torch's generator, as `state` left it; none without a state.
static std::optional<TorchGenerator> torch_generator(const std::optional<py::bytes>& state) {
  if (!state) return std::nullopt;
  TorchGenerator::State parsed;
  const std::string_view bytes = *state;
  if (bytes.size() != sizeof parsed)
    throw std::invalid_argument("jepa_kernels: a generator's state must be 5056 bytes, got " +
                                std::to_string(bytes.size()) + "; pass that of torch's CPU generator");
  std::memcpy(&parsed, bytes.data(), sizeof parsed);
  return TorchGenerator(parsed);
}

// draw(sizes, places), as published where there is a generator of the places, else with the batch's own
// stream.
template <class Draw>
static auto with_generators(uint64_t seed, uint64_t step, uint32_t stream,
                            std::optional<TorchGenerator>& places, Draw draw) {
  if (places) {
    TorchGenerator sizes(seed + step);
    return draw(sizes, *places);
  }
  Philox random(seed, step, stream);
  return draw(random, random);
}

// [rows, K] or packed [T]; the vector lives as long as the array.
static py::array ids_of(MaskRows& rows, bool rectangular) {
  const auto count = static_cast<py::ssize_t>(rows.lengths.size());
  const auto total = static_cast<py::ssize_t>(rows.ids.size());
  auto* const kept = new std::vector<int64_t>(std::move(rows.ids));
  const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  std::vector<py::ssize_t> shape{total};
  if (rectangular) shape = {count, count ? total / count : 0};
  return py::array_t<int64_t>(shape, kept->data(), owner);
}

static py::tuple arrays_of(Masks masks, bool rectangular, const std::optional<TorchGenerator>& places) {
  const auto lengths = [](const MaskRows& rows) {
    return py::array_t<int64_t>(static_cast<py::ssize_t>(rows.lengths.size()), rows.lengths.data());
  };
  const py::array context = lengths(masks.context), target = lengths(masks.target);
  py::object state = py::none();
  if (places)
    state = py::bytes(reinterpret_cast<const char*>(&places->state()), sizeof(TorchGenerator::State));
  return py::make_tuple(ids_of(masks.context, rectangular), context, ids_of(masks.target, rectangular),
                        target, state);
}

// Options by the names that the Python classes give them.
class Options {
public:
  explicit Options(const py::dict& options) : options_(options) {}
  template <class T> T get(const char* name) const { return options_[name].cast<T>(); }
  Range range(const char* name) const {
    const auto [least, most] = get<std::pair<double, double>>(name);
    return {least, most};
  }

private:
  const py::dict& options_;
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
  p.truncate = options.get<bool>("truncate");
  p.short_of_edge = upstream;
  return p;
}

static MultiBlock3dParams params3d(const Options& options, const Options& spec, int64_t batch) {
  const auto [frames, height, width] = options.get<std::tuple<int64_t, int64_t, int64_t>>("grid");
  const auto max_keep = spec.get<std::optional<int64_t>>("max_keep");
  MultiBlock3dParams p{};
  p.batch = batch;
  p.frames = frames;
  p.grid = {height, width};
  p.num_blocks = spec.get<int64_t>("num_blocks");
  p.spatial_scale = spec.range("spatial_scale");
  p.temporal_scale = spec.range("temporal_scale");
  p.aspect = spec.range("aspect_ratio");
  const auto shown = static_cast<int64_t>(frames * spec.get<double>("max_context_frames_ratio"));
  p.context_frames = std::max<int64_t>(shown, 1);
  p.max_keep = max_keep.value_or(frames * height * width);
  p.truncate = options.get<bool>("truncate");
  p.full_complement = spec.get<bool>("full_complement");
  p.pred_full_complement = spec.get<bool>("pred_full_complement");
  p.inv_block = spec.get<bool>("inv_block");
  return p;
}

// (context ids, context lengths, target ids, target lengths, state). With a state the draws are torch's.
static py::tuple draw2d(const py::dict& options, int64_t batch, uint64_t step,
                        const std::optional<py::bytes>& state) {
  const MultiBlock2dParams p = params2d(Options(options), batch);
  const auto seed = Options(options).get<uint64_t>("seed");
  std::optional<TorchGenerator> generator = torch_generator(state);
  Masks masks;
  {
    py::gil_scoped_release nogil;
    masks = with_generators(seed, step, 0, generator,
                            [&](Random& sizes, Random& places) { return multiblock2d(p, sizes, places); });
  }
  return arrays_of(std::move(masks), p.truncate, generator);
}

// The same, spec after spec. No rows where a clip was left no context.
static py::tuple draw3d(const py::dict& options, const std::vector<py::dict>& specs, int64_t batch,
                        uint64_t step, const std::optional<py::bytes>& state) {
  std::vector<MultiBlock3dParams> params;
  for (const py::dict& spec : specs) params.push_back(params3d(Options(options), Options(spec), batch));
  const auto seed = Options(options).get<uint64_t>("seed");
  std::optional<TorchGenerator> generator = torch_generator(state);
  Masks masks;
  {
    py::gil_scoped_release nogil;
    MultiBlock3d sampler;
    bool complete = true;
    for (size_t i = 0; i < params.size() && complete; ++i)
      complete = with_generators(
          seed, step, static_cast<uint32_t>(i), generator,
          [&](Random& sizes, Random& places) { return sampler.add(params[i], sizes, places); });
    if (complete) masks = sampler.rows();
  }
  return arrays_of(std::move(masks), params.size() == 1 && params[0].truncate, generator);
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
