"""Skips steps whose loss or gradient is not finite, reports the cause, and keeps the batch.

A skipped step changes nothing: weights, optimiser, schedule, clustering queue and BatchNorm
statistics stay as they were. ``python -m mcn_ext.train.replay FILE`` replays a kept batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mcn_ext import distributed
from mcn_ext.objective import Objective, Terms
from mcn_ext.train import checkpoint
from mcn_ext.train.log import say

MAX_BAD_STEPS = 10  # in a row: then the run stops
MAX_DUMPS = 3  # batches kept in a run folder, the newest: each has the weights beside it
OVERFLOWS = 24  # in a row are a search for the loss scale, from 65,536 down to 0.004
SHOWN, LISTED = 5, 50  # clips or tensors that a report names, clips that log.jsonl lists
MANY = 8  # overflows in a row are said
COUNTS = ("skipped", "in_a_row", "overflows")
GRADIENT = "the gradient is not finite"


def bad_rows(x: Tensor) -> Tensor:
    """(B,) bool: rows of x (B, ...) with an entry that is not finite."""
    return ~torch.isfinite(x.flatten(1)).all(dim=1) if x.dim() > 1 else ~torch.isfinite(x)


def _inputs(batch: Mapping, modality: str) -> list[Tensor]:
    """A modality's input tensors, padding words as zeros."""
    x = batch[modality]
    if isinstance(x, Mapping):
        return list(x.values())
    # Padding words hold row 0 of the table, see to_device: that is no input of the clip.
    mask = batch.get(f"{modality}_mask")
    return [x if mask is None else x.masked_fill(~mask[..., None], 0)]


def find_clips(modalities: list[str], terms: Terms) -> list[dict]:
    """Where a batch first goes wrong on this rank: per modality, the first of its inputs,
    embeddings and reconstruction errors that is not finite, with the clips it is so for."""
    batch, found = terms.batch, []
    for name in modalities:
        stages = [("input", x) for x in _inputs(batch, name)]
        stages.append(("embedding", terms.embeddings[name]))
        if name in terms.errors:
            stages.append(("reconstruction", terms.errors[name]))
        for stage, x in stages:
            # The first stage in order: what follows from it would hide the cause.
            bad = bad_rows(x)  # of clips that are not valid too: 0 * NaN reaches gradients
            if bad.any():
                found.append(
                    {
                        "modality": name,
                        "stage": stage,
                        "n_bad": int(bad.sum()),
                        "n_clips": len(bad) * distributed.world(),  # ranks hold equal parts
                        "clips": batch["clip_id"][bad][:LISTED].tolist(),
                    }
                )
                break
    return found


def merge(ranks: list[list[dict]]) -> list[dict]:
    """What the ranks found, one entry for each modality and stage."""
    merged: dict[tuple, dict] = {}
    for found in (entry for rank in ranks for entry in rank):
        into = merged.setdefault(
            (found["modality"], found["stage"]), found | {"n_bad": 0, "clips": []}
        )
        into["n_bad"] += found["n_bad"]
        into["clips"] = (into["clips"] + found["clips"])[:LISTED]
    inputs = [entry for entry in merged.values() if entry["stage"] == "input"]
    # One clip's bad input spoils all the batch in BatchNorm: what follows from it is left out.
    return inputs or list(merged.values())


def not_finite(tensors) -> list[str]:
    """Names of those (name, tensor or None) that are not finite everywhere."""
    return [name for name, x in tensors if x is not None and not torch.isfinite(x).all()]


