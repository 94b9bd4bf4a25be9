"""The command `trak-ext`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .kernels.operators import KINDS
from .kernels.runtime import build_info


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

    def add(name: str, summary: str, details: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=details)

    demo = add(
        "demo",
        "attribute handwritten digits and compare with retraining (half a minute)",
        "Train small networks on scikit-learn's handwritten digits, find the training digits "
        "behind their predictions, and compare with what retraining really does. Writes "
        "attributions.png (a picture), report.html, bundle/ (what the report is made of) and "
        "results.json. Needs no download; `pip install trak-ext[demo]` brings what it imports.",
    )
    demo.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder to write into"
    )
    demo.add_argument("--seed", type=_seed, default=1, help="of everything random (default: 1)")
    demo.add_argument(
        "--kind",
        choices=KINDS,
        default="rademacher",
        help="entries of the random projection matrix (default: rademacher)",
    )
    demo.add_argument(
        "--nnz",
        type=int,
        default=1,
        help="columns of that matrix that each parameter meets, for --kind sjlt (default: 1)",
    )
    demo.add_argument("--quiet", action="store_true", help="print the results alone")
    report = add(
        "report",
        "make an HTML page of attributions that were saved",
        "Make one HTML file, which needs nothing else, of attributions that "
        "trak_ext.report.save_bundle wrote: without the model and without the data.",
    )
    report.add_argument(
        "bundle", type=Path, metavar="FOLDER", help="the folder that save_bundle wrote"
    )
    report.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="file to write (default: report.html)",
    )
    info = add(
        "info",
        "print versions and what this machine and build can do",
        "Print versions, the CPU instructions in use, whether the build has CUDA, and the devices.",
    )
    selftest = add(
        "selftest",
        "check every kernel on this machine against known answers",
        "Let every CPU and CUDA kernel solve problems with known answers. The exit status is 0 "
        "where all agree, else 1.",
    )
    selftest.add_argument("--device", help="cpu, or a CUDA device (default: the CPU and all GPUs)")
    for command in (info, selftest):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0, or 1 with one sentence on stderr)."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "info":
            print_info(options.json)
        elif options.command == "selftest":
            return run_selftest(options.device, options.json)
        elif options.command == "report":
            from .report import load_bundle, write_report

            write_report(options.out, load_bundle(options.bundle))
            print(f"wrote {options.out}")
        else:
            from .demo.run import run

            run(
                options.out,
                seed=options.seed,
                kind=options.kind,
                nnz=options.nnz,
                progress=not options.quiet,
            )
    except (ValueError, ImportError, OSError) as error:
        print(f"trak-ext {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def run_selftest(device: str | None, as_json: bool) -> int:
    """Print trak_ext.selftest() for people, or as JSON; return 0 where it passed, else 1."""
    from .known_answers.report import selftest

    report = selftest(device)
    print(json.dumps(report.as_dict(), indent=2) if as_json else report)
    return 0 if report.passed else 1


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"expected 0 to {2**32 - 1}, got {seed}")
    return seed


def print_info(as_json: bool) -> None:
    """Print build_info() for people, or as JSON."""
    information = build_info()
    if as_json:
        print(json.dumps(information, indent=2))
        return
    devices = information.pop("cuda_devices")
    for key, value in information.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{key.replace('_', ' '):<20}{text}")
    names = [
        f"{device['name']} (sm_{device['compute_capability']}, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB)"
        for device in devices
    ]
    print(f"{'cuda devices':<20}{', '.join(names) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
