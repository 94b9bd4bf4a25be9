"""build_info and the number of threads."""

from __future__ import annotations

import pytest
import torch

import trak_ext
from children import run_python
from trak_ext import _C, reference


def test_build_info():
    info = trak_ext.build_info()
    assert info["version"] == trak_ext.__version__
    assert info["cpu_level"] in info["cpu_levels"]
    assert info["cpu_levels"][0] == "baseline"
    assert isinstance(info["cuda"], bool)
    assert (info["cuda_status"] is None) == (not info["cuda"])
    assert info["law_version"] == reference.LAW_VERSION == _C.law_version()


def test_threads_follow_torch_until_set():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert trak_ext.get_num_threads() == 2
        trak_ext.set_num_threads(5)
        torch.set_num_threads(1)
        assert trak_ext.get_num_threads() == 5
        trak_ext.set_num_threads(None)
        assert trak_ext.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", True])
def test_bad_threads(number):
    with pytest.raises((ValueError, TypeError), match="num_threads: expected an integer"):
        trak_ext.set_num_threads(number)


def test_the_extension_links_no_torch():
    # Importing the compiled module alone loads no torch: one wheel serves every torch version.
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert 'torch' not in sys.modules; "
        "maps = open('/proc/self/maps').read(); assert 'libtorch' not in maps; "
        "print(module.cpu_level())"
    )
    run = run_python(code)
    assert run.stdout.strip() == trak_ext.build_info()["cpu_level"]


def test_the_package_says_that_it_is_typed():
    from importlib import resources

    assert (resources.files("trak_ext") / "py.typed").is_file()
