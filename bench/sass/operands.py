"""An instruction's operands, taken apart. Register values are uint32, one a thread."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Getter = Callable[[Any], Any]
U32, U64, I64 = np.uint32, np.uint64, np.int64
LOW = np.uint64(0xFFFFFFFF)
UNIFORM = 256


def register_of(text: str) -> int:
    """Return the place of R5 or UR5; RZ and URZ have places nobody writes."""
    if text.startswith("U"):
        return UNIFORM + (63 if text[2:] == "Z" else int(text[2:]))
    return 255 if text[1:] == "Z" else int(text[1:])


def predicate_of(text: str) -> tuple[int, bool]:
    """Return a predicate's place and the value that counts as true."""
    wanted = not text.startswith("!")
    text = text.lstrip("!")
    first = 8 if text.startswith("U") else 0
    number = text.lstrip("U")[1:]
    return first + (7 if number == "T" else int(number)), wanted


IS_PREDICATE = re.compile(r"!?U?P(\d|T)")
IS_REGISTER = re.compile(r"U?R(\d+|Z)")


def float_bits(text: str) -> int:
    value = {"+INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "-QNAN": np.nan}.get(text)
    return int(np.float32(float(text) if value is None else value).view(U32))


class Operands:
    """An instruction's text, taken apart."""

    def __init__(self, machine: Any, text: str) -> None:
        self.machine = machine
        text = re.sub(r"^@!?U?P\w+ ", "", text)
        head, _, rest = text.partition(" ")
        self.name, *self.modifiers = head.split(".")
        self.parts = [p.strip().replace(".reuse", "") for p in rest.split(",") if p.strip()]
        self.text = text

    def predicates(self, start: int) -> list[tuple[int, bool]]:
        """Take the run of predicates from a place on out of the operands."""
        found = []
        while start < len(self.parts) and IS_PREDICATE.fullmatch(self.parts[start]):
            found.append(predicate_of(self.parts.pop(start)))
        return found

    def last_predicates(self) -> list[tuple[int, bool]]:
        """Take the run of predicates at the end."""
        found: list[tuple[int, bool]] = []
        while self.parts and IS_PREDICATE.fullmatch(self.parts[-1]):
            found.insert(0, predicate_of(self.parts.pop()))
        return found

    def raw(self, text: str, wide: bool = False) -> Getter:
        """Return what reads a register, constant or immediate, as uint32 or as uint64."""
        machine = self.machine
        if IS_REGISTER.fullmatch(text):
            place = register_of(text)
            registers = machine.registers
            zero = place in (255, UNIFORM + 63)
            if not wide:
                return lambda here: registers[place, here]
            if zero:
                return lambda here: np.zeros(here.size, dtype=U64)
            return lambda here: (
                registers[place, here].astype(U64)
                | registers[place + 1, here].astype(U64) << U64(32)
            )
        if found := re.fullmatch(r"c\[0x([0-9a-f]+)\]\[(U?R\w+)?\+?(0x[0-9a-f]+)?\]", text):
            bank = machine.banks[int(found[1], 16)]
            offset = int(found[3] or "0", 16)
            size = 8 if wide else 4
            if found[2]:
                index = self.raw(found[2])
                take = np.arange(size)
                kind = U64 if wide else U32
                return lambda here: (
                    bank[(index(here).astype(I64) + offset)[:, None] + take].view(kind).reshape(-1)
                )
            value = int.from_bytes(bank[offset : offset + size].tobytes(), "little")
        elif re.fullmatch(r"-?0x[0-9a-f]+", text):
            value = int(text, 16)
        else:
            value = float_bits(text)
        mask = 2**64 - 1 if wide else 2**32 - 1
        constant = np.array([value & mask], dtype=U64 if wide else U32)
        return lambda here: np.broadcast_to(constant, here.shape)

    def integer(self, i: int, wide: bool = False) -> tuple[Getter, bool]:
        """Return what reads operand i, ~ applied, and whether it is to be negated."""
        text = self.parts[i]
        if text.startswith("~"):
            get = self.raw(text[1:], wide)
            return (lambda here: ~get(here)), False
        if re.match(r"-U?R|-c\[", text):
            return self.raw(text[1:], wide), True
        return self.raw(text, wide), False

    def value(self, i: int, wide: bool = False) -> Getter:
        """Return what reads operand i, modulo 2^32 or 2^64."""
        get, negated = self.integer(i, wide)
        return (lambda here: -get(here)) if negated else get

    def floating(self, i: int) -> Getter:
        """Return what reads operand i as fp32."""
        text = self.parts[i]
        if re.fullmatch(r"[-+]?(\d.*|INF|QNAN)", text):
            get = self.raw(text)
            return lambda here: get(here).view(np.float32)
        negate = text.startswith("-")
        text = text.lstrip("-")
        absolute = text.startswith("|")
        get = self.raw(text.strip("|"))

        def read(here: Any) -> Any:
            values = np.ascontiguousarray(get(here)).view(np.float32)
            values = np.abs(values) if absolute else values
            return -values if negate else values

        return read

    def address(self, i: int) -> Getter:
        """Return what reads a memory operand's address, int64."""
        text = self.parts[i]
        inside = re.findall(r"\[([^]]*)\]", text)[-1]
        offset, terms = 0, []
        for term in re.findall(r"[-+]?[^-+]+", inside):
            sign = -1 if term.startswith("-") else 1
            term = term.lstrip("+-")
            if term.startswith("0x"):
                offset += sign * int(term, 16)
                continue
            name, *modifiers = term.split(".")
            scale = next((int(m[1:]) for m in modifiers if m[0] == "X"), 1)
            terms.append((self.raw(name, wide="64" in modifiers), scale))

        def read(here: Any) -> Any:
            total = np.full(here.size, offset, dtype=I64)
            for get, scale in terms:
                total += get(here).astype(I64) * scale
            return total

        return read


def write_to(machine: Any, text: str, words: int = 1) -> Callable[[Any, Any], None]:
    """Return what writes a result, uint32 or (two words) uint64."""
    place = register_of(text)
    registers = machine.registers
    if place in (255, UNIFORM + 63):
        return lambda here, values: None
    if words == 1:

        def write(here: Any, values: Any) -> None:
            registers[place, here] = values

        return write

    def write_wide(here: Any, values: Any) -> None:
        values = values.astype(U64, copy=False)
        registers[place, here] = (values & LOW).astype(U32)
        registers[place + 1, here] = (values >> U64(32)).astype(U32)

    return write_wide


def set_predicate(machine: Any, place: int) -> Callable[[Any, Any], None]:
    def write(here: Any, values: Any) -> None:
        if place % 8 != 7:
            machine.predicates[place, here] = values

    return write


def read_predicate(machine: Any, source: tuple[int, bool]) -> Getter:
    place, wanted = source
    return lambda here: machine.predicates[place, here] == wanted
