"""Studies side by side: what a loss, a flag, or the length of stage 1 changes.

    python -m mcn_ext.study --data D.h5 --youcook2 Y.h5 --out runs/with
    python -m mcn_ext.study --data D.h5 --youcook2 Y.h5 --out runs/without --cluster_weight 0
    python -m mcn_ext.study.compare runs/with runs/without --out runs/clustering

For each method: R@10 of text->video+audio by each fusion and the differences between studies, on
the seeds that every study with this method has, with simultaneous intervals; and measures of the
embedding space. Writes compare.md, compare.json and figures/ (PNG, PDF, CSV, LaTeX) to --out.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import json
import re
from pathlib import Path

import numpy as np
from markupsafe import Markup

from mcn_ext.console import printable
from mcn_ext.evaluation.metrics import markdown
from mcn_ext.study import figures, japanese, tables
from mcn_ext.study.bootstrap import compare_family
from mcn_ext.study.report import escaped, spread
from mcn_ext.study.statistics import FUSIONS, MAIN, Study, StudyError
from mcn_ext.train import flags
from mcn_ext.train.log import write_text

SPACE = ("nDCG@10", "words", "mixed")  # keys of geometry.py; those of gaps follow
ABOUT = """Differences in points, with simultaneous 95 % intervals and step-down p over all pairs of
studies (one bootstrap of queries and seeds). Bold: 0 is outside. The correction covers one method
and one search only: over many rows, some are bold by chance. Detectable: a true difference this
large would be found in 4 of 5 such comparisons."""
ABOUT_SPACE = """nDCG@10 of text->video+audio by the words that captions share. Words: how much
k-means clusters of all modalities' embeddings tell about the words of the captions (0: chance, 100:
everything). Mixed: how evenly modalities share clusters (0 to 100). Gap: distance of two
modalities' means (0 to 2)."""


def get_parser() -> argparse.ArgumentParser:
    parser = flags.Parser(
        prog="python -m mcn_ext.study.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY", help="folders of studies")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--language", choices=("en", "ja"), default="en", help="of labels: English or Japanese (en)"
    )
    return parser


def open_studies(folders: list[Path]) -> dict[str, Study]:
    """{folder's name: study}; SystemExit where they cannot be compared."""
    names = [printable(folder.resolve().name) for folder in folders]
    if len(folders) < 2 or len(set(names)) < len(names):
        raise SystemExit("give two studies or more, in folders of different names")
    try:
        studies = dict(zip(names, map(Study, folders), strict=True))
    except StudyError as error:
        raise SystemExit(str(error)) from None
    stores: dict[Path, Path] = {}
    for folder, study in zip(folders, studies.values(), strict=True):
        if study.grid:
            raise SystemExit(f"{folder}: a grid of noise; compare studies of one data set each")
        if not study.seeds:
            raise SystemExit(f"{folder}: no run of it has been evaluated")
        for run in study.runs:
            if data := run.final.metrics.get("data"):
                stores.setdefault(Path(data).resolve(), folder)
    first, *others = stores or [Path()]
    if not all(same_file(first, other) for other in others):
        where = ", ".join(f"{folder} on {data}" for data, folder in stores.items())
        raise SystemExit(f"studies must be evaluated on the same clips: {where}")
    return studies


def same_file(a: Path, b: Path) -> bool:
    """Whether two files have the same bytes; False where one is gone."""
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)


def changed(studies: dict[str, Study]) -> list[str]:
    """The flags in which studies differ, one line each."""
    values = [study.flags_given for study in studies.values()]
    names = sorted({flag for of in values for flag in of} - {"out"})
    found = {name: [of.get(name, "not given") for of in values] for name in names}
    # A list is stored as the text "['5', '25']".
    found = {name: [re.sub(r"[][',]", "", text) for text in of] for name, of in found.items()}
    return [f"--{name}: {', '.join(of)}" for name, of in found.items() if len(set(of)) > 1]


def recalls(studies: dict[str, Study]) -> list[dict]:
    """For each fusion and method: "values" {study: R@10 of each seed}, and "pairs", the later study
    minus the earlier (:func:`.bootstrap.compare_family`), on the "seeds" that every study with
    this method has."""
    rows = []
    for fusion, direction in FUSIONS.items():
        for method in dict.fromkeys(m for study in studies.values() for m in study.methods):
            found = {name: s.ranks(method, direction) for name, s in studies.items()}
            found = {name: ranks for name, ranks in found.items() if ranks}
            if not found:
                continue
            label = next(s.labels[method] for s in studies.values() if method in s.labels)
            seeds = sorted(set.intersection(*map(set, found.values())))
            if not seeds:
                of = "; ".join(f"{name} {sorted(ranks)}" for name, ranks in found.items())
                raise SystemExit(f"{label}: the studies that have it share no seed ({of})")
            values = {
                n: [100 * (ranks[s] <= 10).mean() for s in seeds] for n, ranks in found.items()
            }
            row = {"method": method, "label": label, "fusion": fusion, "seeds": seeds}
            row["values"] = {name: np.array(of) for name, of in values.items()}
            reverse = {name: found[name] for name in reversed(found)}
            rows.append(row | {"pairs": compare_family(reverse) if len(found) > 1 else []})
    if not any(row["pairs"] for row in rows):
        raise SystemExit("no method has been evaluated in two of the studies")
    return rows


