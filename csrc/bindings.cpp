// The compiled module trak_ext._C: addresses, sizes and strides in, nothing of torch. Python has
// checked every argument; what is checked here is only what Python cannot know.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/projection.h"
#include "cpu/scoring.h"
#include "cpu/sjlt.h"
#include "law/normal_table.h"
#include "law/version.h"
#if defined(TRAK_EXT_CUDA)
#include "cuda/device/build.h"
#include "cuda/projection/projection.h"
#include "cuda/projection/sjlt.h"
#include "cuda/scoring/scoring.h"
#endif

namespace py = pybind11;
using py::literals::operator""_a;

namespace trak_ext {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
uintptr_t address_of(T* data) {
  return reinterpret_cast<uintptr_t>(data);
}

// A dense projection with the gradients that its pointer needs.
struct Projection {
  MatrixLaw matrix;
  std::vector<GradientView> grads;
  int64_t rows;
  int64_t proj_dim;
  OutputView out;
  int precision;

  ProjectionProblem problem() const {
    return {matrix,   grads.data(), static_cast<int64_t>(grads.size()), rows,
            proj_dim, out,          static_cast<Precision>(precision)};
  }
};

// The same for the sparse kind.
struct SparseProjection {
  SjltLaw matrix;
  std::vector<GradientView> grads;
  int64_t rows;
  OutputView out;

  SjltProblem problem() const {
    return {matrix, grads.data(), static_cast<int64_t>(grads.size()), rows, out};
  }
};

// Scores in fp32 or fp64, with the storage that a problem's pointers need.
struct Scoring {
  DType dtype;  // of scores, solved targets, coefficients and weights
  std::vector<uintptr_t> features;
  std::vector<int64_t> row_strides;
  DType feature_dtype;
  int64_t num_train;
  int64_t num_targets;
  int64_t proj_dim;
  uintptr_t solved;
  uintptr_t coefficients;
  uintptr_t weights;
  int precision;

  // Returns what call(problem) does for a ScoringProblem<T> of this dtype.
  template <class Call>
  auto with_problem(const Call& call) const {
    return dtype == DType::kFloat64 ? call(problem<double>()) : call(problem<float>());
  }

