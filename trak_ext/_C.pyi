from typing import Any

__version__: str

def project(
    grads: list[tuple[int, int, int, int, int, int]],
    rows: int,
    out: int,
    proj_dim: int,
    out_row_stride: int,
    out_column_stride: int,
    kind: int,
    seed_low: int,
    seed_high: int,
    model_id: int,
    precision: int,
    num_threads: int,
) -> None: ...
def fill_matrix(
    kind: int,
    seed_low: int,
    seed_high: int,
    model_id: int,
    param_offset: int,
    params: int,
    proj_dim: int,
    out: int,
    num_threads: int,
) -> None: ...
def project_sjlt(
    grads: list[tuple[int, int, int, int, int, int]],
    rows: int,
    out: int,
    out_row_stride: int,
    out_column_stride: int,
    law: tuple[int, int, int, int, int],
    num_threads: int,
) -> None: ...
def fill_sjlt_matrix(
    law: tuple[int, int, int, int, int],
    param_offset: int,
    params: int,
    out: int,
    num_threads: int,
) -> None: ...
def score_float(
    features: list[int],
    row_strides: list[int],
    dtype: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    solved: int,
    coefficients: int,
    weights: int,
    out: int,
    num_threads: int,
) -> None: ...
def score_double(
    features: list[int],
    row_strides: list[int],
    dtype: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    solved: int,
    coefficients: int,
    weights: int,
    out: int,
    num_threads: int,
) -> None: ...
def top_k_float(
    features: list[int],
    row_strides: list[int],
    dtype: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    solved: int,
    coefficients: int,
    weights: int,
    count: int,
    values: int,
    indices: int,
    num_threads: int,
) -> bool: ...
def top_k_double(
    features: list[int],
    row_strides: list[int],
    dtype: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    solved: int,
    coefficients: int,
    weights: int,
    count: int,
    values: int,
    indices: int,
    num_threads: int,
) -> bool: ...
def law_version() -> int: ...
def cpu_level() -> str: ...
def has_fixed_point() -> bool: ...
def available_cpu_levels() -> list[str]: ...
def compiler() -> str: ...
def cuda_build() -> dict[str, Any] | None: ...

# Where the CUDA part is built in.
def cuda_workspace_bytes(
    grads: list[tuple[int, int, int, int, int, int]],
    rows: int,
    proj_dim: int,
    passes: int,
    limit: int,
) -> int: ...
def cuda_project(
    grads: list[tuple[int, int, int, int, int, int]],
    rows: int,
    out: int,
    proj_dim: int,
    out_row_stride: int,
    out_column_stride: int,
    kind: int,
    seed_low: int,
    seed_high: int,
    model_id: int,
    passes: int,
    path: str,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_fill_matrix(
    kind: int,
    seed_low: int,
    seed_high: int,
    model_id: int,
    param_offset: int,
    params: int,
    proj_dim: int,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_sjlt_workspace_bytes(
    grads: list[tuple[int, int, int, int, int, int]],
    rows: int,
    law: tuple[int, int, int, int, int],
    limit: int,
) -> int: ...
def cuda_project_sjlt(
    grads: list[tuple[int, int, int, int, int, int]],
    rows: int,
    out: int,
    out_row_stride: int,
    out_column_stride: int,
    law: tuple[int, int, int, int, int],
    full_blocks: bool,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_fill_sjlt_matrix(
    law: tuple[int, int, int, int, int],
    param_offset: int,
    params: int,
    out: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_projection_path(device: int) -> str: ...
def cuda_kernels(path: str, shared_limit: int) -> list[dict[str, Any]]: ...
def cuda_scoring_workspace_bytes_float(
    num_checkpoints: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    dtype: int,
    parts: int,
    count: int,
    limit: int,
) -> int: ...
def cuda_score_float(
    features: list[int],
    row_strides: list[int],
    dtype: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    solved: int,
    coefficients: int,
    weights: int,
    parts: int,
    path: str,
    out: int,
    out_row_stride: int,
    out_target_stride: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_top_k_float(
    features: list[int],
    row_strides: list[int],
    dtype: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    solved: int,
    coefficients: int,
    weights: int,
    parts: int,
    path: str,
    count: int,
    values: int,
    indices: int,
    not_a_number: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_scoring_workspace_bytes_double(
    num_checkpoints: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    dtype: int,
    parts: int,
    count: int,
    limit: int,
) -> int: ...
def cuda_score_double(
    features: list[int],
    row_strides: list[int],
    dtype: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    solved: int,
    coefficients: int,
    weights: int,
    parts: int,
    path: str,
    out: int,
    out_row_stride: int,
    out_target_stride: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_top_k_double(
    features: list[int],
    row_strides: list[int],
    dtype: int,
    num_train: int,
    num_targets: int,
    proj_dim: int,
    solved: int,
    coefficients: int,
    weights: int,
    parts: int,
    path: str,
    count: int,
    values: int,
    indices: int,
    not_a_number: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...

CUDA_TOP_K_MAX: int
