"""Draws and describes a run or a study: curves.png (of a run), report.html and report.md.

python -m mcn_ext.report RUN_OR_STUDY
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mcn_ext.console import printable
from mcn_ext.train import flags
from mcn_ext.train.curves import _pyplot, _save, curves


def similarity_picture(similarity, direction: str, rank, path: Path) -> Path | None:
    """similarity.png: the first queries against their candidates, and the distribution of ranks."""
    import numpy as np

    plt = _pyplot()
    if plt is None:
        return None
    n, shown = len(rank), len(similarity)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.4), layout="constrained", width_ratios=[1.1, 1]
    )
    image = left.imshow(np.ma.masked_invalid(similarity), interpolation="nearest")
    query, candidate = direction.split("->")
    left.set(title=f"similarity, first {shown} of {n}", xlabel=candidate, ylabel=query)
    left.grid(False)
    figure.colorbar(image, ax=left, shrink=0.85)
    share = np.arange(1, n + 1)
    right.step(np.sort(rank), 100 * share / n, where="post", label="this model")
    right.plot(share, 100 * share / n, color="grey", linestyle="--", label="chance")
    right.set(xscale="log", xlim=(0.9, n), ylim=(0, 100), title=f"{direction}, n = {n}")
    right.set(xlabel="rank of the right clip", ylabel="queries at or below it, %")
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
    """Write report.html and report.md of a run: how it was trained, metrics.json as tables,
    figures. Returns the path of report.html."""
    from mcn_ext.evaluation import localization, moments
    from mcn_ext.evaluation.metrics import table_rows
    from mcn_ext.study.report import render
    from mcn_ext.train.log import read

    metrics, log = run / "metrics.json", run / "log.jsonl"
    results = []
    try:
        found = json.loads(metrics.read_text()) if metrics.exists() else {}
    except ValueError as error:
        raise SystemExit(f"{metrics}: damaged ({error}); move it away") from None
    for name, result in found.items():
        if name == "replaced":  # results of earlier checkpoints or settings
            continue
        if name in ("crosstask", "miningyoutube"):
            table = localization.table_rows(result)
        elif name == "moments":
            table = moments.table_rows(result)
        else:
            table = table_rows({k: v for k, v in result.items() if "->" in k}, result["n"])
        results.append((name, result["data"], table))
    curves(run)
    pictures = [run / f"{name}.png" for name in ("curves", "similarity", "search")]
    return render(
        run,
        [path for path in pictures if path.exists()],
        title=run.name,
        study=None,
        args=json.loads((run / "args.json").read_text()),
        results=results,
        skipped=[row for row in (read(log) if log.exists() else []) if "skipped" in row],
    )


def main(argv=None) -> int:
    parser = flags.Parser(
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
    parser.add_argument(
        "--language",
        choices=("en", "ja"),
        default="en",
        help="of the labels in a study's figures and tables: English, or Japanese (en)",
    )
    parser.add_argument(
        "--media",
        type=Path,
        metavar="DIR",
        help="video files of a study's evaluation clips, named by clip id, to show frames",
    )
    args = parser.parse_args(argv)
    run = args.run
    if run is None:
        from mcn_ext.evaluation.embedder import open_run

        run, _ = open_run(None, None)
    if (run / "study.json").exists():
        from mcn_ext.study import report as study_report
        from mcn_ext.study.statistics import StudyError

        try:
            print(printable(study_report.write(run, args.language, args.media)))
        except StudyError as error:
            print(printable(error), file=sys.stderr)
            return 1
        return 0
    if args.media or args.language != "en":
        raise SystemExit(f"--language, --media: for studies; {run} has no study.json")
    if not (run / "args.json").exists():
        message = f"{run.absolute()}: no run folder; train first, or correct the path"
        print(printable(message), file=sys.stderr)
        return 1
    print(printable(report(run)))
    return 0


if __name__ == "__main__":
    flags.run(main)
