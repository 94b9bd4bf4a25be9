// The compiled module trak_ext._C: addresses, sizes and strides in, nothing of torch. Python has
// checked every argument; what is checked here is only what Python cannot know.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/projection.h"
#include "cpu/scoring.h"
#include "cpu/sjlt.h"
#include "law/version.h"
#if defined(TRAK_EXT_CUDA)
#include "cuda/build.h"
#include "cuda/projection.h"
#include "cuda/scoring.h"
#include "cuda/sjlt.h"
#endif

namespace py = pybind11;

namespace trak_ext {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

MatrixLaw make_law(int kind, uint32_t seed_low, uint32_t seed_high, uint32_t model_id) {
  return {static_cast<Kind>(kind), seed_low, seed_high, model_id};
}

// (address, dtype, params, row stride, parameter stride, parameter offset)
using GradientTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, uint64_t>;

std::vector<GradientView> make_views(const std::vector<GradientTuple>& grads) {
  std::vector<GradientView> views;
  views.reserve(grads.size());
  for (const auto& [address, dtype, params, row_stride, param_stride, offset] : grads) {
    views.push_back({at<const void>(address), static_cast<DType>(dtype), params, row_stride,
                     param_stride, offset});
  }
  return views;
}

void bind_project(const std::vector<GradientTuple>& grads, int64_t rows, uintptr_t out,
                  int64_t proj_dim, int64_t out_row_stride, int64_t out_column_stride, int kind,
                  uint32_t seed_low, uint32_t seed_high, uint32_t model_id, int precision,
                  int num_threads) {
  const std::vector<GradientView> views = make_views(grads);
  const ProjectionProblem problem = {make_law(kind, seed_low, seed_high, model_id),
                                     static_cast<Precision>(precision),
                                     views.data(),
                                     static_cast<int64_t>(views.size()),
                                     rows,
                                     proj_dim,
                                     {at<float>(out), out_row_stride, out_column_stride}};
  py::gil_scoped_release release;
  project(problem, num_threads);
}

void bind_fill_matrix(int kind, uint32_t seed_low, uint32_t seed_high, uint32_t model_id,
                      uint64_t param_offset, int64_t params, int64_t proj_dim, uintptr_t out,
                      int num_threads) {
  py::gil_scoped_release release;
  fill_matrix(make_law(kind, seed_low, seed_high, model_id), param_offset, params, proj_dim,
              at<float>(out), num_threads);
}

// (columns of a repetition, repetitions, seed's low and high word, model)
using SjltTuple = std::tuple<uint64_t, int64_t, uint32_t, uint32_t, uint32_t>;
SjltLaw make_sjlt_law(const SjltTuple& law) {
  const auto& [width, repetitions, seed_low, seed_high, model_id] = law;
  return {seed_low, seed_high, model_id, width, repetitions};
}

SjltProblem make_sjlt_problem(const SjltTuple& law, const std::vector<GradientView>& views,
                              int64_t rows, const OutputView& out) {
  return {make_sjlt_law(law), views.data(), static_cast<int64_t>(views.size()), rows, out};
}

void bind_project_sjlt(const std::vector<GradientTuple>& grads, int64_t rows, uintptr_t out,
                       int64_t out_row_stride, int64_t out_column_stride, const SjltTuple& law,
                       int num_threads) {
  const std::vector<GradientView> views = make_views(grads);
  py::gil_scoped_release release;
  project_sjlt(
      make_sjlt_problem(law, views, rows, {at<float>(out), out_row_stride, out_column_stride}),
      num_threads);
}

void bind_fill_sjlt_matrix(const SjltTuple& law, uint64_t param_offset, int64_t params,
                           uintptr_t out, int num_threads) {
  py::gil_scoped_release release;
  fill_sjlt_matrix(make_sjlt_law(law), param_offset, params, at<float>(out), num_threads);
}

// A scoring problem with the storage its pointers need.
template <class T>
struct OwnedScoringProblem {
  std::vector<const void*> features;
  std::vector<int64_t> row_strides;
  ScoringProblem<T> problem;

