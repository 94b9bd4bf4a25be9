"""The report in a real browser: it fits a phone, its pictures decode, its controls work."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

import browser
from reports import HOSTILE, make_attributions, text_items
from trak_ext import report

MISSING = browser.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

WIDTHS = (360, 390, 768, 1280)
TAB, ENTER = "\ue004", "\ue007"
LONG = "a_name_without_any_place_to_break_it_" * 6


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of one page with pictures, one with texts, and one with everything at its worst."""
    folder = tmp_path_factory.mktemp("pages")
    worst = report.Item(
        torch.rand(3, 300, 100), HOSTILE + LONG * 3, label=LONG, caption=LONG, id=LONG + HOSTILE
    )
    captioned = [report.Item(torch.rand(8, 8), caption="a handwritten three") for _ in range(30)]
    made = {
        "pictures": make_attributions(6, 5),
        "captions": make_attributions(3, 5, train_items=captioned),
        "texts": make_attributions(targets=text_items(4), train_items=text_items(30)),
        "worst": make_attributions(
            targets=[worst] * 4, train_items=[worst] * 30, title=LONG, note=LONG, fingerprint=LONG,
            settings={LONG: LONG, "list": [LONG] * 3, HOSTILE: HOSTILE, "mapping": {"a": LONG}},
        ),
    }  # fmt: skip
    for name, attributions in made.items():
        report.write_report(folder / f"{name}.html", attributions)
    return {name: (folder / f"{name}.html").as_uri() for name in made}


@pytest.mark.parametrize("name", ["pictures", "captions", "texts", "worst"])
def test_nothing_is_wider_than_the_window_and_every_picture_decodes(chromium, pages, name):
    for width in WIDTHS:
        chromium.open(pages[name], width=width, dark=width == 390)
        chromium.script(
            "const all = [...document.images];"
            "all.forEach((i) => { i.loading = 'eager'; });"
            "document.querySelectorAll('details').forEach((d) => { d.open = true; });"
            "document.querySelectorAll('.target').forEach("
            "  (t) => { t.style.contentVisibility = 'visible'; });"
            "return Promise.all(all.map((i) => i.decode())).then(() => true);"
        )
        measured = chromium.script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth,"
            " [...document.images].filter((i) => !i.complete || !i.naturalWidth).length]"
        )
        assert measured[0] <= measured[1] <= width
        assert measured[2] == 0
    assert chromium.console() == []


def test_nothing_but_the_file_is_asked_for_and_hostile_text_does_nothing(chromium, pages):
    chromium.requests()
    chromium.open(pages["worst"], width=1280)
    assert chromium.script("return document.title") == LONG
    assert chromium.script("return document.querySelector('h2').textContent") == LONG + HOSTILE
    outside = [url for url in chromium.requests() if not url.startswith(("file:", "data:"))]
    assert outside == []
    assert chromium.console() == []


def test_a_script_that_slipped_in_does_not_run(chromium, tmp_path):
    html = report.render(make_attributions())
    hostile = (
        "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    )
    (tmp_path / "page.html").write_text(html.replace("</main>", hostile + "</main>"))
    chromium.open((tmp_path / "page.html").as_uri(), width=1280)
    assert chromium.script("return document.title") != "owned"
    assert any("Content Security Policy" in message for message in chromium.console())


SHOWN = (
    "return [...document.querySelectorAll('.target')].filter((t) => !t.hidden)"
    ".map((t) => t.querySelector('h2').textContent)"
)


def choose(chromium, control, value):
    chromium.script(
        f"const c = document.getElementById('{control}'); c.value = '{value}';"
        "c.dispatchEvent(new Event('input')); c.dispatchEvent(new Event('change'));"
    )
    return [name.removeprefix("target ") for name in chromium.script(SHOWN)]


def test_search_label_and_order(chromium, pages):
    chromium.open(pages["pictures"], width=1280)
    attributions = make_attributions(6, 5)
    assert choose(chromium, "find", "target 4") == ["4"]
    assert chromium.script("return document.getElementById('count').textContent") == (
        "1 of 6 targets"
    )
    assert choose(chromium, "find", "nothing like it") == []
    assert chromium.script("return !document.querySelector('.nothing').hidden")
    assert choose(chromium, "find", "") == list("012345")
    assert choose(chromium, "label", "2") == ["2", "5"]
    assert choose(chromium, "label", "") == list("012345")
    assert choose(chromium, "order", "label") == list("031425")
    assert choose(chromium, "order", "wrong") == list("023514")
    assert choose(chromium, "order", "lds") == list("012345")
    strongest = attributions.proponents.values[:, 0].argsort(descending=True)
    assert choose(chromium, "order", "top") == [str(i) for i in strongest.tolist()]
    assert choose(chromium, "order", "given") == list("012345")


def test_everything_is_there_without_scripts(chromium, pages):
    chromium.open(pages["pictures"], width=1280, scripts=False)
    assert len(chromium.script(SHOWN)) == 6
    assert chromium.script("return document.querySelector('.controls').offsetHeight") == 0
    chromium.command("Emulation.setScriptExecutionDisabled", value=False)


def test_the_keyboard_reaches_the_targets(chromium, pages):
    chromium.open(pages["texts"], width=1280)
    focused = "const e = document.activeElement; return e.className || e.id || e.tagName"
    chromium.press(TAB)
    assert chromium.script(focused) == "skip"
    assert chromium.script("return document.activeElement.getBoundingClientRect().left >= 0")
    chromium.press(ENTER)
    assert chromium.script(focused) == "targets"
    chromium.press(TAB)
    assert chromium.script(focused) == "SUMMARY"
    chromium.press(ENTER)
    assert chromium.script("return document.activeElement.parentElement.open")


def test_light_and_dark_follow_the_reader_and_text_has_contrast(chromium, pages):
    papers = []
    for dark in (False, True):
        chromium.open(pages["pictures"], width=1280, dark=dark)
        with Image.open(io.BytesIO(base64.b64decode(chromium.screenshot()))) as image:
            papers.append(image.convert("L").getpixel((2, 2)))
        selectors = "h1, dt, .note, .score, .name, .label, .wrong, h3, .key li, output, .unseen"
        colours = chromium.script(
            f"return [...document.querySelectorAll({selectors!r})].map((e) => getComputedStyle(e)"
            ".color).concat(getComputedStyle(document.body).backgroundColor)"
        )
        *inks, paper = [luminance(colour) for colour in colours]
        for ink in set(inks):
            lighter, darker = max(ink, paper), min(ink, paper)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # WCAG 2.2, 1.4.3
    assert papers[0] > 230
    assert papers[1] < 40


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)" as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
