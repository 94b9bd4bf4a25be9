"""Checkpoints from dicts and files, checked against the model and against change."""

from __future__ import annotations

import copy
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trak_ext.inputs.checkpoints import Checkpoints, choose_device

CPU = torch.device("cpu")


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def state_of(seed):
    torch.manual_seed(seed)
    return {name: tensor.clone() for name, tensor in net().state_dict().items()}


def write(state, path, how):
    if how == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        path = path.with_suffix(".pt")
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    return path


def assert_states(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_files_are_the_dicts_they_were_written_from(how, as_type, tmp_path):
    states = [state_of(1), state_of(2)]
    dicts = Checkpoints(net(), states)
    paths = [as_type(write(s, tmp_path / f"m{i}", how)) for i, s in enumerate(states)]
    files = Checkpoints(net(), paths)
    assert files.digests == dicts.digests
    assert len(set(files.digests)) == len(files) == 2
    for m, state in enumerate(states):
        assert_states(files.load(m, CPU), state)
        assert_states(dicts.load(m, CPU), state)


def test_none_is_the_model_as_it_is():
    model = net()
    checkpoints = Checkpoints(model, None)
    assert len(checkpoints) == 1
    assert checkpoints.digests == Checkpoints(model, [model.state_dict()]).digests
    assert_states(checkpoints.load(0, CPU), model.state_dict())


def test_the_order_of_names_does_not_matter():
    state = state_of(1)
    turned = dict(reversed(state.items()))
    assert Checkpoints(net(), [turned]).digests == Checkpoints(net(), [state]).digests
    assert list(Checkpoints(net(), [turned]).load(0, CPU)) == list(state)


@pytest.mark.parametrize("source", ["model", "dict", "file"])
def test_weights_that_have_changed_are_refused(source, tmp_path):
    model = net()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = write(state, tmp_path / "m", "zip")
    checkpoints = Checkpoints(model, {"model": None, "dict": [state], "file": [path]}[source])
    checkpoints.load(0, CPU)
    with torch.no_grad():
        (model.state_dict() if source == "model" else state)["2.bias"][0] += 1
    if source == "file":
        write(state, tmp_path / "m", "zip")
    with pytest.raises(
        ValueError, match=r"^checkpoints: expected checkpoint 0 with the weights it"
    ):
        checkpoints.load(0, CPU)


def test_buffers_count_as_weights():
    state = state_of(1)
    other = {**state, "1.running_mean": state["1.running_mean"] + 1}
    assert Checkpoints(net(), [state]).digests != Checkpoints(net(), [other]).digests


@pytest.mark.parametrize("given", [("first.weight",), ("second.weight",), ("first.weight",
                                   "second.weight")], ids=", ".join)  # fmt: skip
def test_tied_names_stand_for_each_other(given, tmp_path):
    model = Tied()
    weight = torch.randn(3, 3)
    state = {name: weight.clone() for name in given} | {"first.bias": torch.ones(3)}
    expected = {"first.weight": weight, "second.weight": weight, "first.bias": torch.ones(3)}
    for source in (state, write(state, tmp_path / "tied", "safetensors")):
        assert_states(Checkpoints(model, [source]).load(0, CPU), expected)


def test_tied_names_with_different_weights_are_refused():
    state = copy.deepcopy(dict(Tied().state_dict()))
    state["second.weight"] = state["first.weight"] + 1
    with pytest.raises(ValueError, match=r"checkpoints\[0\]: expected .*weight"):
        Checkpoints(Tied(), [state])


class NotSaved(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.ones(2), persistent=False)


def test_buffers_that_are_not_saved_are_not_asked_for():
    checkpoints = Checkpoints(NotSaved(), [{"weight": torch.ones(2)}])
    assert_states(checkpoints.load(0, CPU), {"weight": torch.ones(2)})


def without(name):
    return {key: tensor for key, tensor in state_of(1).items() if key != name}


BAD = {
    "missing": (without("0.bias"), r"1 missing \(0\.bias\) and 0 unknown"),
    "unknown": ({**state_of(1), "3.bias": torch.zeros(2)}, r"0 missing \(\) and 1 unknown"),
    "prefixed": ({f"a.b.{k}": v for k, v in state_of(1).items()}, r"9 missing .* 9 unknown"),
    "half prefixed": (
        {f"module.{k}" if "0." in k else k: v for k, v in state_of(1).items()},
        " mi",
    ),
    "wrapped": ({"weights": state_of(1), "epoch": 3}, r"9 missing .*unknown \(weights, epoch"),
    "shape": (
        {**state_of(1), "0.bias": torch.zeros(5)},
        r"expected 0\.bias of shape \[4\], got \[5\]",
    ),
    "no tensor": ({**state_of(1), "0.bias": [0.0] * 4}, r"0\.bias of shape \[4\], got list"),
}


@pytest.mark.parametrize(("state", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_state_of_another_model_is_refused(state, message, in_file, tmp_path):
    source = write(state, tmp_path / "bad", "zip") if in_file else state
    with pytest.raises(ValueError, match=r"^checkpoints\[1\]: .*" + message) as error:
        Checkpoints(net(), [state_of(1), source])
    assert "\n" not in str(error.value)


class Harm:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_runs_code_is_refused_and_does_not_run(tmp_path, legacy):
    path = tmp_path / "harm.pt"
    state = {**state_of(1), "0.bias": Harm(tmp_path / "harmed")}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=re.escape(f"in '{path}', got a file that does not load")):
        Checkpoints(net(), [path])
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"no state dict at all"], ids=len)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^checkpoints\[0\]: expected .* got .+") as error:
        Checkpoints(net(), [path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["safetensors", "zip"])
def test_a_file_cut_short_is_refused_by_name(tmp_path, how):
    path = write(state_of(1), tmp_path / "m", how)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"^checkpoints\[0\]: expected .* got .+") as error:
        Checkpoints(net(), [path])
    assert str(path) in str(error.value)


