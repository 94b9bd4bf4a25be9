from typing import Any, overload

__version__: str

# What the kernels are told: addresses, sizes and strides in elements. Whoever makes one keeps the
# tensors. dtype: 0 for fp64, 1 fp32, 2 fp16, 3 bf16. precision: 1 for "medium", 2 "high",
# 3 "highest".
class Matrix:
    def __init__(self, *, kind: int, seed_low: int, seed_high: int, model_id: int) -> None: ...
    @property
    def kind(self) -> int: ...
    @property
    def seed_low(self) -> int: ...
    @property
    def seed_high(self) -> int: ...
    @property
    def model_id(self) -> int: ...

class SparseMatrix:
    def __init__(
        self, *, width: int, repetitions: int, seed_low: int, seed_high: int, model_id: int
    ) -> None: ...
    @property
    def width(self) -> int: ...
    @property
    def repetitions(self) -> int: ...
    @property
    def seed_low(self) -> int: ...
    @property
    def seed_high(self) -> int: ...
    @property
    def model_id(self) -> int: ...

class Gradient:
    def __init__(
        self,
        *,
        address: int,
        dtype: int,
        params: int,
        row_stride: int,
        param_stride: int,
        param_offset: int,
    ) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def dtype(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def row_stride(self) -> int: ...
    @property
    def param_stride(self) -> int: ...
    @property
    def param_offset(self) -> int: ...

class Output:
    def __init__(self, *, address: int, row_stride: int, column_stride: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def row_stride(self) -> int: ...
    @property
    def column_stride(self) -> int: ...

class Projection:
    def __init__(
        self,
        *,
        matrix: Matrix,
        grads: list[Gradient],
        rows: int,
        proj_dim: int,
        out: Output,
        precision: int,
    ) -> None: ...
    @property
    def matrix(self) -> Matrix: ...
    @property
    def grads(self) -> list[Gradient]: ...
    @property
    def rows(self) -> int: ...
    @property
    def proj_dim(self) -> int: ...
    @property
    def out(self) -> Output: ...
    @property
    def precision(self) -> int: ...

class SparseProjection:
    def __init__(
        self, *, matrix: SparseMatrix, grads: list[Gradient], rows: int, out: Output
    ) -> None: ...
    @property
    def matrix(self) -> SparseMatrix: ...
    @property
    def grads(self) -> list[Gradient]: ...
    @property
    def rows(self) -> int: ...
    @property
    def out(self) -> Output: ...

class Scoring:
    def __init__(
        self,
        *,
        dtype: int,
        features: list[int],
        row_strides: list[int],
        feature_dtype: int,
        num_train: int,
        num_targets: int,
        proj_dim: int,
        solved: int,
        coefficients: int,
        weights: int,
        precision: int,
    ) -> None: ...
    @property
    def dtype(self) -> int: ...
    @property
    def features(self) -> list[int]: ...
    @property
    def row_strides(self) -> list[int]: ...
    @property
    def feature_dtype(self) -> int: ...
    @property
    def num_train(self) -> int: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def proj_dim(self) -> int: ...
    @property
    def solved(self) -> int: ...
    @property
    def coefficients(self) -> int: ...
    @property
    def weights(self) -> int: ...
    @property
    def precision(self) -> int: ...

def project(projection: Projection | SparseProjection, num_threads: int) -> None: ...
@overload
def fill_matrix(
    matrix: Matrix,
    *,
    param_offset: int,
    params: int,
    proj_dim: int,
    out: int,
    num_threads: int,
) -> None: ...
@overload
def fill_matrix(
    matrix: SparseMatrix, *, param_offset: int, params: int, out: int, num_threads: int
) -> None: ...
def score(scoring: Scoring, *, out: int, num_threads: int) -> None: ...
def top_k(scoring: Scoring, *, count: int, values: int, indices: int, num_threads: int) -> bool: ...
def law_version() -> int: ...
def normal_table() -> list[list[float]]: ...
def cpu_level() -> str: ...
def has_fixed_point() -> bool: ...
def available_cpu_levels() -> list[str]: ...
def compiler() -> str: ...
def cuda_build() -> dict[str, Any] | None: ...

# Where the CUDA part is built in.
@overload
def cuda_workspace_bytes(projection: Projection | SparseProjection, limit: int) -> int: ...
@overload
def cuda_workspace_bytes(scoring: Scoring, limit: int, *, count: int) -> int: ...
@overload
def cuda_project(
    projection: Projection,
    *,
    path: str,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
@overload
def cuda_project(
    projection: SparseProjection,
    *,
    full_blocks: bool,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
@overload
def cuda_fill_matrix(
    matrix: Matrix,
    *,
    param_offset: int,
    params: int,
    proj_dim: int,
    out: int,
    device: int,
    stream: int,
) -> None: ...
@overload
def cuda_fill_matrix(
    matrix: SparseMatrix, *, param_offset: int, params: int, out: int, device: int, stream: int
) -> None: ...
def cuda_score(
    scoring: Scoring,
    *,
    path: str,
    out: int,
    out_row_stride: int,
    out_target_stride: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_top_k(
    scoring: Scoring,
    *,
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
def cuda_projection_path(device: int) -> str: ...
def cuda_kernels(path: str, shared_limit: int) -> list[dict[str, Any]]: ...

CUDA_TOP_K_MAX: int
