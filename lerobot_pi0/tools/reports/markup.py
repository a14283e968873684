"""Elements of HTML reports: sections, notes, tables, bars and pictures, all with the look of report.html.

A verb makes a `Page` of sections and writes it. Text that is not `Html` may be a stranger's: it is escaped. The page is
one file, whose Content-Security-Policy forbids a browser to load anything else and to run programs.
"""

import base64
import html
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from ... import __version__
from ...checkpoints.quoting import plain

logger = logging.getLogger(__name__)

LOOK = Path(__file__).with_name("report.html")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """An element of HTML or SVG. In names of attributes `class_` stands for class, `text_anchor` for text-anchor."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(x)}"' for key, x in attributes.items())
    return Html(f"<{name}{given}>{''.join(map(escaped, inside))}</{name}>")


def escaped(x: object) -> str:
    return x if isinstance(x, Html) else html.escape(plain(x))


def section(title: str, text: object = "", *inside: Html) -> Html:
    """A heading, what is to be known before one looks, and what there is to see."""
    return tag("section", tag("h2", title), *([tag("p", text)] if text else []), *inside)


def note(grade: str, text: str, about: str = "", remedy: str = "") -> Html:
    """A finding or verdict; `grade` is error, warning or fine."""
    head = [tag("b", about)] if about else []
    return tag("div", tag("p", *head, text), *([tag("p", "→ ", remedy)] if remedy else []), class_=f"note {grade}")


def table(rows: Sequence[Sequence[str]]) -> Html:
    """Names in the first row and column, numbers in the others. A wide table scrolls by itself, with keys too."""
    lines = [tag("tr", *(tag("td" if i else "th", x) for x in row)) for i, row in enumerate(rows)]
    return tag("div", tag("table", *lines), class_="wide", tabindex=0)


def legend(names: Mapping[str, str]) -> Html:
    """What the colours mean: names by class, such as b1."""
    return tag("p", *(part for x, name in names.items() for part in (tag("span", class_=f"key {x}"), name)))


def bar(label: str, value: str, parts: Mapping[str, float], mark: float | None = None) -> Html:
    """A bar: parts of its full width by class, such as b1, and a dashed line at `mark`."""
    inside = [tag("span", class_=x, style=_percent("width", part)) for x, part in parts.items()]
    inside += [] if mark is None else [tag("span", class_="mark", style=_percent("left", mark))]
    above = tag("p", tag("span", label), tag("span", value), class_="label")
    return tag("div", above, tag("div", *inside, class_="bar"))


def _percent(name: str, part: float) -> str:
    return f"{name}:{100 * min(max(part, 0), 1):.2f}%"


def picture(data: bytes, alt: str, kind: str = "png") -> Html:
    """The bytes of an image file, with its description below."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return tag("figure", Html(f'<img src="{source}" alt="{escaped(alt)}" />'), tag("figcaption", alt))


def strip(*pictures: Html) -> Html:
    """Pictures in rows of three, on a phone too."""
    return tag("div", *pictures, class_="strip")


def grid(*charts: Html) -> Html:
    """Charts beside each other where there is room, else one below the other."""
    return tag("div", *charts, class_="grid")


class Page(NamedTuple):
    """A report: what it is about, and what there is to see."""

    title: str
    facts: str
    sections: list[Html]

    def write(self, file: Path) -> None:
        about = tag("p", self.facts, f" lerobot_policy_pi0 {__version__}.", class_="quiet")
        body = "\n".join([tag("header", tag("h1", self.title), about), *self.sections])
        text = Template(LOOK.read_text(encoding="utf-8")).substitute(title=escaped(self.title), body=body)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        logger.info("wrote %s", file)
