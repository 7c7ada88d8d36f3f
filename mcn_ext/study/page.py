"""A document as a list of blocks, as Markdown with pictures beside it and as one HTML file.

Text is plain; :class:`Bold` and :class:`Code` mark words, a tuple strings them together. All of it
is escaped: a caption may hold ``<script>``.
"""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from mcn_ext.train.log import write_text


class Bold(str):
    """Words in bold."""


class Code(str):
    """A flag, a file, a command."""


Text = str | tuple  # str, Bold, Code, or a tuple of them

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1b1b1b;
  background: #fff; max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem;
  border-bottom: 1px solid #ccc; padding-bottom: .2rem } h3 { font-size: 1.05rem }
p, ul { max-width: 46rem } .lead { font-size: 1.12rem; background: #f1f6fa; padding: .7rem 1rem;
  border-left: 4px solid #0072b2; margin: .6rem 0 }
nav { font-size: .88rem; margin: 1.2rem 0 } nav a { margin-right: 1rem; white-space: nowrap }
a { color: #00568a } code { font: .88em/1.4 ui-monospace, Menlo, Consolas, monospace;
  background: #f3f3f3; padding: 0 .25em; overflow-wrap: anywhere }
.scroll { overflow-x: auto } table { border-spacing: 0; font-size: .85rem; margin: .8rem 0;
  font-variant-numeric: tabular-nums } th, td { padding: .28rem .55rem; text-align: right;
  border-bottom: 1px solid #ddd; vertical-align: top } th { border-bottom: 2px solid #888 }
th:first-child, td:first-child, .words th, .words td { text-align: left }
td { white-space: nowrap } .words td { white-space: normal } th:first-child, td:first-child {
  position: sticky; left: 0; background: #fff }
figure { margin: 1.2rem 0 } img { max-width: 100%; height: auto }
figcaption { font-size: .88rem; color: #444; max-width: 46rem }
@media (max-width: 40rem) { body { font-size: 15px } th, td { padding: .25rem .45rem }
  figure { overflow-x: auto } img { max-width: none; width: 38rem } }
@media print { body { max-width: none; font-size: 10.5pt; padding: 0 } nav { display: none }
  table { font-size: 7.5pt } th, td { padding: .15rem .3rem }
  th:first-child, td:first-child { position: static }
  figure, tr { break-inside: avoid } h2, h3 { break-after: avoid } .scroll { overflow: visible } }
"""


def _markdown(text: Text, cell: bool = False) -> str:
    if isinstance(text, tuple):
        return "".join(_markdown(part, cell) for part in text)
    if isinstance(text, Code):  # a fence longer than any run of backticks inside
        fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
        pad = " " if "`" in text else ""
        code = f"{fence}{pad}{text}{pad}{fence}"
        return code.replace("|", "\\|") if cell else code  # a row is cut at | before all else
    # Underscores inside words mean nothing in Markdown, and names of runs are full of them.
    plain = re.sub(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", str(text))
    plain = plain.replace("&", "&amp;").replace("<", "&lt;")
    return f"**{plain}**" if isinstance(text, Bold) else plain


def _html(text: Text) -> str:
    if isinstance(text, tuple):
        return "".join(_html(part) for part in text)
    tag = {Bold: "strong", Code: "code"}.get(type(text))
    plain = html.escape(str(text))
    return f"<{tag}>{plain}</{tag}>" if tag else plain


def _cell(text: Text) -> str:
    return _html(text).replace("\n", "<br>")


class Page:
    """Blocks in order; :meth:`save` writes them as ``<stem>.md`` and ``<stem>.html``."""

    def __init__(self, title: str):
        self.title = title
        self.blocks: list[tuple[str, str]] = []  # each in Markdown and in HTML
        self.headings: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """Level 2 is in the list of contents, too."""
        anchor = ""
        if level == 2:
            self.headings.append(text)
            anchor = f' id="s{len(self.headings)}"'
        self.blocks.append(
            (f"{'#' * level} {_markdown(text)}", f"<h{level}{anchor}>{_html(text)}</h{level}>")
        )

    def paragraph(self, *parts: Text, lead: bool = False) -> None:
        """``lead``: what the reader in a hurry is to see."""
        kind = ' class="lead"' if lead else ""
        self.blocks.append((_markdown(parts), f"<p{kind}>{_html(parts)}</p>"))

    def bullets(self, items: list[Text]) -> None:
        self.blocks.append(
            (
                "\n".join(f"- {_markdown(item)}" for item in items),
                "<ul>" + "".join(f"<li>{_html(i)}</li>" for i in items) + "</ul>",
            )
        )

    def table(self, header: list[Text], rows: list[list[Text]], *, words: bool = False) -> None:
        """The first column to the left, the others to the right; ``words``: all to the left. A
        line break in a cell is kept."""
        rule = "|---" + ("|---" if words else "|---:") * (len(header) - 1) + "|"
        lines = [
            [_markdown(text, cell=True).replace("\n", "<br>") for text in row]
            for row in [header, *rows]
        ]
        lines = ["| " + " | ".join(row) + " |" for row in lines]
        head, *body = [
            "<tr>" + "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in row) + "</tr>"
            for tag, row in [("th", header), *(("td", row) for row in rows)]
        ]
        kind = ' class="words"' if words else ""
        self.blocks.append(
            (
                "\n".join([lines[0], rule, *lines[1:]]),
                f'<div class="scroll"><table{kind}><thead>{head}</thead><tbody>\n'
                + "\n".join(body)
                + "\n</tbody></table></div>",
            )
        )

    def picture(self, path: Path, caption: Text, name: str) -> None:
        """A PNG; ``name``: its path in the Markdown, relative to where that will lie."""
        data = path.read_bytes()
        width = int.from_bytes(data[16:20], "big") // 2  # as its header says; two pixels for one
        alt = html.escape(re.sub(r"<.*?>", "", _html(caption)), quote=True)
        self.blocks.append(
            (
                f"![{path.stem}]({name})" + (f"\n\n{_markdown(caption)}" if caption else ""),
                f'<figure><img width="{width}" alt="{alt or path.stem}" src="data:'
                f'image/png;base64,{base64.b64encode(data).decode()}">'
                f"<figcaption>{_html(caption)}</figcaption></figure>",
            )
        )

    def contents(self) -> None:
        """Links to the headings, in HTML, at this place."""
        self.blocks.append(("", "<nav></nav>"))

    def markdown(self) -> str:
        blocks = [block for block, _ in self.blocks if block]
        return "\n\n".join([f"# {_markdown(self.title)}", *blocks]) + "\n"

    def html(self) -> str:
        links = "\n".join(
            f'<a href="#s{i}">{_html(text)}</a>' for i, text in enumerate(self.headings, 1)
        )
        body = "\n".join(
            f"<nav>{links}</nav>" if block == "<nav></nav>" else block for _, block in self.blocks
        )
        title = html.escape(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
            f"<h1>{title}</h1>\n{body}\n</body></html>\n"
        )

    def save(self, folder: Path, stem: str = "report") -> Path:
        """Writes both; the path of the HTML file."""
        write_text(folder / f"{stem}.md", self.markdown())
        write_text(folder / f"{stem}.html", self.html())
        return folder / f"{stem}.html"
