"""Writes report.html (one file, figures inside) and report.md of a study or a run.

Both are rendered from report.jinja: the words are there, the numbers are computed here.
"""

from __future__ import annotations

import base64
import re
import shutil
from math import isfinite, nan
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mcn_ext.study import examples, figures, japanese, tables
from mcn_ext.study.bootstrap import compare_ranks
from mcn_ext.study.predict import orders, predictions, predictive_power, probes_of
from mcn_ext.study.statistics import MAIN, Study, mean
from mcn_ext.train.log import write_text


def number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if isfinite(value) else "-"


def spread(values: np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation (n - 1) over seeds."""
    deviation = f" ± {number(values.std(ddof=1), digits)}" if len(values) > 1 else ""
    return number(mean(values), digits) + deviation


# ---------------------------------------------------------------------------------- two formats
def escaped(text) -> Markup:
    """Escapes text for Markdown, in which inline HTML counts, too."""
    if isinstance(text, Markup):
        return text
    # An underscore within a word has no meaning, and names of runs are full of them.
    text = re.sub(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", str(text))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;"))


def _markdown_code(text) -> Markup:
    text = str(text).replace("`", "'").replace("|", "\\|")  # a pipe would end a table's cell
    return Markup(f"`{text}`")


def _picture(path: Path, folder: Path) -> dict:
    data = path.read_bytes()
    return {
        "path": path.relative_to(folder),
        "uri": f"data:image/png;base64,{base64.b64encode(data).decode()}",
        "width": int.from_bytes(data[16:20], "big") // 2,  # of the PNG's header; two dots a pixel
    }


def render(folder: Path, pictures: list[Path], **context) -> Path:
    """Write report.md and report.html into ``folder``; returns the path of the latter."""
    pictures = {path.stem: _picture(path, folder) for path in pictures}
    for html in (False, True):
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            finalize=None if html else escaped,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["number"] = number
        environment.tests["finite"] = isfinite
        environment.filters["prefixed"] = lambda text, prefix: prefix + text
        environment.filters["average"] = lambda run, key: run.average(key)
        environment.filters["oneline"] = lambda text: type(text)(" ".join(text.split()))
        words = {
            "b": Markup("<strong>{}</strong>").format
            if html
            else lambda text: Markup(f"**{escaped(text)}**"),
            "code": Markup("<code>{}</code>").format if html else _markdown_code,
            "br": Markup("<br>"),
        }
        text = environment.get_template("report.jinja").render(
            html=html, pictures=pictures, **words, **context
        )
        path = folder / f"report.{'html' if html else 'md'}"
        write_text(path, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return path


# ---------------------------------------------------------------------------------- the report
def bold_best(values: list[float], texts: list[str], lowest: bool = False) -> list:
    """Table cells, in which report.jinja sets {"bold": text} in bold."""
    best = (min if lowest else max)(filter(isfinite, values), default=None)
    pairs = zip(values, texts, strict=True)
    return [{"bold": text} if value == best else text for value, text in pairs]


def _context(study: Study) -> dict:
    """The values report.jinja shows."""
    methods = [method for method in study.methods if study.of(method)]

    def row(metric: str, direction: str = MAIN) -> list:
        values = [study.values(method, metric, direction) for method in methods]
        means = [mean(value) for value in values]
        return bold_best(means, [spread(value) for value in values], metric == "MedR")

    return {
        "title": "In which order to train video, audio and text" + ", by noise" * study.grid,
        "study": study,
        "main": MAIN,
        "methods": methods,
        "labels": [study.labels[method] for method in methods],
        "row_of": row,
        "number": number,
        "spread": spread,
        "mean": mean,
        "nan": nan,
        "bold_best": bold_best,
        "compare_ranks": compare_ranks,
        "orders_of": orders,
        "probes_of": probes_of,
        "predictions": predictions,
        "predictive_power": predictive_power,
        "chance": lambda k: 100 * min(k / study.n_queries[-1], 1),
        "total": lambda runs, name: [sum(getattr(s, name) for s in run.stages) for run in runs],
        "last": lambda runs, key: mean(run.final.last(key) for run in runs),
        "demo": any(run.final.args.get("demo") for run in study.runs) or study.grid,
    }


def write(folder: Path, language: str = "en", media: Path | None = None) -> Path:
    """Report the study in ``folder``, finished or not; returns the path of report.html.

    ``folder``/figures gets each figure as PNG and PDF, each table as CSV and LaTeX, labelled in
    ``language``. media: a folder of the evaluation clips' video files, to show frames.

    Raises :class:`mcn_ext.study.statistics.StudyError` if study.json cannot be read.
    """
    study = Study(Path(folder))
    if language == "ja":
        japanese.font()  # before anything is written: is there one?
    found = examples.choose(study)
    videos = examples.find(media, found) if media else {}
    figures_in = study.root / "figures"
    shutil.rmtree(figures_in, ignore_errors=True)  # those of an earlier state
    names = ("winners", "noise") if study.grid else ("recall", "differences", "losses")
    names += ("prediction",)
    drawn = [figures.save(figures_in / n, language, getattr(figures, n), study) for n in names]
    if videos:
        drawn.append(figures.save(figures_in / "examples", language, examples.draw, found, videos))
    page = render(study.root, list(filter(None, drawn)), **_context(study), examples=found)
    tables.export(page.with_suffix(".md").read_text(), figures_in, language)
    return page
