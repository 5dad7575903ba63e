"""The page of the error report: one file that opens from disk, without a network."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).with_name("assets")
# uPlot 1.6.32 draws the curves: 51 kB, MIT licence, whose text is in `uPlot.LICENSE`.
_PARTS = {
    "uplot_css": "uPlot.min.css",
    "css": "report.css",
    "uplot_js": "uPlot.iife.min.js",
    "js": "report.js",
    "uplot_license": "uPlot.LICENSE",
}


def html_page(report: Mapping[str, Any], gallery: Mapping[str, Any]) -> str:
    """Return the page of a report.

    Args:
        report: What `report.json` holds.
        gallery: The images, and what to draw over them.
    """
    page = (_FOLDER / "report.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(f"{report['names']['first']} on {report['dataset']}"),
        "report": _embedded(report),
        "gallery": _embedded(gallery),
    }
    for name, file in _PARTS.items():
        parts[name] = (_FOLDER / file).read_text(encoding="utf-8")
    # In one pass, so that inserted text is not itself searched for placeholders.
    pieces = page.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _embedded(value: Mapping[str, Any]) -> str:
    """Return JSON for a script element, which `</script>` or `<!--` in a name must not end."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
