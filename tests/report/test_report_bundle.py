"""trak_ext.report.bundle: a folder gives the same page again, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from reports import HOSTILE, make_attributions, text_items
from trak_ext import cli, report
from trak_ext.report.bundle import _digest

NOT_FINITE = [(math.nan, math.nan), (math.inf, 1), (-math.inf, -math.inf), (1, math.nan)]
NAMES = ("bundle.json", "bundle.safetensors")


def test_the_page_is_the_same_from_the_bundle(tmp_path):
    for i, attributions in enumerate(
        (
            make_attributions(note="A note.", target_lds=[0.1, math.nan, 0, 1]),
            make_attributions(lds=None, target_lds=None, settings=None, fingerprint=None),
            make_attributions(opponents=None, scale=1e-9, damping=[[0.5, 1 / 3], [2e-7, 0]]),
            make_attributions(
                targets=[report.Item(text=HOSTILE + "\ud800", highlight=(1, 5), label=1e-9)] * 4,
                train_items=text_items(30),
            ),
            make_attributions(
                targets=[report.Item(label=x, prediction=y) for x, y in NOT_FINITE],
                train_items=[report.Item(label=NOT_FINITE[i % 4][0]) for i in range(30)],
            ),
        )
    ):
        folder = tmp_path / str(i) / "bundle"
        report.save_bundle(folder, attributions)
        assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
        assert report.render(report.load_bundle(folder)) == report.render(attributions)


def test_an_item_shown_twice_is_stored_twice(tmp_path):
    item = report.Item(torch.rand(8, 8))
    attributions = make_attributions(targets=[item] * 4, train_items=[item] * 30)
    report.save_bundle(tmp_path, attributions)
    assert torch.equal(report.load_bundle(tmp_path).targets[3].image, item.image)


def test_the_same_attributions_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        report.save_bundle(tmp_path / name, make_attributions())
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_scores_and_indices_are_plain_tensors(tmp_path):
    attributions = make_attributions()
    report.save_bundle(tmp_path, attributions)
    tensors = load_file(tmp_path / NAMES[1])
    assert torch.equal(tensors["proponents.values"], attributions.proponents.values)
    assert torch.equal(tensors["opponents.indices"], attributions.opponents.indices)


def test_a_bundle_from_before_damping_was_told_opens(tmp_path):
    report.save_bundle(tmp_path, make_attributions())
    content = json.loads((tmp_path / "bundle.json").read_text())
    del content["damping"], content["sha256"]
    content["sha256"] = _digest(content)
    (tmp_path / "bundle.json").write_text(json.dumps(content))
    assert report.render(report.load_bundle(tmp_path)) == report.render(make_attributions())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "good"
    report.save_bundle(folder, make_attributions())
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_damage_is_refused_by_name(folder, name):
    path = folder / name
    whole = path.read_bytes()
    damages = [whole[:-1], whole[: len(whole) // 2], b"", b"\x00" * len(whole)]
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        damages.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(report.BundleError, match=r"bundle: expected .*got") as caught:
            report.load_bundle(folder)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    report.load_bundle(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_foreign_half_is_refused(folder, name, tmp_path):
    report.save_bundle(tmp_path / "other", make_attributions(3))
    shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(report.BundleError, match="as it was written, got other bytes"):
        report.load_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(
        report.BundleError, match=r"expected a folder with bundle.json and .*No such"
    ):
        report.load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "expected trak_ext attributions in .*got another file"),
        ({"format_version": 2}, "expected format version 1 in .*got 2"),
        ({"targets": []}, "expected whole attributions in .*got targets: expected at least one"),
        ({"train_items": {}}, "expected whole attributions in .*got train_items: expected an Item"),
        ({"lds": [1]}, "expected whole attributions in .*got"),
        ({"lds": {"TRAK": 0.5}}, "expected whole attributions in .*got"),
        ({"target_lds": ["a"]}, "expected whole attributions in .*got"),
        ({"targets": 3}, "expected whole attributions in .*got"),
    ],
)
def test_what_another_program_wrote_is_refused(folder, change, message):
    content = json.loads((folder / "bundle.json").read_text()) | change
    del content["sha256"]
    content["sha256"] = _digest(content)
    (folder / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(report.BundleError, match=message):
        report.load_bundle(folder)


def test_json_that_is_no_bundle_is_refused(tmp_path):
    (tmp_path / "bundle.json").write_text("[1, 2]")
    (tmp_path / "bundle.safetensors").write_bytes(b"")
    with pytest.raises(report.BundleError, match="got another file"):
        report.load_bundle(tmp_path)


def test_only_attributions_are_saved(tmp_path):
    with pytest.raises(TypeError, match=r"attributions: expected a trak_ext.report.Attr"):
        report.save_bundle(tmp_path, "attributions")


def test_a_write_that_fails_leaves_the_old_bundle(folder, monkeypatch):
    before = report.render(report.load_bundle(folder))

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("trak_ext.report.bundle.os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        report.save_bundle(folder, make_attributions(3))
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    assert report.render(report.load_bundle(folder)) == before


def test_the_command_writes_the_page(saved, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(saved), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == report.render(make_attributions())
    assert str(out) in capsys.readouterr().out


def test_the_command_refuses_in_one_sentence(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trak-ext report: bundle: expected a folder with bundle.json")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
