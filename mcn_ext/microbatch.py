"""The step in parts of a few clips, with the whole batch's gradients (``--micro_batch``).

All clips of a batch are each other's negatives, so their losses cannot be added up part by part.
But the losses see embeddings and reconstruction errors alone, which are small, and what encoders
keep for their backward is not (GradCache, Gao et al. 2021). So a step runs the encoders twice:

1. without a graph, part by part; the losses of all embeddings, and their gradients;
2. part by part again, with a graph, which those gradients are sent back through.

Clips do not meet in the video and text encoders, nor in frozen ones: there that is all. In DAVEnet
they do: each BatchNorm is by the mean and variance of all clips' frames, and so is its gradient.
Statistics of each part would make it another model. So DAVEnet is run not part after part but
step after step: all parts through one convolution; from what comes out the statistics, of all
parts and ranks; all parts normalised by them, and on to the next. Backward likewise: a step's parts
one after the other, statistics taken as constants; then what goes through mean and variance, a
straight line in each row, whose two coefficients per channel are sums over all parts and ranks,
is taken off all. That is exact: gradients are the full batch's but for rounding.

What is kept of DAVEnet between 1 and 2 are the inputs of its blocks; in 2, of one block at a time,
what its convolutions and norms need for their backward. Of all else there is one part at a time.
The price: 4/3 of DAVEnet's convolutions, and the gradients of several ranks are averaged after the
backward, not during it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mcn_ext import distributed
from mcn_ext.encoders import BatchNorm, ResDAVEnet, line, normalize, through_statistics
from mcn_ext.model import MCN
from mcn_ext.packed import Frames

Rows = tuple[Tensor, ...]  # of one part: a block's and its shortcut's


class MicroBatched:
    """In the place of a model, for a step: ``net(batch)``, the losses' backward, and then
    :meth:`backward`.

    Args:
        n: clips of this rank that are encoded at a time.
        autocast: makes the context that encoders run in.
    """

    def __init__(self, model: MCN, n: int, autocast: Callable):
        self.model, self.n, self.autocast = model, n, autocast
        for value in model.state_dict().values():  # as DistributedDataParallel does
            distributed.broadcast(value)

    @torch.no_grad()
    def __call__(self, batch: Mapping) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What :meth:`MCN.forward` returns, those that learn as leaves of the graph."""
        model, self.sound, self.features = self.model, None, None
        size = len(batch["clip_id"])
        self.parts = [_part(batch, slice(i, i + self.n)) for i in range(0, size, self.n)]
        embeddings, errors = {}, {}
        for name in model.modalities:
            learns = name not in model.frozen
            if name == "audio" and learns and model.DAVEnet.training:
                self.sound = Replayed(model.DAVEnet, self.autocast)
                self.features = self.sound(
                    batch["n_frames"], [part["audio"] for part in self.parts]
                )
            found = [self._encode(name, i) for i in range(len(self.parts))]
            embeddings[name] = torch.cat([x for x, _ in found]).requires_grad_(learns)
            if found[0][1] is not None:
                errors[name] = torch.cat([x for _, x in found]).requires_grad_()
        self.leaves = embeddings, errors
        return embeddings, errors

    def _encode(self, name: str, i: int, features: Tensor | None = None):
        """(embedding, reconstruction error or None) of a part's clips."""
        if features is None and name == "audio" and self.features is not None:
            features = self.features[i]
        with self.autocast():  # anew for each part: it would keep casts made without a graph
            return self.model.embed(name, self.parts[i], features)

    def backward(self) -> None:
        """Add the parameters' gradients, averaged over ranks, from those of the leaves."""
        embeddings, errors = self.leaves
        for name in self.model.modalities:
            if name in self.model.frozen:
                continue
            sides = [embeddings[name], errors.get(name)]
            grads = [None if x is None or x.grad is None else x.grad.split(self.n) for x in sides]
            behind = []  # gradients of DAVEnet's features
            for i in range(len(self.parts)):
                leaf = None
                if name == "audio" and self.features is not None:
                    leaf = self.features[i].detach().requires_grad_()
                ends = [
                    (x, grad[i])
                    for x, grad in zip(self._encode(name, i, leaf), grads, strict=True)
                    if grad is not None
                ]
                if ends:
                    torch.autograd.backward(*zip(*ends, strict=True))
                if leaf is not None:
                    behind.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            if behind:
                self.sound.backward(behind)
        distributed.average_gradients([p for p in self.model.parameters() if p.requires_grad])
        self.leaves = self.parts = self.sound = self.features = None


def _part(batch: Mapping, clips: slice) -> dict:
    return {
        key: _part(value, clips) if isinstance(value, Mapping) else value[clips]
        for key, value in batch.items()
    }