def spaces(studies: dict[str, Study]) -> list[dict]:
    """What :meth:`.statistics.Study.geometry` finds, one entry for each method and study."""
    found = {name: study.geometry() for name, study in studies.items()}
    methods = dict.fromkeys(method for of in found.values() for method in of)
    return [
        {"method": method, "label": studies[name].labels[method], "study": name} | of[method]
        for method in methods
        for name, of in found.items()
        if method in of
    ]


def write(out: Path, studies: dict[str, Study], language: str) -> str:
    """compare.md, compare.json and figures/ in ``out``; returns the Markdown."""
    rows, space, names = recalls(studies), spaces(studies), list(studies)
    missing = [
        f"missing in {name}: {text}" for name, study in studies.items() for text in study.missing()
    ]
    facts = [*changed(studies), *missing]
    parts = ["# Studies side by side", "", *(f"- {escaped(fact)}" for fact in facts), ""]
    header = ["method", "search by", "seeds", *names]
    body = [
        [row["label"], row["fusion"], len(row["seeds"])]
        + [spread(row["values"].get(name, np.array([]))) for name in names]
        for row in rows
    ]
    about = f"{MAIN}, mean ± standard deviation over seeds."
    parts += ["## R@10", "", about, "", table(header, body), ""]
    body = []
    for row in rows:
        for pair in row["pairs"]:
            low, high = pair["simultaneous"]
            text = Markup(f"{pair['difference']:+.1f} ({low:+.1f} to {high:+.1f})")
            text = Markup(f"**{text}**") if pair["significant"] else text
            of = f"{pair['a']} - {pair['b']}"
            p = "< 0.0001" if pair["p"] < 0.0001 else f"{pair['p']:.4f}"
            body.append([row["label"], row["fusion"], of, text, p, f"{pair['detectable']:.1f}"])
    header = ["method", "search by", "of", "difference (95 %)", "p (step-down)", "detectable"]
    parts += ["## Differences", "", table(header, body), "", ABOUT, ""]
    if space:
        keys = list(dict.fromkeys(key for row in space for key in row if key.startswith("gap ")))
        keys = [key for key in (*SPACE, *keys) if any(key in row for row in space)]
        digits = {key: 2 if key.startswith("gap ") else 1 for key in keys}
        body = [
            [row["label"], row["study"]]
            + [spread(row.get(key, np.array([])), digits[key]) for key in keys]
            for row in space
        ]
        parts += ["## Space", "", table(["method", "study", *keys], body), "", ABOUT_SPACE, ""]
    text = "\n".join(parts)
    out.mkdir(parents=True, exist_ok=True)
    content = {"studies": {name: str(study.root) for name, study in studies.items()}}
    content |= {"R@10": rows, "space": space}
    write_text(
        out / "compare.json", json.dumps(content, indent=1, default=np.ndarray.tolist) + "\n"
    )
    write_text(out / "compare.md", text)
    tables.export(text, out / "figures", language)
    figures.save(out / "figures" / "compare", language, draw, studies, rows)
    return text


def table(header: list, body: list[list]) -> str:
    """In Markdown; names of studies and methods are escaped."""
    return markdown(list(map(escaped, header)), [list(map(escaped, row)) for row in body])


def draw(plt, studies: dict[str, Study], rows: list[dict]):
    """R@10 of each method over the studies, a panel for each fusion; a line without marks for what
    only one study has."""
    fusions = list(dict.fromkeys(row["fusion"] for row in rows))
    size = (0.8 + 2.9 * len(fusions), 3.8)
    figure, axes = plt.subplots(1, len(fusions), figsize=size, sharey=True, squeeze=False)
    x = {name: i for i, name in enumerate(studies)}
    patterns = itertools.cycle(((0, (1, 1)), (0, (5, 2, 1, 2)), (0, (8, 3))))
    dashes = {
        r["method"]: next(patterns) for r in rows if r["fusion"] == fusions[0] and not r["pairs"]
    }
    for row in rows:
        axis, method = axes[0, fusions.index(row["fusion"])], row["method"]
        style = figures.look(next(s for s in studies.values() if method in s.labels), method)
        style = {key: style[key] for key in ("color", "linestyle", "marker")}
        style |= {"label": row["label"], "markersize": 4}
        means = [of.mean() for of in row["values"].values()]
        if len(means) == 1:
            axis.axhline(means[0], **style | {"linestyle": dashes.get(method, ":"), "marker": ""})
            continue
        errors = [of.std(ddof=1) if len(of) > 1 else 0 for of in row["values"].values()]
        axis.errorbar([x[name] for name in row["values"]], means, errors, capsize=2, **style)
    for axis, fusion in zip(axes[0], fusions, strict=True):
        axis.set_xticks(range(len(x)), list(x), parse_math=False)
        axis.set(title=fusion, xlim=(-0.4, len(x) - 0.6))
    axes[0, 0].set_ylabel(f"{MAIN} R@10, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **figures.BELOW)
    return figure


def main(argv=None) -> int:
    args = get_parser().parse_args(argv)
    if args.out.is_file() or (args.out / "study.json").exists():
        what = "is a file" if args.out.is_file() else "holds a study"
        raise SystemExit(f"--out {args.out}: {what}; give another folder")
    if args.language == "ja":
        japanese.font()  # before anything is written: is there one?
    print(write(args.out, open_studies(args.studies), args.language))
    print(args.out / "compare.md")
    return 0


if __name__ == "__main__":
    flags.run(main)
