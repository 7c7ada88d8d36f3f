"""Checkpoints, plain dictionaries written whole or not at all, and run folders by name."""

from __future__ import annotations

import os
import pickle
import re
import secrets
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import torch

from mcn_ext import distributed
from mcn_ext.data import files
from mcn_ext.train.log import replace, say

LATEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DAMAGED = "checkpoint.damaged.pt"
WORDS = "words.npz"  # the word vectors that a run was trained on
FORMAT = 1
# Flags that change neither the model nor what it is shown, or are remedies: they may differ when a
# run is resumed.
FREE_FLAGS = {
    "workers",
    "device",
    "max_steps",
    "save_every",
    "log_every",
    "resume",
    "checkpoint_activations",
    "clip_grad_norm",
    "out",
    "n_ranks",
    # Compared by open_run itself:
    "init_run_id",
    "init_step",
    "data_id",
    "text_id",
    # Follow from the data:
    "text_model",
    "text_sha256",
    # Older runs do not have it, and it follows from the run to start from:
    "first_epoch",
}
# Settings of an optimiser that do not change what it computes.
IMPLEMENTATION = {"fused", "foreach", "capturable", "differentiable"}
# Flags of the first edition whose value, where it is not the one now fixed, is another run.
FIXED = {
    "joint_pairs": False,
    "clean_first": 0.0,
    "max_words": 20,
    "init_published": None,
    "warmup_steps": None,
}
# What runs did before there were these flags.
BEFORE = {"audio": "davenet", "text": "words", "loss": "softmax"}


class Damaged(SystemExit):
    """A file whose content is not what was written."""


def write(path: Path, content: dict, previous: Path | None = None) -> None:
    """A dictionary, whole or not at all: :func:`mcn_ext.train.log.replace`."""
    replace(path, lambda file: torch.save(content, file), previous)


def load(path: Path, kind: str = "mcn_checkpoint") -> dict:
    """A checkpoint on the CPU; SystemExit names a file that is missing, damaged or not ours."""
    try:
        return _read(path, kind)
    except Damaged as error:
        others = [path.with_name(PREVIOUS), *sorted(path.parent.glob("epoch-*.pt"), reverse=True)]
        others = [str(other) for other in others if other != path and other.exists()]
        if not others or kind != "mcn_checkpoint":
            raise
        raise SystemExit(
            f"{error}. There is {', '.join(others)}: evaluate.py --checkpoint takes each of them, "
            f"train_stage2.py --init one put in place of {LATEST}; the command that trained "
            f"{path.parent} puts {PREVIOUS} there by itself"
        ) from error


def _read(path: Path, kind: str = "mcn_checkpoint") -> dict:
    try:
        with zipfile.ZipFile(path) as file:  # torch.load compares no checksums
            # Checksums do not cover the directory flag, for which torch.load reads nothing.
            bad = [entry.filename for entry in file.infolist() if entry.external_attr & 0x10]
            if bad := file.testzip() or (bad and bad[0]):
                raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
        # weights_only: reading a file from elsewhere runs no code that is in it.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        runs = sorted(str(file.parent) for file in path.parent.parent.glob(f"*/{LATEST}"))
        raise SystemExit(
            f"{path}: no such checkpoint; "
            + (f"there is {', '.join(runs)}" if runs else "train a run first, or correct the path")
        ) from None
    # Not Damaged: the file may be good, and _recover must not move it away.
    except (pickle.UnpicklingError, PermissionError) as error:
        raise SystemExit(
            f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})"
        ) from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
    ) as error:
        raise Damaged(
            f"{path}: damaged, not a readable checkpoint ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(content, dict) or content.get(kind) != FORMAT:
        raise SystemExit(f"{path}: not a file of this program ({kind} {FORMAT})")
    return content


def save(
    folder: Path,
    *,
    args: dict,
    sizes: dict,
    step: int,
    epoch_done: int | None,
    complete: bool,
    run_id: str,
    model: dict,
    training: dict,
) -> None:
    """Write ``checkpoint.pt``, keep the one before as ``checkpoint.previous.pt``, and, after an
    epoch, write its weights as ``epoch-NN.pt``. All ranks call this. SystemExit on a full disk, and
    for weights that are not finite."""
    # Weights that are not finite would take the place of the last good checkpoint.
    if not all(value.isfinite().all() for value in model.values()):
        raise SystemExit(
            f"step {step}: the weights are not finite and are not saved; what is in {folder} is "
            "from before. Lower --lr, or --precision fp32"
        )
    # No rank goes on, or exits, before the files are complete.
    if distributed.rank() != 0:
        return distributed.barrier()
    # Without the optimiser, whose moments would make epoch-NN.pt up to three times as large.
    content = {
        "mcn_checkpoint": FORMAT,
        "args": args,
        "sizes": sizes,
        "step": step,
        "complete": complete,
        "run_id": run_id,
        "model": model,
    }
    if epoch_done is not None:  # first: a kill in between costs the epoch again, not its file
        write(folder / f"epoch-{epoch_done:02d}.pt", content)
    write(folder / LATEST, content | {"training": training}, previous=folder / PREVIOUS)
    distributed.barrier()


def random_states(device: torch.device) -> list[dict]:
    """The states of torch's random numbers on every rank; all ranks call this."""
    mine = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    return distributed.gather_objects(mine)


def set_random_state(states: list[dict], device: torch.device) -> None:
    """Go on with this rank's random numbers; drawn anew if the number of ranks has changed."""
    if len(states) != distributed.world():
        say(
            f"resuming on {distributed.world()} rank(s) what ran on {len(states)}: the same batches"
            " and losses, but sums round differently, and random numbers are drawn anew"
        )
        return
    mine = states[distributed.rank()]
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine and device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], device)