 private:
  template <class T>
  ScoringProblem<T> problem() const {
    static_assert(sizeof(uintptr_t) == sizeof(const void*));
    return {static_cast<int64_t>(row_strides.size()),
            num_train,
            num_targets,
            proj_dim,
            reinterpret_cast<const void* const*>(features.data()),
            feature_dtype,
            row_strides.data(),
            at<const T>(solved),
            at<const T>(coefficients),
            at<const T>(weights),
            static_cast<Precision>(precision)};
  }
};

template <class T>
T* scores_at(const ScoringProblem<T>&, uintptr_t address) {
  return at<T>(address);
}

void bind_problems(py::module_& m) {
  py::class_<MatrixLaw>(m, "Matrix", "A dense matrix: entry (p, j) is a function of these alone.")
      .def(py::init([](int kind, uint32_t seed_low, uint32_t seed_high, uint32_t model_id) {
             return MatrixLaw{static_cast<Kind>(kind), seed_low, seed_high, model_id};
           }),
           py::kw_only(), "kind"_a, "seed_low"_a, "seed_high"_a, "model_id"_a)
      .def_property_readonly("kind", [](const MatrixLaw& m) { return static_cast<int>(m.kind); })
      .def_readonly("seed_low", &MatrixLaw::seed_low)
      .def_readonly("seed_high", &MatrixLaw::seed_high)
      .def_readonly("model_id", &MatrixLaw::model_id);

  py::class_<SjltLaw>(m, "SparseMatrix",
                      "A matrix of `repetitions` blocks of `width` columns, one entry a row each.")
      .def(py::init([](uint64_t width, int64_t repetitions, uint32_t seed_low, uint32_t seed_high,
                       uint32_t model_id) {
             return SjltLaw{seed_low, seed_high, model_id, width, repetitions};
           }),
           py::kw_only(), "width"_a, "repetitions"_a, "seed_low"_a, "seed_high"_a, "model_id"_a)
      .def_readonly("width", &SjltLaw::width)
      .def_readonly("repetitions", &SjltLaw::repetitions)
      .def_readonly("seed_low", &SjltLaw::seed_low)
      .def_readonly("seed_high", &SjltLaw::seed_high)
      .def_readonly("model_id", &SjltLaw::model_id);

  py::class_<GradientView>(m, "Gradient",
                           "A tensor [rows, params] whose first parameter meets row param_offset.")
      .def(py::init([](uintptr_t address, int dtype, int64_t params, int64_t row_stride,
                       int64_t param_stride, uint64_t param_offset) {
             return GradientView{at<const void>(address),
                                 static_cast<DType>(dtype),
                                 params,
                                 row_stride,
                                 param_stride,
                                 param_offset};
           }),
           py::kw_only(), "address"_a, "dtype"_a, "params"_a, "row_stride"_a, "param_stride"_a,
           "param_offset"_a)
      .def_property_readonly("address", [](const GradientView& g) { return address_of(g.data); })
      .def_property_readonly("dtype",
                             [](const GradientView& g) { return static_cast<int>(g.dtype); })
      .def_readonly("params", &GradientView::params)
      .def_readonly("row_stride", &GradientView::row_stride)
      .def_readonly("param_stride", &GradientView::param_stride)
      .def_readonly("param_offset", &GradientView::param_offset);

  py::class_<OutputView>(m, "Output", "A fp32 tensor [rows, columns].")
      .def(py::init([](uintptr_t address, int64_t row_stride, int64_t column_stride) {
             return OutputView{at<float>(address), row_stride, column_stride};
           }),
           py::kw_only(), "address"_a, "row_stride"_a, "column_stride"_a)
      .def_property_readonly("address", [](const OutputView& o) { return address_of(o.data); })
      .def_readonly("row_stride", &OutputView::row_stride)
      .def_readonly("column_stride", &OutputView::column_stride);

  py::class_<Projection>(m, "Projection", "out += gradients @ matrix, tensor after tensor.")
      .def(py::init([](const MatrixLaw& matrix, std::vector<GradientView> grads, int64_t rows,
                       int64_t proj_dim, const OutputView& out, int precision) {
             return Projection{matrix, std::move(grads), rows, proj_dim, out, precision};
           }),
           py::kw_only(), "matrix"_a, "grads"_a, "rows"_a, "proj_dim"_a, "out"_a, "precision"_a)
      .def_readonly("matrix", &Projection::matrix)
      .def_readonly("grads", &Projection::grads)
      .def_readonly("rows", &Projection::rows)
      .def_readonly("proj_dim", &Projection::proj_dim)
      .def_readonly("out", &Projection::out)
      .def_readonly("precision", &Projection::precision);

  py::class_<SparseProjection>(m, "SparseProjection", "out += gradients @ sparse matrix, one sum.")
      .def(py::init([](const SjltLaw& matrix, std::vector<GradientView> grads, int64_t rows,
                       const OutputView& out) {
             return SparseProjection{matrix, std::move(grads), rows, out};
           }),
           py::kw_only(), "matrix"_a, "grads"_a, "rows"_a, "out"_a)
      .def_readonly("matrix", &SparseProjection::matrix)
      .def_readonly("grads", &SparseProjection::grads)
      .def_readonly("rows", &SparseProjection::rows)
      .def_readonly("out", &SparseProjection::out);

  py::class_<Scoring>(m, "Scoring", "Scores of samples for targets, summed over checkpoints.")
      .def(py::init([](int dtype, std::vector<uintptr_t> features, std::vector<int64_t> row_strides,
                       int feature_dtype, int64_t num_train, int64_t num_targets, int64_t proj_dim,
                       uintptr_t solved, uintptr_t coefficients, uintptr_t weights, int precision) {
             if (features.size() != row_strides.size()) {
               throw py::value_error("row_strides: expected one for each of features");
             }
             return Scoring{static_cast<DType>(dtype),
                            std::move(features),
                            std::move(row_strides),
                            static_cast<DType>(feature_dtype),
                            num_train,
                            num_targets,
                            proj_dim,
                            solved,
                            coefficients,
                            weights,
                            precision};
           }),
           py::kw_only(), "dtype"_a, "features"_a, "row_strides"_a, "feature_dtype"_a,
           "num_train"_a, "num_targets"_a, "proj_dim"_a, "solved"_a, "coefficients"_a, "weights"_a,
           "precision"_a)
      .def_property_readonly("dtype", [](const Scoring& s) { return static_cast<int>(s.dtype); })
      .def_readonly("features", &Scoring::features)
      .def_readonly("row_strides", &Scoring::row_strides)
      .def_property_readonly("feature_dtype",
                             [](const Scoring& s) { return static_cast<int>(s.feature_dtype); })
      .def_readonly("num_train", &Scoring::num_train)
      .def_readonly("num_targets", &Scoring::num_targets)
      .def_readonly("proj_dim", &Scoring::proj_dim)
      .def_readonly("solved", &Scoring::solved)
      .def_readonly("coefficients", &Scoring::coefficients)
      .def_readonly("weights", &Scoring::weights)
      .def_readonly("precision", &Scoring::precision);
}

void bind_cpu(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(
      "project",
      [](const Projection& projection, int num_threads) {
        cpu::project(projection.problem(), num_threads);
      },
      "projection"_a, "num_threads"_a, unlocked);
  m.def(
      "project",
      [](const SparseProjection& projection, int num_threads) {
        cpu::project_sjlt(projection.problem(), num_threads);
      },
      "projection"_a, "num_threads"_a, unlocked);
  m.def(
      "fill_matrix",
      [](const MatrixLaw& matrix, uint64_t param_offset, int64_t params, int64_t proj_dim,
         uintptr_t out, int num_threads) {
        cpu::fill_matrix(matrix, param_offset, params, proj_dim, at<float>(out), num_threads);
      },
      "matrix"_a, py::kw_only(), "param_offset"_a, "params"_a, "proj_dim"_a, "out"_a,
      "num_threads"_a, unlocked);
  m.def(
      "fill_matrix",
      [](const SjltLaw& matrix, uint64_t param_offset, int64_t params, uintptr_t out,
         int num_threads) {
        cpu::fill_sjlt_matrix(matrix, param_offset, params, at<float>(out), num_threads);
      },
      "matrix"_a, py::kw_only(), "param_offset"_a, "params"_a, "out"_a, "num_threads"_a, unlocked);
  m.def(
      "score",
      [](const Scoring& scoring, uintptr_t out, int num_threads) {
        scoring.with_problem([&](const auto& problem) {
          cpu::score(problem, scores_at(problem, out), num_threads);
        });
      },
      "scoring"_a, py::kw_only(), "out"_a, "num_threads"_a, unlocked);
  m.def(
      "top_k",
      [](const Scoring& scoring, int64_t count, uintptr_t values, uintptr_t indices,
         int num_threads) {
        return scoring.with_problem([&](const auto& problem) {
          return cpu::top_k(problem, count, scores_at(problem, values), at<int64_t>(indices),
                            num_threads);
        });
      },
      "scoring"_a, py::kw_only(), "count"_a, "values"_a, "indices"_a, "num_threads"_a, unlocked);
}

#if defined(TRAK_EXT_CUDA)
py::list list_cuda_kernels(const std::string& path, int64_t shared_limit) {
  py::list list;
  for (const cuda::KernelInfo& kernel :
       cuda::list_kernels(cuda::find_path(path, cuda::Path::kWgmma), shared_limit)) {
    py::dict entry;
    entry["kind"] = kernel.kind == Kind::kRademacher ? "rademacher" : "normal";
    entry["passes"] = kernel.passes;
    entry["tile_rows"] = kernel.tile_rows;
    entry["tile_columns"] = kernel.tile_columns;
    entry["threads"] = kernel.threads;
    entry["shared_bytes"] = kernel.shared_bytes;
    list.append(entry);
  }
  return list;
}

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def(
      "cuda_workspace_bytes",
      [](const Projection& projection, int64_t limit) {
        return cuda::projection_workspace_bytes(projection.problem(), limit);
      },
      "projection"_a, "limit"_a);
  m.def(
      "cuda_workspace_bytes",
      [](const SparseProjection& projection, int64_t limit) {
        return cuda::sjlt_workspace_bytes(projection.problem(), limit);
      },
      "projection"_a, "limit"_a);
  m.def(
      "cuda_workspace_bytes",
      [](const Scoring& scoring, int64_t limit, int64_t count) {
        return scoring.with_problem([&](const auto& problem) {
          return cuda::scoring_workspace_bytes(problem, count, limit);
        });
      },
      "scoring"_a, "limit"_a, py::kw_only(), "count"_a);
  m.def(
      "cuda_project",
      [](const Projection& projection, const std::string& path, uintptr_t workspace,
         int64_t workspace_bytes, int device, uintptr_t stream) {
        cuda::project(projection.problem(), path, at<float>(workspace), workspace_bytes,
                      {device, stream});
      },
      "projection"_a, py::kw_only(), "path"_a, "workspace"_a, "workspace_bytes"_a, "device"_a,
      "stream"_a, unlocked);
  m.def(
      "cuda_project",
      [](const SparseProjection& projection, bool full_blocks, uintptr_t workspace,
         int64_t workspace_bytes, int device, uintptr_t stream) {
        cuda::project_sjlt(projection.problem(), full_blocks, at<float>(workspace), workspace_bytes,
                           {device, stream});
      },
      "projection"_a, py::kw_only(), "full_blocks"_a, "workspace"_a, "workspace_bytes"_a,
      "device"_a, "stream"_a, unlocked);
  m.def(
      "cuda_fill_matrix",
      [](const MatrixLaw& matrix, uint64_t param_offset, int64_t params, int64_t proj_dim,
         uintptr_t out, int device, uintptr_t stream) {
        cuda::fill_matrix(matrix, param_offset, params, proj_dim, at<float>(out), {device, stream});
      },
      "matrix"_a, py::kw_only(), "param_offset"_a, "params"_a, "proj_dim"_a, "out"_a, "device"_a,
      "stream"_a, unlocked);
  m.def(
      "cuda_fill_matrix",
      [](const SjltLaw& matrix, uint64_t param_offset, int64_t params, uintptr_t out, int device,
         uintptr_t stream) {
        cuda::fill_sjlt_matrix(matrix, param_offset, params, at<float>(out), {device, stream});
      },
      "matrix"_a, py::kw_only(), "param_offset"_a, "params"_a, "out"_a, "device"_a, "stream"_a,
      unlocked);
  m.def(
      "cuda_score",
      [](const Scoring& scoring, const std::string& path, uintptr_t out, int64_t out_row_stride,
         int64_t out_target_stride, uintptr_t workspace, int64_t workspace_bytes, int device,
         uintptr_t stream) {
        scoring.with_problem([&](const auto& problem) {
          cuda::score(problem, path, scores_at(problem, out), out_row_stride, out_target_stride,
                      {at<char>(workspace), workspace_bytes}, {device, stream});
        });
      },
      "scoring"_a, py::kw_only(), "path"_a, "out"_a, "out_row_stride"_a, "out_target_stride"_a,
      "workspace"_a, "workspace_bytes"_a, "device"_a, "stream"_a, unlocked);
  m.def(
      "cuda_top_k",
      [](const Scoring& scoring, const std::string& path, int64_t count, uintptr_t values,
         uintptr_t indices, uintptr_t not_a_number, uintptr_t workspace, int64_t workspace_bytes,
         int device, uintptr_t stream) {
        scoring.with_problem([&](const auto& problem) {
          cuda::top_k(problem, path, count, scores_at(problem, values), at<int64_t>(indices),
                      at<int32_t>(not_a_number), {at<char>(workspace), workspace_bytes},
                      {device, stream});
        });
      },
      "scoring"_a, py::kw_only(), "path"_a, "count"_a, "values"_a, "indices"_a, "not_a_number"_a,
      "workspace"_a, "workspace_bytes"_a, "device"_a, "stream"_a, unlocked);
  m.def("cuda_projection_path", &cuda::projection_path, "device"_a);
  m.def("cuda_kernels", &list_cuda_kernels, "path"_a, "shared_limit"_a);
  m.attr("CUDA_TOP_K_MAX") = cuda::kTopKMax;
}
#endif

