"""The building blocks: ResDAVEnet, gated embedding unit, sentence max-pool, reconstruction head.

Parameter names and shapes are as published (Chen et al., ICCV 2021; Harwath et al., ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mcn_ext.batchnorm import BatchNorm


class GatedUnit(nn.Module):
    """y = fc(x); y * sigmoid(cg.fc(y)): (B, dim_in) -> (B, dim_out)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.fc = nn.Linear(dim_in, dim_out)
        self.cg = nn.ModuleDict({"fc": nn.Linear(dim_out, dim_out)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        # glu(cat(a, b)) = a * sigmoid(b)
        return F.glu(torch.cat([x, self.cg["fc"](x)], dim=1), dim=1)


class SentenceMaxPool(nn.Module):
    """Words (B, words, word_dim), mask (B, words) True on words -> max of ReLU(fc(w)): (B, dim)."""

    def __init__(self, word_dim: int, dim: int):
        super().__init__()
        self.fc = nn.Linear(word_dim, dim)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        # After ReLU nothing is below 0, so padding at 0 never wins; unmasked it is ReLU(bias).
        return (F.relu(self.fc(words)) * mask[..., None]).amax(dim=1)


def reconstruction_head(embd_dim: int, hidden: int, dim_out: int) -> nn.Sequential:
    """Embedding (B, embd_dim) -> the features before projection (B, dim_out), never negative."""
    return nn.Sequential(
        nn.Linear(embd_dim, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim_out),
        nn.ReLU(inplace=True),
    )


class Block(nn.Module):
    """Residual block of two width-9 convolutions in time; stride 2 halves the frame rate."""

    def __init__(self, dim_in: int, dim_out: int, stride: int):
        super().__init__()
        self.stride = stride
        # Padding 4 of width 9 keeps the number of frames. No bias: the BatchNorm after it has one.
        conv = partial(nn.Conv2d, kernel_size=(1, 9), padding=(0, 4), bias=False)
        self.conv1 = conv(dim_in, dim_out, stride=(1, stride))
        self.bn1 = BatchNorm(dim_out)
        self.conv2 = conv(dim_out, dim_out)
        self.bn2 = BatchNorm(dim_out)
        self.downsample = None
        # Where the shape stays the same, x is added as it is.
        if stride != 1 or dim_in != dim_out:
            shortcut = nn.Conv2d(dim_in, dim_out, 1, stride=(1, stride), bias=False)
            self.downsample = nn.ModuleList([shortcut, BatchNorm(dim_out)])

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, C_in, 1, T), mask (B, 1, 1, T) -> both at the block's frame rate."""
        if mask is not None:
            mask = mask[..., :: self.stride]  # output frame i is centred on frame stride * i
        y = self.bn1(self.conv1(x), mask).relu_()
        y = self.bn2(self.conv2(y), mask)
        if self.downsample is not None:
            conv, norm = self.downsample
            # The weight as a matrix: of (n, m, 1, 1) its gradient may have strides that DDP copies.
            weight = conv.weight.flatten(1)[:, :, None, None]
            x = norm(F.conv2d(x, weight, stride=conv.stride), mask)
        return (x + y).relu_(), mask


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers at the end: BatchNorm's running statistics, after a forward."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:  # checkpoint ends its forward by an exception
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)


def davenet_widths(width: float) -> list[int]:
    """Channels after conv1 and after each of the four stages; 1.0 is as published."""
    return [max(1, round(w * width)) for w in (128, 128, 256, 512, 1024)]


class ResDAVEnet(nn.Module):
    """Log-mel (B, 40, T) with n_frames (B,) real frames each -> mean over time, (B, 1024 * width).

    Padding is 0 before every convolution, as if each clip had been convolved alone, and left out of
    every batch statistic and of the mean: an embedding does not depend on how long its neighbours
    in the batch are.

    ``checkpoint_activations``: keep the inputs of blocks alone for the backward, and compute the
    rest again. The same gradients from less memory, for 4/3 of the convolutions.
    """

    def __init__(self, width: float = 1.0, checkpoint_activations: bool = False, n_mels: int = 40):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        widths = davenet_widths(width)
        self.dim = widths[-1]
        self.conv1 = nn.Conv2d(1, widths[0], (n_mels, 1), bias=False)
        self.bn1 = BatchNorm(widths[0])
        for i in range(1, 5):
            first, second = Block(widths[i - 1], widths[i], 2), Block(widths[i], widths[i], 1)
            self.add_module(f"layer{i}", nn.ModuleList([first, second]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, fan-out
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, mel: Tensor, n_frames: Tensor, heard: Tensor | None = None) -> Tensor:
        """Embed clips.

        ``heard`` (B,): frames that are convolved where that is more than the ``n_frames`` that are
        averaged. Both may be on the host, where full clips are recognised.
        """
        mel = F.pad(mel, (0, max(0, 1 - mel.shape[2])))  # one frame where all clips are silent
        convolved = n_frames if heard is None else heard
        mask = None if _all_full(convolved, mel.shape[2]) else _real(convolved, mel)[:, None, None]
        if mask is not None:
            mel = mel.masked_fill(~mask[:, 0], 0.0)  # whatever is there, NaN included
        # A (40, 1) kernel is a product per frame; it leaves channels last, as do convolutions then.
        x = F.linear(mel.transpose(1, 2), self.conv1.weight.flatten(1))
        x = self.bn1(x.transpose(1, 2)[:, :, None], mask).relu_()
        for i in range(1, 5):
            for block in getattr(self, f"layer{i}"):
                x, mask = self._run(block, x, mask)
        # As published: over whole pooled frames, T // 16 of n_frames // 16, at least one.
        n_pooled = (n_frames // 16).clamp_min(1)
        # The sum over time is in fp32: 16-bit sums lose digits as they grow.
        x = x[:, :, 0].to(torch.promote_types(x.dtype, torch.float32))
        averaged = _real(n_pooled, x).to(x.dtype)
        return torch.einsum("bct,bt->bc", x, averaged) / averaged.sum(dim=1, keepdim=True)

    def _run(self, block: Block, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.checkpoint_activations:
            return block(x, mask)
        return checkpoint(
            block,
            x,
            mask,
            use_reentrant=False,
            # A block draws no random numbers.
            preserve_rng_state=False,
            # The forward that backward repeats must not update running statistics again.
            context_fn=lambda: (nullcontext(), unchanged_buffers(block)),
        )


def _real(n_frames: Tensor, x: Tensor) -> Tensor:
    """Which of x's frames (B, ..., T) are real: (B, T) bool, on x's device."""
    if x.device.type == "cuda" and n_frames.device.type == "cpu":
        n_frames = n_frames.pin_memory()  # a copy from pageable memory would wait for the device
    n_frames = n_frames.to(x.device, non_blocking=True)
    return torch.arange(x.shape[-1], device=x.device) < n_frames[:, None]


def _all_full(n_frames: Tensor, longest: int) -> bool:
    """Whether there is no padding to mask, if that can be known without waiting for a GPU."""
    if torch.compiler.is_compiling() or n_frames.device.type != "cpu":
        return False
    return bool((n_frames >= longest).all())
