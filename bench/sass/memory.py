"""Memory, barriers and control."""

from __future__ import annotations

from typing import Any

import numpy as np

from .operands import (
    U32,
    Getter,
    Operands,
    predicate_of,
    read_predicate,
    register_of,
    set_predicate,
)


def bytes_of(op: Operands) -> int:
    for modifier, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if modifier in op.modifiers:
            return size
    return 4


def load(op: Operands) -> Getter:
    machine, size = op.machine, bytes_of(op)
    place = register_of(op.parts[0])
    address = op.address(1)
    shared = op.name == "LDS"

    def run(here: Any) -> None:
        at = address(here)
        found = machine.load_shared(here, at, size) if shared else machine.memory.load(at, size)
        if size < 4:
            found = np.pad(found, ((0, 0), (0, 4 - size)))
        words = np.ascontiguousarray(found).view(U32)
        for i in range(words.shape[1] if place != 255 else 0):
            machine.registers[place + i, here] = words[:, i]

    return run


def store(op: Operands) -> Getter:
    machine, size = op.machine, bytes_of(op)
    address = op.address(0)
    place = register_of(op.parts[1])
    shared = op.name == "STS"

    def run(here: Any) -> None:
        count = max(size // 4, 1)
        rows = [place + i if place != 255 else 255 for i in range(count)]
        words = np.ascontiguousarray(machine.registers[rows][:, here].T)
        values = words.view(np.uint8)[:, :size]
        if shared:
            machine.store_shared(here, address(here), values)
        else:
            machine.memory.store(address(here), values)

    return run


def copy(op: Operands) -> Getter:
    """LDGSTS: it lands at once, which no kernel may rely on and none may mind."""
    machine, size = op.machine, bytes_of(op)
    to, source = op.address(0), op.address(1)
    return lambda here: machine.store_shared(
        here, to(here), machine.memory.load(source(here), size)
    )


def load_matrices(op: Operands) -> Getter:
    """LDSM: lane 8 i + r names row r of matrix i; register i gets four bytes of row lane / 4."""
    machine = op.machine
    if op.modifiers[:2] != ["16", "M88"]:
        raise NotImplementedError(op.text)
    matrices = int(op.modifiers[2]) if len(op.modifiers) > 2 else 1
    place, address = register_of(op.parts[0]), op.address(1)

    def run(here: Any) -> None:
        at = address(here)
        naming = here % 32 < 8 * matrices
        rows = machine.load_shared(here[naming], at[naming], 16)
        rows = rows.reshape(-1, matrices, 8, 4, 4)  # [warps, matrices, rows, quads, bytes]
        for i in range(matrices):
            words = np.ascontiguousarray(rows[:, i]).view(U32).reshape(-1)
            machine.registers[place + i, here] = words

    return run


def elect(op: Operands) -> Getter:
    """ELECT: the lowest lane of those that are here."""
    machine = op.machine
    place, _ = op.predicates(0)[0]

    def run(here: Any) -> None:
        _, first = np.unique(here // 32, return_index=True)
        set_predicate(machine, place)(here, np.isin(np.arange(here.size), first))

    return run


def synchronise(op: Operands) -> Getter:
    """SYNCS: barriers in shared memory (mbarrier)."""
    machine = op.machine
    kind = op.modifiers[0]
    if kind == "EXCH":  # begins one; the word holds 2^20 less the arrivals, shifted
        address, value = op.address(1), op.value(2)
        return lambda here: machine.begin_arrivals(
            int(address(here)[0]), 2**20 - (int(value(here)[0]) >> 1)
        )
    if kind == "ARRIVE":
        address = op.address(1)
        expected = None if "A1T0" in op.modifiers else op.value(2)

        def arrive(here: Any) -> None:
            places = address(here)
            count = expected(here) if expected else np.zeros(here.size, dtype=U32)
            for place, number in zip(places, count, strict=True):
                machine.arrive(int(place), 1, int(number))

        return arrive
    if kind != "PHASECHK":
        raise NotImplementedError(op.text)
    result, _ = op.predicates(0)[0]
    address, parity = op.address(0), op.value(1)

    def wait(here: Any) -> None:
        odd = parity(here) >> U32(31)
        set_predicate(machine, result)(here, True)
        machine.wait_arrivals(here, address(here), odd)

    return wait


def copy_in_bulk(op: Operands) -> Getter:
    """UBLKCP [to, barrier], [from], 16-byte units: once for a warp, and it lands at once."""
    machine = op.machine
    if op.modifiers != ["S", "G"]:
        raise NotImplementedError(op.text)
    to, source = (register_of(part.strip("[]")) for part in op.parts[:2])
    units = op.value(2)

    def run(here: Any) -> None:
        for thread in here[np.unique(here // 32, return_index=True)[1]]:
            one = np.array([thread])
            words = [int(machine.registers[i, thread]) for i in (to, to + 1, source, source + 1)]
            size = int(units(one)[0]) * 16
            data = machine.memory.load(np.array([words[2] | words[3] << 32]), size)
            machine.shared[words[0] : words[0] + size] = data[0]
            machine.counts.wavefronts[machine.now] += -(-size // 128)
            machine.arrive(words[1], 0, -size)

    return run


def barrier(op: Operands) -> Getter:
    machine = op.machine
    number = op.raw(op.parts[0])
    count = op.raw(op.parts[1]) if len(op.parts) > 1 else None
    stay = "ARV" not in op.modifiers

    def run(here: Any) -> None:
        expected = int(count(here)[0]) if count else None
        machine.wait(here, int(number(here)[0]), expected, stay)

    return run


def branch(op: Operands) -> Getter:
    machine = op.machine
    target = int(op.parts[-1], 16)
    conditions = [read_predicate(machine, predicate_of(part)) for part in op.parts[:-1]]
    if set(op.modifiers) - {"U", "ANY", "REL", "NOINC"}:
        raise NotImplementedError(op.text)

    def run(here: Any) -> None:
        for get in conditions:
            here = here[get(here)]
        machine.address[here] = target

    return run


def go_back(op: Operands) -> Getter:
    machine = op.machine
    place = register_of(op.parts[0].split()[0])

    def run(here: Any) -> None:
        machine.address[here] = machine.registers[place, here]

    return run


def leave(op: Operands) -> Getter:
    def run(here: Any) -> None:
        op.machine.state[here] = 2

    return run


def matrix(op: Operands) -> Getter:
    multiply = op.machine.multiply
    if multiply is None:
        return lambda here: None
    return lambda here: multiply(op, here)