py::object describe_cuda_build() {
#if defined(TRAK_EXT_CUDA)
  const cuda::Build build = cuda::describe_build();
  py::list devices;
  for (const cuda::DeviceInfo& device : build.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = device.compute_capability;
    entry["memory_bytes"] = device.memory_bytes;
    devices.append(entry);
  }
  py::dict info;
  info["runtime_version"] = build.runtime_version;
  info["driver_version"] = build.driver_version;
  info["architectures"] = TRAK_EXT_CUDA_ARCHITECTURES;
  info["devices"] = devices;
  info["status"] = build.status;
  return info;
#else
  return py::none();
#endif
}

// The constants of normal entries, a list a row.
std::vector<std::vector<float>> normal_table() {
  std::vector<std::vector<float>> rows;
  for (const auto& row : kNormalTable) rows.emplace_back(std::begin(row), std::end(row));
  return rows;
}

std::vector<std::string> list_levels() {
  std::vector<std::string> names;
  for (const char* const* name = cpu::available_levels(); *name; ++name) names.emplace_back(*name);
  return names;
}

}  // namespace
}  // namespace trak_ext

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of trak_ext; use the functions of the trak_ext package instead.";
  trak_ext::bind_problems(m);
  trak_ext::bind_cpu(m);
  m.def("law_version", [] { return trak_ext::kLawVersion; });
  m.def("normal_table", &trak_ext::normal_table);
  m.def("cpu_level", [] { return trak_ext::cpu::kernels().name; });
  m.def("has_fixed_point", &trak_ext::cpu::has_fixed_point);
  m.def("available_cpu_levels", &trak_ext::list_levels);
  m.def("compiler", [] { return TRAK_EXT_COMPILER; });
  m.def("cuda_build", &trak_ext::describe_cuda_build);
  m.attr("__version__") = TRAK_EXT_VERSION;
#if defined(TRAK_EXT_CUDA)
  trak_ext::bind_cuda(m);
#endif
}
