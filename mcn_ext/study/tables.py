"""The tables of report.md for a thesis: each as CSV, and as LaTeX (booktabs)."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from markupsafe import Markup

from mcn_ext.study import japanese

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "“": "``",
    "”": "''",
}


def _cells(line: str) -> list[tuple[str, bool]]:
    """(text, bold) of each cell of a Markdown table's row, as report.jinja writes them."""
    cells = []
    for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]:
        text = cell.strip().replace("<br>", " ")
        bold = text.startswith("**") and text.endswith("**") and len(text) > 4
        text = re.sub(r"(?<!\\)[*`]", "", text)
        cells.append((str(Markup(re.sub(r"\\(.)", r"\1", text)).unescape()), bold))
    return cells


def tables(markdown: str) -> dict[str, list[list[tuple[str, bool]]]]:
    """{heading in words-with-hyphens: rows of (text, bold), the header first}."""
    found: dict[str, list] = {}
    heading, rows = "", []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("## "):
            heading = re.sub(r"\W+", "-", line[3:].lower()).strip("-")
        if line.startswith("|"):
            rows.append(line)
        elif rows:
            name, n = heading, 2
            while name in found:  # a section's second table
                name, n = f"{heading}-{n}", n + 1
            found[name] = [_cells(row) for i, row in enumerate(rows) if i != 1]  # 1: |---|---:|
            rows = []
    return found


def _latex(text: str, bold: bool = False) -> str:
    text = "".join(LATEX.get(letter, letter) for letter in text)
    # A minus, not a hyphen, before a number.
    text = re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)
    return rf"\textbf{{{text}}}" if bold else text


def latex(rows: list[list[tuple[str, bool]]]) -> str:
    """A tabular for \\input; its file needs \\usepackage{booktabs}."""
    lines = [" & ".join(_latex(*cell) for cell in row) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}", ""])


def export(markdown: str, folder: Path, language: str = "en") -> None:
    """Write NAME.csv and NAME.tex of each table into ``folder``, labelled in ``language``."""
    for name, rows in tables(markdown).items():
        if language == "ja":
            rows = [[(japanese.translate(text), bold) for text, bold in row] for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        # With a byte order mark, by which Excel knows UTF-8.
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([text for text, _ in row] for row in rows)
        (folder / f"{name}.tex").write_text(latex(rows), encoding="utf-8")
