"""Small problems whose answers are known, for kernels that have to show that they compute.

Gradients and features are integers (times a power of two a row), so Rademacher projections and
scores are exact whatever the order of their sums, and must agree with the CPU's to the bit. Normal
projections get a bound of rounding errors, below what two exchanged entries of the matrix change.
Values need one, two or three bf16 parts as the precision has them.

A family's problems stand in CASES; another kernel is another line there. Each is a case: it reserves
places in two buffers (what goes in, what comes out), launches, and judges what came back. All cases
of a self-test share the buffers, so that they cost one copy there, their launches and one copy back.

The quick form, by count of work, for the 21 kernels of wgmma: 23 calls and about 180 launches of 10
to 40 us, 5 MB there and 3 MB back; on one CPU core 8 ms for the answers, once a process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _C, ops
from .runtime import get_num_threads

CPU = torch.device("cpu")
SEED_LOW, SEED_HIGH, MODEL_ID = 0x9E3779B9, 0x7F4A7C15, 5
# Of the first parameter: odd, inside a block of every kernel, and with a high word in the counter.
FIRST_PARAM = 2**40 + 333
GUARD = 3  # columns beside the result, which must stay as they were
BASE_ROWS = 8  # others are these times a power of two, so that few answers serve many rows


class Slot(NamedTuple):
    """A tensor's place in a buffer of bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor."""
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        end = self.start + extent * self.dtype.itemsize
        typed = buffer[self.start : end].view(self.dtype)
        return typed.as_strided(self.shape, self.strides)


class Memory:
    """Tensors in one buffer of the device; around them all bytes are 255."""

    def __init__(self) -> None:
        self._size = 0
        self._values: list[tuple[Slot, Tensor | float, bool]] = []
        self._known: dict[Any, Slot] = {}

    def place(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        values: Tensor | float,
        strides: tuple[int, ...] | None = None,
        start: int = 0,
        is_base: bool = False,
    ) -> Slot:
        """Reserve a place, `start` bytes after a multiple of 16.

        Its values, or the base rows that they are `spread` from.
        """
        if strides is None:
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        slot = Slot(self._size + start, dtype, shape, strides)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        self._size += (start + extent * dtype.itemsize + 15) // 16 * 16 + 16
        self._values.append((slot, values, is_base))
        return slot

    def shared(self, key: Any, make: Callable[[], Slot]) -> Slot:
        """Return the place that was made for a key, or make it."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def build(self, kernels: Any) -> Tensor:
        """Return the buffer with its values: each tensor is sent once and spread on the device."""
        buffer = torch.full((self._size,), 255, dtype=torch.uint8, device=kernels.device)
        there: dict[Any, Tensor] = {}
        for slot, values, is_base in self._values:
            place = slot.view(buffer)
            if not isinstance(values, Tensor):
                place.fill_(values)
                continue
            sent = there.setdefault((id(values), 0), kernels.send(values))
            rows = slot.shape[0]
            if is_base and (id(values), rows) not in there:
                there[id(values), rows] = spread(sent, rows)
            place.copy_(there[id(values), rows] if is_base else sent)
        return buffer


class Case(Protocol):
    """A problem and its answer."""

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take places."""

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start the work; wait for nothing."""

    def judge(self, outputs: Tensor) -> str | None:
        """Return what is wrong, None for nothing."""


def check_quickly(kernels: Any, family: str, path: str) -> str | None:
    """Run a family's quick cases on one path; return what is wrong in one clause, or None."""
    try:
        problems = run_cases(kernels, path, CASES[family](kernels, path))
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return next(filter(None, problems), None)


def run_cases(kernels: Any, path: str, cases: Iterable[Case]) -> list[str | None]:
    """Return what is wrong with each case, None for nothing; raises where a launch does."""
    cases = list(cases)
    inputs, outputs = Memory(), Memory()
    for case in cases:
        case.reserve(inputs, outputs)
    with kernels.stream():
        there, back = inputs.build(kernels), outputs.build(kernels)
        for case in cases:
            case.launch(kernels, path, there, back)
        made = kernels.fetch(back)
    return [case.judge(made) for case in cases]