def lock(folder: Path) -> None:
    """Keep a run folder for this process: :func:`mcn_ext.data.files.lock`. All ranks call this."""
    why = None
    if distributed.rank() == 0:
        try:
            files.lock(folder)
        except SystemExit as error:
            why = str(error)
    if why := distributed.broadcast_object(why):
        distributed.fail(why)


def new_run_id() -> str:
    # Random, not made of the flags: stage 1 trained anew is another start for stage 2.
    return distributed.broadcast_object(secrets.token_hex(8))


def open_run(folder: Path, args: dict, resume: bool) -> dict | None:
    """The checkpoint to go on from, or None for a new run; nothing computed is lost or mixed up.

    --no-resume moves an existing folder aside, but not when torchrun or SLURM has restarted the
    command: it has made this folder. Flags unlike its run's are an error naming them. A damaged
    checkpoint is moved aside and the previous one used.
    """
    restarted = any(
        int(os.environ.get(f"{launcher}_RESTART_COUNT", 0)) > 0
        for launcher in ("TORCHELASTIC", "SLURM")
    )
    resume = resume or any(distributed.gather_objects(restarted))  # the count is each node's own
    content = why = None
    if distributed.rank() == 0:
        try:
            if not resume and folder.exists():
                number = 1
                while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                    number += 1
                shutil.move(folder, aside)
                say(f"{folder}, which was there, is {aside} now")
            content = _recover(folder)
        except SystemExit as error:
            why = str(error)
    if why := distributed.broadcast_object(why):
        distributed.fail(why)
    # Rank 0 reads first, since it may have to put the previous checkpoint in place.
    if distributed.rank() != 0 and (folder / LATEST).exists():
        try:
            content = load(folder / LATEST)  # what rank 0 has found good
        except SystemExit as error:
            say(str(error))
    seen = distributed.gather_objects(content and (content["run_id"], content["step"]))
    if any(other != seen[0] for other in seen):
        distributed.fail(
            f"ranks see different checkpoints in {folder}: put --out on a disk that all of them "
            "share, and start them in the same folder"
        )
    if content is None:
        return None
    if "training" not in content:
        distributed.fail(
            f"{folder / LATEST}: weights alone, of an epoch-*.pt, from which no run "
            "can go on; train anew with --no-resume or another --out"
        )
    old, now = BEFORE | content["args"], FIXED | args
    # A flag of the first edition; clusters are now refitted every --queue_size steps.
    now["refit_every"] = now.get("queue_size")

    def differs(name):
        if name in old:
            return old[name] != now[name]
        return bool(args.get(name))  # a flag that is newer than the run: it was off

    changed = [
        f"--{name} {old.get(name, 'not there')} (now {now[name]})"
        for name in sorted(now.keys() - FREE_FLAGS)
        if differs(name)
    ]
    if any(old.get(key, args.get(key)) != args.get(key) for key in ("init_run_id", "init_step")):
        changed.append("another start (its stage 1 has been retrained, or has gone on, since)")
    if any(old.get(key, args.get(key)) != args.get(key) for key in ("data_id", "text_id")):
        changed.append(f"other data (--data {args['data']} has been prepared anew since)")
    if changed:
        distributed.fail(
            f"{folder} holds a run with {', '.join(changed)}. To go on with it, give the same "
            "flags; to train anew, --no-resume (keeps the old folder) or another --out"
        )
    return content


