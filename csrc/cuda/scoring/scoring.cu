#include "scoring.h"

#include <algorithm>
#include <string>
#include <type_traits>

#include "../device/device_guard.h"
#include "../device/path.h"
#include "run_scoring.h"

namespace trak_ext::cuda {
namespace {

// The best path that this build has code for on a device, for features of fp32, fp16 or bf16.
Path best_scoring_path(int device) {
  // Code for sm_75 has no bf16 matrix instruction, on whatever device it runs.
  if (code_architecture(float32_scorer(1, 1).kernel, device) < 80) return Path::kPlain;
  // Only code for sm_90a has the warpgroup's, and sm_90a is no number: elsewhere these kernels are
  // a trap without registers.
  if (compute_capability(device) != 90) return Path::kMma;
  constexpr int kRegistersOfTrap = 40;
  return register_count(float32_warpgroup_scorer(1, kMostTargets).kernel) > kRegistersOfTrap
             ? Path::kWgmma
             : Path::kMma;
}

template <class T>
Scorer<T> choose_scorer(const ScoringProblem<T>& problem, const std::string& path_name,
                        int64_t count, int64_t workspace_bytes, int device) {
  if constexpr (std::is_same_v<T, float>) {
    // The same kernels for all shapes: a score depends on none of its neighbours.
    const Path path = find_path(path_name, best_scoring_path(device));
    if (path == Path::kWgmma) {
      return choose_warpgroup_scorer(problem, count, workspace_bytes,
                                     device_attribute(cudaDevAttrMultiProcessorCount, device));
    }
    if (path == Path::kMma) {
      return tensor_core_scorer(problem.feature_dtype, bf16_parts(problem.precision),
                                problem.num_targets);
    }
  } else {
    (void)find_path(path_name, Path::kPlain);
  }
  (void)code_architecture(plain_scorer<T>().kernel, device);
  return plain_scorer<T>();
}

}  // namespace

template <class T>
int64_t scoring_workspace_bytes(const ScoringProblem<T>& problem, int64_t count, int64_t limit) {
  if constexpr (std::is_same_v<T, float>) {
    // Enough for any path; which of them the device gets is not known here.
    const DType dtype = problem.feature_dtype;
    const int64_t targets = problem.num_targets;
    int64_t bytes = scoring_workspace_bytes(plain_scorer<T>(), problem, count, limit);
    for (const Scorer<T>& scorer :
         {tensor_core_scorer(dtype, bf16_parts(problem.precision), targets),
          warpgroup_scorer(dtype, bf16_parts(problem.precision),
                           std::min<int64_t>(targets, kManyTargets))}) {
      bytes = std::max(bytes, scoring_workspace_bytes(scorer, problem, count, limit));
    }
    const int64_t wanted = wanted_workspace(
        warpgroup_scorer(dtype, bf16_parts(problem.precision), targets), problem, count);
    return bytes == 0 ? 0 : std::max(bytes, std::min(limit, wanted));
  }
  return scoring_workspace_bytes(plain_scorer<T>(), problem, count, limit);
}

template <class T>
void score(const ScoringProblem<T>& problem, const std::string& path, T* out, int64_t row_stride,
           int64_t target_stride, const ScoringWorkspace& workspace, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  run_score(choose_scorer(problem, path, 0, workspace.bytes, queue.device), problem,
            {out, row_stride, target_stride}, workspace,
            reinterpret_cast<cudaStream_t>(queue.stream));
}

template <class T>
void top_k(const ScoringProblem<T>& problem, const std::string& path, int64_t count, T* values,
           int64_t* indices, int32_t* not_a_number, const ScoringWorkspace& workspace,
           const Queue& queue) {
  const DeviceGuard guard(queue.device);
  run_top_k(choose_scorer(problem, path, count, workspace.bytes, queue.device), problem, count,
            {values, indices}, not_a_number, workspace,
            reinterpret_cast<cudaStream_t>(queue.stream));
}

template int64_t scoring_workspace_bytes<float>(const ScoringProblem<float>&, int64_t, int64_t);
template int64_t scoring_workspace_bytes<double>(const ScoringProblem<double>&, int64_t, int64_t);
template void score<float>(const ScoringProblem<float>&, const std::string&, float*, int64_t,
                           int64_t, const ScoringWorkspace&, const Queue&);
template void score<double>(const ScoringProblem<double>&, const std::string&, double*, int64_t,
                            int64_t, const ScoringWorkspace&, const Queue&);
template void top_k<float>(const ScoringProblem<float>&, const std::string&, int64_t, float*,
                           int64_t*, int32_t*, const ScoringWorkspace&, const Queue&);
template void top_k<double>(const ScoringProblem<double>&, const std::string&, int64_t, double*,
                            int64_t*, int32_t*, const ScoringWorkspace&, const Queue&);

}  // namespace trak_ext::cuda
