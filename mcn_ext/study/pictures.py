"""Pictures of a study, as a paper would print them: one colour an order, safe for the colour-blind.

Each function draws what there is of a :class:`mcn_ext.study.runs.Study` and returns a figure, or
None when there is nothing to draw.
"""

from __future__ import annotations

from collections import Counter
from math import ceil, isfinite, nan

import numpy as np
import torch

from mcn_ext.evaluation.metrics import RECALLS, recall_interval
from mcn_ext.study.runs import MAIN, Run, Study, paired
from mcn_ext.train.diagnostics import uniformity

# Okabe & Ito (2008): orders and modalities share no colour.
ORDERS = {"AV_T": "#0072B2", "VT_A": "#D55E00", "AT_V": "#009E73", "AVT": "#555555"}
MODALITIES = {"video": "#56B4E9", "audio": "#E69F00", "text": "#CC79A7"}
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
HATCHES, MARKERS = ("", "////", "....", "xxxx", "----"), "osD^v"
SHOWN = 400  # clips of a map
STOP_WORDS = frozenset(
    "a an and are as at be by for from have here he her his i if in into is it its just know "
    "little me my next now of off on once onto or our out over put so some take that the their "
    "them then there these they this those to up use want was we what when will with you "
    "your".split()
)


def style(plt) -> None:
    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.axisbelow": True,
            "hatch.linewidth": 0.6,
            "savefig.dpi": 200,
            "pdf.fonttype": 42,
        }
    )


def look(study: Study, method: str) -> dict:
    """Colour by order; dash, hatch and marker tell methods of one order apart."""
    order = study.orders[method]
    i = [m for m in study.methods if study.orders[m] == order].index(method)
    return {
        "color": ORDERS.get(order, "#000000"),
        "linestyle": DASHES[i % 5],
        "hatch": HATCHES[i % 5],
        "marker": MARKERS[i % 5],
    }


def _stacked(study: Study, method: str) -> np.ndarray | None:
    ranks = list(study.ranks(method).values())
    ranks = [r for r in ranks if len(r) == len(ranks[0])]
    return np.stack(ranks) if ranks else None


def recall_bars(plt, study: Study):
    """R@1, R@5, R@10 of each method with 95 % intervals, and chance."""
    methods = [m for m in study.methods if study.of(m)]
    if not methods:
        return None
    figure, axis = plt.subplots(figsize=(7.4, 3.4), layout="constrained")
    width = 0.84 / len(methods)
    for i, method in enumerate(methods):
        style, stacked = look(study, method), _stacked(study, method)
        for at, k in enumerate(RECALLS):
            x, value = at + (i - (len(methods) - 1) / 2) * width, study.mean(method, f"R@{k}")
            axis.bar(
                x,
                value,
                0.9 * width,
                facecolor=style["color"],
                edgecolor="white",
                hatch=style["hatch"],
                linewidth=0,
                label=study.labels[method] if not at else None,
            )
            if stacked is not None and isfinite(value):
                low, high = recall_interval(stacked, k)
                axis.errorbar(
                    x,
                    value,
                    [[max(value - low, 0)], [max(high - value, 0)]],
                    color="black",
                    linewidth=0.9,
                    capsize=2,
                )
    if n := study.n_queries():
        for at, k in enumerate(RECALLS):
            axis.hlines(
                100 * min(k / n[-1], 1),
                at - 0.46,
                at + 0.46,
                color="black",
                zorder=3,
                linestyle=":",
                linewidth=1,
                label="chance" if not at else None,
            )
    axis.set_xticks(range(3), [f"R@{k}" for k in RECALLS])
    axis.set(ylabel=f"{MAIN}, %", ylim=(0, None))
    axis.grid(False, axis="x")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def differences(plt, study: Study):
    """R@10 of each method less that of the best, with the interval that counts."""
    best, *others = study.ranked(study.methods) or [None]
    rows = [(m, study.compare(m, best)) for m in others]
    rows = [(m, c) for m, c in rows if c]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(7.4, 0.9 + 0.3 * len(rows)), layout="constrained")
    for y, (method, c) in enumerate(reversed(rows)):
        style, (low, high) = look(study, method), c["ci95"]
        axis.plot([low, high], [y, y], color=style["color"], linestyle="-", linewidth=2)
        axis.plot(
            c["difference"],
            y,
            style["marker"],
            color=style["color"],
            markersize=7,
            markerfacecolor=style["color"] if c["real"] else "white",
        )
    axis.axvline(0, color="black", linewidth=0.9)
    axis.set_yticks(range(len(rows)), [study.labels[m] for m, _ in reversed(rows)])
    axis.set(
        xlabel=f"{MAIN} R@10 less that of {study.labels[best]}, points",
        ylim=(-0.6, len(rows) - 0.4),
    )
    axis.grid(False, axis="y")
    return figure


