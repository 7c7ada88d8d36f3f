"""Retrieval after every epoch of a run, from the weights it keeps: epochs.json, epochs.csv and
epochs.png in the run folder.

    python -m mcn_ext.evaluation.epochs --run runs/stage2-AV_T --youcook2 data/youcook2.h5

Each direction's R@1, R@5, R@10 and MedR, by the sum of cosines. Epochs whose weights have been
removed are left out.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path

from mcn_ext.train import flags

SHOWN = "R@1", "R@5", "R@10", "MedR"


def get_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="python -m mcn_ext.evaluation.epochs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--youcook2",
        type=Path,
        metavar="STORE",
        help=f"evaluation store (default {flags.STORES['youcook2']}, or the demo's)",
    )
    parser.add_argument("--all_directions", action="store_true", help="not only the customary ones")
    flags.add_run(parser)
    return parser


def draw(rows: list[dict], run: Path) -> Path | None:
    """epochs.png: R@10 of each direction, and all four numbers of the first."""
    from mcn_ext.console import printable
    from mcn_ext.train.curves import _pyplot, _save

    plt = _pyplot()
    if plt is None:
        return None
    directions = list(rows[0]["results"])
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for direction in directions:
        values = [row["results"][direction]["R@10"] for row in rows]
        left.plot(epochs, values, "o-", markersize=3, label=direction)
    left.set(title="R@10, %", xlabel="epoch", ylim=(0, 100))
    left.legend(fontsize=7)
    for name in SHOWN[:3]:
        values = [row["results"][directions[0]][name] for row in rows]
        right.plot(epochs, values, "o-", markersize=3, label=f"{name}, %")
    median = [row["results"][directions[0]]["MedR"] for row in rows]
    right.plot(epochs, median, "s--", color="grey", markersize=3, label="median rank")
    right.set(title=directions[0], xlabel="epoch")
    right.set_ylim(bottom=0)
    right.legend(fontsize=7)
    figure.suptitle(printable(run.name))
    path = _save(figure, run / "epochs.png")
    plt.close(figure)
    return path


def main(argv=None) -> int:
    args = get_parser().parse_args(argv)
    if args.checkpoint:
        raise SystemExit("--checkpoint: all epochs of --run are evaluated; leave it out")

    from mcn_ext.evaluation import retrieval
    from mcn_ext.evaluation.embedder import Embedder, open_run, open_store
    from mcn_ext.evaluation.metrics import markdown, summarize
    from mcn_ext.train.log import write_text

    run, _ = open_run(args.run, None)
    files = sorted(run.glob("epoch-*.pt"))
    if not files:
        raise SystemExit(
            f"--run {run}: no epoch-NN.pt in it; train it, or name another run (a study keeps them "
            "with --keep_epochs)"
        )
    rows, store, directions, path = [], None, [], None
    for number, file in enumerate(files, 1):
        print(f"{file.name}, {number} of {len(files)}", flush=True)
        embedder = Embedder(argparse.Namespace(**vars(args) | {"run": run, "checkpoint": file}))
        if store is None:
            demo = embedder.args["demo"]
            path = args.youcook2 or (flags.DEMO / "eval.h5" if demo else flags.STORES["youcook2"])
            store = open_store(path, "--youcook2", flags.PREPARE["youcook2"])
            embedder.check(store, "--youcook2")
            retrieval.check_captions(store, "--youcook2")
            directions = retrieval.asked(embedder.model.modalities, ["sum"], args.all_directions)
        clips = embedder.clips(store, [(i, [(0, 0)]) for i in range(len(store))])
        ranks, _, _ = retrieval.evaluate(clips, directions, kind=embedder.args["similarity"])
        results = {name: summarize(rank) for name, rank in ranks.items()}
        rows.append({"epoch": int(file.stem.removeprefix("epoch-")), "results": results})
    report = {"data": str(path), "n": len(store), "epochs": rows}
    write_text(run / "epochs.json", json.dumps(report, indent=1) + "\n")
    header = ["epoch", *(f"{name} {direction}" for direction in results for name in SHOWN)]
    body = [
        [row["epoch"], *(round(of[name], 2) for of in row["results"].values() for name in SHOWN)]
        for row in rows
    ]
    text = io.StringIO()
    csv.writer(text).writerows([header, *body])
    write_text(run / "epochs.csv", text.getvalue())
    shown = len(SHOWN) + 1  # the first direction's
    print(markdown(header[:shown], [[str(value) for value in row[:shown]] for row in body]))
    picture = draw(rows, run)
    print(f"{run / 'epochs.json'}, epochs.csv" + (f", {picture.name}" if picture else ""))
    return 0


if __name__ == "__main__":
    flags.run(main)
