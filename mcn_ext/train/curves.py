"""Draws curves.png of a training run from its log.jsonl."""

from __future__ import annotations

import sys
from math import nan
from pathlib import Path

from mcn_ext.console import printable
from mcn_ext.modalities import MODALITIES

COLOURS = {row.name: row.colour for row in MODALITIES.values()}

# A panel's title and the quantity it shows: one line for the key itself, or one for each key
# "<quantity>_<modality or pair>".
PANELS = {
    "total loss": "total",
    "contrastive": "contrastive",
    "cluster (1 = no better than uniform)": "cluster",
    "reconstruction": "reconstruction",
    "learning rate": "lr",
    "cosine of positives": "positive",
    "cosine of negatives": "negative",
    "alignment (0 = identical)": "alignment",
    "uniformity (0 = collapsed)": "uniformity",
    "effective rank": "rank",
    "embedding norm": "norm",
    "cosine of pairs' gradients (< 0: conflict)": "gradient",
    "live clusters": "live_clusters",
    "share of the largest cluster": "largest_share",
    "gradient norm": "grad_norm",
    "clips per second": "clips_per_s",
}
# In log.jsonl, but not drawn; any other column, such as one of your own, gets a panel.
NOT_DRAWN = {"step", "epoch", "data_wait", "peak_mib", "skipped_steps"}
PAIR_COLOURS = ("tab:purple", "tab:brown", "tab:olive", "tab:cyan", "tab:pink", "tab:gray")
FROM_ZERO = {"rank", "norm", "live_clusters", "largest_share", "clips_per_s"}


def _pyplot():
    """matplotlib without a display, or None (with a notice) where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: pip install matplotlib (or pip install -e '.[plot]')", file=sys.stderr)
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
    """Write a PNG in one move: a reader never sees half a file."""
    tmp = path.with_name(path.name + ".tmp")
    figure.savefig(tmp, format="png")
    tmp.replace(path)
    return path


def _value(row: dict, key: str) -> float:
    # Before the first k-means fit there is no clustering loss: draw a gap, not a zero.
    if key.startswith("cluster") and not row.get(key):
        return nan
    return row.get(key, nan)


def _keys_of(quantity: str, rows: list[dict]) -> dict[str, str]:
    """Columns of a panel -> what each is of, a modality or a pair; "" for the quantity itself."""
    keys = dict.fromkeys(key for row in rows for key in row)
    prefix = f"{quantity}_"
    return {
        key: key.removeprefix(prefix) if key != quantity else ""
        for key in keys
        if key == quantity or set(key.removeprefix(prefix).split("_")) <= COLOURS.keys()
    }


def _panel(axis, rows: list[dict], title: str, quantity: str) -> None:
    pair_colours = iter(PAIR_COLOURS)
    steps = [row["step"] for row in rows]
    for key, name in _keys_of(quantity, rows).items():
        colour = COLOURS.get(name) or (next(pair_colours) if name else "black")
        values = [_value(row, key) for row in rows]
        marker = "." if len(rows) < 5 else ""
        axis.plot(steps, values, label=name.replace("_", "-"), color=colour, marker=marker)
        if name:
            axis.legend(fontsize=7)
    if quantity in FROM_ZERO:
        axis.set_ylim(bottom=0)
    axis.set_title(title)


def curves(run: Path) -> Path | None:
    """Write ``run``/curves.png: the loss and its terms, signs of collapse
    (:mod:`mcn_ext.train.diagnostics`), gradient norms, speed, all over steps.

    Returns its path, None without a logged step or without matplotlib.
    """
    from mcn_ext.train.log import read  # it imports torch, which --help does not need

    log = read(run / "log.jsonl") if (run / "log.jsonl").exists() else []
    rows = [row for row in log if "total" in row]
    plt = _pyplot() if rows else None
    if plt is None:
        return None
    known = {key for quantity in PANELS.values() for key in _keys_of(quantity, rows)} | NOT_DRAWN
    more = dict.fromkeys(key for row in rows for key in row if key not in known)
    titles = PANELS | {key: key for key in more}
    n_rows = -(-len(titles) // 5)
    size = (15, 2.5 * n_rows)
    figure, axes = plt.subplots(n_rows, 5, figsize=size, layout="constrained", sharex=True)
    panels = {}
    for axis, (title, quantity) in zip(axes.flat, titles.items(), strict=False):
        _panel(axis, rows, title, quantity)
        panels[quantity] = axis
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    skipped = [row["step"] for row in log if "skipped" in row]
    panels["grad_norm"].set_yscale("log")
    panels["grad_norm"].set_title(f"gradient norm ({len(skipped)} steps skipped, red)")
    for step in skipped:
        panels["grad_norm"].axvline(step, color="tab:red", linewidth=0.8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(printable(run.name))
    path = _save(figure, run / "curves.png")
    plt.close(figure)
    return path
