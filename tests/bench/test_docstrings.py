"""examples/docstrings.py: real sentences, masked, disjoint, balanced, the same every time."""

from __future__ import annotations

import re

import pytest
import torch

import docstrings
from docstrings import Text, load_docstrings_split, package_texts

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def split():
    return load_docstrings_split(90, 33)


def test_split_has_the_stated_sizes_and_is_balanced(split):
    assert len(split.train) == len(split.train_labels) == 90
    assert len(split.test) == len(split.test_labels) == 33
    assert split.classes == docstrings.PACKAGES
    assert split.train_labels.dtype == split.test_labels.dtype == torch.int64
    assert split.train_labels.bincount().tolist() == [15] * 6
    together = torch.cat([split.train_labels, split.test_labels]).bincount()
    assert int(together.max() - together.min()) <= 1


def test_labels_are_the_packages_of_the_texts(split):
    for texts, labels in ((split.train, split.train_labels), (split.test, split.test_labels)):
        for text, label in zip(texts, labels.tolist(), strict=True):
            assert text.package == split.classes[label]
    assert split.train_texts == [text.text for text in split.train]
    assert split.test_texts == [text.text for text in split.test]


def test_texts_are_different_sentences_without_the_packages_names(split):
    texts = split.train_texts + split.test_texts
    assert len({text.lower() for text in texts}) == len(texts)
    for text in texts:
        assert 5 <= len(text.split()) <= 40
        assert text.isascii()
        assert not re.search(
            r"\b(torch|pytorch|numpy|np|scipy|sklearn|matplotlib|pyplot|python)\b", text, re.I
        )


def test_same_seed_same_split_and_torch_state_is_untouched(split):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = load_docstrings_split(90, 33)
    other = load_docstrings_split(90, 33, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert again.train == split.train
    assert again.test == split.test
    assert other.train != split.train


def test_a_smaller_count_is_the_beginning_of_a_larger_one():
    assert package_texts("matplotlib", 30)[:11] == package_texts("matplotlib", 11)


def test_texts_are_first_sentences_of_what_they_name(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "_source_folder", lambda package: tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text('def f():\n    "Never read as it is a test."')
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "__init__.py").write_text(
        "class A:\n"
        '    """Hold one of the many things. And more."""\n'
        "    def method(self):\n"
        '        """Return one of\n        the many things"""\n'
        "    def _private(self):\n"
        '        """Return none of the many things."""\n'
        "def again():\n"
        '    """Return one of the many things"""\n'
    )
    assert package_texts("package", 10) == [
        Text("Hold one of the many things.", "package.sub.A", "package"),
        Text("Return one of the many things", "package.sub.A.method", "package"),
    ]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Solve a NumPy system of equations.  Then rest.", "Solve a library system of equations."),
        ("Return the `~torch.Tensor` of\nall\n\nMore.", "Return the library.Tensor of all"),
        ("Too short.", None),
        ("", None),
        ("x = np.linspace(0, 1, 5); y = f(x) ** 2 + 1 / 3", None),
        ("Return :class:`Axes` of this figure, or None", "Return Axes of this figure, or None"),
    ],
)
def test_first_sentence(docstring, sentence):
    assert docstrings._first_sentence(docstring) == sentence


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"packages": ["torch"]}, ValueError, "packages: expected two or more different names"),
        ({"packages": ["torch", "torch"]}, ValueError, "packages: expected two or more different"),
        ({"packages": ["torch", "no_such_thing"]}, ImportError, "packages: expected installed"),
        ({"num_train": 0}, ValueError, "num_train and num_test: expected num_train >= 1"),
        ({"num_test": -1}, ValueError, "num_train and num_test: expected num_train >= 1"),
        (
            {"num_train": 9000, "packages": ["numpy", "matplotlib"]},
            ValueError,
            "expected at most .* texts of numpy, got a sum that needs 4560",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        load_docstrings_split(**arguments)
    assert "\n" not in str(caught.value)
