"""The report of a study: report.html, report.md and pictures/, the answer in the first lines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import isfinite
from pathlib import Path

import numpy as np

from mcn_ext.study import examples as study_examples
from mcn_ext.study import grid as study_grid
from mcn_ext.study import pictures as study_pictures
from mcn_ext.study import tables as study_tables
from mcn_ext.study.page import Bold, Code, Page, Text
from mcn_ext.study.runs import MAIN, Run, Study, compare_args
from mcn_ext.study.tables import bold_best, difference, interval, number, spread
from mcn_ext.train.diagnostics import signs_of_collapse

ONE_SEED = (
    "One seed: the intervals count the chance of the queries, not that of the training. "
    "Another seed may turn a small difference round."
)


def write(folder: Path) -> Path:
    """Read the study in ``folder``, finished or not, and write its report; the HTML file's path.
    :class:`mcn_ext.study.runs.StudyError` if study.json cannot be read."""
    from mcn_ext.study.curves import _pyplot

    study, plt = Study(Path(folder)), _pyplot()
    if plt:
        study_pictures.style(plt)
    page = Page(
        "In which order to train video, audio and text" + (", by noise" if study.grid else "")
    )
    shutil.rmtree(study.root / "pictures", ignore_errors=True)  # none of an earlier state

    def draw(name: str, caption: Text, function: Callable, *args) -> bool:
        figure = function(plt, study, *args) if plt else None
        return bool(figure) and _add(page, study.root, plt, figure, name, caption)

    _headline(page, study)
    page.contents()
    if study.grid:
        _grid(page, study, draw)
    else:
        study_tables.add(page, study, draw)
        _curves_and_forgetting(page, study, draw)
        _space(page, study, draw)
        study_examples.add(page, study)
    _health(page, study)
    _cost(page, study)
    _equal(page, study)
    return page.save(study.root)


def _add(page: Page, root: Path, plt, figure, name: str, caption: Text) -> bool:
    from mcn_ext.study.curves import _save

    path = root / "pictures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    _save(figure, path)
    plt.close(figure)
    page.picture(path, caption, f"pictures/{name}.png")
    return True


# ------------------------------------------------------------------------------- the answer
def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _list(items) -> str:
    return " and ".join(map(str, items)) or "no"


def _against(study: Study, best: str, other: str, what: str) -> str:
    """How far ``best`` is from another method, and whether that is real."""
    compare, name = study.compare(best, other), f"{what} ({study.labels[other]})"
    if compare is None:
        return (
            f"{study.mean(best) - study.mean(other):+.1f} points to {name}; no interval: the "
            "ranks of one seed of both are missing"
        )
    gap, seeds = compare["difference"], len(compare["seeds"])
    verdict = (
        "not decided, as 0 is inside"
        if not compare["real"]
        else "real"
        if seeds > 1
        else "real for these queries"
    )
    some = f", {_count(seeds, 'seed')} both have" if seeds < len(study.seeds()) else ""
    return (
        f"{abs(gap):.1f} points {'above' if gap >= 0 else 'below'} {name}: 95 % interval "
        f"{interval(compare)}{some}, {verdict}"
    )


def headline(study: Study) -> tuple[str, list[str]]:
    """(the answer in a sentence that names the winner or says that there is none, what it rests
    on), by R@10 of text->video+audio."""
    if study.grid:
        return _grid_headline(study)
    orders, n, seeds = study.by_order(), study.n_queries(), len(study.seeds())
    if not orders:
        return (f"Nothing to compare yet: no two-stage run has been evaluated on {MAIN}.", [])
    best, *rest = orders
    compare = study.compare(best, rest[0]) if rest else None
    claim = (
        "wins"
        if compare and compare["real"]
        else "is ahead, but which order is best is not decided"
        if rest
        else "is the only order yet"
    )
    points = [_against(study, best, rest[0], "the next order")] if rest else []
    points += [
        _against(
            study, best, method, f"one stage of equal {' and '.join(study.kinds(method, best))}"
        )
        for method in study.baselines(of=best)
    ]
    if not study.baselines():
        points.append("The one-stage baseline has not been evaluated.")
    if seeds == 1:
        points.append(ONE_SEED)
    above = ""  # "wins" is among the two-stage orders: whoever reads one line must not miss this
    if study.baselines() and study.mean(study.baselines()[0]) > study.mean(best):
        top = study.baselines()[0]
        real = (study.compare(top, best) or {}).get("real")
        above = (
            f" But one stage finds more: {number(study.mean(top))} % ({study.labels[top]}"
            f"{'' if real else '; not decided'})."
        )
    return (
        f"{study.labels[best]} {claim}: it finds the right clip among the first ten for "
        f"{spread(study.values(best))} % of {_list(n)} captions (R@10; chance "
        f"{number(100 * min(10 / n[-1], 1))} %; {_count(seeds, 'seed')}).{above}",
        points,
    )


def _grid_headline(study: Study) -> tuple[str, list[str]]:
    rows = [row for row in study_grid.winners(study) if row["winner"]]
    if not rows:
        return "Nothing to compare yet: no two-stage run has been evaluated.", []
    won = [
        (study.orders[row["winner"]], bool(row["compare"] and row["compare"]["real"]))
        for row in rows
    ]
    counts = sorted(
        (
            (sum(o == order for o, _ in won), won.count((order, True)), order)
            for order in {o for o, _ in won}
        ),
        reverse=True,
    )
    cells = [(row, row["cell"].get("name", "")) for row in rows if row["baseline"]]
    above = sum(
        study.mean(row["baseline"], cell=c) > study.mean(row["winner"], cell=c) for row, c in cells
    )
    return (
        "Of "
        + _count(len(rows), "grade")
        + " of noise, "
        + ", ".join(
            f"{order} is best in {n} ({real} of them beyond chance)" for n, real, order in counts
        )
        + f"; by R@10 of {_list(study.n_queries())} captions, "
        f"{_count(len(study.seeds()), 'seed')}.",
        (
            [f"The one-stage baseline is above the best order in {above} of {len(cells)}."]
            if cells
            else []
        )
        + ([ONE_SEED] if len(study.seeds()) == 1 else []),
    )


def _headline(page: Page, study: Study) -> None:
    answer, points = headline(study)
    page.paragraph(Bold(answer), lead=True)
    if points:
        page.bullets(points)
    page.paragraph(
        f"A caption is the query, clips are found by their video and audio ({MAIN}). “AV then T” "
        "(AV_T) trains audio and video together first and adds text in a second stage; the other "
        "orders likewise. Frozen: in the second stage the first one's encoders stay as they are; "
        "finetuned: they go on learning. One stage (AVT) trains all three at once. “Real”: the "
        "95 % interval of the paired difference leaves out 0."
    )
    store = study_examples.store_of(study)
    if study.demo or store and store.source.startswith("demo data"):
        page.paragraph(
            Bold("Demo data, made up:"), " these numbers say that it runs, nothing on real data."
        )
    if missing := study.missing():
        page.paragraph(
            Bold(f"The study is not complete: {_count(len(missing), 'gap')}"),
            ", see “What is missing”.",
        )


# ----------------------------------------------------------------------------- the sections
def _curves_and_forgetting(page: Page, study: Study, draw) -> None:
    page.heading("Training")
    draw(
        "curves",
        "Total and contrastive loss over the steps of both stages; mean of the seeds, "
        "band of one standard deviation. A loss is the mean over its pairs, which the stages "
        "do not share: levels compare within a stage, not between stages or with AVT.",
        study_pictures.curves,
    )
    rows = study_pictures.forgetting(study)
    page.heading("What stage 2 does to the first pair")
    if not rows:
        page.paragraph("No run has been evaluated after both stages.")
        return
    draw(
        "forgetting",
        "Retrieval within the first pair, after stage 1 and after stage 2. Filled "
        "to the left of hollow is forgetting.",
        study_pictures.forgetting_lines,
    )
    page.table(
        ["method", "direction", "R@10 after stage 1", "after stage 2", "change (95 % interval)"],
        [
            [
                study.labels[r["method"]],
                r["direction"],
                number(r["before"]),
                number(r["after"]),
                difference(r["change"]) if r["change"] else f"{r['after'] - r['before']:+.1f}",
            ]
            for r in rows
        ],
    )


def _space(page: Page, study: Study, draw) -> None:
    rows = study_pictures.geometry(study)
    page.heading("The joint space")
    if not rows:
        page.paragraph("No embeddings were saved (youcook2.npz).")
        return
    draw(
        "geometry",
        "Alignment (how far apart a clip's two modalities are) against uniformity "
        "(how evenly clips fill the sphere) on the evaluation clips; Wang & Isola 2020. Both are "
        "better when lower: the corner at the lower left is the best.",
        study_pictures.geometry_scatter,
        rows,
    )
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    values = {
        (r["method"], r["pair"]): f"{r['alignment']:.2f} / {r['uniformity']:.2f}" for r in rows
    }
    page.table(
        ["alignment / uniformity", *pairs],
        [
            [study.labels[m], *(values.get((m, p), "-") for p in pairs)]
            for m in study.methods
            if study.of(m)
        ],
    )
    draw(
        "space",
        "Evaluation clips on the first two principal axes of the joint space (unit "
        "rows, the first seed), one point a clip and modality. Apart colours are a gap between "
        "modalities.",
        study_pictures.joint_space,
    )
    best = study.ranked(study.methods)[:1]
    captions = study_examples.captions_of(study)[1]
    if best and captions:
        draw(
            "words",
            f"{study.labels[best[0]]}: clips whose caption has the word, in colour; all "
            "others grey. Each modality is centred on its own mean, so that the word shows and "
            "not the gap.",
            study_pictures.word_map,
            best[0],
            captions,
        )


def _grid(page: Page, study: Study, draw) -> None:
    page.heading("Which order wins where")
    draw(
        "winners",
        f"The best two-stage order in each grade of noise by {MAIN} R@10, its margin "
        "over the second, and the best one-stage baseline (AVT). Full colour: the paired 95 % "
        "interval of the margin leaves out 0. Pale and hatched: not decided.",
        study_grid.who_wins,
    )
    orders = [o for o in study_pictures.ORDERS if o in study.orders.values()]
    rows = []
    for row in study_grid.winners(study):
        cell, compare = row["cell"].get("name", ""), row["compare"]
        best = [study_grid.best_of(study, o, cell) for o in orders]
        rows.append(
            [
                cell,
                study.orders.get(row["winner"], "-"),
                *bold_best(best, [number(v) for v in best]),
                difference(compare) if compare else "-",
            ]
        )
    page.table(
        [
            "cell",
            "best two-stage order",
            *(f"{o} R@10" for o in orders),
            "its margin over the next",
        ],
        rows,
    )
    draw("orders", "R@10 of each order, all on one scale.", study_grid.each_order)
    draw(
        "noise",
        "R@10 against video noise, one panel for each grade of audio noise; mean and "
        "standard deviation of the seeds.",
        study_grid.over_noise,
    )


def _by_method(study: Study) -> dict[str, list[Run]]:
    runs = {
        m: [r for r in study.runs if r.method == m and any(s.log for s in r.stages)]
        for m in study.methods
    }
    return {m: found for m, found in runs.items() if found}


def _mean(values) -> float:
    values = [v for v in values if isfinite(v)]
    return float(np.mean(values)) if values else float("nan")


def _health(page: Page, study: Study) -> None:
    page.heading("Did training stay healthy?")
    rows, warnings = [], []
    for method, runs in _by_method(study).items():
        final = [r.final for r in runs]
        rows.append(
            [
                study.labels[method],
                str(sum(s.skipped for r in runs for s in r.stages)),
                f"{number(_mean(f.last('live_clusters') for f in final), 0)} of "
                f"{final[0].args.get('cluster_size', '-')}",
                number(100 * _mean(f.last("largest_share") for f in final)),
                *(
                    number(_mean(f.last(f"rank_{m}") for f in final))
                    for m in ("video", "audio", "text")
                ),
            ]
        )
        for r in runs:
            end = next((row for row in reversed(r.final.log) if "total" in row), {})
            signs = signs_of_collapse(end)
            if not isfinite(end.get("total", 0.0)):
                signs.append("the last loss is not finite")
            if signs:
                warnings.append(
                    f"{r.cell + ': ' if r.cell else ''}{r.label}, seed {r.seed}: "
                    + "; ".join(signs)
                )
    page.table(
        [
            "method",
            "steps skipped",
            "live clusters",
            "largest cluster, %",
            "effective rank: video",
            "audio",
            "text",
        ],
        rows,
    )
    page.paragraph(
        "At the end of training, mean of the seeds; skipped steps (loss or gradient not "
        "finite) are the sum over seeds and stages. Effective rank: in how many "
        "directions embeddings vary (Roy & Vetterli 2007); near 1 is collapse."
    )
    if warnings:
        page.paragraph(Bold("Signs of collapse:"))
        page.bullets(warnings)
    else:
        page.paragraph("No sign of collapse in any run.")
    unseen = [
        study.labels[m]
        for m, runs in _by_method(study).items()
        if not any(isfinite(r.final.last("live_clusters")) for r in runs)
    ]
    if unseen:
        page.paragraph(
            Bold("No clustering took place"),
            f" in {', '.join(unseen)}: no statistics "
            "of clusters were logged, so nothing is known of their collapse.",
        )


def _cost(page: Page, study: Study) -> None:
    def equal(method):
        return "; ".join(
            f"{kind} of {', '.join(of)}" for kind, of in study.equal[method].items() if of
        )

    page.heading("Cost")
    rows = []
    for method, runs in _by_method(study).items():
        flops = _mean(r.flops for r in runs if r.flops)
        rows.append(
            [
                study.labels[method],
                " + ".join(map(str, runs[0].epochs)),
                f"{_mean(sum(s.clips for s in r.stages) for r in runs):,.0f}",
                number(_mean(sum(s.seconds for s in r.stages) for r in runs), 0),
                f"{flops:.2e}" if isfinite(flops) else "-",
                equal(method),
            ]
        )
    page.table(
        ["method", "epochs", "clips", "training seconds", "training FLOPs", "equal in"], rows
    )
    page.paragraph(
        "Per run, both stages together, mean of the seeds. A stage 1 that two methods "
        "share is counted for each."
    )


def _equal(page: Page, study: Study) -> None:
    same, differ = compare_args(study)
    page.heading("What is equal, what is not")
    if differ:
        page.table(
            ["differs", "value", "in"],
            [
                [Code(key) if i == 0 else "", Code(value), "; ".join(names) if i else "all others"]
                for key, values in differ.items()
                for i, (value, names) in enumerate(values)
            ],
            words=True,
        )
    else:
        page.paragraph(
            "Nothing differs but what the study compares: pair, added modality, frozen "
            "or finetuned encoders, epochs and seed."
        )
    if same:
        parts: list[Text] = []
        for key, value in same.items():
            parts += [Code(f"{key} {value}"), " "]
        page.paragraph("The same in the ", Code("args.json"), " of every run: ", *parts)
    page.heading("What is missing")
    missing = study.missing()
    if missing:
        page.bullets(missing)
    else:
        page.paragraph("Nothing: every run of the study was trained and evaluated.")
    page.paragraph(
        "Made by ",
        Code(study.command or "python -m mcn_ext.study"),
        "; this page by ",
        Code(f"python -m mcn_ext.report {study.root}"),
        ".",
    )