def test_a_file_with_a_list_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"checkpoints\[0\]: expected a state dict in .* a list"):
        Checkpoints(net(), [tmp_path / "list.pt"])


@pytest.mark.parametrize("name", ["none.pt", "none/none.pt"])
def test_a_path_without_a_file_is_refused(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"^checkpoints\[0\]: expected a file, got none at"):
        Checkpoints(net(), [tmp_path / name])


@pytest.mark.parametrize(
    "source", [net(), None, 3, [state_of(1)]], ids=["model", "None", "int", "list"]
)
def test_what_is_neither_dict_nor_path_is_refused(source):
    with pytest.raises(TypeError, match=r"^checkpoints\[1\]: expected .* got "):
        Checkpoints(net(), [state_of(1), source])


@pytest.mark.parametrize("sources", [state_of(1), "m.pt", 3, net().parameters], ids=[0, 1, 2, 3])
def test_what_is_no_list_is_refused(sources):
    with pytest.raises(TypeError, match=r"^checkpoints: expected a list of state dicts or paths"):
        Checkpoints(net(), sources)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match=r"^checkpoints: expected at least one, got an empty list"):
        Checkpoints(net(), [])


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("table", torch.ones(2), persistent=False)


@pytest.mark.parametrize("name", ["second.weight", "table"])
def test_tensors_on_the_meta_device_are_refused_by_name(name):
    model = Partly()
    if name == "table":
        model.table = model.table.to("meta")
    else:
        model.second = model.second.to("meta")
    with pytest.raises(ValueError, match=rf"^model: .* values, got {name} on the meta device"):
        Checkpoints(model, None)
    state = {key: tensor.to("meta") for key, tensor in state_of(1).items()}
    with pytest.raises(ValueError, match=r"^checkpoints\[0\]: .* got 0.weight on the meta device"):
        Checkpoints(net(), [state])


def test_a_model_without_values_takes_those_of_its_checkpoints():
    with torch.device("meta"):
        model = net()
    assert_states(Checkpoints(model, [state_of(1)]).load(0, CPU), state_of(1))
    with pytest.raises(ValueError, match=r"^device: .* got the meta device"):
        choose_device(model)
    assert choose_device(model, "cpu") == CPU