def describe_difference(
    name: str, got: Tensor, expected: Tensor, bound: Tensor | None = None
) -> str | None:
    """Return a clause about the first entry [row, column] that is wrong, None if none is."""
    if bound is None:
        if torch.equal(got, expected):
            return None
        wrong = ~(got == expected)
    else:
        wrong = ~((got - expected).abs() <= bound)
    if not bool(wrong.any()):
        return None
    row, column = divmod(int(wrong.flatten().to(torch.uint8).argmax()), wrong.shape[1])
    return (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} results are wrong, the first at "
        f"[{row}, {column}]: expected {expected[row, column].item()}, got {got[row, column].item()}"
    )


@functools.cache
def _hashes(seed: int, count: int) -> Tensor:
    """Return numbers below 2^32 that look random: a hash (lowbias32) of seed and place."""
    x = torch.arange(count, dtype=torch.int64, device=CPU) + (seed << 20)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF
    return x ^ x >> 16


def integers(seed: int, shape: tuple[int, ...], largest: int) -> Tensor:
    """Return integers from -largest to largest as fp32; torch's generators stay untouched."""
    drawn = (_hashes(seed, math.prod(shape)) * (2 * largest + 1) >> 32) - largest
    return drawn.to(torch.float32).view(shape)


# --- Projections ----------------------------------------------------------------------------------


class _Values(NamedTuple):
    """Base rows [8, params] of a tensor of gradients, and where in the matrix it begins."""

    params: int
    param_offset: int


# Side by side, so that most begin at odd parameters. "two parts" has several chunks of superblocks;
# all have tails. The sum of |g| is below 2^22 in each.
VALUES = {
    "one part": _Values(1100, FIRST_PARAM),
    "two parts": _Values(2301, FIRST_PARAM + 1100),
    "three parts": _Values(1101, FIRST_PARAM + 3401),
    "fp16": _Values(517, FIRST_PARAM + 4502),
}
# What an fp32 tensor holds in each precision; and a tensor of another dtype in the same call.
FP32_VALUES = {"medium": "one part", "high": "two parts", "highest": "three parts"}
OTHER = {
    "medium": ("one part", torch.bfloat16),
    "high": ("fp16", torch.float16),
    "highest": ("one part", torch.float64),
}
# Of a tensor in memory: rows at multiples of 16 bytes, the matrix's row 0 at one, neither, and
# parameters that do not follow one another.
LAYOUTS = ("aligned", "aligned in the matrix", "odd", "strided")
NORMAL_TOLERANCE = 2.0**-20  # of |g_b| |R_j|, both 2-norms


@functools.cache
def base_rows(name: str) -> Tensor:
    """Return the integers [8, params]."""
    params = VALUES[name].params
    if name == "one part":
        return integers(1, (BASE_ROWS, params), 127)
    if name == "two parts":
        return integers(2, (BASE_ROWS, params), 2**11)
    if name == "fp16":
        return integers(3, (BASE_ROWS, params), 2**11 - 1)
    rows = integers(4, (BASE_ROWS, params), 127)
    rows[:, ::16] = integers(5, (BASE_ROWS, params), 2**17)[:, ::16]
    return rows


@functools.cache
def _group_scales(groups: int, device: torch.device) -> Tensor:
    group = torch.arange(groups, dtype=torch.float32, device=CPU)
    return (2.0 ** (group % 9 - 4) * (1 - 2 * (group % 2)))[:, None, None].to(device)


