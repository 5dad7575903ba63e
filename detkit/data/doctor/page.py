"""The report as one HTML file that needs no network: findings with pictures of their examples."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image, ImageDraw

from detkit.data.doctor.check import Report
from detkit.data.doctor.finding import SEVERITIES, Finding
from detkit.utils.errors import UserError
from detkit.utils.image import convert_image_to_rgb, read_image
from detkit.utils.text import counted

_EXAMPLES = 6  # of a finding
_SHORT = 70  # letters that fit below a picture
_SIDE = 320  # pixels of a picture's longer side
_ZOOM = 5  # times the sides of an object are shown, where it is small

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --error: #c62828;
  --warning: #b26a00; --note: #1565c0; }
@media (prefers-color-scheme: dark) { :root { --error: #ff7b72; --warning: #e3b341;
  --note: #79c0ff; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
article { border: 1px solid var(--line); border-left: 6px solid var(--c); border-radius: 6px;
  padding: 0.8rem 1rem; margin: 1rem 0; }
.error { --c: var(--error); } .warning { --c: var(--warning); } .note { --c: var(--note); }
.severity { color: var(--c); font-weight: 600; }
.where, figcaption { color: color-mix(in srgb, currentColor 70%, transparent); }
.where { margin: 0.1rem 0; font-size: 0.9rem; overflow-wrap: anywhere; }
.remedy { background: var(--soft); border-radius: 4px; padding: 0.4rem 0.7rem; margin: 0.6rem 0;
  overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  gap: 0.8rem; }
figure { margin: 0; min-width: 0; }
.of2 { grid-column: span 2; }
figure div { display: flex; gap: 3px; }
img { min-width: 0; width: 100%; height: 8.5rem; object-fit: contain; background: var(--soft);
  border-radius: 4px; }
figcaption { font-size: 0.78rem; line-height: 1.35; overflow-wrap: anywhere; }
code { font-size: 0.9em; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; }
"""


def page_of(report: Report, title: str, image_format: str, max_pixels: int) -> str:
    """Return the report as HTML.

    Args:
        report: What was found.
        title: Heading, such as the name of the config.
        image_format: INPUT.FORMAT, to read the images.
        max_pixels: INPUT.MAX_IMAGE_PIXELS.
    """
    counts = report.findings.counts()
    summary = ", ".join(
        f'<span class="severity {s}">{counted(counts[s], s, s + "s")}</span>' for s in SEVERITIES
    )
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{summary}</p>", _table_of_sets(report)]
    if report.anchors:
        recall = f"{report.anchors['recall']:.1%}"
        parts.append(f"<p>Anchors meet {recall} of the training objects at IoU 0.5.</p>")
    parts.append(_table_of_classes(report))
    for finding in report.findings:
        parts.append(_article(finding, image_format, max_pixels))
    if not sum(counts.values()):
        parts.append("<p>Nothing was found.</p>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int) -> str:
    """Return a table whose columns are numbers after the first few."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [tag if k < num_texts else f"{tag} class=number" for k in range(len(row))]
        return "".join(f"<{kind}>{escape(v)}</{tag}>" for kind, v in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _table_of_sets(report: Report) -> str:
    rows = []
    for name, entry in report.as_json()["datasets"].items():
        use = " and ".join(entry["use"])
        rows.append((name, use, f"{entry['images']:,}", f"{entry['annotations']:,}"))
    return _table(("data set", "use", "images", "annotations"), rows, num_texts=2)


def _table_of_classes(report: Report) -> str:
    names = dict.fromkeys(name for classes in report.classes.values() for name, _ in classes)
    per_set = [dict(classes) for classes in report.classes.values()]
    rows = [(name, *(f"{counts.get(name, 0):,}" for counts in per_set)) for name in names]
    if not rows:
        return ""
    table = _table(("class", *report.classes), rows, num_texts=1)
    return f"<details><summary>Objects of {len(rows)} classes</summary>{table}</details>"


def _article(finding: Finding, image_format: str, max_pixels: int) -> str:
    figures, texts = [], []
    for example in finding.examples[:_EXAMPLES]:
        pictures = [
            f'<img alt="" src="{picture}">'
            for file, box in ((example.file, example.box), (example.other, None))
            if file and (picture := _picture(file, box, image_format, max_pixels))
        ]
        which = "" if example.annotation is None else f"annotation {example.annotation}"
        if pictures:
            lines = [example.file.rpartition("/")[2], which]
            if len(example.detail) <= _SHORT:
                lines.append(example.detail)
            caption = "<br>".join(escape(line) for line in lines if line)
            figures.append(
                f'<figure title="{escape(example.file)}" class="of{len(pictures)}">'
                f"<div>{''.join(pictures)}</div><figcaption>{caption}</figcaption></figure>"
            )
        if not pictures or len(example.detail) > _SHORT:
            line = ": ".join(part for part in (example.file, which, example.detail) if part)
            texts.append(f'<p class="where">{escape(line)}</p>')
    shown = min(len(finding.examples), _EXAMPLES)
    count = f" ({finding.count:,})" if finding.count > 1 else ""
    more = f'<p class="where">{finding.count - shown:,} more</p>' if finding.count > shown else ""
    return (
        f'<article class="{finding.severity}" id="{finding.code}">'
        f"<h2>{escape(finding.title)}{count}</h2>"
        f'<p class="where"><span class="severity">{finding.severity}</span>'
        f" <code>{finding.code}</code> in {escape(finding.dataset)}</p>"
        f'<p class="remedy">{_with_code(finding.remedy)}</p>'
        f'<div class="pictures">{"".join(figures)}</div>{"".join(texts)}{more if shown else ""}'
        "</article>"
    )


def _with_code(text: str) -> str:
    """Return text as HTML, with what is between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if k % 2 else part for k, part in enumerate(parts))


def _picture(file: str, box: list[float] | None, image_format: str, max_pixels: int) -> str:
    """Return a small picture as an address, with a box drawn, or "" if it cannot be read."""
    try:
        pixels = read_image(file, image_format, max_pixels=max_pixels)
    except (UserError, OSError):
        return ""
    image = Image.fromarray(convert_image_to_rgb(pixels, image_format))
    left, top, right, bottom = window = _window(image.size, box)
    scale = min(_SIDE / max(right - left, bottom - top), 8)
    size = (max(round((right - left) * scale), 1), max(round((bottom - top) * scale), 1))
    image = image.crop(window).resize(size, Image.Resampling.LANCZOS)
    if box is not None:
        # Within the picture, so that boxes that stick out are seen, too.
        x0, x1 = (min(max((v - left) * scale, 1), size[0] - 2) for v in box[::2])
        y0, y1 = (min(max((v - top) * scale, 1), size[1] - 2) for v in box[1::2])
        ImageDraw.Draw(image).rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline="red", width=2)
    file_of_bytes = io.BytesIO()
    image.save(file_of_bytes, "JPEG", quality=75)
    encoded = base64.b64encode(file_of_bytes.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{encoded}"


def _window(size: tuple[int, int], box: list[float] | None) -> tuple[int, int, int, int]:
    """Return the part of an image of `(width, height)` to show: around an object that is small."""
    if box is None:
        return (0, 0, *size)
    center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    side = max(_ZOOM * max(box[2] - box[0], box[3] - box[1]), 48)
    starts, ends = [], []
    for middle, length in zip(center, size, strict=True):
        part = min(side, length)
        start = round(min(max(middle - part / 2, 0), length - part))
        starts.append(start)
        ends.append(start + max(round(part), 1))
    return (*starts, *ends)
