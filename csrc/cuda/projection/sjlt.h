// The contract between the bindings and the CUDA projection by the sparse kind; no CUDA header
// needed to call it. Failures of the CUDA runtime are std::runtime_error, a workspace that is too
// small is std::invalid_argument.
#pragma once

#include "../../sjlt_problem.h"
#include "../device/queue.h"

namespace trak_ext::cuda {

// What a projection can use, `limit` at most, unless the least that it can do with (74 KiB) is
// more.
int64_t sjlt_workspace_bytes(const SjltProblem& problem, int64_t limit);

// Both only add work to the stream: they allocate nothing and wait for nothing. full_blocks: blocks
// take as many rows as they can, however few blocks that leaves; small problems then launch the
// kernels of large ones. Bits do not depend on it.
void project_sjlt(const SjltProblem& problem, bool full_blocks, float* workspace,
                  int64_t workspace_bytes, const Queue& queue);
// out[p, j] = R[param_offset + p, j] for p < params.
void fill_sjlt_matrix(const SjltLaw& law, uint64_t param_offset, int64_t params, float* out,
                      const Queue& queue);

}  // namespace trak_ext::cuda