def load_weights(folder: Path, model: torch.nn.Module, state: dict, strict: bool = True) -> None:
    """Load a run's weights; SystemExit if they are of another model, which code has changed."""
    try:
        model.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        found = " ".join(str(error).split())[:300]
        raise SystemExit(
            f"{folder}: its weights do not fit this model ({found}); train anew with --no-resume "
            "(keeps the old folder) or another --out"
        ) from None


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimiser's state. SystemExit if it is of another optimiser, or one of other settings
    than the learning rate, which the schedule sets: torch would go on with the old ones."""
    olds, news = state["param_groups"], optimizer.param_groups
    differences = {
        f"{key} {old[key]} (now {new.get(key, 'without it')})"
        for old, new in zip(olds, news, strict=False)
        for key in old.keys() - {"params", "lr"} - IMPLEMENTATION
        if old[key] != new.get(key)
    }
    # torch also compares these, but its error names neither the run nor what to do.
    sizes = [[len(group["params"]) for group in groups] for groups in (olds, news)]
    if sizes[0] != sizes[1]:
        differences.add(f"groups of {sizes[0]} parameters (now {sizes[1]})")
    if differences:
        distributed.fail(
            f"{folder} holds a run of another optimiser: {', '.join(sorted(differences))}. Train "
            "anew with --no-resume (keeps the old folder) or another --out"
        )
    optimizer.load_state_dict(state)


def _recover(folder: Path) -> dict | None:
    """The last good checkpoint, put in LATEST's place if it is not there; None if there is none.

    SystemExit when all there are are damaged.
    """
    latest, errors = folder / LATEST, []
    for file in (latest, folder / PREVIOUS):
        try:
            content = _read(file) if file.exists() else None
        except Damaged as error:
            errors.append(str(error))
            continue
        if content is None:
            continue
        if file != latest:
            if errors:  # out of the way of the next save, which keeps what it replaces
                os.replace(latest, folder / DAMAGED)
                say(f"{errors[0]}; it is {folder / DAMAGED} now")
            os.replace(file, latest)
            say(f"going on from {file}, the checkpoint before it: step {content['step']}")
        return content
    if errors:
        epochs = ", ".join(str(path) for path in sorted(folder.glob("epoch-*.pt")))
        raise SystemExit(
            "; ".join(errors)
            + "; no run can go on from these. "
            + (f"Weights for evaluate.py --checkpoint: {epochs}. " if epochs else "")
            + "Train anew with --no-resume (keeps the folder)"
        )
    return None


def find_run(
    runs: Path, stage: int | None = None, lacks: str = "", demo: bool = True
) -> Path | None:
    """The newest run with a checkpoint, of one stage (None: 2, then 1), that lacks a modality; one
    of the demo data only if there is no other, and not at all without ``demo``."""
    found = {}
    for file in runs.glob(f"stage*-*/{LATEST}"):
        match = re.fullmatch(r"stage(\d)-([A-Z]+)(?:_([A-Z]))?(-demo)?", file.parent.name)
        if not match:
            continue  # moved aside (.1), or named by hand
        number, letters, is_demo = int(match[1]), match[2] + (match[3] or ""), bool(match[4])
        if stage in (None, number) and (demo or not is_demo) and not (lacks and lacks in letters):
            # max() takes real data before the demo, then the later stage, then the newest file.
            found[not is_demo, number, file.stat().st_mtime] = file.parent
    return found[max(found)] if found else None
