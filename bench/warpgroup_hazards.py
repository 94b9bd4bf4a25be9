"""Follows a warpgroup's matrix instructions through a kernel's machine code.

From its start until the wait that covers its group, an HGMMA reads its first operand's registers
and reads and writes its sums whenever it likes. So in between no other instruction may write the
ones or touch the others, and what was touched before must be fenced (WARPGROUP.ARRIVE). `gsb0` at
an HGMMA ends a group; WARPGROUP.DEPBAR.LE gsb0, n waits until at most n groups are under way.

All paths are followed: what is under way is carried along every edge of the control flow, round
loops too, until nothing new comes.
"""

from __future__ import annotations

import dataclasses
import re

Code = list[tuple[int, str]]
Registers = frozenset[int]
NONE: Registers = frozenset()
GROUPS_MAX = 16  # under way; a kernel with more never waits

# Those whose first operand is a register that they read.
READ_ONLY = {"BAR", "BRX", "NANOSLEEP", "RET", "WARPSYNC"}


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction as the analysis sees it."""

    address: int
    text: str
    name: str
    reads: Registers
    writes: Registers
    conditional: bool
    target: int | None

    @property
    def commits(self) -> bool:
        """Return whether it is an HGMMA that ends a group."""
        return "gsb0" in self.text


def width_of(name: str, modifiers: list[str], operand: int, operands: int) -> int:
    """Return registers an operand has, rather too many than too few."""
    if name == "HMMA" or "128" in modifiers:
        return 4
    if name == "LDSM":
        return int(modifiers[-1]) if operand == 0 and modifiers[-1].isdigit() else 1
    if "WIDE" in modifiers:  # two of one register, added to two
        return 2 if operand in (0, operands - 1) else 1
    if name in ("I2F", "F2I", "F2F") and {"64", "F64", "U64", "S64"} & set(modifiers):
        return 2
    if "64" in modifiers or "F64" in modifiers or re.match(r"D(ADD|MUL|FMA|SETP|MNMX)", name):
        return 2
    return 2 if name == "CS2R" and "32" not in modifiers else 1


def parse(address: int, text: str) -> Step:
    """Read an instruction's registers off its text."""
    conditional = text.startswith("@")
    body = re.sub(r"^@!?U?P\w+ ", "", text)
    head, _, rest = body.partition(" ")
    name, *modifiers = head.split(".")
    branch = re.search(r"0x([0-9a-f]+)\s*$", rest) if name in ("BRA", "CALL", "WARPSYNC") else None
    target = int(branch[1], 16) if branch else None
    operands = [operand.strip() for operand in rest.split(",")]
    while operands and re.fullmatch(r"!?U?P(\d|T)", operands[0]):
        operands.pop(0)
    if name == "HGMMA":
        shape = re.fullmatch(r"64x(\d+)x16", modifiers[0])
        if shape is None:
            raise ValueError(f"HGMMA: expected 64xNx16, got '{text}'")
        sums, first = (int(operand[1:]) for operand in operands[:2])
        writes = frozenset(range(sums, sums + int(shape[1]) // 2))
        reads = frozenset(range(first, first + 4)) if operands[1].startswith("R") else NONE
        return Step(address, text, name, reads, writes, conditional, None)
    written, read = set(), set()
    last = max((i + 1 for i, text in enumerate(operands) if re.match(r"[-|~]*R", text)), default=0)
    for i, operand in enumerate(operands):
        width = width_of(name, modifiers, i, last)
        for bracket in re.findall(r"\[[^]]*\]", operand):
            for number, wide in re.findall(r"\bR(\d+)(\.64)?", bracket):
                read |= set(range(int(number), int(number) + (2 if wide else 1)))
        plain = re.sub(r"\w*\[[^]]*\]", "", operand)
        for number in re.findall(r"\bR(\d+)\b", plain):
            registers = set(range(int(number), int(number) + width))
            alone = re.fullmatch(r"R\d+", operand) is not None
            is_result = i == 0 and alone and name not in READ_ONLY and not name.endswith("SETP")
            if is_result:
                written |= registers
            else:
                read |= registers
    return Step(address, text, name, frozenset(read), frozenset(written), conditional, target)


@dataclasses.dataclass(frozen=True)
class Multiply:
    """What a matrix instruction under way reads (its first operand) and sums into."""

    first: Registers
    sums: Registers


@dataclasses.dataclass(frozen=True)
class Flight:
    """What is under way."""

    groups: tuple[frozenset[Multiply], ...] = ()  # committed, the oldest first
    open: frozenset[Multiply] = frozenset()

    def all(self) -> list[Multiply]:
        """Return all of it."""
        return [multiply for group in (*self.groups, self.open) for multiply in group]


def successors(steps: list[Step], at: dict[int, int], i: int) -> list[int]:
    """Return the indices of what may come after an instruction; a call comes back."""
    step = steps[i]
    following = [i + 1] if i + 1 < len(steps) else []
    if step.name == "BRX" or step.name == "JMP":
        raise ValueError(f"{step.address:#x}: an indirect jump, which is not followed: {step.text}")
    if step.name in ("EXIT", "RET"):
        return following if step.conditional else []
    if step.name == "BRA" and step.target is not None:
        # `BRA P0, target` is conditional without a guard.
        sure = not step.conditional and re.match(r"BRA(\.U)? 0x", step.text) is not None
        return [at[step.target], *([] if sure else following)]
    if step.name == "WARPSYNC" and step.target is not None:
        return [at[step.target], *following]
    return following


def apply(
    step: Step, flight: Flight, touched: Registers, faults: set[str]
) -> tuple[Flight, Registers]:
    """Return what is under way after an instruction, and registers touched since the last fence."""

    def fault(what: str) -> None:
        faults.add(f"{step.address:#x}: {what}: {step.text}")

    under_way = flight.all()
    first = frozenset().union(*(multiply.first for multiply in under_way))
    sums = frozenset().union(*(multiply.sums for multiply in under_way))
    if step.name == "HGMMA":
        if step.conditional:
            fault("a matrix instruction that not all threads may start")
        if step.reads & touched:
            fault("its first operand was written since the last fence")
        if step.writes & touched:
            fault("its sums were touched since the last fence")
        if step.reads & sums:
            fault("its first operand is sums under way")
        if step.writes & first:
            fault("its sums are the first operand of one under way")
        if any(m.sums & step.writes and m.sums != step.writes for m in under_way):
            fault("its sums are a part of those under way")
        opened = flight.open | {Multiply(step.reads, step.writes)}
        if step.commits:
            return Flight((*flight.groups, opened), frozenset()), touched
        return Flight(flight.groups, opened), touched
    if step.name == "WARPGROUP":
        if "ARRIVE" in step.text:
            return flight, NONE
        wait = re.search(r"DEPBAR\.LE gsb0, 0x([0-9a-f]+)", step.text)
        if wait is None:
            raise ValueError(f"{step.address:#x}: unknown: {step.text}")
        if flight.open:
            fault("a wait with a group that was not ended")
        pending = int(wait[1], 16)
        groups = flight.groups[len(flight.groups) - pending :] if pending else ()
        return Flight(
            groups if len(flight.groups) > pending else flight.groups, flight.open
        ), touched
    if step.writes & first:
        fault("writes the first operand of a matrix instruction under way")
    if (step.writes | step.reads) & sums:
        fault("touches the sums of a matrix instruction under way")
    if step.name in ("CALL", "EXIT", "RET") and under_way:
        fault("leaves with a matrix instruction under way")
    return flight, touched | step.writes | step.reads


def check_warpgroups(code: Code) -> list[str]:
    """Return what is wrong with a kernel's use of its matrix instructions, each once."""
    steps = [parse(address, text) for address, text in code]
    at = {step.address: i for i, step in enumerate(steps)}
    matrix = [step for step in steps if step.name == "HGMMA"]
    # Other registers need not be followed.
    sums = frozenset().union(*(step.writes for step in matrix))
    first = frozenset().union(*(step.reads for step in matrix))
    steps = [
        step
        if step.name == "HGMMA"
        else dataclasses.replace(step, reads=step.reads & sums, writes=step.writes & (sums | first))
        for step in steps
    ]
    starts = {0} | {at[step.target] for step in steps if step.target in at}
    starts |= {i + 1 for i, step in enumerate(steps) if step.target is not None}
    faults: set[str] = set()
    reached: set[int] = set()
    # Registers touched, by where and with what under way; they only grow, so it comes to an end.
    known: dict[tuple[int, Flight], Registers] = {}
    work: list[tuple[int, Flight, Registers]] = [(0, Flight(), NONE)]
    while work:
        i, flight, touched = work.pop()
        while True:
            if i in starts:
                before = known.get((i, flight))
                if before is not None and touched <= before:
                    break
                touched |= before or NONE
                known[i, flight] = touched
            reached.add(i)
            flight, touched = apply(steps[i], flight, touched, faults)
            if len(flight.groups) > GROUPS_MAX:
                faults.add(f"{steps[i].address:#x}: more than {GROUPS_MAX} groups under way")
                break
            following = successors(steps, at, i)
            if len(following) != 1:
                work.extend((j, flight, touched) for j in following)
                break
            i = following[0]
    for step in matrix:
        if at[step.address] not in reached:
            faults.add(f"{step.address:#x}: not reached by what was followed: {step.text}")
    return sorted(faults)
