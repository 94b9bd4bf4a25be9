#include "scoring.h"

#include <type_traits>

#include "device_guard.h"
#include "run_scoring.h"

namespace trak_ext {
namespace {

template <class T>
Scorer<T> tiled_scorer(const CudaScoringProblem<T>& problem) {
  if constexpr (std::is_same_v<T, float>) {
    return tensor_core_scorer(problem.feature_dtype, problem.parts, problem.num_targets);
  } else {
    return plain_scorer<T>();
  }
}

template <class T>
Scorer<T> choose_scorer(const CudaScoringProblem<T>& problem, const std::string& path, int device) {
  const Scorer<T> tiled = tiled_scorer(problem);
  // Code for sm_75 has no bf16 matrix instruction, on whatever device it runs.
  const bool has_mma = tiled.parts > 0 && code_architecture(tiled.kernel, device) >= 80;
  return find_path(path, has_mma ? CudaPath::kMma : CudaPath::kPlain) == CudaPath::kMma
             ? tiled
             : plain_scorer<T>();
}

}  // namespace

template <class T>
int64_t cuda_scoring_workspace_bytes(const CudaScoringProblem<T>& problem, int64_t count,
                                     int64_t limit) {
  return scoring_workspace_bytes(tiled_scorer(problem), problem, count, limit);
}

template <class T>
void cuda_score(const CudaScoringProblem<T>& problem, const std::string& path, T* out,
                int64_t row_stride, int64_t target_stride, const ScoringWorkspace& workspace,
                const CudaQueue& queue) {
  const DeviceGuard guard(queue.device);
  run_score(choose_scorer(problem, path, queue.device), problem, {out, row_stride, target_stride},
            workspace, reinterpret_cast<cudaStream_t>(queue.stream));
}

template <class T>
void cuda_top_k(const CudaScoringProblem<T>& problem, const std::string& path, int64_t count,
                T* values, int64_t* indices, int32_t* not_a_number,
                const ScoringWorkspace& workspace, const CudaQueue& queue) {
  const DeviceGuard guard(queue.device);
  run_top_k(choose_scorer(problem, path, queue.device), problem, count, {values, indices},
            not_a_number, workspace, reinterpret_cast<cudaStream_t>(queue.stream));
}

template int64_t cuda_scoring_workspace_bytes<float>(const CudaScoringProblem<float>&, int64_t,
                                                     int64_t);
template int64_t cuda_scoring_workspace_bytes<double>(const CudaScoringProblem<double>&, int64_t,
                                                      int64_t);
template void cuda_score<float>(const CudaScoringProblem<float>&, const std::string&, float*,
                                int64_t, int64_t, const ScoringWorkspace&, const CudaQueue&);
template void cuda_score<double>(const CudaScoringProblem<double>&, const std::string&, double*,
                                 int64_t, int64_t, const ScoringWorkspace&, const CudaQueue&);
template void cuda_top_k<float>(const CudaScoringProblem<float>&, const std::string&, int64_t,
                                float*, int64_t*, int32_t*, const ScoringWorkspace&,
                                const CudaQueue&);
template void cuda_top_k<double>(const CudaScoringProblem<double>&, const std::string&, int64_t,
                                 double*, int64_t*, int32_t*, const ScoringWorkspace&,
                                 const CudaQueue&);

}  // namespace trak_ext
