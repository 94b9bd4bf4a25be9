"""The command `trak-ext`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .kernels.operators import KINDS
from .kernels.runtime import build_info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0, or 1 with one sentence on stderr)."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"trak-ext {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trak-ext",
        description="Which training examples made the model say this? Attribution itself is a "
        "Python library, trak_ext.Attributor; these commands show what it does, and check it.",
        epilog="trak-ext COMMAND --help says what a command takes.",
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )

    def add(run: Callable[[Any], int], summary: str, details: str) -> Callable[..., Any]:
        name = run.__name__.strip("_")
        command = commands.add_parser(name, help=summary, description=details)
        command.set_defaults(run=run)
        return command.add_argument

    option = add(
        _demo,
        "attribute handwritten digits and compare with retraining (half a minute)",
        "Train small networks on scikit-learn's handwritten digits, find the training digits "
        "behind their predictions, and compare with what retraining really does. Writes "
        "attributions.png (a picture), report.html, bundle/ (what the report is made of) and "
        "results.json. Needs no download; `pip install trak-ext[demo]` brings what it imports.",
    )
    option("--out", type=Path, required=True, metavar="FOLDER", help="folder to write into")
    option("--seed", type=_seed, default=1, help="of everything random (default: 1)")
    text = "entries of the random projection matrix (default: sjlt)"
    option("--kind", choices=KINDS, default="sjlt", help=text)
    text = "columns of that matrix that each parameter meets, for --kind sjlt (default: 1)"
    option("--nnz", type=int, default=1, help=text)
    option("--quiet", action="store_true", help="print the results alone")
    option = add(
        _report,
        "make an HTML page of attributions that were saved",
        "Make one HTML file, which needs nothing else, of attributions that "
        "trak_ext.report.save_bundle wrote: without the model and without the data.",
    )
    option("bundle", type=Path, metavar="FOLDER", help="the folder that save_bundle wrote")
    out = Path("report.html")
    option("--out", type=Path, default=out, metavar="FILE", help=f"file to write (default: {out})")
    option = add(
        _info,
        "print versions and what this machine and build can do",
        "Print versions, the CPU instructions in use, whether the build has CUDA, and the devices.",
    )
    option("--json", action="store_true", help="print JSON")
    option = add(
        _selftest,
        "check every kernel on this machine against known answers",
        "Let every CPU and CUDA kernel solve problems with known answers. The exit status is 0 "
        "where all agree, else 1.",
    )
    option("--device", help="cpu, or a CUDA device (default: the CPU and all GPUs)")
    option("--json", action="store_true", help="print JSON")
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .demo.run import run

    choice = {name: getattr(options, name) for name in ("seed", "kind", "nnz")}
    run(options.out, **choice, progress=not options.quiet)
    return 0


def _report(options: argparse.Namespace) -> int:
    from .report import load_bundle, write_report

    write_report(options.out, load_bundle(options.bundle))
    print(f"wrote {options.out}")
    return 0


def _info(options: argparse.Namespace) -> int:
    information = build_info()
    if options.json:
        print(json.dumps(information, indent=2))
        return 0
    devices = [
        f"{device['name']} (sm_{device['compute_capability']}, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB)"
        for device in information.pop("cuda_devices")
    ]
    for key, value in {**information, "cuda_devices": devices or ["none"]}.items():
        text = ", ".join(value) if isinstance(value, list) else value
        name = "matrix definition" if key == "law_version" else key.replace("_", " ")
        print(f"{name:<20}{text}")
    return 0


def _selftest(options: argparse.Namespace) -> int:
    from .known_answers.report import selftest

    report = selftest(options.device)
    print(json.dumps(report.as_dict(), indent=2) if options.json else report)
    return 0 if report.passed else 1


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected 0 to {2**32 - 1}, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