def some(names: list[str], n: int | None = None) -> str:
    """The first names, and how many of n (default: of all) there are more."""
    more = (len(names) if n is None else n) - len(names[:SHOWN])
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def found_lines(clips: list[dict], terms: dict, describe) -> list[str]:
    """What went wrong first, and which terms it reached, for people."""
    lines = []
    for found in clips:
        n_bad, n_clips = found["n_bad"], found["n_clips"]
        where = (
            f"all {n_clips} clips"
            if n_bad == n_clips
            else (f"{n_bad} of {n_clips} clips: {some(describe(found['clips'][:SHOWN]), n_bad)}")
        )
        lines.append(f"  {found['modality']}: {found['stage']} not finite in {where}")
    bad = [name for name, value in terms.items() if not math.isfinite(float(value))]
    good = [f"{name} {float(value):.4g}" for name, value in terms.items() if name not in bad]
    return [
        *lines,
        f"  terms: not finite: {', '.join(bad) or 'none'}; finite: {', '.join(good) or 'none'}",
    ]


class Guard:
    """Decides whether a step counts.

    Args:
        scaler: steps whose gradients overflow while it looks for its scale are skipped, but are not
            bad, up to OVERFLOWS in a row.
        describe: clip ids -> texts that a person understands.

    Attributes: ``skipped`` steps in all, ``in_a_row`` bad ones until now, ``norm`` of the last
    gradient.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: Objective,
        scaler: torch.amp.GradScaler,
        folder: Path,
        describe: Callable[[list[int]], list[str]] = lambda ids: list(map(str, ids)),
    ):
        self.model, self.objective, self.scaler = model, objective, scaler
        self.folder, self.describe = folder, describe
        self.buffers = list(model.buffers())  # BatchNorm statistics
        # Memory that remember() copies into, so that no step allocates.
        self.remembered = [buffer.clone() for buffer in self.buffers]
        self.skipped = self.in_a_row = self.overflows = 0
        self.norm = math.nan

    def remember(self) -> None:
        """Note what a forward pass changes by itself."""
        if self.buffers:
            torch._foreach_copy_(self.remembered, self.buffers)

    def check(self, total: Tensor, norm: Tensor, stop: bool = False) -> tuple[str, bool]:
        """(why the optimiser must not step, or ""; whether to stop), the same on every rank.

        total: the loss. norm: of the unscaled gradient. stop: this rank is asked to end; all ranks
        then stop after the same step. This waits for the device, once.
        """
        # Ranks hold their shares of the loss, and one decision must serve them all.
        # A flag beside the numbers: one message and one wait for the device, not three.
        stop = total.new_full((), float(stop), dtype=torch.float32)
        mine = torch.stack([total.detach().float(), norm.float().to(total.device), stop])
        mean = distributed.total(mine) / distributed.world()
        loss, self.norm, stops = mean.tolist()
        why = "" if math.isfinite(self.norm) else GRADIENT
        # Where both are not finite, the loss is named: it comes before its gradient.
        if not math.isfinite(loss):
            why = "the loss is not finite"
        if not why:
            self.in_a_row = self.overflows = 0
        return why, stops > 0

    def skip(self, step: int, why: str, terms: Terms, args: dict) -> dict:
        """Undo a bad step and explain it, on the console too; returns what log.jsonl is to hold of
        it. All ranks call this."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.remembered)
        self.skipped += 1
        named = [*self.model.named_parameters(), *self.objective.named_parameters()]
        gradients = some(not_finite((name, p.grad) for name, p in named))
        # Before update(), which lowers it where unscale_() has found an overflow.
        scale = self.scaler.get_scale()
        if why == GRADIENT and self.scaler.is_enabled():
            self.scaler.update()
            self.overflows += 1
            # A scale that stays has seen finite gradients: only their norm is not.
            if self.scaler.get_scale() < scale and self.overflows <= OVERFLOWS:
                why = f"fp16 overflow: loss scale {scale:g} to {self.scaler.get_scale():g}"
                if self.overflows == MANY:
                    say(
                        f"step {step}: {why}, the {MANY}th in a row; gradients not finite: "
                        f"{gradients}"
                    )
                return {"skipped": why, "gradients": gradients}
        elif self.scaler.is_enabled():
            self.scaler.update(scale)  # a bad batch says nothing of the scale: it stays
        # An overflow returned above: it is part of the search for a scale, and not a bad step.
        self.in_a_row += 1
        clips = find_clips(self.objective.modalities, terms)
        row = {
            "skipped": why,
            "in_a_row": self.in_a_row,
            "gradient_norm": str(self.norm),
            "terms": {name: str(value) for name, value in self._terms(terms).items()},
            "weights": some(not_finite(named)),
            "gradients": gradients,
            "clips": merge(distributed.gather_objects(clips)),
            "file": self._dump(step, why, terms, args, scale),
        }
        if distributed.rank() == 0:
            say(self.report(step, row))
        return row

    def _terms(self, terms: Terms) -> dict[str, float]:
        """All terms of a step and their sum, in which a term may be that only the script has."""
        total = float(distributed.total(terms.total.detach())) / distributed.world()
        return self.objective.parts(terms) | {"total": total}

    def give_up(self, step: int) -> None:
        """SystemExit after MAX_BAD_STEPS bad steps in a row."""
        if self.in_a_row >= MAX_BAD_STEPS:
            raise SystemExit(
                f"step {step}: {self.in_a_row} bad steps in a row; the run stops. They changed "
                f"nothing: what is saved in {self.folder} is of before. The reports above are in "
                "log.jsonl, too. If they name single clips, look at their features; if weights, or "
                "all clips, go back to an earlier epoch or train anew (--no-resume) with a lower "
                "--lr, --precision fp32 or --similarity cosine"
            )

    def report(self, step: int, row: dict) -> str:
        """What :meth:`skip` found, for people."""
        lines = [
            f"step {step} skipped: {row['skipped']} ({row['in_a_row']} in a row, the run "
            f"stops at {MAX_BAD_STEPS})"
        ]
        lines += found_lines(row["clips"], row["terms"], self.describe)
        for kind in ("weights", "gradients"):
            if row[kind]:
                lines.append(f"  {kind} not finite: {row[kind]}")
        if row["file"]:
            lines.append(f"  to replay it: python -m mcn_ext.train.replay {row['file']}")
        return "\n".join(lines)

    def _dump(self, step: int, why: str, terms: Terms, args: dict, scale: float) -> str | None:
        """Keep the batch, each rank its own, and rank 0 the model, in place of the oldest kept.
        None for later ones in a row, which have the same cause, and without room on the disk."""
        if self.in_a_row > MAX_DUMPS:
            return None
        rank, clusters = distributed.rank(), self.objective.clusters
        path = self.folder / f"bad-step-{step:06d}{f'.rank{rank}' if rank else ''}.pt"
        content = {
            "mcn_bad_step": 1,
            "step": step,
            "why": why,
            "n_ranks": distributed.world(),
            "loss_scale": scale,
            "batch": terms.batch,
        }
        if rank == 0:
            # The same on every rank: one copy is enough.
            content |= {
                "args": args,
                "sizes": self.model.sizes,
                "model": self.model.state_dict(),
                "centroids": clusters.centroids if clusters is not None else None,
                "objective": self.objective.state_dict(),
            }
        if rank == 0:
            # All but the newest MAX_DUMPS - 1: this one makes MAX_DUMPS.
            for old in find_dumps(self.folder)[: 1 - MAX_DUMPS]:
                for file in self.folder.glob(f"{old.stem}.*"):
                    file.unlink(missing_ok=True)
        try:
            checkpoint.write(path, content)
        except SystemExit as error:  # a full disk: training goes on
            say(f"the bad batch is not kept: {error}")
            return None
        return str(path)

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in COUNTS}

    def load_state_dict(self, state: dict) -> None:
        for name in COUNTS:
            setattr(self, name, state.get(name, 0))


def find_dumps(folder: Path) -> list[Path]:
    """Bad steps kept in a run folder, oldest first: rank 0's files."""
    return sorted(p for p in folder.glob("bad-step-*.pt") if ".rank" not in p.name)
