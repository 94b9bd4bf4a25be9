"""Which instruction does what."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import arithmetic, convert, float_compare, float_min_max, half_constant, reciprocal
from .integers import (
    add_three,
    compare,
    funnel_shift,
    load_constant,
    logic,
    move,
    multiply_add,
    permute,
    predicate_logic,
    predicates_to_register,
    register_to_predicates,
    select,
    shift_add,
    shuffle,
    smaller_or_larger,
    special,
    vote,
)
from .memory import (
    barrier,
    branch,
    copy,
    copy_in_bulk,
    elect,
    go_back,
    leave,
    load,
    load_matrices,
    matrix,
    store,
    synchronise,
)
from .operands import U32, Getter, Operands, predicate_of, write_to

NOTHING = {
    *("BSSY", "BSYNC", "BREAK", "NOP", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "FENCE"),
    *("MEMBAR", "BMOV", "CCTL", "YIELD", "ERRBAR", "LEPC", "UCGABAR", "ARRIVES"),
}

OPERATIONS: dict[str, Callable[[Operands], Getter]] = {
    **{"IADD3": add_three, "VIADD": add_three, "IMAD": multiply_add, "LEA": shift_add},
    **{"SHF": funnel_shift, "LOP3": logic, "PLOP3": predicate_logic, "ISETP": compare},
    **{"SEL": select, "FSEL": select, "VIMNMX": smaller_or_larger, "IMNMX": smaller_or_larger},
    **{"PRMT": permute, "MOV": move, "R2UR": move, "LDC": load_constant, "S2R": special},
    **{"S2UR": special, "CS2R": special, "P2R": predicates_to_register},
    **{"R2P": register_to_predicates, "SHFL": shuffle, "VOTE": vote, "FADD": arithmetic},
    **{"FMUL": arithmetic, "FFMA": arithmetic, "FMNMX": float_min_max, "FSETP": float_compare},
    **{"I2F": convert, "I2FP": convert, "F2I": convert, "F2F": convert, "F2FP": convert},
    **{"HADD2": convert, "HFMA2": half_constant, "MUFU": reciprocal, "LD": load, "LDG": load},
    **{"LDS": load, "ST": store, "STG": store, "STS": store, "LDGSTS": copy, "BAR": barrier},
    **{"BRA": branch, "CALL": branch, "RET": go_back, "EXIT": leave, "HMMA": matrix},
    **{"HGMMA": matrix, "LDSM": load_matrices, "ELECT": elect, "SYNCS": synchronise},
    "UBLKCP": copy_in_bulk,
}


def compile_instruction(machine: Any, address: int, text: str) -> tuple[Any, Getter]:
    """Return an instruction's guard, if it has one, and what it does to threads that take it."""
    found = re.match(r"@(!?U?P\w+) ", text)
    guard = predicate_of(found[1]) if found else None
    op = Operands(machine, text)
    name = op.name
    if name in NOTHING:
        return guard, lambda here: None
    if name == "IABS":
        write, a = write_to(machine, op.parts[0]), op.value(1)
        return guard, lambda here: write(
            here, np.abs(np.ascontiguousarray(a(here)).view(np.int32)).view(U32)
        )
    if name not in OPERATIONS and name.startswith("U"):
        name = name[1:]  # the uniform datapath's, on registers of its own
    if name not in OPERATIONS:
        raise NotImplementedError(f"{address:#x}: {text}")
    op.name = name
    return guard, OPERATIONS[name](op)
