"""Integers, logic, predicates and moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import (
    I64,
    IS_PREDICATE,
    LOW,
    U32,
    U64,
    Getter,
    Operands,
    predicate_of,
    read_predicate,
    set_predicate,
    write_to,
)


def add_three(op: Operands) -> Getter:
    """IADD3 and VIADD: carries out after the result, carries in (.X) at the end."""
    machine = op.machine
    wide = "64" in op.modifiers
    carried_in = op.last_predicates() if "X" in op.modifiers else []
    carried_out = op.predicates(1)
    write = write_to(machine, op.parts[0], 2 if wide else 1)
    sources = [op.integer(i, wide) for i in range(1, len(op.parts))]
    ins = [read_predicate(machine, source) for source in carried_in]

    def run(here: Any) -> None:
        if wide:
            total64 = np.zeros(here.size, dtype=U64)
            for get, negated in sources:
                total64 = total64 - get(here) if negated else total64 + get(here)
            write(here, total64)
            return
        total = np.zeros(here.size, dtype=U64)
        for get, negated in sources:
            value = get(here)
            total += (~value).astype(U64) + U64(1) if negated else value.astype(U64)
        for get in ins:
            total += get(here).astype(U64)
        write(here, (total & LOW).astype(U32))
        for i, (place, _) in enumerate(carried_out):
            set_predicate(machine, place)(here, (total >> U64(32)) > i)

    return run


def multiply_add(op: Operands) -> Getter:
    """IMAD: low, .HI or .WIDE."""
    machine = op.machine
    carried_in = op.last_predicates()
    carried_out = op.predicates(1)
    signed = "U32" not in op.modifiers
    wide, high = "WIDE" in op.modifiers, "HI" in op.modifiers
    write = write_to(machine, op.parts[0], 2 if wide else 1)
    a, b = op.value(1), op.value(2)
    c = op.value(3, wide=wide or high)
    carry = read_predicate(machine, carried_in[0]) if "X" in op.modifiers else None

    def extend(values: Any) -> Any:
        return values.view(np.int32).astype(I64).view(U64) if signed else values.astype(U64)

    def run(here: Any) -> None:
        x, y = np.ascontiguousarray(a(here)), np.ascontiguousarray(b(here))
        if not (wide or high):
            total = x.astype(U64) * y.astype(U64) + c(here).astype(U64)
            if carry is not None:
                total = total + carry(here).astype(U64)
            write(here, (total & LOW).astype(U32))
            return
        product, addend = extend(x) * extend(y), c(here)
        total = product + addend
        over = total < product
        if carry is not None:
            total = total + carry(here).astype(U64)
            over |= total < carry(here).astype(U64)
        write(here, total if wide else (total >> U64(32)).astype(U32))
        for place, _ in carried_out[:1]:
            set_predicate(machine, place)(here, over)

    return run


def shift_add(op: Operands) -> Getter:
    """LEA."""
    machine = op.machine
    carried_in = op.last_predicates()
    carried_out = op.predicates(1)
    write = write_to(machine, op.parts[0])
    high, sign = "HI" in op.modifiers, "SX32" in op.modifiers
    shift = U64(int(op.parts[-1], 16)) if op.parts[-1].startswith("0x") else U64(0)
    shift_is_operand = op.parts[-1].startswith("0x")
    a = op.value(1)
    b, negated = op.integer(2)
    top = op.value(3) if high and not sign else None
    carry = read_predicate(machine, carried_in[0]) if "X" in op.modifiers else None
    assert shift_is_operand, op.text

    def run(here: Any) -> None:
        x = np.ascontiguousarray(a(here))
        if high:
            upper = (
                x.view(np.int32).astype(I64).view(U64) >> U64(32) if sign else top(here).astype(U64)
            )
            whole = (upper << U64(32)) | x.astype(U64)
            first = (whole << shift) >> U64(32)
        else:
            first = (x.astype(U64) << shift) & LOW
        y = b(here)
        total = first + ((~y).astype(U64) + U64(1) if negated else y.astype(U64))
        if carry is not None:
            total = total + carry(here).astype(U64)
        write(here, (total & LOW).astype(U32))
        for place, _ in carried_out[:1]:
            set_predicate(machine, place)(here, total >> U64(32) != 0)

    return run


def funnel_shift(op: Operands) -> Getter:
    """SHF: of (low, amount, high)."""
    write = write_to(op.machine, op.parts[0])
    low, amount, high = op.value(1), op.value(2), op.value(3)
    left, wrap, upper = op.modifiers[0] == "L", "W" in op.modifiers, "HI" in op.modifiers
    kind = next(m for m in op.modifiers if m in ("U32", "S32", "U64", "S64"))
    bits = int(kind[1:])

    def run(here: Any) -> None:
        s = amount(here).astype(U64)
        s = s & U64(bits - 1) if wrap else np.minimum(s, U64(bits))
        lo, hi = low(here).astype(U64), high(here).astype(U64)
        whole = hi << U64(32) | lo
        over = s >= U64(64)
        s = np.minimum(s, U64(63))
        if left:
            shifted = np.where(over, U64(0), whole << s)
        elif kind.startswith("S"):
            shifted = (whole.view(I64) >> s.view(I64)).view(U64)
        else:
            shifted = np.where(over, U64(0), whole >> s)
        write(here, ((shifted >> U64(32)) if upper else (shifted & LOW)).astype(U32))

    return run


def logic(op: Operands) -> Getter:
    """LOP3: any function of three bits."""
    machine = op.machine
    op.last_predicates()
    is_zero = op.predicates(0)
    write = write_to(machine, op.parts[0])
    a, b, c = op.value(1), op.value(2), op.value(3)
    table = int(op.parts[4], 16)
    known = {
        0xC0: lambda x, y, z: x & y,
        0xFC: lambda x, y, z: x | y,
        0x3C: lambda x, y, z: x ^ y,
        0x96: lambda x, y, z: x ^ y ^ z,
        0xAE: lambda x, y, z: (~x & y) | z,
        0xF8: lambda x, y, z: x | (y & z),
        0x33: lambda x, y, z: ~y,
    }.get(table)

    def general(x: Any, y: Any, z: Any) -> Any:
        result = np.zeros_like(x)
        for i in range(8):
            if table >> i & 1:
                term = x if i & 4 else ~x
                term = term & (y if i & 2 else ~y)
                result = result | (term & (z if i & 1 else ~z))
        return result

    function = known or general

    def run(here: Any) -> None:
        result = function(a(here), b(here), c(here))
        write(here, result)
        for place, _ in is_zero[:1]:
            set_predicate(machine, place)(here, result != 0)

    return run


def predicate_logic(op: Operands) -> Getter:
    """PLOP3."""
    machine = op.machine
    tables = [int(part, 16) for part in op.parts if part.startswith("0x")]
    predicates = [predicate_of(part) for part in op.parts if IS_PREDICATE.fullmatch(part)]
    results, sources = predicates[:2], [read_predicate(machine, p) for p in predicates[2:5]]

    def run(here: Any) -> None:
        index = sum(get(here).astype(int) << (2 - i) for i, get in enumerate(sources))
        for (place, _), table in zip(results, tables, strict=False):
            set_predicate(machine, place)(here, (table >> index) & 1 == 1)

    return run


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    **{"EQ": np.equal, "NE": np.not_equal, "LT": np.less, "GT": np.greater},
    **{"LE": np.less_equal, "GE": np.greater_equal},
}
STRICT = {"LE": np.less, "GE": np.greater, "LT": np.less, "GT": np.greater}


def combine(op: Operands, result: Any, other: Any) -> Any:
    if "OR" in op.modifiers:
        return result | other
    return result ^ other if "XOR" in op.modifiers else result & other


def compare(op: Operands) -> Getter:
    """ISETP; .EX is the upper half's, after the lower half's result."""
    machine = op.machine
    results = op.predicates(0)
    sources = op.last_predicates()
    a, b = op.value(0), op.value(1)
    name = op.modifiers[0]
    signed, extended = "U32" not in op.modifiers, "EX" in op.modifiers
    other = read_predicate(machine, sources[0])
    lower = read_predicate(machine, sources[1]) if extended else None

    def run(here: Any) -> None:
        x, y = np.ascontiguousarray(a(here)), np.ascontiguousarray(b(here))
        if signed:
            x, y = x.view(np.int32), y.view(np.int32)
        if lower is None:
            result = COMPARE[name](x, y)
        elif name in STRICT:
            result = STRICT[name](x, y) | ((x == y) & lower(here))
        else:
            result = (x == y) & lower(here) if name == "EQ" else (x != y) | lower(here)
        last = other(here)
        for (place, _), value in zip(results, (result, ~result), strict=False):
            set_predicate(machine, place)(here, combine(op, value, last))

    return run


def select(op: Operands) -> Getter:
    """SEL, FSEL."""
    condition = read_predicate(op.machine, op.last_predicates()[-1])
    write = write_to(op.machine, op.parts[0])
    if op.name.startswith("F"):
        x, y = op.floating(1), op.floating(2)
        return lambda here: write(here, np.where(condition(here), x(here), y(here)).view(U32))
    a, b = op.value(1), op.value(2)
    return lambda here: write(here, np.where(condition(here), a(here), b(here)))


def smaller_or_larger(op: Operands) -> Getter:
    """VIMNMX, IMNMX: the smaller where the predicate is true."""
    condition = read_predicate(op.machine, op.last_predicates()[-1])
    write = write_to(op.machine, op.parts[0])
    a, b = op.value(1), op.value(2)
    kind = U32 if "U32" in op.modifiers else np.int32

    def run(here: Any) -> None:
        x, y = (np.ascontiguousarray(get(here)).view(kind) for get in (a, b))
        result = np.where(condition(here), np.minimum(x, y), np.maximum(x, y))
        write(here, result.astype(kind).view(U32))

    return run


def permute(op: Operands) -> Getter:
    """PRMT of (a, selector, b)."""
    write = write_to(op.machine, op.parts[0])
    a, selector, b = op.value(1), op.value(2), op.value(3)

    def run(here: Any) -> None:
        whole = b(here).astype(U64) << U64(32) | a(here).astype(U64)
        s = selector(here).astype(U64)
        result = np.zeros(here.size, dtype=U64)
        for i in range(4):
            pick = s >> U64(4 * i)
            byte = whole >> ((pick & U64(7)) * U64(8)) & U64(255)
            sign = np.where(byte & U64(128), U64(255), U64(0))
            result |= np.where(pick & U64(8), sign, byte) << U64(8 * i)
        write(here, result.astype(U32))

    return run


def move(op: Operands) -> Getter:
    write = write_to(op.machine, op.parts[0])
    a = op.value(1)
    return lambda here: write(here, a(here))


def load_constant(op: Operands) -> Getter:
    words = 2 if "64" in op.modifiers else 1
    write = write_to(op.machine, op.parts[0], words)
    get = op.raw(op.parts[1], wide=words == 2)
    if "U8" in op.modifiers:
        return lambda here: write(here, get(here) & U32(255))
    return lambda here: write(here, get(here))


def special(op: Operands) -> Getter:
    """S2R, S2UR, CS2R."""
    machine = op.machine
    words = 2 if op.name == "CS2R" and "32" not in op.modifiers else 1
    write = write_to(machine, op.parts[0], words)
    what = op.parts[1]
    zero = {"SRZ", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId", "SR_TID.Y", "SR_TID.Z"}

    def run(here: Any) -> None:
        if what == "SR_TID.X":
            write(here, here.astype(U32))
        elif what == "SR_LANEID":
            write(here, (here % 32).astype(U32))
        elif what == "SR_CTAID.X":
            write(here, np.full(here.size, machine.block, dtype=U32))
        elif what in zero:
            write(here, np.zeros(here.size, dtype=U32))
        else:
            raise NotImplementedError(op.text)

    return run


def predicates_to_register(op: Operands) -> Getter:
    write = write_to(op.machine, op.parts[0])
    base, mask = op.value(2), op.value(3)

    def run(here: Any) -> None:
        bits = sum(op.machine.predicates[i, here].astype(U32) << U32(i) for i in range(7))
        write(here, (base(here) & ~mask(here)) | (bits & mask(here)))

    return run


def register_to_predicates(op: Operands) -> Getter:
    value, mask = op.value(1), op.value(2)

    def run(here: Any) -> None:
        bits, taken = value(here), int(mask(here)[0])
        for i in range(7):
            if taken >> i & 1:
                op.machine.predicates[i, here] = (bits >> U32(i)) & U32(1) == 1

    return run


def shuffle(op: Operands) -> Getter:
    """SHFL.IDX: another lane's value."""
    machine = op.machine
    if op.modifiers[0] != "IDX":
        raise NotImplementedError(op.text)
    op.predicates(0)
    write = write_to(machine, op.parts[0])
    value, lane = op.value(1), op.value(2)
    everyone = np.arange(machine.threads)

    def run(here: Any) -> None:
        write(here, value(everyone)[here // 32 * 32 + lane(here).astype(I64) % 32])

    return run


def vote(op: Operands) -> Getter:
    """VOTE.ANY: the ballot and whether any is true."""
    machine = op.machine
    source = read_predicate(machine, op.last_predicates()[-1])
    results = op.predicates(1)
    write = write_to(machine, op.parts[0])

    def run(here: Any) -> None:
        ballots = np.zeros(machine.threads // 32, dtype=U32)
        np.bitwise_or.at(ballots, here // 32, source(here).astype(U32) << (here % 32).astype(U32))
        write(here, ballots[here // 32])
        for place, _ in results[:1]:
            set_predicate(machine, place)(here, ballots[here // 32] != 0)

    return run
