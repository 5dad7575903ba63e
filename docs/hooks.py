"""What the site shows and no page spells out: commands, keys, the model zoo, diagrams, test links.

MkDocs calls the functions named `on_...`. Nothing here imports torch.
"""

import argparse
import functools
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detkit.cli.command import COMMANDS
from detkit.cli.parsers import PARSERS
from detkit.config import defaults

ROOT = Path(__file__).resolve().parents[1]
_HELP_WIDTH = 100
SOURCE = "https://github.com/detkit/detkit/blob/main"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the markers of a page by what they stand for."""
    name = page.file.src_uri
    if name == "config.md":
        markdown = markdown.replace("<!-- keys -->", _config_keys())
    elif name == "model_zoo.md":
        markdown = markdown.replace("<!-- zoo -->", _model_zoo())
    elif name == "commands.md":
        markdown = markdown.replace("<!-- commands -->", _commands())
    elif name == "reliability.md":
        markdown = re.sub(r"`(tests/[^`]+)`", _link_to_test, markdown)
    elif name in ("contributing.md", "changelog.md"):
        markdown = _page_of_the_root(ROOT / f"{page.file.name.upper()}.md")
    return re.sub(r"^```diagram\n(.*?)^```", _diagram, markdown, flags=re.DOTALL | re.MULTILINE)


def on_page_content(content: str, **_: Any) -> str:
    """Give each cell of a table the name of its column: on phones a row becomes a block."""
    return re.sub(r"<table>.*?</table>", _with_labels, content, flags=re.DOTALL)


def on_post_page(output: str, **_: Any) -> str:
    """Keep the theme from asking GitHub for the stars of the repository."""
    return output.replace(' data-md-component="source"', "")


def _with_labels(match: re.Match[str]) -> str:
    labels = [re.sub(r"<[^>]+>", "", name) for name in re.findall(r"<th[^>]*>(.*?)</th>", match[0])]
    head, body, rest = match[0].partition("<tbody>")
    rows = []
    for row in rest.split("</tr>"):
        first, *cells = row.split("<td")
        named = (
            f"<td data-label='{label}'{cell}" for label, cell in zip(labels, cells, strict=False)
        )
        rows.append(first + "".join(named))
    return head + body + "</tr>".join(rows)


def _link_to_test(match: re.Match[str]) -> str:
    path = match[1].rstrip("/")
    return f"[{Path(path).stem.removeprefix('test_')}]({SOURCE}/{path})"


def _page_of_the_root(path: Path) -> str:
    """Return a file of the repository's root with its links as they are from docs/."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if "://" in target or target.startswith("#"):
            return match[0]
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')})"
        return f"]({SOURCE}/{target})"

    return re.sub(r"\]\(([^)]+)\)", link, path.read_text(encoding="utf-8"))


# --- Commands ------------------------------------------------------------------------------------


def _commands() -> str:
    """Return the help of each command, with that of its actions."""
    parts = []
    for command in (name for name in COMMANDS if name in PARSERS):
        parser = PARSERS[command](f"detkit {command}")
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [parser, *(p for action in below for p in action.choices.values())]
        texts = []
        for one in parsers:
            one.formatter_class = functools.partial(
                argparse.RawDescriptionHelpFormatter, width=_HELP_WIDTH
            )  # pyright: ignore
            texts.append(one.format_help())
        parts.append(f"## detkit {command}\n\n```text\n{chr(10).join(texts)}```\n")
    return "\n".join(parts)


# --- Config keys ---------------------------------------------------------------------------------


def _config_keys() -> str:
    sections: dict[str, list[str]] = {}
    for key, spec in defaults._TABLE.items():
        sections.setdefault(_section(key), []).append(_key_entry(key, spec))
    parts = []
    for section, entries in sections.items():
        parts.append(f"## {section}\n\n<dl class='keys' markdown='0'>\n{''.join(entries)}</dl>\n")
    return "\n".join(parts)


def _section(key: str) -> str:
    """Return the group of a key: two names deep below MODEL, else one; "Run" for single names."""
    *groups, _ = key.split(".")
    if not groups:
        return "Run"
    return ".".join(groups[:2]) if groups[0] == "MODEL" else groups[0]


