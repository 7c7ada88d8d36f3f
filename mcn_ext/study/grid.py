"""Pictures and rows of a study over grades of noise: which order wins where."""

from __future__ import annotations

from math import isfinite, nan

import numpy as np

from mcn_ext.study.pictures import ORDERS, look
from mcn_ext.study.runs import MAIN, Study


def level_name(value) -> str:
    return "none" if value is None else f"{value:g}"


def levels(study: Study, axis: str) -> list:
    """The grades of "video_noise" or "audio_noise", lowest first; None stands for the data's own"""
    found = {cell.get(axis) for cell in study.cells}
    return sorted(found, key=lambda v: (v is not None, v or 0.0))


def winners(study: Study) -> list[dict]:
    """Of each cell: "winner" and "second" (the best methods of the two best orders), R@10 of each
    order, the paired difference "compare", and the best one-stage "baseline". None: not there."""
    out = []
    for cell in study.cells:
        name, order = cell.get("name", ""), study.by_order(cell.get("name", ""))
        best, second = [*order, None, None][:2]
        out.append(
            {
                "cell": cell,
                "winner": best,
                "second": second,
                "recall": {study.orders[m]: study.mean(m, cell=name) for m in order},
                "compare": study.compare(best, second, name) if second else None,
                "baseline": next(iter(study.baselines(name)), None),
            }
        )
    return out


def _place(plt, study: Study, n: int = 1, size: float = 1.15):
    video, audio = levels(study, "video_noise"), levels(study, "audio_noise")
    figure, axes = plt.subplots(
        1,
        n,
        squeeze=False,
        layout="constrained",
        sharey=True,
        figsize=(n * (size * len(video) + 0.4) + 0.9, 0.8 * size * len(audio) + 1.2),
    )
    for axis in axes[0]:
        axis.set_xticks(range(len(video)), [level_name(v) for v in video])
        axis.set_yticks(range(len(audio)), [level_name(a) for a in audio])
        axis.set(
            xlim=(-0.5, len(video) - 0.5),
            ylim=(-0.5, len(audio) - 0.5),
            xlabel="video noise",
            aspect=0.8,
        )
        axis.grid(False)
        axis.tick_params(length=0)
    axes[0, 0].set_ylabel("audio noise")
    at = {
        cell.get("name", ""): (
            video.index(cell.get("video_noise")),
            audio.index(cell.get("audio_noise")),
        )
        for cell in study.cells
    }
    return figure, axes[0], at


def who_wins(plt, study: Study):
    """The winner's colour, R@10 and margin; pale and hatched where the interval has 0 in it."""
    rows = winners(study)
    if not any(row["winner"] for row in rows):
        return None
    figure, (axis,), at = _place(plt, study, size=1.5)
    for row in rows:
        (x, y), winner = at[row["cell"].get("name", "")], row["winner"]
        corner = (x - 0.48, y - 0.48)
        if winner is None:
            axis.text(x, y, "missing", ha="center", va="center", color="#777777", fontsize=8)
            continue
        order, compare = study.orders[winner], row["compare"]
        real = bool(compare and compare["real"])
        axis.add_patch(
            plt.Rectangle(
                corner, 0.96, 0.96, facecolor=ORDERS[order], alpha=1.0 if real else 0.3, linewidth=0
            )
        )
        if not real:
            axis.add_patch(
                plt.Rectangle(
                    corner,
                    0.96,
                    0.96,
                    facecolor="none",
                    hatch="///",
                    edgecolor=ORDERS[order],
                    alpha=0.35,
                    linewidth=0,
                )
            )
        margin = (
            f"+{compare['difference']:.1f} over {study.orders[row['second']]}"
            if compare
            else "no other order"
        )
        baseline = row["baseline"]
        name = row["cell"].get("name", "")
        text = f"{study.mean(winner, cell=name):.1f}\n{margin}" + (
            f"\nAVT {study.mean(baseline, cell=name):.1f}" if baseline else ""
        )
        colour = "white" if real else "black"
        axis.text(
            x, y + 0.22, order, ha="center", va="center", color=colour, weight="bold", fontsize=11
        )
        axis.text(x, y - 0.08, text, ha="center", va="center", color=colour, fontsize=7.5)
    axis.set_title(f"Best order by {MAIN} R@10, %")
    orders = [o for o in ORDERS if o != "AVT" and o in study.orders.values()]
    figure.legend(
        [
            *(plt.Rectangle((0, 0), 1, 1, facecolor=ORDERS[o]) for o in orders),
            plt.Rectangle(
                (0, 0), 1, 1, facecolor="#dddddd", hatch="///", edgecolor="#888888", linewidth=0
            ),
        ],
        [*orders, "undecided"],
        loc="outside lower center",
        ncols=4,
        fontsize=8,
    )
    return figure


def best_of(study: Study, order: str, cell: str) -> float:
    """R@10 of the order's best method in a cell."""
    values = [study.mean(m, cell=cell) for m in study.methods if study.orders[m] == order]
    return max((v for v in values if isfinite(v)), default=nan)


def each_order(plt, study: Study):
    """R@10 of each order over the grid, on one scale."""
    orders = [o for o in ORDERS if o in study.orders.values()]
    values = {
        (o, c.get("name", "")): best_of(study, o, c.get("name", ""))
        for o in orders
        for c in study.cells
    }
    known = [v for v in values.values() if isfinite(v)]
    if not known:
        return None
    figure, axes, at = _place(plt, study, len(orders), size=0.52)
    low, high = min(known), max(known) + 1e-9
    for axis, order in zip(axes, orders, strict=True):
        picture = np.full(
            (len(levels(study, "audio_noise")), len(levels(study, "video_noise"))), nan
        )
        for cell, (x, y) in at.items():
            value = picture[y, x] = values[order, cell]
            if isfinite(value):
                axis.text(
                    x,
                    y,
                    f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if (value - low) / (high - low) > 0.6 else "white",
                )
        image = axis.imshow(
            picture, cmap="cividis", vmin=low, vmax=high, origin="lower", aspect=0.8
        )
        axis.set_title(order, color=ORDERS[order])
    figure.colorbar(image, ax=axes, label="R@10, %", shrink=0.8)
    return figure


def over_noise(plt, study: Study):
    """R@10 over video noise, one panel a grade of audio noise, mean and deviation of the seeds."""
    video, audio = levels(study, "video_noise"), levels(study, "audio_noise")
    names = {(c.get("video_noise"), c.get("audio_noise")): c.get("name", "") for c in study.cells}
    if not any(study.of(m, cell) for m in study.methods for cell in names.values()):
        return None
    figure, axes = plt.subplots(
        1,
        len(audio),
        figsize=(2.0 * len(audio) + 0.8, 3.0),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, noise in zip(axes[0], audio, strict=True):
        for method in study.methods:
            values = [
                study.values(method, cell=names[v, noise]) if (v, noise) in names else np.zeros(0)
                for v in video
            ]
            style = look(study, method)
            axis.errorbar(
                range(len(video)),
                [v.mean() if len(v) else nan for v in values],
                [v.std(ddof=1) if len(v) > 1 else 0 for v in values],
                capsize=2,
                color=style["color"],
                linestyle=style["linestyle"],
                marker=style["marker"],
                markersize=4,
                label=study.labels[method],
            )
        axis.set_xticks(range(len(video)), [level_name(v) for v in video])
        axis.set(title=f"audio noise {level_name(noise)}", xlabel="video noise")
    axes[0, 0].set_ylabel(f"{MAIN} R@10, %")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return figure