  OwnedScoringProblem(const std::vector<uintptr_t>& addresses, std::vector<int64_t> strides,
                      int dtype, int64_t num_train, int64_t num_targets, int64_t proj_dim,
                      uintptr_t solved, uintptr_t coefficients, uintptr_t weights)
      : row_strides(std::move(strides)) {
    for (uintptr_t address : addresses) features.push_back(at<const void>(address));
    problem = {static_cast<int64_t>(features.size()),
               num_train,
               num_targets,
               proj_dim,
               features.data(),
               static_cast<DType>(dtype),
               row_strides.data(),
               at<const T>(solved),
               at<const T>(coefficients),
               at<const T>(weights)};
  }
  OwnedScoringProblem(const OwnedScoringProblem&) = delete;
};

template <class T>
void bind_score(const std::vector<uintptr_t>& features, const std::vector<int64_t>& row_strides,
                int dtype, int64_t num_train, int64_t num_targets, int64_t proj_dim,
                uintptr_t solved, uintptr_t coefficients, uintptr_t weights, uintptr_t out,
                int num_threads) {
  py::gil_scoped_release release;
  const OwnedScoringProblem<T> owned(features, row_strides, dtype, num_train, num_targets, proj_dim,
                                     solved, coefficients, weights);
  score(owned.problem, at<T>(out), num_threads);
}

template <class T>
bool bind_top_k(const std::vector<uintptr_t>& features, const std::vector<int64_t>& row_strides,
                int dtype, int64_t num_train, int64_t num_targets, int64_t proj_dim,
                uintptr_t solved, uintptr_t coefficients, uintptr_t weights, int64_t count,
                uintptr_t values, uintptr_t indices, int num_threads) {
  py::gil_scoped_release release;
  const OwnedScoringProblem<T> owned(features, row_strides, dtype, num_train, num_targets, proj_dim,
                                     solved, coefficients, weights);
  return top_k(owned.problem, count, at<T>(values), at<int64_t>(indices), num_threads);
}

#if defined(TRAK_EXT_CUDA)
int64_t bind_cuda_sjlt_workspace_bytes(const std::vector<GradientTuple>& grads, int64_t rows,
                                       const SjltTuple& law, int64_t limit) {
  const std::vector<GradientView> views = make_views(grads);
  return cuda_sjlt_workspace_bytes(make_sjlt_problem(law, views, rows, {}), limit);
}

void bind_cuda_project_sjlt(const std::vector<GradientTuple>& grads, int64_t rows, uintptr_t out,
                            int64_t out_row_stride, int64_t out_column_stride, const SjltTuple& law,
                            bool full_blocks, uintptr_t workspace, int64_t workspace_bytes,
                            int device, uintptr_t stream) {
  const std::vector<GradientView> views = make_views(grads);
  py::gil_scoped_release release;
  cuda_project_sjlt(
      make_sjlt_problem(law, views, rows, {at<float>(out), out_row_stride, out_column_stride}),
      full_blocks, at<float>(workspace), workspace_bytes, {device, stream});
}

void bind_cuda_fill_sjlt_matrix(const SjltTuple& law, uint64_t param_offset, int64_t params,
                                uintptr_t out, int device, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda_fill_sjlt_matrix(make_sjlt_law(law), param_offset, params, at<float>(out), {device, stream});
}

int64_t bind_cuda_workspace_bytes(const std::vector<GradientTuple>& grads, int64_t rows,
                                  int64_t proj_dim, int passes, int64_t limit) {
  const std::vector<GradientView> views = make_views(grads);
  CudaProjectionProblem problem = {};
  problem.grads = views.data();
  problem.num_grads = static_cast<int64_t>(views.size());
  problem.rows = rows;
  problem.proj_dim = proj_dim;
  problem.passes = passes;
  return cuda_workspace_bytes(problem, limit);
}

void bind_cuda_project(const std::vector<GradientTuple>& grads, int64_t rows, uintptr_t out,
                       int64_t proj_dim, int64_t out_row_stride, int64_t out_column_stride,
                       int kind, uint32_t seed_low, uint32_t seed_high, uint32_t model_id,
                       int passes, const std::string& path, uintptr_t workspace,
                       int64_t workspace_bytes, int device, uintptr_t stream) {
  const std::vector<GradientView> views = make_views(grads);
  const CudaProjectionProblem problem = {make_law(kind, seed_low, seed_high, model_id),
                                         views.data(),
                                         static_cast<int64_t>(views.size()),
                                         rows,
                                         proj_dim,
                                         {at<float>(out), out_row_stride, out_column_stride},
                                         passes,
                                         at<float>(workspace),
                                         workspace_bytes};
  py::gil_scoped_release release;
  cuda_project(problem, path, {device, stream});
}

void bind_cuda_fill_matrix(int kind, uint32_t seed_low, uint32_t seed_high, uint32_t model_id,
                           uint64_t param_offset, int64_t params, int64_t proj_dim, uintptr_t out,
                           int device, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda_fill_matrix(make_law(kind, seed_low, seed_high, model_id), param_offset, params, proj_dim,
                   at<float>(out), {device, stream});
}

// A CUDA scoring problem with the storage its pointers need.
template <class T>
struct OwnedCudaScoring {
  std::vector<const void*> features;
  std::vector<int64_t> row_strides;
  CudaScoringProblem<T> problem;

