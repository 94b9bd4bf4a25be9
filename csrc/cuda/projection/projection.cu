#include "projection.h"

#include <algorithm>
#include <string>

#include "../device/device_guard.h"
#include "run_projection.h"

namespace trak_ext::cuda {
namespace {

// The best path that this build has code for on a device.
Path best_path(int device) {
  constexpr int64_t kOneRow = 1, kNoLimit = 227 * 1024;
  const Multiplier mma = tensor_core_multiplier(Kind::kRademacher, 1, kOneRow, kNoLimit);
  // Code for sm_75 has no bf16 matrix instruction, on whatever device it runs.
  if (code_architecture(mma.kernel, device) < 80) return Path::kPlain;
  // Only code for sm_90a has the warpgroup's, and sm_90a is no number: elsewhere these kernels are
  // a trap without registers.
  if (compute_capability(device) != 90) return Path::kMma;
  constexpr int kRegistersOfTrap = 40;
  const Multiplier wgmma = warpgroup_multiplier(Kind::kRademacher, 1, kOneRow);
  return register_count(wgmma.kernel) > kRegistersOfTrap ? Path::kWgmma : Path::kMma;
}

}  // namespace

int64_t projection_workspace_bytes(const ProjectionProblem& problem, int64_t limit) {
  const int64_t rows = problem.rows, columns = problem.proj_dim;
  if (rows == 0 || columns == 0) return 0;
  // At least the rows that any path's tile has for this batch.
  const int tile_rows = rows <= 8 ? 8 : rows <= 32 ? 32 : kTileRowsMax;
  int64_t least = 0;
  double wanted = 0;
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    const GradientView& grad = problem.grads[i];
    if (grad.params == 0) continue;
    const ChunkCut cut = cut_chunks(grad);
    const int64_t operand = chunk_operand_bytes(
        cut, 1, tile_rows, passes_of(grad.dtype, bf16_parts(problem.precision)));
    const int64_t sums = std::min<int64_t>(rows, tile_rows) *
                         std::min<int64_t>(columns, kTileColumnsMax) *
                         static_cast<int64_t>(sizeof(float));
    least = std::max(least, operand + sums);
    wanted = std::max(
        wanted, static_cast<double>(cut.chunks) *
                    (static_cast<double>(ceil_div(rows, tile_rows)) * static_cast<double>(operand) +
                     static_cast<double>(rows) * static_cast<double>(columns) *
                         static_cast<double>(sizeof(float))));
  }
  if (wanted > static_cast<double>(limit)) return std::max(least, limit);
  return std::max(least, static_cast<int64_t>(wanted));
}

void project(const ProjectionProblem& problem, const std::string& path_name, float* workspace,
             int64_t workspace_bytes, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const Path path = find_path(path_name, best_path(queue.device));
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, queue.device);
  const int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device);
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    const GradientView& grad = problem.grads[i];
    const int passes = passes_of(grad.dtype, bf16_parts(problem.precision));
    const auto choose = [&](int64_t rows, bool is_rest) {
      return choose_multiplier(path, problem.law.kind, passes, rows, is_rest, shared_limit);
    };
    run_projection(choose, problem.law, grad, problem.rows, problem.proj_dim, problem.out,
                   {workspace, workspace_bytes}, multiprocessors,
                   reinterpret_cast<cudaStream_t>(queue.stream));
  }
}

void fill_matrix(const MatrixLaw& law, uint64_t param_offset, int64_t params, int64_t proj_dim,
                 float* out, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  (void)code_architecture(matrix_kernel<Kind::kRademacher>, queue.device);
  run_fill_matrix({law, param_offset, params, proj_dim, out},
                  reinterpret_cast<cudaStream_t>(queue.stream));
}

std::string projection_path(int device) {
  const DeviceGuard guard(device);
  return kPathNames[static_cast<int>(best_path(device))];
}

std::vector<KernelInfo> list_kernels(Path path, int64_t shared_limit) {
  std::vector<KernelInfo> kernels;
  if (path == Path::kPlain) return kernels;
  for (Kind kind : {Kind::kRademacher, Kind::kNormal}) {
    for (int passes = 1; passes <= 3; ++passes) {
      for (int64_t rows = 1; rows <= kTileRowsMax;) {
        const Multiplier found = path == Path::kWgmma
                                     ? warpgroup_multiplier(kind, passes, rows)
                                     : tensor_core_multiplier(kind, passes, rows, shared_limit);
        if (!kernels.empty() && rows > 1 && found.tile_rows == kernels.back().tile_rows) break;
        kernels.push_back(
            {kind, passes, found.tile_rows, found.tile_columns, found.threads, found.shared_bytes});
        rows = found.tile_rows + 1;
      }
    }
  }
  return kernels;
}

}  // namespace trak_ext::cuda
