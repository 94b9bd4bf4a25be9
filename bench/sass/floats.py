"""Floating point and conversions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .integers import COMPARE, combine
from .operands import I64, U32, U64, Getter, Operands, read_predicate, set_predicate, write_to


def arithmetic(op: Operands) -> Getter:
    """FADD, FMUL, FFMA."""
    write = write_to(op.machine, op.parts[0])
    sources = [op.floating(i) for i in range(1, len(op.parts))]
    name = op.name

    def run(here: Any) -> None:
        x = [get(here) for get in sources]
        with np.errstate(all="ignore"):
            if name == "FADD":
                result = x[0] + x[1]
            elif name == "FMUL":
                result = x[0] * x[1]
            else:  # rounded twice at worst, which fp64's width makes rare
                result = (x[0].astype(np.float64) * x[1] + x[2]).astype(np.float32)
        write(here, result.astype(np.float32).view(U32))

    return run


def float_min_max(op: Operands) -> Getter:
    condition = read_predicate(op.machine, op.last_predicates()[-1])
    write = write_to(op.machine, op.parts[0])
    a, b = op.floating(1), op.floating(2)
    xor_sign = "XORSIGN" in op.modifiers

    def run(here: Any) -> None:
        x, y = (np.broadcast_to(get(here), here.shape) for get in (a, b))
        p, q = (np.abs(x), np.abs(y)) if xor_sign else (x, y)
        result = np.where(condition(here), np.fmin(p, q), np.fmax(p, q))
        if xor_sign:
            result = np.where(np.signbit(x) ^ np.signbit(y), -result, result)
        write(here, result.astype(np.float32).view(U32))

    return run


def float_compare(op: Operands) -> Getter:
    machine = op.machine
    results = op.predicates(0)
    sources = op.last_predicates()
    a, b = op.floating(0), op.floating(1)
    name = op.modifiers[0]
    other = read_predicate(machine, sources[0])
    unordered = name.endswith("U")

    def run(here: Any) -> None:
        x, y = a(here), b(here)
        result = COMPARE[name[:2]](x, y)
        if unordered:
            result = result | np.isnan(x) | np.isnan(y)
        elif name == "NE":
            result = result & ~np.isnan(x) & ~np.isnan(y)
        last = other(here)
        for (place, _), value in zip(results, (result, ~result), strict=False):
            set_predicate(machine, place)(here, combine(op, value, last))

    return run


def round_up(values: Any) -> Any:
    """Return fp32 at least as large as integers."""
    nearest = values.astype(np.float32)
    below = nearest.astype(np.float64) < values.astype(np.float64)
    return np.where(below, np.nextafter(nearest, np.float32(np.inf)), nearest).astype(np.float32)


def convert(op: Operands) -> Getter:
    """I2F, I2FP, F2I, F2F, F2FP, HADD2."""
    machine = op.machine
    words = op.modifiers
    name = op.name
    if name in ("I2F", "I2FP"):
        wide = "U64" in words or "S64" in words
        write = write_to(machine, op.parts[0])
        a = op.value(1, wide)
        kind = next((k for k in ("U32", "U64", "S64") if k in words), "S32")
        kind = kind if name == "I2FP" or kind != "S32" else ("U32" if "U32" in words else "S32")

        def to_float(here: Any) -> None:
            x = np.ascontiguousarray(a(here))
            x = x.view({"S32": np.int32, "S64": I64}.get(kind, x.dtype))
            result = round_up(x) if "RP" in words else x.astype(np.float32)
            write(here, result.view(U32))

        return to_float
    if name == "F2I":
        wide = "U64" in words
        write = write_to(machine, op.parts[0], 2 if wide else 1)
        f = op.floating(1)

        def to_integer(here: Any) -> None:
            x = np.trunc(f(here).astype(np.float64))
            limit = 2.0**64 - 2048 if wide else 2.0**32 - 1
            write(here, np.clip(np.nan_to_num(x), 0, limit).astype(U64 if wide else U32))

        return to_integer
    if name == "F2F":
        write = write_to(machine, op.parts[0])
        a = op.value(1, wide=True)
        return lambda here: write(here, a(here).view(np.float64).astype(np.float32).view(U32))
    if name == "HADD2":
        write = write_to(machine, op.parts[0])
        half = re.fullmatch(r"(U?R\w+)\.H([01])_H[01]", op.parts[2])
        assert half is not None, op.text
        source, shift = op.raw(half[1]), U32(16 * int(half[2]))

        def from_half(here: Any) -> None:
            bits = ((source(here) >> shift) & U32(0xFFFF)).astype(np.uint16)
            write(here, bits.view(np.float16).astype(np.float32).view(U32))

        return from_half
    write = write_to(machine, op.parts[0])  # F2FP.BF16.F32.PACK_AB, the upper half first
    upper, lower = op.floating(1), op.floating(2)
    truncates = "RZ" in words

    def pack(here: Any) -> None:
        halves = []
        for get in (lower, upper):
            values = np.ascontiguousarray(np.broadcast_to(get(here), here.shape))
            bits = values.astype(np.float32).view(U32).astype(U64)
            if not truncates:
                bits = bits + U64(0x7FFF) + (bits >> U64(16) & U64(1))
            halves.append(np.where(np.isnan(values), U64(0x7FFF), bits >> U64(16) & U64(0xFFFF)))
        write(here, (halves[0] | halves[1] << U64(16)).astype(U32))

    return pack


def reciprocal(op: Operands) -> Getter:
    if op.modifiers[0] != "RCP":
        raise NotImplementedError(op.text)
    write = write_to(op.machine, op.parts[0])
    a = op.floating(1)

    def run(here: Any) -> None:
        with np.errstate(all="ignore"):
            write(here, (np.float32(1) / a(here)).astype(np.float32).view(U32))

    return run


def half_constant(op: Operands) -> Getter:
    """HFMA2.MMA R, -RZ, RZ, x, y: a way to move two halves."""
    if op.parts[1:3] != ["-RZ", "RZ"]:
        raise NotImplementedError(op.text)
    write = write_to(op.machine, op.parts[0])
    halves = [int(np.float16(float(part)).view(np.uint16)) for part in op.parts[3:5]]
    value = np.array([halves[0] << 16 | halves[1]], dtype=U32)
    return lambda here: write(here, np.broadcast_to(value, here.shape))