  OwnedCudaScoring(const std::vector<uintptr_t>& addresses, std::vector<int64_t> strides, int dtype,
                   int64_t num_train, int64_t num_targets, int64_t proj_dim, uintptr_t solved,
                   uintptr_t coefficients, uintptr_t weights, int parts)
      : row_strides(std::move(strides)) {
    for (uintptr_t address : addresses) features.push_back(at<const void>(address));
    problem = {static_cast<int64_t>(features.size()),
               num_train,
               num_targets,
               proj_dim,
               features.data(),
               static_cast<DType>(dtype),
               row_strides.data(),
               at<const T>(solved),
               at<const T>(coefficients),
               at<const T>(weights),
               parts};
  }
  OwnedCudaScoring(const OwnedCudaScoring&) = delete;
};

template <class T>
int64_t bind_cuda_scoring_workspace_bytes(int64_t num_checkpoints, int64_t num_train,
                                          int64_t num_targets, int64_t proj_dim, int dtype,
                                          int parts, int64_t count, int64_t limit) {
  CudaScoringProblem<T> problem = {};
  problem.num_checkpoints = num_checkpoints;
  problem.num_train = num_train;
  problem.num_targets = num_targets;
  problem.proj_dim = proj_dim;
  problem.feature_dtype = static_cast<DType>(dtype);
  problem.parts = parts;
  return cuda_scoring_workspace_bytes(problem, count, limit);
}

template <class T>
void bind_cuda_score(const std::vector<uintptr_t>& features,
                     const std::vector<int64_t>& row_strides, int dtype, int64_t num_train,
                     int64_t num_targets, int64_t proj_dim, uintptr_t solved,
                     uintptr_t coefficients, uintptr_t weights, int parts, const std::string& path,
                     uintptr_t out, int64_t out_row_stride, int64_t out_target_stride,
                     uintptr_t workspace, int64_t workspace_bytes, int device, uintptr_t stream) {
  py::gil_scoped_release release;
  const OwnedCudaScoring<T> owned(features, row_strides, dtype, num_train, num_targets, proj_dim,
                                  solved, coefficients, weights, parts);
  cuda_score(owned.problem, path, at<T>(out), out_row_stride, out_target_stride,
             {at<char>(workspace), workspace_bytes}, {device, stream});
}

template <class T>
void bind_cuda_top_k(const std::vector<uintptr_t>& features,
                     const std::vector<int64_t>& row_strides, int dtype, int64_t num_train,
                     int64_t num_targets, int64_t proj_dim, uintptr_t solved,
                     uintptr_t coefficients, uintptr_t weights, int parts, const std::string& path,
                     int64_t count, uintptr_t values, uintptr_t indices, uintptr_t not_a_number,
                     uintptr_t workspace, int64_t workspace_bytes, int device, uintptr_t stream) {
  py::gil_scoped_release release;
  const OwnedCudaScoring<T> owned(features, row_strides, dtype, num_train, num_targets, proj_dim,
                                  solved, coefficients, weights, parts);
  cuda_top_k(owned.problem, path, count, at<T>(values), at<int64_t>(indices),
             at<int32_t>(not_a_number), {at<char>(workspace), workspace_bytes}, {device, stream});
}

py::list bind_cuda_kernels(const std::string& path, int64_t shared_limit) {
  py::list list;
  for (const CudaKernel& kernel : cuda_kernels(find_path(path, CudaPath::kWgmma), shared_limit)) {
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
#endif

py::object bind_cuda_build() {
#if defined(TRAK_EXT_CUDA)
  const CudaBuild build = cuda_build();
  py::list devices;
  for (const CudaDevice& device : build.devices) {
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

std::vector<std::string> list_levels() {
  std::vector<std::string> names;
  for (const char* const* name = available_levels(); *name; ++name) names.emplace_back(*name);
  return names;
}

}  // namespace
}  // namespace trak_ext

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of trak_ext; use the functions of the trak_ext package instead.";
  m.def("project", &trak_ext::bind_project);
  m.def("fill_matrix", &trak_ext::bind_fill_matrix);
  m.def("project_sjlt", &trak_ext::bind_project_sjlt);
  m.def("fill_sjlt_matrix", &trak_ext::bind_fill_sjlt_matrix);
  m.def("score_float", &trak_ext::bind_score<float>);
  m.def("score_double", &trak_ext::bind_score<double>);
  m.def("top_k_float", &trak_ext::bind_top_k<float>);
  m.def("top_k_double", &trak_ext::bind_top_k<double>);
  m.def("law_version", [] { return trak_ext::kLawVersion; });
  m.def("cpu_level", [] { return trak_ext::kernels().name; });
  m.def("has_fixed_point", &trak_ext::has_fixed_point);
  m.def("available_cpu_levels", &trak_ext::list_levels);
  m.attr("__version__") = TRAK_EXT_VERSION;
  m.def("compiler", [] { return TRAK_EXT_COMPILER; });
  m.def("cuda_build", &trak_ext::bind_cuda_build);
#if defined(TRAK_EXT_CUDA)
  m.def("cuda_workspace_bytes", &trak_ext::bind_cuda_workspace_bytes);
  m.def("cuda_project", &trak_ext::bind_cuda_project);
  m.def("cuda_fill_matrix", &trak_ext::bind_cuda_fill_matrix);
  m.def("cuda_sjlt_workspace_bytes", &trak_ext::bind_cuda_sjlt_workspace_bytes);
  m.def("cuda_project_sjlt", &trak_ext::bind_cuda_project_sjlt);
  m.def("cuda_fill_sjlt_matrix", &trak_ext::bind_cuda_fill_sjlt_matrix);
  m.def("cuda_projection_path", &trak_ext::cuda_projection_path);
  m.def("cuda_kernels", &trak_ext::bind_cuda_kernels);
  m.def("cuda_scoring_workspace_bytes_float", &trak_ext::bind_cuda_scoring_workspace_bytes<float>);
  m.def("cuda_scoring_workspace_bytes_double",
        &trak_ext::bind_cuda_scoring_workspace_bytes<double>);
  m.def("cuda_score_float", &trak_ext::bind_cuda_score<float>);
  m.def("cuda_score_double", &trak_ext::bind_cuda_score<double>);
  m.def("cuda_top_k_float", &trak_ext::bind_cuda_top_k<float>);
  m.def("cuda_top_k_double", &trak_ext::bind_cuda_top_k<double>);
  m.attr("CUDA_TOP_K_MAX") = trak_ext::kCudaTopKMax;
#endif
}