def spread(base: Tensor, rows: int) -> Tensor:
    """Return `rows` rows [rows, n] of the 8: those of every next 8 times another power of two."""
    scales = _group_scales(-(-rows // BASE_ROWS), base.device).to(base.dtype)
    return (base * scales).flatten(0, 1)[:rows]


@functools.cache
def tolerances(name: str) -> Tensor:
    """Return what a normal projection of each base row may be off, [8, 1]."""
    norms = base_rows(name).norm(dim=1, keepdim=True)
    return NORMAL_TOLERANCE * math.sqrt(VALUES[name].params) * norms


_answers: dict[tuple[str, str], Tensor] = {}


def base_answers(name: str, kind: str, proj_dim: int) -> Tensor:
    """Return base rows @ R by the CPU's kernels, [8, proj_dim]; made once a process."""
    known = _answers.get((name, kind))
    if known is None or known.shape[1] < proj_dim:
        base = base_rows(name)
        known = torch.zeros(BASE_ROWS, proj_dim, dtype=torch.float32, device=CPU)
        params, offset = VALUES[name]
        _C.project(
            [(base.data_ptr(), ops.DTYPE_CODES[base.dtype], params, params, 1, offset)],
            *(BASE_ROWS, known.data_ptr(), proj_dim, proj_dim, 1),
            *law_of(kind),
            ops.PRECISIONS["highest"],
            get_num_threads(),
        )
        _answers[name, kind] = known
    return known[:, :proj_dim]


def law_of(kind: str) -> tuple[int, int, int, int]:
    """Return the matrix's arguments as `_C` takes them."""
    return ops.KINDS[kind], SEED_LOW, SEED_HIGH, MODEL_ID


def place_gradients(memory: Memory, name: str, dtype: torch.dtype, layout: str, rows: int) -> Slot:
    """Reserve a place for `rows` rows of gradients, [rows, params]."""
    params, offset = VALUES[name]
    size = dtype.itemsize
    values = base_rows(name)
    if layout == "strided":
        return memory.place((rows, params), dtype, values, (1, rows + 1), is_base=True)
    pitch = -(-params // 16) * 16 + 16
    start = 0 if layout == "aligned" else offset * size % 16
    if layout == "odd":
        pitch, start = pitch + 1, start + size
    return memory.place((rows, params), dtype, values, (pitch, 1), start, is_base=True)


@functools.cache
def _before() -> Tensor:
    """Return what base rows of a result hold before, [8, 1]."""
    return torch.full((BASE_ROWS, 1), 32.0, dtype=torch.float32, device=CPU)


@dataclass
class ProjectionCase:
    """A projection of several tensors, each (values, dtype, layout), into a result with a border."""

    kind: str
    precision: str
    rows: int
    proj_dim: int
    grads: list[tuple[str, torch.dtype, str]]
    least_workspace: bool = False
    transposed: bool = False  # the result
    rows_in_memory: int = 0  # of the tensors, which cases share
    _grads: list[Slot] = field(default_factory=list)
    _out: Slot | None = None

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take places; the result begins as 32 in every base row."""
        rows = max(self.rows, self.rows_in_memory)
        self._grads = [
            inputs.shared((*grad, rows), lambda g=grad: place_gradients(inputs, *g, rows))
            for grad in self.grads
        ]
        width = self.proj_dim + GUARD
        strides = (1, self.rows) if self.transposed else (width, 1)
        self._out = outputs.place(
            (self.rows, width), torch.float32, _before(), strides, is_base=True
        )

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start the projection."""
        assert self._out is not None
        grads = [
            (slot.view(inputs)[: self.rows], VALUES[grad[0]].param_offset)
            for slot, grad in zip(self._grads, self.grads, strict=True)
        ]
        out = self._out.view(outputs)[:, : self.proj_dim]
        kernels.project(path, grads, out, law_of(self.kind), self.precision, self.least_workspace)

    def judge(self, outputs: Tensor) -> str | None:
        """Compare with the CPU's projection."""
        assert self._out is not None
        expected = _before().repeat(1, self.proj_dim + GUARD)
        bound = None
        for name, _, _ in self.grads:
            expected[:, : self.proj_dim] += base_answers(name, self.kind, self.proj_dim)
            if self.kind == "normal":
                bound = tolerances(name) if bound is None else bound + tolerances(name)
        return describe_difference(
            str(self),
            self._out.view(outputs),
            spread(expected, self.rows),
            None if bound is None else spread(bound, self.rows).abs(),
        )

    def __str__(self) -> str:
        dtypes = ", ".join(f"{str(dtype)[6:]} {layout}" for _, dtype, layout in self.grads)
        return (
            f"{self.kind} {self.precision}, {self.rows} rows, {self.proj_dim} columns, of {dtypes}"
        )


def tiles_of(kernels: Any, path: str) -> list[dict[str, Any]]:
    """Return the tiles of a path, smaller ones first."""
    return sorted(
        kernels.tiles(path), key=lambda tile: (tile["kind"], tile["passes"], tile["tile_rows"])
    )


def projection_cases(kernels: Any, path: str) -> list[ProjectionCase]:
    """Return the quick cases: every kernel once, and a batch of two tiles in the least workspace.

    A kernel gets as many rows as it takes, or 1 or 3 less; more columns than a tile; and an fp32
    tensor in two layouts beside one of another dtype.
    """
    precisions = {passes: name for name, passes in ops.PRECISIONS.items()}
    cases: list[ProjectionCase] = []
    tiles = tiles_of(kernels, path)
    for i, tile in enumerate(tiles):
        kind, passes = tile["kind"], tile["passes"]
        precision = precisions[passes]
        is_first = i == 0 or (tiles[i - 1]["kind"], tiles[i - 1]["passes"]) != (kind, passes)
        is_last = i + 1 == len(tiles) or tiles[i + 1]["kind"] != kind
        least_rows = 1 if is_first else tiles[i - 1]["tile_rows"] + 1
        rows = max(least_rows, tile["tile_rows"] - (0, 3, 1)[passes - 1])
        columns = tile["tile_columns"] + 21
        values = FP32_VALUES[precision]
        grads = [(values, torch.float32, LAYOUTS[(i + shift) % 4]) for shift in (0, 2)]
        grads.append((*OTHER[precision], LAYOUTS[(i + 1) % 4]))
        cases.append(ProjectionCase(kind, precision, rows, columns, grads))
        if is_last:
            rows = tile["tile_rows"] + 5
            cases.append(ProjectionCase(kind, precision, rows, columns, grads[:1], True))
    rows = max((case.rows for case in cases), default=0)
    for case in cases:
        case.rows_in_memory = rows
    return cases


# --- The matrix itself ----------------------------------------------------------------------------


@dataclass
class MatrixCase:
    """Rows of the matrix."""

    kind: str
    param_offset: int
    params: int
    proj_dim: int
    _out: Slot | None = None

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take the place of the rows."""
        self._out = outputs.place((self.params, self.proj_dim), torch.float32, 0.0)

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start filling them in."""
        assert self._out is not None
        kernels.fill_matrix(law_of(self.kind), self.param_offset, self._out.view(outputs))

    def judge(self, outputs: Tensor) -> str | None:
        """Compare with the CPU's, to the bit."""
        assert self._out is not None
        expected = torch.empty((self.params, self.proj_dim), dtype=torch.float32, device=CPU)
        _C.fill_matrix(
            *law_of(self.kind),
            self.param_offset,
            self.params,
            self.proj_dim,
            expected.data_ptr(),
            get_num_threads(),
        )
        return describe_difference(str(self), self._out.view(outputs), expected)

    def __str__(self) -> str:
        return f"{self.params} rows of the {self.kind} matrix from {self.param_offset} on"


def matrix_cases(kernels: Any, path: str) -> list[MatrixCase]:
    """Return the quick cases: rows of either kind with tails at both ends."""
    return [MatrixCase(kind, FIRST_PARAM, 301, 277) for kind in ("rademacher", "normal")]


# --- Scores ---------------------------------------------------------------------------------------

SCORED_FEATURES = 83  # of a sample: tails of 16 and of 4
CHECKPOINTS = 2
SAMPLES, TARGETS = 133, 71  # that are drawn: others are the first of them, or these again


class _ScoringValues(NamedTuple):
    features: Tensor  # [M, 133, k]
    targets: Tensor  # [M, 71, k]
    products: Tensor  # their inner products, [M, 133, 71]


@functools.cache
def scoring_values(largest: tuple[int, int], three_parts: tuple[bool, bool]) -> _ScoringValues:
    """Return integers up to the largest feature and target, and some for three parts of either.

    A large number meets a small one, so that sums stay below 2^24.
    """
    shape = (CHECKPOINTS, SAMPLES + TARGETS, SCORED_FEATURES)
    drawn = integers(6, shape, 3)
    features, targets = drawn[:, :SAMPLES].clone(), drawn[:, SAMPLES:].clone()
    large = integers(7, shape, largest[0])
    features[..., ::2] = large[:, :SAMPLES, ::2]
    large = integers(8, shape, largest[1])
    targets[..., 1::2] = large[:, SAMPLES:, 1::2]
    medium = integers(9, shape, 127)
    features[..., 4::5], targets[..., 4::5] = medium[:, :SAMPLES, 4::5], medium[:, SAMPLES:, 4::5]
    for many, few, columns, is_wanted in (
        (features, targets, [0, 40], three_parts[0]),
        (targets, features, [1, 41], three_parts[1]),
    ):
        if is_wanted:
            many[..., columns] = integers(10, (*many.shape[:2], 2), 2**17)
            few[..., columns] = integers(11, (*few.shape[:2], 2), 1)
    return _ScoringValues(features, targets, (features.double() @ targets.double().mT).float())


@functools.cache
def scoring_scales(samples: int) -> tuple[Tensor, Tensor]:
    """Return weights [n] and coefficients [M, n]: powers of two, the weights of either sign."""
    drawn = integers(12, (4, samples), 2)
    weights = 2.0 ** drawn[0] * (1 - 2 * (drawn[1] > 0).to(torch.float32))
    return weights, 2.0 ** (drawn[2:] > 0).to(torch.float32)


@dataclass
class ScoringCase:
    """Scores [n, t] of two checkpoints, or the best `count` of them for each target."""

    dtype: torch.dtype
    precision: str
    samples: int
    targets: int
    count: int = 0  # 0: all scores
    aligned: bool = True
    scaled: bool = True  # by coefficients
    least_workspace: bool = False
    _inputs: list[Slot] = field(default_factory=list)
    _outputs: list[Slot] = field(default_factory=list)

    @property
    def compute(self) -> torch.dtype:
        """Of the scores."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _values(self) -> _ScoringValues:
        if self.precision == "medium":
            return scoring_values((127, 127), (False, False))
        feature = {torch.bfloat16: 127, torch.float16: 2**11 - 1}.get(self.dtype, 2**12 - 1)
        is_highest = self.precision == "highest"
        return scoring_values(
            (feature, 2**12 - 1), (is_highest and self.dtype.itemsize > 2, is_highest)
        )

    def _rows(self) -> Tensor:
        """Return which of the drawn samples each one is, [n]: again and again, for ties."""
        return torch.arange(self.samples, device=CPU) % SAMPLES

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take places."""
        values, rows = self._values(), self._rows()
        pitch = 96 if self.aligned else 2 * SCORED_FEATURES + 1
        start = 0 if self.aligned else self.dtype.itemsize
        shape = (self.samples, SCORED_FEATURES)
        self._inputs = [
            inputs.shared(
                (id(values.features), m, self.dtype, shape, pitch),
                lambda m=m: inputs.place(
                    shape, self.dtype, values.features[m, rows], (pitch, 1), start
                ),
            )
            for m in range(CHECKPOINTS)
        ]
        solved = values.targets[:, : self.targets]
        for tensor in (solved, *scoring_scales(self.samples)):
            self._inputs.append(inputs.place(tuple(tensor.shape), self.compute, tensor))
        if self.count == 0:
            self._outputs = [
                outputs.place((self.samples, self.targets + GUARD), self.compute, 32.0)
            ]
        else:
            shape = (self.targets, self.count)
            self._outputs = [
                outputs.place(shape, self.compute, math.nan),
                outputs.place(shape, torch.int64, -1.0),
                outputs.place((1,), torch.int32, 0.0),
            ]

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start the scores."""
        *features, solved, weights, coefficients = (slot.view(inputs) for slot in self._inputs)
        given = (features, solved, weights, coefficients if self.scaled else None, self.precision)
        out = [slot.view(outputs) for slot in self._outputs]
        if self.count == 0:
            kernels.score(path, *given, out[0][:, : self.targets], self.least_workspace)
        else:
            kernels.top_k(path, *given, tuple(out), self.least_workspace)

    def judge(self, outputs: Tensor) -> str | None:
        """Compare with fp64."""
        products = self._values().products[:, :, : self.targets]
        if self.samples != SAMPLES:
            products = products[:, self._rows()]
        weights, coefficients = scoring_scales(self.samples)
        if self.scaled:
            products = products * coefficients[..., None]
        scores = products.sum(0) * weights[:, None]
        got = [slot.view(outputs) for slot in self._outputs]
        if self.count == 0:
            expected = torch.full(got[0].shape, 32.0, dtype=self.compute, device=CPU)
            expected[:, : self.targets] = scores
            return describe_difference(str(self), got[0], expected)
        values, indices = (best[:, : self.count] for best in best_first(scores))
        if bool(got[2]):
            return f"{self}: NaN is said to be among the scores, and is not"
        return describe_difference(
            f"{self}: values", got[0], values.to(self.compute)
        ) or describe_difference(f"{self}: indices", got[1], indices)

    def __str__(self) -> str:
        what = f"the best {self.count} of" if self.count else "all"
        return (
            f"{what} {self.samples} scores of {str(self.dtype)[6:]} features in {self.precision} "
            f"for {self.targets} targets"
        )


def best_first(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return every target's scores and samples, [t, n], ties by lower index."""
    found = scores.T.sort(dim=1, descending=True, stable=True)
    return found.values, found.indices


def scoring_cases(kernels: Any, path: str) -> list[ScoringCase]:
    """Return the quick cases: each dtype, precision and tile, and two lists of the best."""
    precisions = ["highest"] if path == "plain" else list(ops.PRECISIONS)
    cases = []
    for dtype in kernels.feature_dtypes:
        for precision in precisions:
            for targets in (11, 71):
                i = len(cases)
                cases.append(
                    ScoringCase(
                        *(dtype, precision, 133, targets),
                        aligned=i % 2 == 0,
                        scaled=i % 3 != 0,
                        least_workspace=i % 4 == 3,
                    )
                )
    return [*cases, *top_k_cases(kernels.feature_dtypes[0])]


def wide_scoring_cases(kernels: Any, path: str) -> list[ScoringCase]:
    """Return the quick cases in fp64."""
    wide = torch.float64
    return [ScoringCase(wide, "highest", 133, 71, aligned=False), *top_k_cases(wide)]


def top_k_cases(dtype: torch.dtype) -> list[ScoringCase]:
    """Return lists of the best: groups in ample workspace, several slabs of samples in the least."""
    return [
        ScoringCase(dtype, "highest", 1333, 5, count=7),
        ScoringCase(dtype, "high", 1333, 5, count=300, least_workspace=True),
    ]


CASES: dict[str, Callable[[Any, str], Sequence[Case]]] = {
    "projection": projection_cases,
    "projection matrix": matrix_cases,
    "scoring": scoring_cases,
    "scoring in fp64": wide_scoring_cases,
}
