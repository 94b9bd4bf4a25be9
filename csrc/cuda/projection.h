// The contract between the bindings and the CUDA projection; no CUDA header needed to call it.
// Failures of the CUDA runtime are std::runtime_error; a workspace that is too small and a
// path that is not there are std::invalid_argument.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"
#include "path.h"

namespace trak_ext {

// Where the work goes: a device by its number, and a stream of it (a cudaStream_t as an address).
struct CudaQueue {
  int device;
  uintptr_t stream;
};

// out[b, j] += sum_p g[b, p] R[p, j] for every tensor in turn.
struct CudaProjectionProblem {
  MatrixLaw law;
  const GradientView* grads;
  int64_t num_grads;
  int64_t rows;
  int64_t proj_dim;
  OutputView out;
  int passes;  // bf16 parts of an fp32 gradient: 1, 2 or 3
  float* workspace;
  int64_t workspace_bytes;
};

// What a projection can use, `limit` at most, unless the least that it can do with is more: the
// bf16 parts of a chunk of a tile's rows and a tile's sums, 13 MB at most.
int64_t cuda_workspace_bytes(const CudaProjectionProblem& problem, int64_t limit);

// Both only add work to the stream: they allocate nothing and wait for nothing. `path`: "plain",
// "mma" or "wgmma", one that the build has for the device.
void cuda_project(const CudaProjectionProblem& problem, const std::string& path,
                  const CudaQueue& queue);
// out[p, j] = R[param_offset + p, j] for p < params.
void cuda_fill_matrix(const MatrixLaw& law, uint64_t param_offset, int64_t params, int64_t proj_dim,
                      float* out, const CudaQueue& queue);

// The last of "plain", "mma" and "wgmma" that this build has code for on a device; those before it
// are there too.
std::string cuda_projection_path(int device);

// A path's kernels with matrix instructions, for a device with so much shared memory a block.
struct CudaKernel {
  Kind kind;
  int passes;
  int tile_rows;
  int tile_columns;
  int threads;
  int shared_bytes;  // dynamic
};

std::vector<CudaKernel> cuda_kernels(CudaPath path, int64_t shared_limit);

}  // namespace trak_ext
