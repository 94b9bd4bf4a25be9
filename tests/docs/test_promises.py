"""Every promise names its tests, and they are there."""

from __future__ import annotations

import re

import pytest

from pages import ROOT, quoted, table

TESTS = ROOT / "tests"
AT_LEAST = 30  # what 0.1.0 promised; there are never fewer


def promises() -> list[list[str]]:
    return table((ROOT / "docs" / "promises.md").read_text(encoding="utf-8"), "promise")


def test_nothing_that_was_promised_is_gone():
    assert len(promises()) >= AT_LEAST
    assert len({promise for promise, _ in promises()}) == len(promises())


@pytest.mark.parametrize(("promise", "named"), promises())
def test_a_promise_has_tests(promise, named):
    patterns = quoted(named)
    assert patterns
    for pattern in patterns:
        files = list(TESTS.glob(pattern))
        assert files, pattern
        for path in files:
            assert re.search(r"^def test_", path.read_text(encoding="utf-8"), re.MULTILINE), path