def _key_entry(key: str, spec: Any) -> str:
    meaning = spec.meaning.removeprefix("detkit:").strip()
    marks = "<span class='own'>detkit</span>" if spec.meaning.startswith("detkit:") else ""
    if meaning.partition(" ")[0].isalpha():  # a name such as torch.x stays as it is
        meaning = meaning[0].upper() + meaning[1:]
    lines = [html.escape(meaning, quote=False)]
    if spec.choices:
        legal = ", ".join(f"<code>{html.escape(repr(choice))}</code>" for choice in spec.choices)
        lines.append(f"One of {legal}.")
    if spec.minimum is not None:
        lines.append(f"At least <code>{spec.minimum:g}</code>.")
    if spec.in_epochs:
        lines.append("Accepts epochs: <code>'2ep'</code>.")
    lines += [f"Has an effect only with {need}." for need in _needs(spec.needs)]
    lines += [f"Has no effect with {need}." for need in _needs(spec.unless)]
    if builders := defaults.BUILDERS.get(key.rpartition(".")[0]):
        (need,) = _needs(("MODEL.BACKBONE.NAME", *builders))
        lines.append(f"Has an effect only with {need}.")
    if spec.unread:
        lines.append(f"Not read by this version: {html.escape(spec.unread, quote=False)}.")
    default = html.escape(repr(spec.default))
    return (
        f"<dt id='{key}'><a href='#{key}'><code>{key}</code></a> {marks}"
        f"<span class='default'>default <code>{default}</code></span></dt>\n"
        f"<dd>{' '.join(lines)}</dd>\n"
    )


def _needs(condition: tuple[Any, ...]) -> Iterator[str]:
    """Return the settings on which the effect of a key depends, as text."""
    if condition:
        key, *values = condition
        wanted = " or ".join(f"<code>{html.escape(repr(value))}</code>" for value in values)
        yield f"<a href='#{key}'><code>{key}</code></a> {wanted}"


# --- Model zoo -----------------------------------------------------------------------------------


def _model_zoo() -> str:
    parts = []
    configs = ROOT / "configs"
    for folder in sorted(path for path in configs.rglob("*") if path.is_dir()):
        rows = []
        for path in sorted(folder.glob("*.yaml")):
            about = _first_lines(path)
            if "Reproduces" in about:
                rows.append(_zoo_row(path, about))
        if rows:
            head = "| config | what | score | cost |\n|---|---|---|---|\n"
            title = folder.relative_to(configs).as_posix()
            parts.append(f"## {title}\n\n{head}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _first_lines(path: Path) -> dict[str, str]:
    """Return the comments `# Name: text.` that a config starts with."""
    about: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"# ([A-Z][a-z ]*): (.*)", line)
        if match is None:
            break
        about[match[1]] = match[2].rstrip(".")
    return about


def _zoo_row(path: Path, about: dict[str, str]) -> str:
    none = about.get("Score and cost", "")
    what = about["Reproduces"].removeprefix("nothing published; ")
    # Each row says whose number it is: this table is what a user chooses a model by.
    published = about.get("Published score", "").partition(";")[0]
    score = f"{published} (the source's)" if published else about.get("Score", none)
    cells = [
        f"[`{path.stem}`]({SOURCE}/{path.relative_to(ROOT).as_posix()})",
        what[0].upper() + what[1:],
        score,
        about.get("Published cost", about.get("Cost", "")),
    ]
    cells = [cell.replace("; not measured here", "").replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(cells)} |"


# --- Diagrams ------------------------------------------------------------------------------------

_WIDTH = 460  # narrow enough to be read on a phone


def _diagram(match: re.Match[str]) -> str:
    """Draw a fenced block as SVG: `A | B` boxes side by side, `-> text` an arrow with a label.

    The part of a box after ` : ` is its second line. Colours follow the theme.
    """
    parts: list[str] = []
    y = 4
    for line in match[1].strip().splitlines():
        if line.startswith("->"):
            parts.append(_arrow(y, line.removeprefix("->").strip()))
            y += 34
        elif line:
            boxes = [box.strip() for box in line.split(" | ")]
            height = 44 if any(" : " in box for box in boxes) else 28
            width = (_WIDTH - 4 - 8 * (len(boxes) - 1)) / len(boxes)
            for i, box in enumerate(boxes):
                parts.append(_box(2 + i * (width + 8), y, width, height, box))
            y += height + 4
    return (
        # In a div, so that Markdown leaves it alone.
        f"<div><svg class='diagram' role='img' viewBox='0 0 {_WIDTH} {y + 4}' "
        f"xmlns='http://www.w3.org/2000/svg'>{''.join(parts)}</svg></div>\n"
    )


def _box(x: float, y: float, width: float, height: float, text: str) -> str:
    title, _, below = text.partition(" : ")
    middle = x + width / 2
    lines = [(title, "title", y + (18 if below else height / 2 + 5))]
    lines += [(below, "below", y + 35)] if below else []
    drawn = "".join(
        f"<text class='{kind}' x='{middle:g}' y='{at:g}'>{html.escape(words)}</text>"
        for words, kind, at in lines
    )
    return f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='4'/>{drawn}"


def _arrow(y: float, label: str) -> str:
    x = 40
    return (
        f"<path d='M{x} {y} v26 m-5 -7 l5 7 l5 -7'/>"
        f"<text class='label' x='{x + 14}' y='{y + 19}'>{html.escape(label)}</text>"
    )
