"""Figures of a study: one colour for each order, safe for colour-blind readers.

Each function draws what there is of a :class:`mcn_ext.study.statistics.Study` and returns a
matplotlib figure, or None when there is nothing to draw.
"""

from __future__ import annotations

from itertools import chain, combinations, product
from pathlib import Path

import numpy as np

from mcn_ext.evaluation.metrics import RECALLS
from mcn_ext.modalities import MODALITIES
from mcn_ext.study import japanese
from mcn_ext.study.bootstrap import recall_interval
from mcn_ext.study.predict import predictions
from mcn_ext.study.statistics import MAIN, Study, mean
from mcn_ext.train.curves import _pyplot, _save

# Okabe & Ito (2008).
ORDERS = {"AV_T": "#0072B2", "VT_A": "#D55E00", "AT_V": "#009E73", "AVT": "#555555"}
KINDS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of stage 2
DASHES, HATCHES, MARKERS = ("-", "--", ":", "-."), ("", "////", "....", "xxxx"), "osD^"
STYLE = {
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}
PAIRS = list(combinations((row.name for row in MODALITIES.values()), 2))
BELOW = {"loc": "outside lower center", "ncols": 3}


def save(path: Path, language: str, function, *args) -> Path | None:
    """Draw ``function(pyplot, *args)`` as ``path``.png and .pdf; returns the former's path, None
    where there is nothing to draw, or no matplotlib."""
    if (plt := _pyplot()) is None:
        return None
    with plt.rc_context(STYLE | (japanese.font() if language == "ja" else {})):
        if (figure := function(plt, *args)) is None:
            return None
        if language == "ja":
            japanese.label(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_name(f"{path.name}.pdf"))
        png = _save(figure, path.with_name(f"{path.name}.png"))
        plt.close(figure)
    return png


def look(study: Study, method: str) -> dict:
    """Colour by order; dash, hatch and marker tell the methods of one order apart."""
    order = study.orders[method]
    i = [m for m in study.methods if study.orders[m] == order].index(method) % len(DASHES)
    return {
        "color": ORDERS[order],
        "linestyle": DASHES[i],
        "hatch": HATCHES[i],
        "marker": MARKERS[i],
    }


def recall(plt, study: Study):
    """R@1, R@5, R@10 of each method with 95 % intervals, and chance."""
    methods = [method for method in study.methods if study.ranks(method)]
    if not methods:
        return None
    figure, axis = plt.subplots(figsize=(7.4, 3.4))
    width = 0.84 / len(methods)
    for i, method in enumerate(methods):
        style, ranks = look(study, method), list(study.ranks(method).values())
        x = np.arange(len(RECALLS)) + (i - (len(methods) - 1) / 2) * width
        values = np.array([mean(study.values(method, f"R@{k}")) for k in RECALLS])
        bar = {"facecolor": style["color"], "hatch": style["hatch"], "edgecolor": "white"}
        axis.bar(x, values, 0.9 * width, linewidth=0, label=study.labels[method], **bar)
        if len({len(r) for r in ranks}) == 1:
            low, high = np.transpose([recall_interval(np.stack(ranks), k) for k in RECALLS])
            errors = np.maximum([values - low, high - values], 0)
            axis.errorbar(x, values, errors, fmt="none", color="black", capsize=2, linewidth=0.9)
    chance = [100 * min(k / study.n_queries[-1], 1) for k in RECALLS]
    axis.errorbar(range(3), chance, xerr=0.46, fmt="none", color="red", label="chance")
    axis.set_xticks(range(3), [f"R@{k}" for k in RECALLS])
    axis.set(ylabel=f"{MAIN}, %", ylim=(0, None))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def differences(plt, study: Study):
    """R@10 of each method minus that of the best, with the paired interval."""
    ranked = study.ranked(study.methods)
    compared = {method: study.compare(method, ranked[0]) for method in ranked[1:]}
    compared = {method: compare for method, compare in compared.items() if compare}
    if not compared:
        return None
    figure, axis = plt.subplots(figsize=(7.4, 0.9 + 0.3 * len(compared)))
    for y, (method, compare) in enumerate(compared.items()):
        style = look(study, method)
        color = style["color"]
        axis.plot(compare["ci95"], [y, y], color=color, linewidth=2)
        fill = color if compare["significant"] else "white"
        point = {"color": color, "markersize": 7, "markerfacecolor": fill}
        axis.plot(compare["difference"], y, style["marker"], **point)
    axis.axvline(0, color="black", linewidth=0.9)
    axis.set_yticks(range(len(compared)), [study.labels[method] for method in compared])
    axis.set_ylim(len(compared) - 0.4, -0.6)
    axis.set_xlabel(f"{MAIN} R@10 minus that of {study.labels[ranked[0]]}, points")
    return figure


def losses(plt, study: Study):
    """The contrastive loss of each pair in training, over both stages: a panel for each pair, the
    mean of the seeds."""
    lines = []
    for method, runs in study.trained().items():
        for k, pair in enumerate(PAIRS):
            # A line for each stage: one line would join the end of stage 1 to stage 2.
            for stage in zip(*(run.losses(pair) for run in runs), strict=True):
                points: dict[int, list[float]] = {}
                for clips, value in chain(*stage):
                    points.setdefault(clips, []).append(value)
                if points:
                    lines.append((k, method, sorted(points.items())))
    if not lines:
        return None
    figure, axes = plt.subplots(1, len(PAIRS), figsize=(8.4, 3.6), sharey=True)
    for k, method, points in lines:
        style = {key: look(study, method)[key] for key in ("color", "linestyle")}
        x, y = [clips for clips, _ in points], [mean(values) for _, values in points]
        axes[k].plot(x, y, label=study.labels[method], linewidth=1.2, **style)
    for axis, pair in zip(axes, PAIRS, strict=True):
        axis.set(title=", ".join(pair), xlabel="clips")
    axes[0].set_ylabel("contrastive loss")
    labels = {
        text: line
        for axis in axes
        for line, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), **BELOW)
    return figure


