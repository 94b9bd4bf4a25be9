#include "sjlt.h"

#include "../device/device_guard.h"
#include "run_sjlt.h"

namespace trak_ext::cuda {

int64_t sjlt_workspace_bytes(const SjltProblem& problem, int64_t limit) {
  return plan_sjlt_workspace(problem, limit);
}

void project_sjlt(const SjltProblem& problem, bool full_blocks, float* workspace,
                  int64_t workspace_bytes, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  (void)code_architecture(sjlt_fold_kernel, queue.device);
  run_sjlt(problem, {workspace, workspace_bytes}, reinterpret_cast<cudaStream_t>(queue.stream),
           full_blocks ? 0 : kSjltBlocksWanted);
}

void fill_sjlt_matrix(const SjltLaw& law, uint64_t param_offset, int64_t params, float* out,
                      const Queue& queue) {
  const DeviceGuard guard(queue.device);
  (void)code_architecture(sjlt_entry_kernel, queue.device);
  run_fill_sjlt_matrix({law, param_offset, params, law.width == 0 ? 0.0f : sjlt_scale(law), out},
                       reinterpret_cast<cudaStream_t>(queue.stream));
}

}  // namespace trak_ext::cuda
