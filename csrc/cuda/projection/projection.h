// The contract between the bindings and the CUDA projection; no CUDA header needed to call it.
// Failures of the CUDA runtime are std::runtime_error; a workspace that is too small and a
// path that is not there are std::invalid_argument.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../problem.h"
#include "../device/path.h"
#include "../device/queue.h"

namespace trak_ext::cuda {

// What a projection can use, `limit` at most, unless the least that it can do with is more: the
// bf16 parts of a chunk of a tile's rows and a tile's sums, 13 MB at most.
int64_t projection_workspace_bytes(const ProjectionProblem& problem, int64_t limit);

// Both only add work to the stream: they allocate nothing and wait for nothing. `path`: "plain",
// "mma" or "wgmma", one that the build has for the device.
void project(const ProjectionProblem& problem, const std::string& path, float* workspace,
             int64_t workspace_bytes, const Queue& queue);
// out[p, j] = R[param_offset + p, j] for p < params.
void fill_matrix(const MatrixLaw& law, uint64_t param_offset, int64_t params, int64_t proj_dim,
                 float* out, const Queue& queue);

// The last of "plain", "mma" and "wgmma" that this build has code for on a device; those before it
// are there too.
std::string projection_path(int device);

// A path's kernels with matrix instructions, for a device with so much shared memory a block.
struct KernelInfo {
  Kind kind;
  int passes;
  int tile_rows;
  int tile_columns;
  int threads;
  int shared_bytes;  // dynamic
};

std::vector<KernelInfo> list_kernels(Path path, int64_t shared_limit);

}  // namespace trak_ext::cuda
