"""Replays a batch that a run skipped, and says where it first goes wrong.

    python -m mcn_ext.train.replay runs/stage1-AV/bad-step-000123.pt

One process, fp32 unless --precision; the batches of all ranks are joined. Forward hooks tell the
first module whose output is not finite, tensor hooks the first gradient.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mcn_ext.data.clips import ClipReader
from mcn_ext.data.store import Store, StoreError
from mcn_ext.modalities import MODALITIES
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from mcn_ext.train import checkpoint, flags
from mcn_ext.train.guard import SHOWN, bad_rows, find_clips, found_lines, merge, not_finite, some

OBJECTIVE = (
    "loss temperature margin similarity cluster_weight recon_weight cluster_size queue_size seed"
).split()


def load(file: Path) -> tuple[dict, dict]:
    """(what rank 0 kept of the step, the batch of all ranks)."""
    dump = checkpoint.load(file, kind="mcn_bad_step")
    if "model" not in dump:
        raise SystemExit(f"{file}: another rank's part; give the file without .rankN")
    others = [file.with_name(f"{file.stem}.rank{rank}.pt") for rank in range(1, dump["n_ranks"])]
    parts = [dump, *(checkpoint.load(other, kind="mcn_bad_step") for other in others)]
    return dump, join([part["batch"] for part in parts])


def join(batches: list[Mapping]) -> dict:
    """Ranks' batches as one, audio and captions' features padded to the longest."""
    out = {}
    for key, value in batches[0].items():
        values = [batch[key] for batch in batches]
        if isinstance(value, Mapping):
            out[key] = join(values)
            continue
        axis = {"audio": 2, "text": 1, "text_mask": 1}.get(key, value.ndim)
        if axis < value.ndim:  # else it is one of "valid"
            # Each rank has padded its clips to its own longest.
            longest = max(v.shape[axis] for v in values)
            after = [0, 0] * (value.ndim - 1 - axis)
            values = [nn.functional.pad(v, (*after, 0, longest - v.shape[axis])) for v in values]
        out[key] = torch.cat(values)
    return out


def build(dump: dict) -> tuple[MCN, Objective]:
    """The model and the objective as they were before the step."""
    args, model = dump["args"], MCN(**dump["sizes"])
    model.load_state_dict(dump["model"])
    names = model.modalities
    # What was frozen learns nothing here either: it has no gradients to watch.
    if "add" in args and args["stage1_encoders"] == "frozen":
        model.freeze([name for name in names if name != MODALITIES[args["add"]].name])
    model.train()
    trained = [name for name in names if name not in model.frozen]
    # Flags and arguments have the same names.
    options = {name: args[name] for name in OBJECTIVE if name in args}  # old runs lack some
    learnt = dump.get("objective", {})
    objective = Objective(names, trained, learn_temperature="log_scale" in learnt, **options)
    objective.load_state_dict(learnt)
    if objective.clusters:
        objective.clusters.centroids = dump["centroids"]
    return model, objective


def watch(model: nn.Module, first: dict[str, str], clip_ids: Tensor, describe) -> None:
    """Note in ``first`` the first output ("forward") and gradient ("backward") not finite."""

    def on_gradient(name: str):
        def hook(gradient):
            # Backward runs from the loss to the inputs: the first one found is nearest the loss.
            if "backward" not in first and not torch.isfinite(gradient).all():
                first["backward"] = f"the gradient of {name}"
                if len(gradient) == len(clip_ids):
                    bad = clip_ids[bad_rows(gradient)].tolist()
                    first["backward"] += f", for {len(bad)} clips: "
                    first["backward"] += some(describe(bad[:SHOWN]), len(bad))

        return hook

    def on_output(name: str):
        def hook(_module, inputs, output):
            for x in tree_leaves(output):
                if not isinstance(x, Tensor) or not x.is_floating_point():
                    continue
                if "forward" not in first and not torch.isfinite(x).all():
                    came = [i for i in tree_leaves(inputs) if isinstance(i, Tensor)]
                    finite = all(torch.isfinite(i).all() for i in came if i.is_floating_point())
                    first["forward"] = (
                        f"the output of {name}, {int((~torch.isfinite(x)).sum())} of {x.numel()} "
                        f"numbers, from {'finite inputs' if finite else 'an input that is not'}"
                    )
                if x.requires_grad:
                    x.register_hook(on_gradient(f"the output of {name}"))

        return hook

    for name, module in model.named_modules():
        # A ModuleList is never called, and the model itself ("") ends after all its modules.
        if name and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(on_output(name))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(on_gradient(name))


def describe_clips(args: dict):
    """Clip ids -> video, seconds and words, where the run's data still lie there."""
    try:
        return ClipReader(Store(Path(args["data"]))).describe
    except (StoreError, OSError):
        return lambda ids: [f"clip {i}" for i in ids]


def replay(file: Path, precision: str = "fp32") -> str:
    """What a kept step shows when it is run again, for people."""
    dump, batch = load(file)
    model, objective = build(dump)
    lines = [f"{file}: step {dump['step']}, {dump['why']}; {len(batch['clip_id'])} clips"]
    if weights := not_finite(model.named_parameters()):
        lines.append(f"  weights not finite: {some(weights)}")
    first: dict[str, str] = {}
    describe = describe_clips(dump["args"])
    watch(model, first, batch["clip_id"], describe)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    # On the CPU, wherever the run was.
    autocast = torch.autocast("cpu", kinds[precision]) if precision in kinds else None
    with autocast or contextlib.nullcontext():
        embeddings, errors = model(batch)
    terms = objective(embeddings, errors, batch)
    found = merge([find_clips(objective.modalities, terms)])
    lines += found_lines(found, objective.parts(terms), describe)
    # The gradient of a NaN is NaN everywhere and says nothing.
    if torch.isfinite(terms.total):
        # The loss scale of the run: without it, an overflow in fp16 does not show.
        (terms.total * dump["loss_scale"]).backward()
    lines += [f"  first not finite, {way}: {what}" for way, what in first.items()]
    if not first:
        lines.append("  all outputs and gradients are finite here; try the run's --precision")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mcn_ext.train.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="bad-step-NNNNNN.pt of a run folder")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    args = parser.parse_args(argv)
    print(replay(args.file, args.precision))
    return 0


if __name__ == "__main__":
    flags.run(main)
