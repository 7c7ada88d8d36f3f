"""Pictures and a page of a run: ``python -m mcn_ext.report RUN`` -> curves.png, report.md and
report.html; of a study, when RUN is its folder: :mod:`mcn_ext.study.report`."""

from __future__ import annotations

import argparse
import json
import sys
from math import nan
from pathlib import Path

from mcn_ext.train.flags import Parser

_COLOURS = {"video": "tab:blue", "audio": "tab:orange", "text": "tab:green"}
_TERMS = ("total", "contrastive", "cluster", "reconstruction")


def _pyplot():
    """matplotlib without a screen, or None (with a notice) where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib (or pip install -e '.[plot]')", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "lines.linewidth": 1.4,
            "savefig.dpi": 150,
            "legend.frameon": False,
        }
    )
    return pyplot


def _save(figure, path: Path) -> Path:
    tmp = path.with_name(path.name + ".tmp")
    figure.savefig(tmp, format="png")  # constrained layout: nothing lies outside
    tmp.replace(path)
    return path


def _lines(axis, rows: list[dict], prefix: str, title: str) -> None:
    """One line for each quantity ``<prefix>_<modality or pair>`` that the rows have."""
    axis.set_title(title)
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(f"{prefix}_"))
    for key in names:
        name = key.removeprefix(f"{prefix}_")
        axis.plot(
            [row["step"] for row in rows],
            [row.get(key, nan) for row in rows],
            color=_COLOURS.get(name),
            label=name.replace("_", "-"),
            linestyle="--" if prefix == "negative" else "-",
        )
    if names:
        axis.legend(fontsize=7)


def curves(run: Path) -> Path | None:
    """curves.png from log.jsonl, over steps: the loss and its terms, signs of collapse
    (:mod:`mcn_ext.train.diagnostics`), gradients with skipped steps in red, speed."""
    from mcn_ext.train.log import read

    log = read(run / "log.jsonl") if (run / "log.jsonl").exists() else []
    rows = [row for row in log if "total" in row]
    skipped = [row["step"] for row in log if "skipped" in row]
    plt = _pyplot() if rows else None
    if plt is None:
        return None
    step = [row["step"] for row in rows]
    figure, axes = plt.subplots(3, 4, figsize=(13, 7.4), layout="constrained", sharex=True)
    for axis, term in zip(axes[0], _TERMS, strict=True):
        # Before the first k-means fit there is no clustering loss: a gap, not a zero.
        shown = [
            row[term] if term != "cluster" or "live_clusters" in row and row[term] else nan
            for row in rows
        ]
        axis.plot(step, shown, color="black")
        axis.set_title(term if term != "cluster" else "cluster (1 = no better than uniform)")
    axis = axes[1, 0]
    fitted = [row for row in rows if "live_clusters" in row]
    axis.set_title("clustering")
    if fitted:
        axis.plot(
            [r["step"] for r in fitted],
            [r["live_clusters"] for r in fitted],
            color="tab:blue",
            label="live clusters",
        )
        axis.set_ylim(bottom=0)
        share = axis.twinx()
        share.plot(
            [r["step"] for r in fitted], [100 * r["largest_share"] for r in fitted], color="tab:red"
        )
        share.set_ylabel("largest share, %", color="tab:red")
        share.set_ylim(bottom=0)
        share.grid(False)
        axis.set_ylabel("live clusters", color="tab:blue")
    else:
        axis.text(
            0.5, 0.5, "no k-means fit yet", ha="center", va="center", transform=axis.transAxes
        )
    _lines(axes[1, 1], rows, "negative", "")
    axes[1, 1].set_prop_cycle(None)
    _lines(axes[1, 1], rows, "positive", "cosine: positives, negatives (dashed)")
    _lines(axes[1, 2], rows, "rank", "effective rank")
    _lines(axes[1, 3], rows, "norm", "embedding norm")
    _lines(axes[2, 0], rows, "alignment", "alignment (0 = identical)")
    _lines(axes[2, 1], rows, "uniformity", "uniformity (0 = collapsed)")
    axes[2, 2].plot(step, [row.get("grad_norm", nan) for row in rows], color="black")
    axes[2, 2].set_yscale("log")
    axes[2, 2].set_title(f"gradient norm ({len(skipped)} steps skipped, red)")
    for at in skipped:
        axes[2, 2].axvline(at, color="tab:red", linewidth=0.8)
    axes[2, 3].plot(step, [row["clips_per_s"] for row in rows], color="black")
    axes[2, 3].set_title("clips per second")
    for axis in (axes[1, 2], axes[1, 3], axes[2, 3]):
        axis.set_ylim(bottom=0)
    for axis in axes[2]:
        axis.set_xlabel("step")
    figure.suptitle(run.name)
    path = _save(figure, run / "curves.png")
    plt.close(figure)
    return path


def similarity_picture(similarity, direction: str, rank, path: Path) -> Path | None:
    """similarity.png: the first queries against their candidates, the distribution of all ranks."""
    import numpy as np

    plt = _pyplot()
    if plt is None:
        return None
    n, shown = len(rank), len(similarity)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.4), layout="constrained", width_ratios=[1.1, 1]
    )
    image = left.imshow(np.ma.masked_invalid(similarity), cmap="viridis", interpolation="nearest")
    query, candidate = direction.split("->")
    left.set(title=f"similarity, first {shown} of {n}", xlabel=candidate, ylabel=query)
    left.grid(False)
    figure.colorbar(image, ax=left, shrink=0.85)
    ordered = np.sort(rank)
    right.step(ordered, 100 * np.arange(1, n + 1) / n, where="post", label="this model")
    line = np.arange(1, n + 1)
    right.plot(line, 100 * line / n, color="grey", linestyle="--", label="chance")
    right.set(
        xscale="log",
        xlim=(0.9, n),
        ylim=(0, 100),
        xlabel="rank of the right clip",
        ylabel="queries at or below it, %",
        title=f"{direction}, n = {n}",
    )
    for k in (1, 5, 10):
        right.axvline(k, color="grey", linewidth=0.6)
    ticks = [k for k in (1, 5, 10, 50, 100, 500, 1000, 5000) if k <= n]
    right.set_xticks(ticks, [str(k) for k in ticks])
    right.minorticks_off()
    right.legend(loc="lower right")
    _save(figure, path)
    plt.close(figure)
    return path


def report(run: Path) -> Path:
    """report.md and report.html in the run folder: what was trained on what, tables of
    metrics.json, pictures."""
    from mcn_ext.evaluation import localization, moments
    from mcn_ext.evaluation.metrics import table_rows
    from mcn_ext.study.page import Code, Page
    from mcn_ext.train.log import read

    args = json.loads((run / "args.json").read_text())
    page = Page(run.name)
    page.paragraph(
        "Trained on ",
        Code(args["data"]),
        (" (demo data, made up)" if args.get("demo") else "")
        + f", {args['epochs']} epochs, batch of {args['batch_size']} videos x {args['n_pair']} "
        f"clips, learning rate {args['lr']:g}, temperature {args['temperature']:g}, "
        f"seed {args['seed']}.",
    )
    metrics = run / "metrics.json"
    if metrics.exists():
        for name, result in json.loads(metrics.read_text()).items():
            page.heading(f"{name}: {result['data']}")
            if name in ("crosstask", "miningyoutube", "moments"):
                page.table(*(moments if name == "moments" else localization).table_rows(result))
            else:
                page.table(*table_rows({k: v for k, v in result.items() if "->" in k}, result["n"]))
    else:
        page.paragraph("Not evaluated yet: ", Code("python evaluate.py --youcook2"))
    log = run / "log.jsonl"
    skipped = [row for row in read(log) if "skipped" in row] if log.exists() else []
    if skipped:
        page.paragraph(
            f"{len(skipped)} steps were skipped (log.jsonl says why), the last at step "
            f"{skipped[-1]['step']}: {skipped[-1]['skipped']}."
        )
    curves(run)
    for name, title in (
        ("curves.png", "Training"),
        ("similarity.png", "Retrieval"),
        ("search.png", "The last search"),
    ):
        if (run / name).exists():
            page.heading(title)
            page.picture(run / name, "", name)
    page.save(run)
    return run / "report.md"


def main(argv=None) -> int:
    parser = Parser(
        prog="python -m mcn_ext.report",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="folder of a run or of a study (default: the newest run, stage 2 before stage 1)",
    )
    args = parser.parse_args(argv)
    if args.run is None:
        from mcn_ext.train.checkpoint import find_run

        args.run = find_run(Path("runs"))
    if args.run is not None and (args.run / "study.json").exists():
        from mcn_ext.study import report as study_report
        from mcn_ext.study.runs import StudyError

        try:
            print(study_report.write(args.run))
        except StudyError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if args.run is None or not (args.run / "args.json").exists():
        print(f"{args.run or 'runs'}: no run folder; train first", file=sys.stderr)
        return 1
    print(report(args.run).with_suffix(".html"))
    return 0