@dataclass
class _Step:
    """From BatchNorm (or none) of each of its inputs to the inputs of the next."""

    norms: tuple[BatchNorm | None, ...]
    function: Callable[..., Rows]  # (frames, *inputs)
    statistics: list[tuple[Tensor, Tensor, Tensor] | None] | None = None

    def run(self, frames: Frames, inputs: Rows, weights=None) -> Rows:
        """One part; ``weights``: (weight, bias) to use in the place of each norm's own."""
        rows = []
        for i, (norm, x) in enumerate(zip(self.norms, inputs, strict=True)):
            if norm is not None:
                weight, bias = weights[i] if weights else (norm.weight, norm.bias)
                x = normalize(x, *self.statistics[i][:2], weight, bias, norm.eps)
            rows.append(x)
        return self.function(frames, *rows)


class Replayed:
    """DAVEnet in training, step by step over all parts; see the module."""

    def __init__(self, net: ResDAVEnet, autocast: Callable):
        self.autocast = autocast
        self.blocks = [
            (
                [
                    _Step((None,), lambda frames, mel: (net.stem(mel, frames),)),
                    _Step((net.bn1,), lambda _, rows: (F.relu(rows),)),
                ],
                None,
            )
        ]
        for block in net.blocks():
            norm = None if block.downsample is None else block.downsample[1]
            self.blocks.append(
                (
                    [
                        _Step((None,), block.enter),
                        _Step((block.bn1, None), block.middle),
                        _Step((block.bn2, norm), block.leave),
                    ],
                    block.after,
                )
            )
        self.blocks.append(([_Step((None,), lambda frames, x: (net.mean(frames, x),))], None))

    @torch.no_grad()
    def __call__(self, n_frames: Tensor, mels: list[Tensor]) -> list[Tensor]:
        """Parts of log-mel (n, 40, T), ``n_frames`` (B,) of all of them -> features of each."""
        lengths = n_frames.cpu().split([len(mel) for mel in mels])
        frames = [Frames(n.numpy(), mel.device) for n, mel in zip(lengths, mels, strict=True)]
        rows, self.kept = [(mel,) for mel in mels], []
        for steps, after in self.blocks:
            self.kept.append((rows, frames))
            rows = list(rows)
            for step in steps:
                step.statistics = [
                    norm and norm.fit([inputs[i] for inputs in rows])
                    for i, norm in enumerate(step.norms)
                ]
                self._advance(step, frames, rows)
            if after is not None:
                frames = [after(f) for f in frames]
        return [x for (x,) in rows]

    def _advance(self, step: _Step, frames: list[Frames], rows: list[Rows]) -> None:
        """All parts a step on, each in the place of the one before."""
        for i, f in enumerate(frames):
            with self.autocast():
                rows[i] = step.run(f, rows[i])

    def backward(self, grads: list[Tensor]) -> None:
        """Add the parameters' gradients from the features' (B, C), part by part."""
        grads = [(grad,) for grad in grads]
        for steps, _ in reversed(self.blocks):
            rows, frames = self.kept.pop()
            tapes = []
            for i, step in enumerate(steps):
                tapes.append(_Tape(step, rows, onward=bool(self.kept or i)))
                if step is not steps[-1]:  # of the last step a part at a time is enough
                    rows = [
                        tuple(x.detach() for x in tapes[-1].run(part, f, self.autocast))
                        for part, f in enumerate(frames)
                    ]
            while tapes:
                tapes.pop().backward(frames, grads, self.autocast)


class _Tape:
    """A step run again, with a graph from its inputs on; ``onward``: to which gradients go."""

    def __init__(self, step: _Step, rows: list[Rows], onward: bool):
        self.step, self.ends = step, {}
        self.leaves = [tuple(x.detach().requires_grad_(onward) for x in inputs) for inputs in rows]
        # Copies, whose gradients are sums over the parts alone.
        self.weights = [
            norm and (norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())
            for norm in step.norms
        ]

    @torch.enable_grad()
    def run(self, part: int, frames: Frames, autocast: Callable) -> Rows:
        with autocast():
            self.ends[part] = self.step.run(frames, self.leaves[part], self.weights)
        return self.ends[part]

    def backward(self, frames: list[Frames], grads: list[Rows], autocast: Callable) -> None:
        """Gradients of the step's outputs -> in their place those of its inputs."""
        for i, (f, leaves) in enumerate(zip(frames, self.leaves, strict=True)):
            if i not in self.ends:
                self.run(i, f, autocast)
            torch.autograd.backward(self.ends.pop(i), grads[i])
            grads[i] = tuple(leaf.grad for leaf in leaves)
        for i, norm in enumerate(self.step.norms):
            if norm is None:
                continue
            sums = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights[i]]
            for own, grad in zip((norm.weight, norm.bias), sums, strict=True):
                own.grad = grad.clone() if own.grad is None else own.grad + grad
            mean, var, count = self.step.statistics[i]
            slope, offset = through_statistics(
                *sums, norm.weight.detach(), mean, var, count, norm.eps
            )
            for leaves, part in zip(self.leaves, grads, strict=True):
                part[i].sub_(line(leaves[i].detach(), slope, offset))
