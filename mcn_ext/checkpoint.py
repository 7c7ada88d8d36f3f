"""Checkpoints, plain dictionaries written whole or not at all, and run folders by name."""

from __future__ import annotations

import os
import pickle
import re
import secrets
import shutil
from pathlib import Path

import torch

from mcn_ext import distributed

LATEST = "checkpoint.pt"
FORMAT = 1
# Flags that change neither the model nor what it is shown, or are remedies: they may differ when a
# run is resumed.
FREE_FLAGS = {"workers", "device", "max_steps", "save_every", "log_every", "tensorboard", "resume",
              "out", "n_ranks", "init_run_id", "max_bad_steps", "grad_outliers", "grad_factor",
              "detect"}


def write(path: Path, content: dict) -> None:
    """Write, fsync, rename: at every moment ``path`` is the old file or the new one, complete."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise SystemExit(
            f"{path}: could not be written ({error}); the previous checkpoint is untouched. "
            "Make room and run the same command again") from error
    os.replace(tmp, path)


def load(path: Path, kind: str = "mcn_checkpoint") -> dict:
    """A checkpoint on the CPU; SystemExit names a file that is missing, damaged or not ours."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such checkpoint") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise SystemExit(
            f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})"
            + (f"; the epochs before it are in {path.parent}/epoch-*.pt"
               if kind == "mcn_checkpoint" else "")) from error
    if not isinstance(content, dict) or content.get(kind) != FORMAT:
        raise SystemExit(f"{path}: not a file of this program ({kind} {FORMAT})")
    return content


def save(folder: Path, *, args: dict, sizes: dict, step: int, epoch_done: int | None,
         complete: bool, run_id: str, model: dict, training: dict) -> None:
    """Write ``checkpoint.pt`` and, after an epoch, its weights as ``epoch-NN.pt``."""
    content = {"mcn_checkpoint": FORMAT, "args": args, "sizes": sizes, "step": step,
               "complete": complete, "run_id": run_id, "model": model}
    if epoch_done is not None:  # first: a kill in between costs the epoch again, not its file
        write(folder / f"epoch-{epoch_done:02d}.pt", content)
    write(folder / LATEST, content | {"training": training})


def new_run_id() -> str:
    return distributed.broadcast_object(secrets.token_hex(8))


def open_run(folder: Path, args: dict, resume: bool) -> dict | None:
    """The checkpoint to go on from, or None for a new run; nothing computed is lost or mixed up.

    --no-resume moves an existing folder aside; flags unlike its run's are an error naming them.
    """
    if not resume and folder.exists() and distributed.rank() == 0:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        shutil.move(folder, aside)
    distributed.barrier()
    if not resume or not (folder / LATEST).exists():
        return None
    content = load(folder / LATEST)
    old = content["args"]
    compared = sorted(args.keys() & old.keys() - FREE_FLAGS)
    changed = [f"--{name} {old[name]} (now {args[name]})" for name in compared
               if old[name] != args[name]]
    if old.get("init_run_id") != args.get("init_run_id"):
        changed.append("another stage-1 run as its start (retrained since)")
    if changed:
        raise SystemExit(
            f"{folder} holds a run with {', '.join(changed)}. To go on with it, give the same "
            "flags; to train anew, --no-resume (keeps the old folder) or another --out")
    return content


def find_run(runs: Path, stage: int | None = None, lacks: str = "") -> Path | None:
    """The newest run with a checkpoint, of one stage (None: 2, then 1), that lacks a modality."""
    for wanted in (2, 1) if stage is None else (stage,):
        found = []
        for file in runs.glob(f"stage{wanted}-*/{LATEST}"):
            match = re.fullmatch(r"stage\d-([AVT]+)(?:_([AVT]))?(?:-demo)?", file.parent.name)
            if not match:
                continue  # moved aside (.1), or named by hand
            letters = match[1] + (match[2] or "")
            if not (lacks and lacks in letters):
                found.append(file)
        if found:
            return max(found, key=lambda file: file.stat().st_mtime).parent
    return None
