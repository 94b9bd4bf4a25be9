"""A target and its ranked training samples as HTML."""

from __future__ import annotations

from .attributions import Attributions
from .items import Item
from .markup import Scale, element, escape, label_text
from .png import png_data_uri

PIXELATED = 64  # pictures up to this many pixels a side are drawn with sharp pixels
PREVIEW = 260  # characters of a text that stand open; the rest unfolds
PREVIEW_LINES = 5  # and lines
HEADINGS = {"proponents": ("Proponents", "▲"), "opponents": ("Opponents", "▼")}


def subject(item: Item, i: int, lds: float | None) -> str:
    """Return the target itself: name, picture, text and what is known of it."""
    name = f"Target {i + 1}" if item.id is None else str(item.id)
    rows = []
    if item.label is not None:
        rows.append(("Label", f"<b>{escape(label_text(item.label))}</b>"))
    if item.prediction is not None:
        right = label_text(item.prediction) == label_text(item.label)
        said = escape(label_text(item.prediction))
        if item.label is not None:
            word, style, sign = ("right", "right", "✓") if right else ("wrong", "wrong", "✗")
            said = (
                f'<b class="{style}">{said} <span aria-hidden="true">{sign}</span>'
                f'<span class="unseen"> ({word})</span></b>'
            )
        rows.append(("Model says", said))
    if lds is not None:
        rows.append(("LDS", "not defined" if lds != lds else f"{lds:.2f}".replace("-", "−")))
    known = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in rows)
    kind = "has-picture" if item.image is not None else "text-only"
    return (
        f'<div class="subject {kind}">\n<h2 id="target-{i}" dir="auto">{escape(name)}</h2>\n'
        f"{_picture(item, name)}"
        f'<div class="words">{_text(item)}{element("p", item.caption, "caption")}</div>\n'
        + (f'<dl class="known">{known}</dl>\n' if known else "")
        + "</div>"
    )


def ranked_list(attributions: Attributions, i: int, side: str, scale: Scale) -> str:
    """Return the proponents or the opponents of target i as an ordered list."""
    values, indices = getattr(attributions, side)
    target = attributions.targets[i]
    shown = [attributions.train_items[index] for index in indices[i].tolist()]
    tiles = all(item.image is not None and item.text is None for item in shown)
    captions = tiles and any(item.caption is not None for item in shown)
    style = ("tiles captioned" if captions else "tiles") if tiles else "rows"
    rows = "\n".join(
        _sample(item, index, value, target, side, scale)
        for item, index, value in zip(shown, indices[i].tolist(), values[i].tolist(), strict=True)
    )
    heading, mark = HEADINGS[side]
    return (
        f'<section class="{side}" aria-labelledby="{side}-{i}">\n'
        f'<h3 id="{side}-{i}"><span class="mark {side[:-1]}" aria-hidden="true">{mark}</span> '
        f'{heading}<span class="unseen"> of this target</span></h3>\n'
        f'<ol class="{style}" role="list">\n{rows}\n</ol>\n</section>'
    )


def _sample(item: Item, index: int, score: float, target: Item, side: str, scale: Scale) -> str:
    name = f"No. {index}" if item.id is None else str(item.id)
    label = ""
    if item.label is not None:
        text = escape(label_text(item.label))
        differs = target.label is not None and label_text(item.label) != label_text(target.label)
        label = (
            f'<span class="label differs">{text}<span class="unseen"> (not the target\'s label)'
            "</span></span>"
            if differs
            else f'<span class="label">{text}</span>'
        )
    words = _text(item) + element("p", item.caption, "caption")
    return (
        f'<li class="sample">{_picture(item, f"Training sample {name}")}'
        + (f'<div class="words">{words}</div>' if words else "")
        + f'<div class="about">{label}'
        f'<span class="score">{scale.text(score)}</span>'
        f'<span class="name" dir="auto" title="{escape(name)}">{escape(name)}</span>'
        f"{scale.bar(score, side)}</div></li>"
    )


def _picture(item: Item, name: str) -> str:
    if item.image is None:
        return ""
    height, width = item.image.shape[:2]
    style = "picture sharp" if max(height, width) <= PIXELATED else "picture"
    alt = name if item.label is None else f"{name}, label {label_text(item.label)}"
    return (
        f'<img class="{style}" src="{png_data_uri(item.image)}" width="{width}" '
        f'height="{height}" alt="{escape(alt)}" decoding="async" loading="lazy">'
    )


def _text(item: Item) -> str:
    """Return the text; a long one as a beginning that unfolds to the whole."""
    if item.text is None:
        return ""
    whole = _marked(item.text, item.highlight)
    if len(item.text) <= PREVIEW * 5 // 4 and item.text.count("\n") < PREVIEW_LINES:
        return f'<p class="text" dir="auto">{whole}</p>'
    start = 0
    if item.highlight is not None and item.highlight[1] > PREVIEW:
        start = max(0, item.highlight[0] - PREVIEW * 2 // 3)  # the mark must stand in the preview
    stop = _end_of_word(item.text, start + PREVIEW)
    mark = item.highlight
    if mark is not None:
        mark = (max(0, mark[0] - start), max(0, min(mark[1], stop) - start))
    preview = _marked(item.text[start:stop], mark)
    before, after = "…" if start else "", "…" if stop < len(item.text) else ""
    return (
        f'<details class="text"><summary><span class="preview" dir="auto">{before}{preview}{after}'
        f'</span><span class="more"></span></summary><p dir="auto">{whole}</p></details>'
    )


def _end_of_word(text: str, stop: int) -> int:
    """Return where the word at `stop` ends, if that is near."""
    end = stop
    while end < len(text) and not text[end].isspace():
        end += 1
    return end if end - stop <= PREVIEW // 10 else stop


def _marked(text: str, highlight: tuple[int, int] | None) -> str:
    if highlight is None:
        return escape(text)
    start, stop = highlight
    marked = f"<mark>{escape(text[start:stop])}</mark>"
    return escape(text[:start]) + marked + escape(text[stop:])
