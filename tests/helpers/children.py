"""Python in a process of its own, for tests of what a process decides once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile


def run_python(code: str, *arguments: str, check: bool = True, **environment: str):
    """Run `python -c code arguments...` with environment variables added; return what it printed.

    In an empty folder: `python -c` looks for packages where it stands, and the source folder of
    trak_ext has no compiled module.
    """
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=check,
        )
