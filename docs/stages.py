"""Draws docs/stages.png, the two stages: ``python docs/stages.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

COLOURS = {"audio": "C1", "video": "C0", "text": "C2"}  # as in mcn_ext/modalities.py
ENCODERS = {
    "audio": "DAVEnet,\ngated unit",
    "video": "gated unit",
    "text": "word max pool,\ngated unit",
}
INPUTS = {"audio": "log-mel spectrogram", "video": "2D + 3D features", "text": "word vectors"}


def box(ax, x, y, width, height, text, colour, filled=True, **style):
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0.05",
            edgecolor=colour,
            facecolor=matplotlib.colors.to_rgba(colour, 0.22 if filled else 0.0),
            **style,
        )
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(ax, start, end, **style):
    style = {"color": "0.35", "arrowstyle": "-|>", "mutation_scale": 11} | style
    ax.add_patch(FancyArrowPatch(start, end, **style))


def draw_stage(ax, title, states, pairs):
    """One stage; ``states``: modality -> what its encoder does, "" for one that is not used."""
    ax.set_title(title, fontsize=11, weight="bold")
    for row, (name, state) in enumerate(states.items()):
        y, colour = 2.6 - 1.3 * row, COLOURS[name]
        if not state:
            box(ax, 0, y, 1.7, 0.9, f"{name}\n(not used)", "0.75", False, linestyle=":")
            continue
        style = {"linestyle": "--"} if state != "trained" else {"linewidth": 1.8}
        box(ax, 0, y, 1.7, 0.9, f"{name}\n{INPUTS[name]}", colour, False)
        box(ax, 2.2, y, 1.5, 0.9, ENCODERS[name], colour, state == "trained", **style)
        ax.text(2.95, y + 1.01, state, ha="center", fontsize=8, color=colour, style="italic")
        arrow(ax, (1.78, y + 0.45), (2.12, y + 0.45))
        arrow(ax, (3.78, y + 0.45), (4.32, 1.2 + y * 0.28), color=colour)
    box(ax, 4.4, 0.85, 1.3, 1.8, "joint\nspace", "0.3", False)
    loss = f"contrastive\n({pairs})\n+ clustering\n+ reconstruction"
    box(ax, 6.2, 0.85, 1.75, 1.8, loss, "C3", linewidth=1.2)
    arrow(ax, (5.78, 1.75), (6.12, 1.75))
    ax.set(xlim=(-0.15, 8.1), ylim=(-0.2, 3.9), aspect="equal")
    ax.axis("off")


def main():
    figure, axes = plt.subplots(1, 2, figsize=(14, 3.9), layout="constrained")
    draw_stage(
        axes[0],
        "Stage 1: train_stage1.py --pair AV",
        {"audio": "trained", "video": "trained", "text": ""},
        "A-V",
    )
    draw_stage(
        axes[1],
        "Stage 2: train_stage2.py --add T",
        {"audio": "frozen or finetuned", "video": "frozen or finetuned", "text": "trained"},
        "A-T, V-T",
    )
    figure.savefig(Path(__file__).with_name("stages.png"), dpi=100)


if __name__ == "__main__":
    main()
