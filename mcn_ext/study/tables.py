"""Tables of a study's report: recalls, which differences are real, equal compute, fusions."""

from __future__ import annotations

from math import isfinite

import numpy as np

from mcn_ext.evaluation.metrics import RECALLS
from mcn_ext.study import pictures as study_pictures
from mcn_ext.study.page import Bold, Page, Text
from mcn_ext.study.runs import MAIN, Study, paired


def number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if isfinite(value) else "-"


def spread(values: np.ndarray, digits: int = 1) -> str:
    """Mean +- standard deviation (n - 1) over seeds; the mean alone of one seed."""
    if not len(values):
        return "-"
    text = number(values.mean(), digits)
    return text + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def interval(compare: dict) -> str:
    return "{:+.1f} to {:+.1f}".format(*compare["ci95"])


def bold_best(values: list[float], cells: list[str], lowest: bool = False) -> list[Text]:
    known = [v for v in values if isfinite(v)]
    best = (min if lowest else max)(known, default=None)
    return [Bold(c) if v == best else c for v, c in zip(values, cells, strict=True)]


def add(page: Page, study: Study, draw) -> None:
    methods = [m for m in study.methods if study.of(m)]
    if not methods:
        return
    page.heading(f"Result: {MAIN}")
    metrics = [*(f"R@{k}" for k in RECALLS), "MedR"]
    columns = [
        bold_best(
            [study.mean(m, metric) for m in methods],
            [spread(study.values(m, metric)) for m in methods],
            metric == "MedR",
        )
        for metric in metrics
    ]
    rows = [
        [study.labels[m], str(len(study.of(m))), *(column[i] for column in columns)]
        for i, m in enumerate(methods)
    ]
    if n := study.n_queries():
        rows.append(
            [
                "chance",
                "",
                *(number(100 * min(k / n[-1], 1)) for k in RECALLS),
                f"{(n[-1] + 1) / 2:g}",
            ]
        )
    page.table(["method", "seeds", *metrics], rows)
    page.paragraph(
        "Percent of captions whose clip is among the first K (R@K), and the median rank "
        "(MedR, lower is better)"
        + (
            "; mean ± standard deviation over seeds."
            if len(study.seeds()) > 1
            else "; one seed, so no standard deviation."
        )
    )
    draw(
        "recall",
        "Recall with 95 % intervals (bootstrap over queries and seeds). Plain and "
        "hatched bars of one colour are variants of one order.",
        study_pictures.recall_bars,
    )
    _equal_compute(page, study, methods)
    if len(methods) > 1:
        _differences(page, study, methods, draw)
    _fusions(page, study, methods)
    page.heading("All directions, R@10")
    directions = list(
        dict.fromkeys(
            [
                MAIN,
                *(
                    d
                    for m in methods
                    for run in study.of(m)
                    for d in run.final.metrics
                    if "->" in d and "(" not in d
                ),
            ]
        )
    )  # fusions have a table of their own
    rows = []
    for d in directions:
        values = [study.values(m, direction=d) for m in methods]
        rows.append(
            [
                d,
                *bold_best(
                    [v.mean() if len(v) else np.nan for v in values], [spread(v) for v in values]
                ),
            ]
        )
    if n:
        rows.append(["chance", *[number(100 * min(10 / n[-1], 1))] * len(methods)])
    page.table(["query -> candidates", *(study.labels[m] for m in methods)], rows)


def _differences(page: Page, study: Study, methods: list[str], draw) -> None:
    page.heading("Is the difference real?")
    draw(
        "differences",
        "Differences to the best method with paired 95 % intervals. Filled: the "
        "interval leaves out 0, the difference is real. Hollow: not decided.",
        study_pictures.differences,
    )
    pairs = {(a, b): study.compare(a, b) for i, a in enumerate(methods) for b in methods[:i]}
    cells = [
        [difference(pairs[a, b]) if (a, b) in pairs else "" for b in methods[:-1]] for a in methods
    ]
    page.table(
        ["R@10, row less column", *(study.labels[m] for m in methods[:-1])],
        [[study.labels[m], *row] for m, row in zip(methods, cells, strict=True)][1:],
    )
    page.paragraph(
        "Points and 95 % interval of a paired bootstrap that draws queries and seeds "
        "anew, crossed; ",
        Bold("bold"),
        ": 0 is outside. Each interval is for its own "
        "comparison; among many, some are bold by chance.",
    )


def difference(compare: dict | None) -> Text:
    if compare is None:
        return "-"
    text = f"{compare['difference']:+.1f}\n({interval(compare)})"
    return Bold(text) if compare["real"] else text


def _equal_compute(page: Page, study: Study, methods: list[str]) -> None:
    rows = []
    for method in methods:
        for baseline in study.baselines(of=method):
            if "compute" in study.kinds(baseline, method):
                cost = [
                    f"{next(r.flops for r in study.of(m)) or np.nan:.2e}"
                    for m in (method, baseline)
                ]
                rows.append(
                    [
                        study.labels[method],
                        spread(study.values(method)),
                        cost[0],
                        study.labels[baseline],
                        spread(study.values(baseline)),
                        cost[1],
                        difference(study.compare(method, baseline)),
                    ]
                )
    if rows:
        page.heading("Two stages against one of equal compute")
        page.table(
            ["two stages", "R@10", "FLOPs", "one stage", "R@10", "FLOPs", "two less one"], rows
        )
        page.paragraph(
            "FLOPs of the encoders' forward and backward in training, both stages, "
            f"equal but for whole epochs; {MAIN}."
        )


def _fusions(page: Page, study: Study, methods: list[str]) -> None:
    rows = []
    for method in methods:
        plain, row = study.ranks(method), []
        for kind in ("mean", "bank"):
            other = f"{MAIN} ({kind})"
            row += [
                spread(study.values(method, direction=other)),
                difference(paired(study.ranks(method, other), plain)),
            ]
        if any(cell != "-" for cell in row):
            alone = [
                spread(study.values(method, direction=f"text->{m}")) for m in ("video", "audio")
            ]
            rows.append([study.labels[method], *alone, spread(study.values(method)), *row])
    if rows:
        page.heading("How to search video and audio together")
        page.table(
            [
                "R@10",
                "video alone",
                "audio alone",
                "sum",
                "mean",
                "mean less sum",
                "bank",
                "bank less sum",
            ],
            rows,
        )
        page.paragraph(
            "Sum: of cosines, the published protocol, used elsewhere on this page. "
            "Mean: the cosine to the mean of a clip's unit embeddings. Bank: the sum, "
            "less what draws training captions to a clip (log-sum-exp at the training's "
            "temperature); clips that suit every query fall back. None uses evaluation "
            "data."
        )
