"""The building blocks: ResDAVEnet, gated embedding unit, sentence max-pool, reconstruction head.

Parameter names and shapes are as published (Chen et al., ICCV 2021; Harwath et al., ICLR 2020).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mcn_ext import distributed
from mcn_ext.packed import Convolution, Frames, Shortcut


class GatedUnit(nn.Module):
    """y = fc(x); y * sigmoid(cg.fc(y)): (B, dim_in) -> (B, dim_out)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.fc = nn.Linear(dim_in, dim_out)
        self.cg = nn.ModuleDict({"fc": nn.Linear(dim_out, dim_out)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
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


def normalize(
    rows: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Rows (n, C) by statistics (C,) that are constants here."""
    return F.batch_norm(rows, mean, var, weight, bias, False, 0.0, eps) if len(rows) else rows


def line(rows: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """offset + slope * row of (n, C) rows, in their type; by batch norm, which takes one pass."""
    eps = 1e-5
    zero = torch.zeros_like(slope)
    return normalize(rows, zero, zero + (1.0 - eps), slope, offset, eps)


def through_statistics(
    d_weight: Tensor,
    d_bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(slope, offset) (C,): offset + slope * row is what a row's gradient loses through mean and
    variance. ``d_weight``, ``d_bias``: this rank's; ``count``: rows of all ranks, 0 for constants.
    """
    d_weight, d_bias = distributed.stack(torch.stack([d_weight, d_bias])).sum(dim=0)
    invstd = (var + eps).rsqrt()
    scale = torch.where(count > 0, weight * invstd / count.clamp_min(1), 0.0)
    slope = scale * d_weight * invstd
    return slope, scale * d_bias - slope * mean


class _Normalize(torch.autograd.Function):
    """Batch norm of rows (n, C) by the mean and variance of all ranks' rows."""

    @staticmethod
    def forward(ctx, rows, weight, bias, mean, var, count, eps):
        """count: rows of all ranks that mean and var are of; 0: they are constants."""
        ctx.save_for_backward(rows, weight, mean, var, count)
        ctx.eps = eps
        return normalize(rows, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, mean, var, count = ctx.saved_tensors
        d_rows, d_weight, d_bias = grad, torch.zeros_like(weight), torch.zeros_like(weight)
        if len(rows):  # as if mean and var were constants
            invstd = (var + ctx.eps).rsqrt()
            d_rows, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                grad, rows, weight, mean, var, mean, invstd, False, ctx.eps, [True] * 3
            )
        slope, offset = through_statistics(d_weight, d_bias, weight, mean, var, count, ctx.eps)
        return d_rows - line(rows, slope, offset), d_weight, d_bias, None, None, None, None


def _merged(table: Tensor) -> Tensor:
    """Rows of (number, means (C,), sums of squares about them (C,)) of parts as those of the whole,
    in order (Chan et al. 1979): float64."""
    number, mean, square = table.double().split([1, *[table.shape[1] // 2] * 2], dim=1)
    count = number.sum(dim=0)
    whole = (number * mean).sum(dim=0) / count.clamp_min(1)
    square = square.sum(dim=0) + (number * (mean - whole).square()).sum(dim=0)
    return torch.cat([count, whole, square])


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the packed frames (n, C) of all ranks, without padding; fewer than 2
    (silence): as in eval."""

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training or distributed.world() == 1:
            if self.training and len(rows) < 2:
                return F.batch_norm(
                    rows,
                    self.running_mean,
                    self.running_var,
                    self.weight,
                    self.bias,
                    False,
                    0.0,
                    self.eps,
                )
            return super().forward(rows)
        return self.of_all_ranks(rows)

    def of_all_ranks(self, rows: Tensor) -> Tensor:
        """In training, rows (n, C) by the statistics of all ranks' rows."""
        return _Normalize.apply(rows, self.weight, self.bias, *self.fit([rows]), self.eps)

    @torch.no_grad()
    def fit(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(mean (C,), variance (C,), number) of all ranks' rows, here in parts, of which the
        running statistics learn; the running ones and 0 if there are fewer than 2. Merged in the
        order of parts and ranks, so that ranks' buffers are equal to the bit."""
        moments = [self._moments(rows) for rows in parts]
        ours = _merged(torch.stack(moments)) if len(parts) > 1 else moments[0]
        whole = _merged(distributed.stack(ours))
        dim = self.num_features
        count, mean, square = whole.to(self.running_mean.dtype).split([1, dim, dim])
        var, some = square / count.clamp_min(1), count[0] > 1  # nothing here waits for a GPU
        for running, now in ((self.running_mean, mean), (self.running_var, square / (count - 1))):
            running.copy_(torch.where(some, running.lerp(now, self.momentum), running))
        self.num_batches_tracked += some
        mean, var = (
            torch.where(some, now, running)
            for now, running in ((mean, self.running_mean), (var, self.running_var))
        )
        return mean, var, count[0] * some

    def _moments(self, rows: Tensor) -> Tensor:
        """Number, means (C,) and sums of squares about them (C,) of one part's rows (n, C). By
        batch norm, whose output is dropped: it reads 16-bit rows once and adds up in fp32."""
        mean = square = torch.zeros_like(self.running_mean)
        if len(rows):
            _, mean, invstd = torch.native_batch_norm(
                rows, self.weight, self.bias, None, None, True, 0.0, 0.0
            )
            # Without eps it is 0 where all rows are alike.
            square = torch.where(invstd == 0, 0.0, len(rows) * invstd.square().reciprocal())
        return torch.cat([mean.new_full((1,), len(rows)), mean, square])


class _Block(nn.Module):
    """Residual block of two width-9 convolutions in time; the first may halve the rate.

    Packed rows (n, C), at the block's rate from :meth:`enter` on. In three parts, as
    :mod:`.microbatch` runs them: what is between them are the rows that BatchNorm is of.
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int):
        super().__init__()
        self.conv1 = Convolution(dim_in, dim_out, stride)
        self.bn1 = BatchNorm(dim_out)
        self.conv2 = Convolution(dim_out, dim_out)
        self.bn2 = BatchNorm(dim_out)
        self.stride = stride
        self.downsample = None
        if stride != 1 or dim_in != dim_out:
            self.downsample = nn.ModuleList([Shortcut(dim_in, dim_out, stride), BatchNorm(dim_out)])

    def enter(self, frames: Frames, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's input -> (rows for bn1, the shortcut's, for its norm if there is one)."""
        shortcut = x if self.downsample is None else self.downsample[0](x, frames)
        return self.conv1(x, frames), shortcut

    def middle(self, frames: Frames, rows: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        """Out of bn1 -> (rows for bn2, the shortcut's as they are)."""
        return self.conv2(F.relu(rows), self.after(frames)), shortcut

    def leave(self, _: Frames, rows: Tensor, shortcut: Tensor) -> tuple[Tensor]:
        """Out of bn2 and the shortcut's norm -> the block's output."""
        return (F.relu(rows + shortcut),)

    def after(self, frames: Frames) -> Frames:
        """The frames of what the block returns."""
        return frames.halved if self.stride == 2 else frames

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        rows, shortcut = self.enter(frames, x)
        rows, shortcut = self.middle(frames, self.bn1(rows), shortcut)
        if self.downsample is not None:
            shortcut = self.downsample[1](shortcut)
        return self.leave(frames, self.bn2(rows), shortcut)[0]


def davenet_widths(width: float) -> list[int]:
    """Channels after conv1 and after each of the four stages; 1.0 is as published."""
    return [max(1, round(w * width)) for w in (128, 128, 256, 512, 1024)]


class ResDAVEnet(nn.Module):
    """Log-mel (B, 40, T) with n_frames (B,) real frames each -> mean over time, (B, 1024 * width).

    Padding is zero before every convolution, as if each clip had been convolved alone, and left out
    of every batch statistic and of the mean: an embedding does not depend on how long its
    neighbours in the batch are. ``heard`` (B,) frames are convolved instead, when given.
    """

    def __init__(self, width: float = 1.0, n_mels: int = 40):
        super().__init__()
        widths = davenet_widths(width)
        self.dim = widths[-1]
        self.conv1 = nn.Conv2d(1, widths[0], (n_mels, 1), bias=False)
        self.bn1 = BatchNorm(widths[0])
        for i in range(1, 5):
            self.add_module(
                f"layer{i}",
                nn.ModuleList(
                    [_Block(widths[i - 1], widths[i], 2), _Block(widths[i], widths[i], 1)]
                ),
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, fan-out
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> list[_Block]:
        return [block for i in range(1, 5) for block in getattr(self, f"layer{i}")]

    def stem(self, mel: Tensor, frames: Frames) -> Tensor:
        """Log-mel (B, 40, T) -> packed rows (n, C) for bn1."""
        # A (40, 1) kernel over one channel is (1, 1) over 40: on packed frames, one matmul.
        begin = frames.order * mel.shape[-1]
        rows = mel.transpose(1, 2).reshape(-1, mel.shape[1])
        return F.linear(
            rows.index_select(0, frames.index(begin, frames.lengths)), self.conv1.weight.flatten(1)
        )

    def mean(self, frames: Frames, x: Tensor) -> Tensor:
        """Packed rows after the last block -> means over time (B, C), fp32.

        As published: over whole pooled frames, T // 16 of n_frames // 16, at least one.
        """
        longest = max(1, int(frames.lengths.max(initial=0)))
        begin, counts = frames.order * longest, np.empty_like(frames.pooled)
        padded = x.new_zeros(len(begin) * longest, x.shape[1])
        padded = padded.index_copy(0, frames.index(begin, frames.lengths), x)
        counts[frames.order] = frames.pooled
        counts = frames.on_device(counts)[:, None]
        pooled = (torch.arange(longest, device=x.device) < counts).float()
        padded = padded.view(len(begin), longest, x.shape[1]).float()
        return torch.einsum("btc,bt->bc", padded, pooled) / pooled.sum(dim=1, keepdim=True)

    def forward(self, mel: Tensor, n_frames: Tensor, heard: Tensor | None = None) -> Tensor:
        """``heard`` (B,): how many frames are convolved, where that is more than there are."""
        real = n_frames.cpu().numpy()
        frames = Frames(
            real if heard is None else heard.cpu().numpy(), mel.device, (real // 16).clip(1)
        )
        x = F.relu(self.bn1(self.stem(mel, frames)))
        for block in self.blocks():
            x, frames = block(x, frames), block.after(frames)
        return self.mean(frames, x)