def prediction(plt, study: Study):
    """One panel for each probe, all cells. x: how much cleaner the probe finds one first pair than
    another. y: R@10 (sum) of the order with the cleaner one, minus the other's: above 0 the
    prediction holds."""
    rows = [row for row in predictions(study) if row["family"].endswith(", sum")]
    if not rows:
        return None
    probes = list(dict.fromkeys(row["probe"] for row in rows))
    kinds = list(dict.fromkeys(row["family"].removesuffix(", sum") for row in rows))
    size = (0.6 + 2.1 * len(probes), 3.0)
    figure, axes = plt.subplots(1, len(probes), figsize=size, sharey=True, squeeze=False)
    for row in rows:
        kind = kinds.index(row["family"].removesuffix(", sum"))
        x, y, ends = zip(*row["margins"], strict=True)
        errors = np.abs(np.transpose(ends) - y)
        style = {"color": KINDS[kind % len(KINDS)], "markersize": 4, "linewidth": 0.8}
        axis = axes[0, probes.index(row["probe"])]
        axis.errorbar(x, y, errors, fmt=MARKERS[kind % len(MARKERS)], label=kinds[kind], **style)
    for axis, probe in zip(axes[0], probes, strict=True):
        axis.axhline(0, color="black", linewidth=0.9)
        axis.set(title=probe, xlabel="cleaner by")
    axes[0, 0].set_ylabel("R@10 higher by, points")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), **BELOW)
    return figure


# ---------------------------------------------------------------------------- a grid of noise
def levels(study: Study, axis: str) -> list[float]:
    """The levels of "video_noise", "audio_noise" or "shift", lowest first."""
    return sorted({cell.get(axis, 0.0) for cell in study.cells})


def _misaligned(shift: float) -> str:
    return f"{shift:.0%} of clips misaligned"


def winners(plt, study: Study):
    """The best order in each cell; pale where its margin is not significant. A panel for each share
    of misaligned clips."""
    rows = [row for row in study.winners() if row["winner"]]
    if not rows:
        return None
    video, audio = levels(study, "video_noise"), levels(study, "audio_noise")
    shifts = levels(study, "shift")
    size = (1.5 * len(video) * len(shifts) + 1.3, 1.2 * len(audio) + 1.2)
    figure, axes = plt.subplots(1, len(shifts), figsize=size, squeeze=False, sharey=True)
    figure.suptitle(f"Best order by {MAIN} R@10, %")
    for axis, shift in zip(axes[0], shifts, strict=True):
        axis.set_xticks(range(len(video)), video)
        axis.set_yticks(range(len(audio)), audio)
        axis.set(xlim=(-0.5, len(video) - 0.5), ylim=(-0.5, len(audio) - 0.5))
        axis.set(xlabel="video noise", title=_misaligned(shift) if len(shifts) > 1 else "")
        axis.grid(False)
    axes[0, 0].set_ylabel("audio noise")
    for row in rows:
        axis = axes[0, shifts.index(row.get("shift", 0.0))]
        x, y = video.index(row["video_noise"]), audio.index(row["audio_noise"])
        alpha, color = (1.0, "white") if row["significant"] else (0.3, "black")
        box = {"facecolor": ORDERS[row["order"]], "alpha": alpha, "linewidth": 0}
        axis.add_patch(plt.Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, **box))
        lines = [f"{row['recalls'][row['order']]:.1f}"]
        if row["difference"]:
            margin = row["difference"]["difference"]
            lines.append(f"+{margin:.1f} over {study.orders[row['second']]}")
        if row["baseline"]:
            lines.append(f"AVT {row['recalls']['AVT']:.1f}")
        text = {"ha": "center", "va": "center", "color": color}
        axis.text(x, y + 0.22, row["order"], weight="bold", fontsize=11, **text)
        axis.text(x, y - 0.08, "\n".join(lines), fontsize=7.5, **text)
    return figure


def noise(plt, study: Study):
    """R@10 over video noise, one panel for each level of audio noise (columns) and each share of
    misaligned clips (rows)."""
    video, audio = levels(study, "video_noise"), levels(study, "audio_noise")
    shifts = levels(study, "shift")
    names = {
        (c["video_noise"], c["audio_noise"], c.get("shift", 0.0)): c["name"] for c in study.cells
    }
    methods = [m for m in study.methods if any(study.of(m, cell) for cell in names.values())]
    if not methods:
        return None
    size = (2.0 * len(audio) + 0.8, 1.0 + 2.0 * len(shifts))
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(len(shifts), len(audio), figsize=size, **shared)
    for (shift, level), axis in zip(product(shifts, audio), axes.flat, strict=True):
        for method in methods:
            style = look(study, method)
            style.pop("hatch")
            values = [study.values(method, cell=names.get((v, level, shift), "-")) for v in video]
            spread = [v.std(ddof=1) if len(v) > 1 else 0 for v in values]
            style |= {"label": study.labels[method], "markersize": 4, "capsize": 2}
            axis.errorbar(range(len(video)), [mean(v) for v in values], spread, **style)
        axis.set_xticks(range(len(video)), video)
        title = f"audio noise {level:g}"
        axis.set(title=title + (f"\n{_misaligned(shift)}" if len(shifts) > 1 else ""))
    for axis in axes[-1]:
        axis.set_xlabel("video noise")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{MAIN} R@10, %" if len(shifts) == 1 else "R@10, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **BELOW)
    return figure
