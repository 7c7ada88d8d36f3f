"""Packed frames: the real frames of a batch of clips end to end, and convolutions of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mcn_ext import minimal

_GAP = 4  # silent frames between two clips of a line: half of a convolution's width
_CLIPS, _WIDE = 4, 1024  # longest clips, frames, to a line or more: the end of one stays empty


def n_whole(lengths: np.ndarray, device: torch.device) -> int:
    """How many clips, all of the longest length, are convolved where they lie, as images: none, or
    where they hold most of the frames. To lay those out in lines saves no work, and moves their
    rows once more; by count a third of a step's bytes where all clips are of one length, a fifth
    where a tenth is shorter (benchmarks/memory.py). On CPUs lines serve :mod:`.minimal`."""
    longest = lengths.max(initial=0)
    n = int((lengths == longest).sum())
    return n if device.type != "cpu" and 2 * n * longest > lengths.sum() else 0


class Frames:
    """Where clips' real frames lie, at one of the network's frame rates.

    Packed, they are the rows (n, C) of all clips, end to end. For a convolution they are laid out
    in lines (R, width), several clips to a line, each followed by _GAP zero frames, so that it is
    as if each clip had been convolved alone: little of the work is done on padding. Clips begin at
    even frames, for convolutions of stride 2. But the first ``whole``, see :func:`n_whole`.

    Attributes: ``order`` (B,), which clips are first, second, ... of the packed ones; ``lengths``,
    ``pooled`` and ``place`` are in that order.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        device: torch.device,
        pooled: np.ndarray | None = None,
        order: np.ndarray | None = None,
        whole: int = 0,
    ):
        """lengths (B,) int64: real frames of each clip, on the host, as all of the layout is.
        ``pooled``: over how many frames :meth:`ResDAVEnet.mean` is; by default T // 16. ``order``
        and ``whole``: found here, unless given with the other two in that order."""
        pooled = (lengths // 16).clip(1) if pooled is None else pooled
        if order is None:
            order, whole = np.arange(len(lengths)), n_whole(lengths, device)
            if whole:
                order = np.argsort(lengths != lengths.max(), kind="stable")
            lengths, pooled = lengths[order], pooled[order]
        self.lengths, self.pooled, self.order, self.whole = lengths, pooled, order, whole
        self.device, self.n = device, int(lengths.sum())
        self.longest = int(lengths.max(initial=0))
        self.first = lengths.cumsum() - lengths
        lengths = lengths[whole:]
        room = (lengths + _GAP + 1) // 2 * 2 * (lengths > 0)
        longest, total = int(room.max(initial=0)), int(room.sum())
        lines = max(1, round(total / max(_CLIPS * longest, _WIDE)))
        share = -(-total // (2 * lines)) * 2
        self.width = max(share + (longest if lines > 1 else 0), _GAP + 2)
        # Line by line: as many of the next clips as there is room for.
        end, line, begin = room.cumsum(), 0, 0
        self.place = end - room
        while begin < len(room):
            stop = int(np.searchsorted(end, self.place[begin] + self.width, side="right"))
            self.place[begin:stop] += line * self.width - self.place[begin]
            begin, line = stop, line + 1
        self.n_lines = max(line, 1)

    def index(self, begin: np.ndarray, lengths: np.ndarray, step: int = 1) -> Tensor:
        """begin[b] + step * i for each frame i < lengths[b] of each clip: (n,) int64."""
        first, n = lengths.cumsum() - lengths, int(lengths.sum())
        table = self.on_device(np.stack([begin - step * first, lengths]))
        offset = table[0].repeat_interleave(table[1], output_size=n)  # a size known: no wait
        return offset + step * torch.arange(n, device=self.device)

    def on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # from pinned memory: the copy waits for nothing
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    @cached_property
    def real(self) -> Tensor:
        """Where in the lines each packed frame is, (n,), less those of whole clips."""
        return self.index(self.place, self.lengths[self.whole :])

    @cached_property
    def halved(self) -> Frames:
        """After a convolution of stride 2, whose frame i is centred on frame 2 i."""
        return Frames((self.lengths + 1) // 2, self.device, self.pooled, self.order, self.whole)

    @cached_property
    def strided(self) -> Tensor:
        """Where in a stride-2 convolution's lines each packed frame of ``halved`` is."""
        return self.index(self.place // 2, self.halved.lengths[self.whole :])

    @cached_property
    def even(self) -> Tensor:
        """Which packed frame is the centre of each packed frame of ``halved``."""
        return self.index(self.first, self.halved.lengths, step=2)

    def lines(self, rows: Tensor) -> Tensor:
        """Packed (n, C) -> (_GAP + R * width + _GAP, C), zero where no clip is."""
        size = self.n_lines * self.width + 2 * _GAP
        return rows.new_zeros(size, rows.shape[1]).index_copy_(0, self.real + _GAP, rows)

    def divide(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Rows (n, C) as an image (B, C, 1, T) of the whole clips, and those of the others; None
        where there are none."""
        n = self.whole * self.longest
        image = rows[:n].view(self.whole, 1, self.longest, rows.shape[1]).permute(0, 3, 1, 2)
        return image if n else None, rows[n:] if n < len(rows) or not n else None


class _Convolve(torch.autograd.Function):
    """Convolution in time, width 9, of packed rows (n, C_in): (n or half as many, C_out)."""

    @staticmethod
    def forward(ctx, rows, weight, frames, stride):
        ctx.save_for_backward(rows, weight)
        ctx.frames, ctx.stride = frames, stride
        if minimal.pays(rows, weight, stride) and not frames.whole:
            return minimal.convolve(frames.lines(rows), weight).index_select(0, frames.real)
        options, parts = dict(stride=(1, stride), padding=(0, _GAP)), []
        whole, others = frames.divide(rows)
        if whole is not None:
            parts.append(_rows(F.conv2d(whole, weight, **options)))
        if others is not None:
            out = _rows(F.conv2d(_image(frames.lines(others), frames), weight, **options))
            parts.append(out.index_select(0, frames.real if stride == 1 else frames.strided))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        frames, stride, wanted = ctx.frames, ctx.stride, ctx.needs_input_grad[:2]
        if minimal.pays(rows, weight, stride) and not frames.whole:
            spread, d_rows, d_weight = frames.lines(grad), None, None
            if wanted[0]:
                d_rows = minimal.input_gradient(spread, weight).index_select(0, frames.real)
            if wanted[1]:
                d_weight = minimal.weight_gradient(frames.lines(rows), spread[_GAP:-_GAP])
            return d_rows, d_weight, None, None
        whole, others = frames.divide(rows)
        upstream, rest = (frames.halved if stride == 2 else frames).divide(grad)
        found = []
        if whole is not None:
            d_whole, d_weight = _convolution_backward(upstream, whole, weight, stride, wanted)
            found.append((_rows(d_whole) if wanted[0] else None, d_weight))
        if others is not None:
            found.append(_of_lines(rest, others, weight, frames, stride, wanted))
        d_rows, d_weight = zip(*found, strict=True)
        return (
            torch.cat(d_rows) if wanted[0] and len(found) > 1 else d_rows[0],
            d_weight[0] if len(found) == 1 or not wanted[1] else d_weight[0] + d_weight[1],
            None,
            None,
        )


def _of_lines(
    grad: Tensor, rows: Tensor, weight: Tensor, frames: Frames, stride: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows that lie in lines, and of the weight."""
    index = frames.real if stride == 1 else frames.strided
    spread = grad.new_zeros(frames.n_lines * frames.width // stride, grad.shape[1])
    spread.index_copy_(0, index, grad)
    # As rows of a matrix the lines need laying out again: less than to have kept them.
    lines, d_weight = frames.lines(rows), None
    image = spread.view(frames.n_lines, 1, -1, grad.shape[1]).permute(0, 3, 1, 2)
    products = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)
    if products and wanted[1]:
        # oneDNN's weight gradient takes twice as long as nine matrix products.
        taps = rows.new_empty(9, *weight.shape[:2])
        last = stride * (len(spread) - 1) + 1
        for i, tap in enumerate(taps):
            torch.mm(spread.t(), lines[i : i + last : stride], out=tap)
        d_weight = taps.permute(1, 2, 0)[:, :, None].contiguous()
    d_lines, other = _convolution_backward(
        image, _image(lines, frames), weight, stride, (wanted[0], wanted[1] and not products)
    )
    d_rows = _rows(d_lines).index_select(0, frames.real) if wanted[0] else None
    return d_rows, other if d_weight is None else d_weight


def _convolution_backward(
    grad: Tensor, image: Tensor, weight: Tensor, stride: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    return torch.ops.aten.convolution_backward(
        grad,
        image,
        weight,
        None,
        [1, stride],
        [0, _GAP],
        [1, 1],
        False,
        [0, 0],
        1,
        [*wanted, False],
    )[:2]


def _image(lines: Tensor, frames: Frames) -> Tensor:
    """Lines as a batch of images (R, C, 1, width) in channels_last, the same memory."""
    image = lines[_GAP:-_GAP].view(frames.n_lines, 1, frames.width, lines.shape[1])
    return image.permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """Images (R, C, 1, width) -> rows (R * width, C), the same memory in channels_last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


class Convolution(nn.Conv2d):
    """Width-9 convolution in time, without bias, of packed rows (n, C_in)."""

    def __init__(self, dim_in: int, dim_out: int, stride: int = 1):
        super().__init__(dim_in, dim_out, (1, 9), stride=(1, stride), padding=(0, 4), bias=False)

    def forward(self, rows: Tensor, frames: Frames) -> Tensor:
        weight = self.weight
        if torch.is_autocast_enabled(rows.device.type):  # which does not reach _Convolve
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        return _Convolve.apply(rows, weight, frames, self.stride[1])


class Shortcut(nn.Conv2d):
    """Width-1 convolution, without bias, of every other packed row (n, C_in), or of all."""

    def __init__(self, dim_in: int, dim_out: int, stride: int):
        super().__init__(dim_in, dim_out, 1, stride=(1, stride), bias=False)

    def forward(self, rows: Tensor, frames: Frames) -> Tensor:
        if self.stride[1] == 2:
            rows = _Select.apply(rows, frames.even)
        return F.linear(rows, self.weight.flatten(1))


class _Select(torch.autograd.Function):
    """rows[index], no index twice: the gradient is copied, not added, which takes a tenth."""

    @staticmethod
    def forward(ctx, rows, index):
        ctx.save_for_backward(index)
        ctx.n = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.n, grad.shape[1]).index_copy_(0, index, grad), None