def joined(run: Run, key: str) -> tuple[dict[float, float], int]:
    """({step: value} of both stages on one axis, the step at which stage 2 begins)."""
    out, start = {}, 0
    for number, stage in enumerate(run.stages):
        if number:
            start = max(out, default=0)
        rows = {start + row["step"]: float(row[key]) for row in stage.log if key in row}
        if number:
            rows[start + 0.5] = nan  # the losses differ: no line from one stage to the other
        out |= {step: value if isfinite(value) else nan for step, value in rows.items()}
    return out, start


def curves(plt, study: Study, cell: str = ""):
    """Loss over the steps of both stages, mean of the seeds with a band of one deviation."""
    trained = [r for r in study.runs if r.cell == cell and any(s.log for s in r.stages)]
    orders = [o for o in ORDERS if any(r.order == o for r in trained)]
    if not orders:
        return None
    figure, axes = plt.subplots(
        2,
        len(orders),
        figsize=(2.2 * len(orders) + 0.8, 4.2),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for (y, x), axis in np.ndenumerate(axes):
        key = ("total", "contrastive")[y]
        for method in [m for m in study.methods if study.orders[m] == orders[x]]:
            lines = [joined(r, key) for r in trained if r.method == method]
            steps = sorted(set().union(*(values for values, _ in lines)))
            if not steps:
                continue
            table = np.array([[values.get(s, nan) for s in steps] for values, _ in lines])
            known = np.isfinite(table)
            count = np.maximum(known.sum(axis=0), 1)
            mean = np.where(known, table, 0).sum(axis=0) / count
            sd = np.sqrt(
                np.square(np.where(known, table - mean, 0)).sum(axis=0) / np.maximum(count - 1, 1)
            )
            mean[~known.any(axis=0)] = nan
            style = look(study, method)
            axis.plot(
                steps,
                mean,
                color=style["color"],
                linestyle=style["linestyle"],
                label=study.labels[method],
            )
            axis.fill_between(
                steps, mean - sd, mean + sd, color=style["color"], alpha=0.2, linewidth=0
            )
            for start in {start for _, start in lines if start}:
                axis.axvline(start, color="black", linewidth=0.8, linestyle=(0, (2, 2)))
                if y == 0:
                    axis.annotate(
                        "stage 2",
                        (start, 1),
                        xycoords=("data", "axes fraction"),
                        xytext=(2, -8),
                        textcoords="offset points",
                        fontsize=7,
                    )
        axis.set_title(orders[x] if y == 0 else "")
        if y == 1:
            axis.set_xlabel("step")
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.28))
        if x == 0:
            axis.set_ylabel(f"{key} loss")
    return figure


def forgetting(study: Study) -> list[dict]:
    """R@10 of the first pair, both ways, after stage 1 and after stage 2, for each method."""
    out = []
    for method in study.methods:
        runs = [r for r in study.of(method) if r.first]
        for one, other in ((0, 1), (1, 0)) if runs else ():
            direction = f"{runs[0].pair[one]}->{runs[0].pair[other]}"
            pairs = [
                (
                    r.first.metrics.get(direction, {}).get("R@10", nan),
                    r.final.metrics.get(direction, {}).get("R@10", nan),
                )
                for r in runs
            ]
            pairs = [p for p in pairs if np.isfinite(p).all()]
            if pairs:
                before, after = np.mean(pairs, axis=0)
                change = paired(
                    *(
                        {
                            r.seed: stage.ranks[direction]
                            for r in runs
                            if direction in (stage := (r.first, r.final)[i]).ranks
                        }
                        for i in (1, 0)
                    )
                )
                out.append(
                    {
                        "method": method,
                        "direction": direction,
                        "before": before,
                        "after": after,
                        "change": change,
                    }
                )
    return out


