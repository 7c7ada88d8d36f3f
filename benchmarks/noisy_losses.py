"""Which contrastive loss when clips are misaligned? Studies of each loss by share of shifted clips.

    python benchmarks/noisy_losses.py DIR --data demo              # makes its data
    python benchmarks/noisy_losses.py DIR --data digits --flags "--audio rows ..."
    python benchmarks/noisy_losses.py DIR                          # only the results so far

DIR/data/NAME-SHARE/ has train.h5 and eval.h5. Those of other data than the demo's are made from
NAME-0 by shift.py. Each study goes to DIR/runs/NAME-SHARE/LOSS; to resume, run the same command
again. Results: noisy-losses.json and .md in OUT (default: benchmarks/results).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import ROOT, describe

from mcn_ext.evaluation.metrics import markdown
from mcn_ext.study.bootstrap import compare_ranks
from mcn_ext.study.report import spread
from mcn_ext.study.statistics import MAIN, Study

SHARES = ("0", "0.2", "0.4", "0.6")
LOSSES = {
    "softmax": "--loss softmax",
    "milnce-2": "--loss milnce --n_candidates 2",
    "milnce-4": "--loss milnce --n_candidates 4",
    "dcl": "--loss dcl",
    "sigmoid": "--loss sigmoid",
}
# Of commit 56436a9, when there was --loss rince, which never won.
MEASURED = [*LOSSES, "rince-0.1", "rince-0.5"]
STUDY = "--orders VT_A AV_T --stage1_encoders frozen --seeds 0 1 2 --jobs 2"
ORDERS = {"VT_A": "VT then A", "AV_T": "AV then T"}
FUSIONS = {"sum": MAIN, "bank": f"{MAIN} (bank)"}


def python(*words) -> None:
    """A study that fails says so, and the others go on."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=False)


def finished(study: Path) -> bool:
    return (study / "study.json").exists() and not Study(study).missing()


def prepare(name: str, folder: Path) -> None:
    """DIR/data/NAME-SHARE of all shares."""
    for share in SHARES:
        out = folder / f"data/{name}-{share}"
        if name == "demo":
            words = ("--videos", 128, "--shift", share, "--out", out)
            python("-m", "mcn_ext.prepare", "demo", *words)
        elif not (out / "train.h5").exists():
            plain = folder / f"data/{name}-0"
            out.mkdir(exist_ok=True)
            (out / "eval.h5").unlink(missing_ok=True)  # of a start that was interrupted
            (out / "eval.h5").symlink_to(plain / "eval.h5")
            python("benchmarks/shift.py", plain / "train.h5", out / "train.h5", "--share", share)


def train(name: str, folder: Path, shares: list[str], losses: list[str], flags: str) -> None:
    for share in shares:
        for loss in losses:
            data, out = folder / f"data/{name}-{share}", folder / f"runs/{name}-{share}/{loss}"
            if not finished(out):
                stores = ("--data", data / "train.h5", "--youcook2", data / "eval.h5")
                words = f"{STUDY} {flags} {LOSSES[loss]}".split()
                python("-m", "mcn_ext.study", *stores, "--out", out, *words)
            write(folder)


def rows_of(folder: Path) -> list[dict]:
    """R@10 of every data set, share, order, fusion and loss that has been evaluated."""
    rows = []
    for cell in sorted((folder / "runs").glob("*-*")):
        name, _, share = cell.name.rpartition("-")
        studies = {loss: Study(cell / loss) for loss in MEASURED if finished(cell / loss)}
        for order in ORDERS:
            for fusion, direction in FUSIONS.items():
                for loss, study in studies.items():
                    values = study.values(order, direction=direction)
                    row = {"data": name, "share": float(share), "order": order, "loss": loss}
                    row |= {"fusion": fusion, "n_seeds": len(values), "R@10": float(values.mean())}
                    row["text"] = spread(values)
                    if loss != "softmax" and "softmax" in studies:
                        plain = studies["softmax"].ranks(order, direction)
                        row["less softmax"] = compare_ranks(study.ranks(order, direction), plain)
                    rows.append(row)
    return rows


def cell_text(row: dict) -> str:
    """R@10 and the difference to the softmax, bold where it is significant."""
    gain = row.get("less softmax")
    if not gain:
        return row["text"]
    low, high = gain["ci95"]
    text = f"{gain['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"{row['text']}; " + (f"**{text}**" if gain["significant"] else text)


def tables(rows: list[dict]) -> str:
    """Markdown: a table for each data set, fusion and order; columns are shares."""
    parts = []
    for name in dict.fromkeys(row["data"] for row in rows):
        for fusion in FUSIONS:
            for order, label in ORDERS.items():
                at = {
                    (row["loss"], row["share"]): cell_text(row)
                    for row in rows
                    if (row["data"], row["fusion"], row["order"]) == (name, fusion, order)
                }
                shares = sorted({share for _, share in at})
                body = [[loss, *(at.get((loss, s), "") for s in shares)] for loss in MEASURED]
                header = ["loss", *(f"{share:.0%} shifted" for share in shares)]
                parts.append(f"## {name}, {label}, {fusion}\n\n{markdown(header, body)}\n")
    return "\n".join(parts)


ABOUT = """# Losses on misaligned clips

R@10 of {main}, three seeds, mean ± standard deviation; then the difference to the softmax in the
same column with its 95 % interval (paired bootstrap over queries and seeds), bold where it excludes
0. All losses have the same temperature and learning rate, which were tuned for the softmax only.
No correction for many comparisons: of 100 differences without an effect, 5 would be bold.

A shifted clip has its sound or its picture from the clip before or after it. Evaluation clips are
not shifted. Made by `benchmarks/noisy_losses.py`, commit {commit}, {date}.

"""


def write(folder: Path) -> None:
    rows, facts = rows_of(folder), describe()
    out = Path(os.environ.get("OUT", ROOT / "benchmarks/results")) / "noisy-losses.json"
    report = {"machine": facts, "losses": LOSSES, "study": STUDY, "rows": rows}
    out.write_text(json.dumps(report, indent=1) + "\n")
    about = ABOUT.format(main=MAIN, commit=facts["commit"], date=facts["date"])
    out.with_suffix(".md").write_text(about + tables(rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--data", metavar="NAME", help="what to train on; demo makes it")
    parser.add_argument("--shares", nargs="+", choices=SHARES, default=SHARES)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    flags = "--preset demo --n_pair 8"
    parser.add_argument("--flags", default=flags, help=f"of train_stage1.py (default {flags})")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if args.data:
        prepare(args.data, folder)
        train(args.data, folder, args.shares, args.losses, args.flags)
    write(folder)


if __name__ == "__main__":
    main()
