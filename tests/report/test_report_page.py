"""trak_ext.report.page: what the page says, that it is safe, and that it needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from reports import HOSTILE, make_attributions, make_lds, text_items
from trak_ext import report

HOSTILE_STRINGS = [
    HOSTILE,
    '" onmouseover="alert(1)" x="',
    "' autofocus onfocus='alert(1)",
    "</script><script>alert(1)</script>",
    "</pre></details><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}{# #}",
    "&lt;b&gt; &amp;amp; <!-- ]]>",
]
VOID = {"meta", "link", "img", "input", "rect", "path", "wbr"}


class Page(HTMLParser):
    """Elements with their attributes, text without style and script, and unbalanced tags."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.words, self.open, self.faults, self.scripts = [], [], [], [], []
        self.feed(page)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if len(attributes) != len(dict(attributes)):
            self.faults.append(f"repeated attribute in {tag}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    def all(self, tag, **wanted):
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page():
    return Page(report.render(make_attributions(note="About these pictures.")))


def test_tags_are_balanced_and_ids_unique(page):
    assert page.faults == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert named <= set(ids)


def test_every_target_has_its_samples_with_scores(page):
    attributions = make_attributions()
    assert len(page.all("article")) == 4
    assert len(page.all("li", **{"class": "sample"})) == 4 * (3 + 3)
    for values in (attributions.proponents.values, attributions.opponents.values):
        for value in values.flatten().tolist():
            assert f"{value:+.2f}".replace("-", "−") in page.words
    for index in attributions.train_items:
        assert f"No. {index}" in page.words


def test_pictures_have_words(page):
    images = page.all("img")
    assert len(images) == 4 * (1 + 3 + 3)
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(image["alt"] for image in images)
    assert "target 2, label 2" in {image["alt"] for image in images}
    styles = {(image["width"], image["class"]) for image in images}
    assert styles == {("8", "picture sharp"), ("90", "picture")}


def test_facts_lds_settings_and_fingerprint_are_told(page):
    for expected in (
        "About these pictures.", "LDS, TRAK 0.500 95 %: 0.450 to 0.550", "Training samples 30",
        "0.480 to 0.520", "proj dim 512", "image_classification", "ab" * 16,
    ):  # fmt: skip
        assert expected in page.text
    assert [a["data-wrong"] for a in page.all("article")] == ["1", "0", "1", "1"]
    assert "1 ✗ (wrong)" in page.text
    assert "1 ✓ (right)" in page.text


def test_labels_that_differ_are_marked(page):
    attributions = make_attributions()
    differing = sum(
        attributions.train_items[index].label != target.label
        for ranked in (attributions.proponents, attributions.opponents)
        for target, row in zip(attributions.targets, ranked.indices.tolist(), strict=True)
        for index in row
    )
    assert page.text.count("(not the target's label)") == differing > 0


def test_structure_for_screen_readers(page):
    assert page.all("html") == [{"lang": "en"}]
    tags = [name for name, _ in page.elements]
    assert tags.count("h1") == tags.count("main") == tags.count("footer") == 1
    assert page.all("a") == [{"class": "skip", "href": "#targets"}]
    assert len(page.all("ol")) == 8
    assert all(svg["aria-hidden"] == "true" for svg in page.all("svg"))


def test_nothing_is_loaded_from_elsewhere():
    html = report.render(make_attributions(targets=[report.Item(text="a", caption="b")] * 4))
    html = re.sub(r"base64,[\w+/=]+", "", html)
    assert not re.search(r"""(?:https?:)?//[\w[]""", html)
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|import\(", html)
    for _, attributes in Page(html).elements:
        assert not {"style", "srcset", "action", "onload", "onerror", "onclick"} & set(attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:"))


def test_text_of_users_stays_text():
    item = report.Item(
        torch.rand(4, 4), HOSTILE, label=HOSTILE, prediction="'\"", caption=HOSTILE, id=HOSTILE
    )
    hostile = {
        "targets": [item] * 4, "train_items": [item] * 30, "title": HOSTILE, "note": HOSTILE,
        "lds": {HOSTILE: make_lds(0.1)}, "settings": {HOSTILE: HOSTILE, "list": [HOSTILE] * 9},
        "fingerprint": HOSTILE,
    }  # fmt: skip
    found = Page(report.render(make_attributions(**hostile)))
    plain = Page(report.render(make_attributions(**_with_plain_text(hostile))))
    # The same elements in the same order: nothing that was written became markup.
    assert [(name, sorted(a)) for name, a in found.elements] == [
        (name, sorted(a)) for name, a in plain.elements
    ]
    assert found.faults == []
    assert found.text.count("<script>document.title = 'owned'</script>") > 8


def _with_plain_text(hostile):
    plain = re.sub("[<>&\"']", "x", HOSTILE)
    item = report.Item(
        torch.rand(4, 4), plain, label=plain, prediction="''", caption=plain, id=plain
    )
    return hostile | {
        "targets": [item] * 4, "train_items": [item] * 30, "title": plain, "note": plain,
        "lds": {plain: make_lds(0.1)}, "settings": {plain: plain, "list": [plain] * 9},
        "fingerprint": plain,
    }  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE_STRINGS)
def test_no_text_leaves_the_place_it_is_put(hostile):
    """In elements, attributes, JSON of settings, and beside the script, as text and as Markup."""
    for text in (hostile, Markup(hostile)):
        item = report.Item(text=text, label=text, prediction=text, caption=text, id=text)
        pictured = report.Item(torch.rand(4, 4), label=text, id=text)
        found = Page(
            report.render(
                make_attributions(
                    targets=[item, pictured] * 2, train_items=[item, pictured] * 15, title=text,
                    note=text, fingerprint=text, lds={text: make_lds(0.1)},
                    settings={text: text, "mapping": {text: [text, {"a": text}]}},
                )
            )
        )  # fmt: skip
        plain = Page(report.render(make_attributions()))
        assert found.faults == []
        assert found.scripts == plain.scripts
        policy = {"http-equiv": "Content-Security-Policy"}
        assert found.all("meta", **policy) == plain.all("meta", **policy)
        article, image = found.all("article")[0], found.all("img")[0]
        assert article["data-label"] == hostile
        assert set(article) == set(plain.all("article")[0])
        assert set(image) == set(plain.all("img")[0])
        assert image["alt"] == f"Training sample {hostile}, label {hostile}"
        assert found.all("span", **{"class": "name"})[0]["title"] == hostile
        words = [word.strip() for word in found.words]
        assert words.count(hostile.strip()) > 20
        mapping = {hostile: [hostile, {"a": hostile}]}
        assert json.dumps(mapping, ensure_ascii=False) in found.words or (
            json.dumps(mapping, ensure_ascii=False, indent=1) in found.words
        )


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_property_no_text_changes_the_elements_of_a_page(text):
    def elements(text):
        item = report.Item(torch.ones(4, 4), caption=text, id=text, label=text)
        attributions = make_attributions(
            2, 1, targets=[item] * 2, train_items=[item] * 30, title=text, note=text,
            fingerprint=text, lds={text: make_lds(0.1)}, settings={text: text, "list": [text]},
            target_lds=None,
        )  # fmt: skip
        page = Page(report.render(attributions))
        assert page.faults == []
        # A setting may break after each of its points.
        return [(tag, sorted(a)) for tag, a in page.elements if tag != "wbr"]

    assert elements(text) == elements("x")


def test_damping_that_was_chosen_is_told():
    def told(damping):
        return Page(report.render(make_attributions(damping=damping))).text

    assert "damping in use, by checkpoint 0.5 · 0.001234" in told([0.5, 0.0012341])
    assert "damping in use, by checkpoint 1 2 · 3 4" in told(torch.tensor([[1.0, 2], [3, 4]]))
    assert "damping in use" not in told(None)
    assert "damping in use" not in told(torch.empty(0))


def test_characters_that_html_cannot_hold_are_replaced(tmp_path):
    item = report.Item(text="a\x00b\x1bc\ud800d\te\nf")
    report.write_report(tmp_path / "a.html", make_attributions(targets=[item] * 4))
    html = (tmp_path / "a.html").read_bytes().decode("utf-8")
    assert "a�b�c�d\te\nf" in html


def test_a_long_text_unfolds_and_its_mark_is_in_sight():
    text = "word " * 300 + "the token " + "word " * 20
    start = text.index("token")
    targets = [report.Item(text=text, highlight=(start, start + 5))] * 4
    html = report.render(make_attributions(targets=targets, train_items=text_items(30)))
    details = re.findall(r"<summary>(.*?)</summary><p dir=\"auto\">(.*?)</p>", html, re.DOTALL)
    preview, whole = details[0]
    assert "<mark>token</mark>" in preview
    assert preview.count("word") < 70
    assert whole.replace("<mark>", "").replace("</mark>", "") == text
    short = report.render(make_attributions(targets=[report.Item(text="a short text")] * 4))
    assert "<details" not in short


@pytest.mark.parametrize("scale", [1.0, 1e-7, 12345.0])
def test_bars_have_one_scale_and_grow_from_zero(scale):
    attributions = make_attributions(scale=scale)
    bars = [(float(bar["x"]), float(bar["width"])) for bar in
            Page(report.render(attributions)).all("rect")]  # fmt: skip
    values = torch.cat([attributions.proponents.values, attributions.opponents.values], 1).flatten()
    largest = float(values.abs().max())
    for (x, width), value in zip(bars, values.tolist(), strict=True):
        assert width == pytest.approx(100 * abs(value) / largest, abs=0.01)
        assert x == pytest.approx(0 if value > 0 else 100 - width, abs=0.011)


def test_zero_moves_to_the_middle_where_a_proponent_is_below_it():
    values = torch.tensor([[2.0, -1.0]] * 4)
    indices = torch.tensor([[0, 1]] * 4)
    found = Page(report.render(make_attributions(proponents=(values, indices), opponents=None)))
    bars = [(bar["class"], bar["x"], bar["width"]) for bar in found.all("rect")]
    assert bars == [("proponent", "50", "50"), ("opponent", "25", "25")] * 4
    assert found.all("section", **{"class": "opponents"}) == []


def test_no_scores_or_only_zeros_are_fine():
    none = torch.empty(4, 0)
    found = Page(report.render(make_attributions(proponents=(none, none.long()), opponents=None)))
    assert found.faults == []
    zeros = torch.zeros(4, 2)
    found = Page(report.render(make_attributions(proponents=(zeros, zeros.long()))))
    assert all(bar["width"] == "0" for bar in found.all("rect")[:2])


def test_size_is_that_of_the_pictures_and_little_more():
    one, many = (len(report.render(make_attributions(count, 5))) for count in (10, 110))
    picture = len(report.render(make_attributions(1, 0))) - len(
        report.render(make_attributions(1, 0, targets=[report.Item(label=0)]))
    )
    assert (many - one) / 100 < picture + 10 * 1024


def test_only_attributions_are_written(tmp_path):
    with pytest.raises(TypeError, match=r"attributions: expected a trak_ext.report.Attr"):
        report.write_report(tmp_path / "a.html", None)
    assert not list(tmp_path.iterdir())