def forgetting_lines(plt, study: Study):
    rows = forgetting(study)
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(7.4, 0.9 + 0.28 * len(rows)), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        style = look(study, row["method"])
        axis.plot([row["before"], row["after"]], [y, y], color=style["color"], linewidth=2)
        axis.plot(row["before"], y, "o", color="white", markeredgecolor=style["color"])
        axis.plot(row["after"], y, "o", color=style["color"])
    axis.plot([], [], "o", color="white", markeredgecolor="black", label="after stage 1")
    axis.plot([], [], "o", color="black", label="after stage 2")
    axis.set_yticks(
        range(len(rows)), [f"{study.labels[r['method']]}: {r['direction']}" for r in reversed(rows)]
    )
    axis.set(xlabel="R@10 of the first pair, %", ylim=(-0.6, len(rows) - 0.4))
    axis.set_xlim(left=0)  # the right keeps its margin: the last dot is drawn whole
    axis.grid(False, axis="y")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def geometry(study: Study, sample: int = 1024) -> list[dict]:
    """Alignment and uniformity (Wang & Isola 2020) of each method's pairs on the evaluation clips::

        alignment = mean |x - y|^2 over clips;  uniformity = log mean exp(-2 |x - x'|^2),

    of unit rows; the uniformity of a pair is the mean of its two modalities'. Lower is better.
    Means over seeds; uniformity on at most ``sample`` clips, evenly spread over the store."""
    found: dict[tuple, list] = {}
    for method in study.methods:
        for run in study.of(method):
            unit = {
                m: torch.nn.functional.normalize(x, dim=1)
                for m, x in run.final.embeddings().items()
            }
            here = {m: x[torch.isfinite(x).all(dim=1)] for m, x in unit.items()}
            spread = {
                m: float(uniformity(x[:: max(1, len(x) // sample)]))
                for m, x in here.items()
                if len(x) > 1
            }
            names = [m for m in MODALITIES if m in spread]
            for i, a in enumerate(names):
                for b in names[i + 1 :]:
                    distance = (unit[a] - unit[b]).square().sum(dim=1)
                    distance = distance[torch.isfinite(distance)]
                    if len(distance):
                        found.setdefault((method, f"{a}-{b}"), []).append(
                            (float(distance.mean()), (spread[a] + spread[b]) / 2)
                        )
    return [
        {
            "method": m,
            "pair": pair,
            "alignment": np.mean([v[0] for v in values]),
            "uniformity": np.mean([v[1] for v in values]),
        }
        for (m, pair), values in found.items()
    ]


def geometry_scatter(plt, study: Study, rows: list[dict]):
    if not rows:
        return None
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    figure, axes = plt.subplots(
        1,
        len(pairs),
        figsize=(2.5 * len(pairs) + 0.4, 3.1),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, pair in zip(axes[0], pairs, strict=True):
        for row in rows:
            if row["pair"] == pair:
                style = look(study, row["method"])
                axis.plot(
                    row["uniformity"],
                    row["alignment"],
                    style["marker"],
                    markersize=7,
                    color=style["color"],
                    markerfacecolor=style["color"] if style["linestyle"] == "-" else "white",
                    label=study.labels[row["method"]],
                )
        axis.set(title=pair, xlabel="uniformity")
        axis.locator_params(axis="x", nbins=4)
        axis.margins(0.15)
    axes[0, 0].set_ylabel("alignment")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3
    )
    return figure


def principal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """((n, 2) coordinates on the first two principal axes, their shares of the variance), by the
    smaller of the two Gram matrices; the sign is such that the largest coordinate is positive."""
    x = rows.double() - rows.double().mean(dim=0)
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)[:, :2]
    points = vectors * values[:2].sqrt() if wide else x @ vectors
    largest = points.gather(0, points.abs().argmax(dim=0, keepdim=True))
    return points * largest.sign(), values[:2] / values.sum().clamp_min(1e-30)


def _map(run: Run, centred: bool) -> tuple[dict[str, tuple], torch.Tensor, int] | None:
    """({modality: (points (k, 2), clips (k,))}, shares, clips in all); at most SHOWN are in it."""
    parts, n = {}, 0
    for name, x in run.final.embeddings().items():
        n = len(x)
        stride = max(1, ceil(len(x) / SHOWN))
        x = torch.nn.functional.normalize(x[::stride], dim=1)
        index = torch.isfinite(x).all(dim=1).nonzero().flatten()
        if len(index) > 1:
            x = x[index] - (x[index].mean(dim=0) if centred else 0)
            parts[name] = (x, index * stride)
    if not parts:
        return None
    points, share = principal(torch.cat([x for x, _ in parts.values()]))
    cut = points.split([len(x) for x, _ in parts.values()])
    return (
        {
            name: (cut[i].numpy(), index.numpy())
            for i, (name, (_, index)) in enumerate(parts.items())
        },
        share,
        n,
    )


def _bare(axis) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set(visible=True, color="#bbbbbb")


def _panels(plt, n: int, columns: int = 4, size: float = 2.1):
    rows = ceil(n / columns)
    figure, axes = plt.subplots(
        rows,
        min(n, columns),
        squeeze=False,
        layout="constrained",
        figsize=(size * min(n, columns), (size + 0.15) * rows + 0.3),
    )
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    return figure, axes.flat


def joint_space(plt, study: Study):
    """Each method's evaluation clips on its first two principal axes, coloured by modality."""
    maps = [(m, _map(study.of(m)[0], centred=False)) for m in study.methods if study.of(m)]
    maps = [(m, found) for m, found in maps if found]
    if not maps:
        return None
    figure, axes = _panels(plt, len(maps))
    for axis, (method, (parts, share, _)) in zip(axes, maps, strict=False):
        for name, (points, _) in parts.items():
            axis.scatter(*points.T, s=5, color=MODALITIES.get(name), alpha=0.6, linewidths=0)
        axis.set_title(study.labels[method], fontsize=8)
        axis.set_xlabel(f"{100 * share[0]:.0f} % of variance", fontsize=7)
        axis.set_ylabel(f"{100 * share[1]:.0f} %", fontsize=7)
        _bare(axis)
    _modality_legend(plt, figure, MODALITIES)
    return figure


def _modality_legend(plt, figure, names) -> None:
    figure.legend(
        [plt.Line2D([], [], marker="o", linestyle="", color=MODALITIES[n]) for n in names],
        list(names),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
    )


def frequent_words(captions: list[str], most: int = 8) -> list[str]:
    """The words most captions have, without those that say nothing of what is seen."""
    count = Counter(
        w
        for c in captions
        for w in set(c.lower().split())
        if w.isalpha() and len(w) > 2 and w not in STOP_WORDS
    )
    return [
        word
        for word, n in sorted(count.items(), key=lambda item: (-item[1], item[0]))
        if 3 <= n <= len(captions) / 2
    ][:most]


def word_map(plt, study: Study, method: str, captions: list[str]):
    """Where the clips of a word lie: one panel a word, other clips grey."""
    words, runs = frequent_words(captions), study.of(method)
    found = _map(runs[0], centred=True) if runs and words else None
    if not found or found[2] != len(captions):  # another store than the run was evaluated on
        return None
    figure, axes = _panels(plt, len(words))
    for axis, word in zip(axes, words, strict=False):
        n = 0
        for name, (points, index) in found[0].items():
            has = np.array([word in captions[i].lower().split() for i in index])
            n = max(n, int(has.sum()))
            axis.scatter(*points[~has].T, s=3, color="#dddddd", linewidths=0, zorder=1)
            axis.scatter(*points[has].T, s=9, color=MODALITIES[name], linewidths=0, zorder=2)
        axis.set_title(f"{word} ({n})", fontsize=8.5)
        _bare(axis)
    _modality_legend(plt, figure, found[0])
    return figure
