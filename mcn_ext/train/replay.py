"""A kept bad step run again (``--detect``): where it first goes wrong, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from mcn_ext.objective import Objective
from mcn_ext.train import checkpoint
from mcn_ext.train.guard import (
    MAX_DUMPS,
    SHOWN,
    bad_rows,
    find_clips,
    find_dumps,
    found_lines,
    merge,
    not_finite,
    some,
)


def replay(
    file: Path,
    folder: Path,
    model: torch.nn.Module,
    objective: Objective,
    autocast,
    device: torch.device,
    describe,
) -> str:
    """Run a kept bad step again, in one process, and say where it first goes wrong.

    ``file``: as kept by :class:`Guard`; the folder's last if it is Path(). Changes ``model``. The
    ranks' batches are joined.
    """
    if file == Path():
        kept = find_dumps(folder)
        if not kept:
            raise SystemExit(
                f"--detect: no bad-step-*.pt in {folder}; a run keeps its newest "
                f"{MAX_DUMPS} bad steps there"
            )
        file = kept[-1]
    dump = checkpoint.load(file, kind="mcn_bad_step")
    parts = [dump] + [
        checkpoint.load(file.with_name(f"{file.stem}.rank{r}.pt"), "mcn_bad_step")
        for r in range(1, dump["n_ranks"])
    ]
    if dump["sizes"] != model.sizes:
        raise SystemExit(
            f"--detect {file}: kept from a model of {dump['sizes']}, not "
            f"{model.sizes}; give the run's own flags"
        )
    model.load_state_dict(dump["model"])
    model.train()
    if objective.clusters is not None:
        centroids = dump["centroids"]
        objective.clusters.centroids = None if centroids is None else centroids.to(device)
    batch = _joined([part["batch"] for part in parts], device)
    lines = [f"{file}: step {dump['step']}, {dump['why']}; {len(batch['clip_id'])} clips"]
    weights = not_finite(model.named_parameters())
    lines += [f"  weights not finite: {some(weights)}"] if weights else []
    first: list[str] = []  # gradients that are not finite, in the order they arrive

    def watch(tensor: Tensor, name: str, of_clips: bool = False) -> None:
        def hook(gradient):
            if torch.isfinite(gradient).all():
                return
            text = name
            if of_clips:
                bad = batch["clip_id"][bad_rows(gradient)]
                text += f", for {len(bad)} clips: {some(describe(bad[:SHOWN].tolist()), len(bad))}"
            first.append(text)

        tensor.register_hook(hook)

    def watch_outputs(name: str):
        def hook(_module, _inputs, output):
            for x in tree_leaves(output):
                if isinstance(x, Tensor) and x.requires_grad:
                    watch(
                        x,
                        f"the output of {name or 'the model'}",
                        of_clips=len(x) == len(batch["clip_id"]),
                    )

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(watch_outputs(name))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            watch(parameter, name)
    with FirstNotFinite() as forward, autocast:
        embeddings, errors = model(batch)
    # Cut between encoders and losses: what the losses do inside is their own affair (the reference
    # masks with -inf), what they send back is looked at.
    sides = {"embedding": embeddings, "reconstruction": errors}
    leaves = {
        side: {name: x.detach().requires_grad_(x.requires_grad) for name, x in xs.items()}
        for side, xs in sides.items()
    }
    objective.progress = 1.0  # with all clips, also such as --clean_first has left out
    terms = objective(leaves["embedding"], leaves["reconstruction"], batch)
    lines += found_lines(merge([find_clips(objective)]), objective.parts(), describe)
    lines.append(f"  forward: {forward}")
    if torch.isfinite(terms["total"]):
        (terms["total"] * dump["loss_scale"]).backward()
        ends = [
            (f"the {name} {side}", sides[side][name], leaf.grad)
            for side, xs in leaves.items()
            for name, leaf in xs.items()
            if leaf.grad is not None
        ]
        lines += [
            f"  losses: the gradient of {name} is not finite"
            for name, _, grad in ends
            if not torch.isfinite(grad).all()
        ]
        with FirstNotFinite() as backward:
            torch.autograd.backward([x for _, x, _ in ends], [grad for _, _, grad in ends])
        lines.append(f"  backward: {backward}")
        lines += [f"  first gradient that is not finite: {first[0]}"] if first else []
    return "\n".join(lines)


def _joined(batches: list[Mapping], device: torch.device) -> dict:
    """Ranks' batches as one, audio padded to the longest."""
    first, out = batches[0], {}
    for key, value in first.items():
        values = [batch[key] for batch in batches]
        if isinstance(value, Mapping):
            out[key] = _joined(values, device)
            continue
        if key == "audio":
            longest = max(v.shape[-1] for v in values)
            values = [torch.nn.functional.pad(v, (0, longest - v.shape[-1])) for v in values]
        out[key] = torch.cat(values).to(device)
    return out


aten = torch.ops.aten
OVERWRITE = {aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default}


class FirstNotFinite(TorchDispatchMode):
    """Notes the first operation that yields NaN or inf, and, forward, its module."""

    def __init__(self):
        super().__init__()
        self.tracker, self.found = ModuleTracker(), "all finite"

    def __enter__(self):
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.tracker.__exit__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Neither makes numbers: views share theirs, and memory just asked for holds any.
        if self.found != "all finite" or func.is_view or "empty" in str(func):
            return func(*args, **kwargs)
        # Looked at before, for what is written in place; what is only written to is not read.
        read = {name: value for name, value in kwargs.items() if name != "out"}
        inputs = [
            x for x in tree_leaves((args[func in OVERWRITE :], read)) if isinstance(x, Tensor)
        ]
        before = not_finite((str(i), x) for i, x in enumerate(inputs))
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
                module = max(self.tracker.parents - {"Global"}, key=len, default="")
                self.found = (
                    f"first {f'in {module}: ' if module else ''}{func} yields "
                    f"{int((~torch.isfinite(x)).sum())} of {x.numel()} entries not finite in "
                    f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}, from "
                    + ("an input that was not finite" if before else "finite inputs")
                )
                break
        return out

    def __str__(self) -> str:
        return self.found
