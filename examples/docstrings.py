"""Real labelled text that any machine has: first sentences of docstrings, labelled by package.

Sources are read and parsed, never imported. Which texts come out depends on the installed versions
of the packages; on one installation it is the same every time.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# "python" is the standard library. The rest comes with trak-ext[demo].
PACKAGES = ("python", "torch", "numpy", "scipy", "sklearn", "matplotlib")

# Names that would give a package away, replaced by MASK in every text.
_NAMES = (
    "python|cpython|pytorch|torchvision|torchscript|torch|aten|numpy|np|ndarrays?|scipy|sklearn|"
    "scikit-learn|scikit_learn|matplotlib|mpl|pyplot|plt|transformers|hugging ?face"
)
MASK = "library"
_NAME_PATTERN = re.compile(rf"(?<![A-Za-z0-9])({_NAMES})(?![A-Za-z0-9])", re.IGNORECASE)
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_vendor", "vendored", "externals", "site-packages",
     "dist-packages", "distutils", "idlelib", "lib2to3", "ensurepip", "pip", "__pycache__"}
)  # fmt: skip
_MIN_WORDS, _MAX_WORDS = 5, 40
_TEXTS_A_FILE = 4  # so that no file of many alike functions fills a class


class Text(NamedTuple):
    """A docstring's first sentence and where it stands."""

    text: str
    name: str  # dotted path of the class or function
    package: str


class DocstringSplit(NamedTuple):
    """Training and held-out texts; a label is an index into `classes`."""

    train: list[Text]
    train_labels: Tensor  # [n], int64
    test: list[Text]
    test_labels: Tensor  # [t], int64
    classes: tuple[str, ...]

    @property
    def train_texts(self) -> list[str]:
        """The training sentences, in order."""
        return [text.text for text in self.train]

    @property
    def test_texts(self) -> list[str]:
        """The held-out sentences, in order."""
        return [text.text for text in self.test]


def load_docstrings_split(
    num_train: int = 480,
    num_test: int = 120,
    *,
    packages: Sequence[str] = PACKAGES,
    seed: int = 0,
) -> DocstringSplit:
    """Draw disjoint training and test texts, as many of each package to within one.

    The names of the packages are masked in the texts; a sentence that two packages share is left
    out.

    Args:
        num_train: Training texts n, at least 1.
        num_test: Held-out texts t, at least 0.
        packages: Classes: importable top-level packages, or "python" for the standard library.
        seed: Of the shuffle that makes the split; the pool it draws from does not depend on it.

    Raises:
        ImportError: a package that is not installed.
        ValueError: no packages, a name twice, counts out of range, or too few texts in a package.
    """
    packages = tuple(packages)
    if len(packages) < 2 or len(set(packages)) != len(packages):
        raise ValueError(f"packages: expected two or more different names, got {list(packages)}")
    if num_train < 1 or num_test < 0:
        raise ValueError(
            "num_train and num_test: expected num_train >= 1 and num_test >= 0, got "
            f"{num_train} and {num_test}"
        )
    total = num_train + num_test
    needed = -(-total // len(packages))
    pools = [package_texts(package, needed + needed // 4 + 8) for package in packages]
    counts = Counter(text.text.lower() for pool in pools for text in pool)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn: list[tuple[Text, int]] = []
    for label, pool in enumerate(pools):
        own = [text for text in pool if counts[text.text.lower()] == 1]
        if len(own) < needed:
            raise ValueError(
                f"num_train and num_test: expected at most {len(own)} texts of "
                f"{packages[label]}, got a sum that needs {needed}"
            )
        chosen = torch.randperm(len(own), generator=generator, device="cpu")[:needed].tolist()
        drawn.extend((own[i], label) for i in chosen)
    # Class by class in turn, so that both parts hold as many of each; then shuffled apart.
    by_turn = [drawn[label * needed + i] for i in range(needed) for label in range(len(packages))]
    train, test = by_turn[:num_train], by_turn[num_train:total]
    train, test = (
        [part[i] for i in torch.randperm(len(part), generator=generator, device="cpu").tolist()]
        for part in (train, test)
    )
    return DocstringSplit(
        [text for text, _ in train],
        torch.tensor([label for _, label in train], dtype=torch.int64, device="cpu"),
        [text for text, _ in test],
        torch.tensor([label for _, label in test], dtype=torch.int64, device="cpu"),
        packages,
    )


def package_texts(package: str, count: int) -> list[Text]:
    """Return up to `count` different sentences of a package, the same ones every time.

    Files are visited in a fixed shuffled order, so that a small count still spreads over the
    package, and no more of them are read than needed.
    """
    root = _source_folder(package)
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        and not path.name.startswith(("test_", "_test"))
    )
    texts: list[Text] = []
    seen: set[str] = set()
    generator = torch.Generator("cpu").manual_seed(0)
    for index in torch.randperm(len(files), generator=generator, device="cpu").tolist():
        if len(texts) >= count:
            break
        taken = 0
        for text in _file_texts(files[index], root, package):
            if taken < _TEXTS_A_FILE and text.text.lower() not in seen:
                seen.add(text.text.lower())
                texts.append(text)
                taken += 1
    return texts[:count]


def _source_folder(package: str) -> Path:
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"packages: expected installed packages, got {package!r}, which is not")
    return Path(next(iter(spec.submodule_search_locations)))


def _file_texts(path: Path, root: Path, package: str) -> Iterator[Text]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates, and sources for another Python
        return
    parts = [*path.relative_to(root).with_suffix("").parts]
    prefix = ([] if package == "python" else [package]) + [p for p in parts if p != "__init__"]
    yield from _node_texts(tree, ".".join(prefix), package)


def _node_texts(node: ast.AST, prefix: str, package: str) -> Iterator[Text]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        name = f"{prefix}.{child.name}"
        sentence = _first_sentence(ast.get_docstring(child) or "")
        if sentence and not child.name.startswith("_"):
            yield Text(sentence, name, package)
        if isinstance(child, ast.ClassDef):
            yield from _node_texts(child, name, package)


def _first_sentence(docstring: str) -> str | None:
    """Return the masked first sentence, or None where it is too short, too long or not prose."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?:])\s", paragraph)[0]
    sentence = re.sub(r"(:\w+:)?`~?([^`]*)`", r"\2", sentence)
    sentence = _NAME_PATTERN.sub(MASK, sentence)
    if not _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS or not sentence.isascii():
        return None
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return sentence if letters >= 0.85 * len(sentence) else None
