"""Batch normalisation over the real frames of all ranks, in plain PyTorch.

    y = weight * (x - mean) / sqrt(var + eps) + bias

mean and var are those of all real frames of the whole batch, so that neither padding nor the
number of ranks changes an output or a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcn_ext import distributed


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over ranks; the gradient is summed, too: every rank's loss depends on it."""

    # Gathered, then added up in rank order: the same bits on all ranks.
    @staticmethod
    def forward(ctx, x):
        return distributed.stack(x).sum(dim=0)

    @staticmethod
    def backward(ctx, grad):
        return distributed.stack(grad).sum(dim=0)


class _Sums(torch.autograd.Function):
    """x (B, C, 1, T) -> each channel's sum, then its sum of squares: (2 C,) float64."""

    # A Function because autograd would keep an fp32 copy of 16-bit x for the gradient.
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.cat([y.sum((0, 2, 3), dtype=torch.float64) for y in (wide, wide.square())])

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        shift, scale = grad.chunk(2)
        # d(sum of x) / dx = 1 and d(sum of x^2) / dx = 2 x
        return affine(x, 2 * scale, shift)


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift per channel, in x's dtype: x (B, C, 1, T), scale and shift (C,)."""
    # batch_norm with mean 0 and variance 1: one pass that reads 16-bit x and computes in fp32.
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = scale.to(wide), shift.to(wide)
    zero = torch.zeros_like(scale)
    # Not F.batch_norm: in torch 2.11 it refuses eps 0.
    return torch.batch_norm(x, scale, shift, zero, zero + 1, False, 0.0, 0.0, True)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of x (B, C, 1, T) over the frames where mask (B, 1, 1, T) is True; None: over all.

    Returns 0 where the mask is False. If the whole batch has fewer than 2 frames (silence), the
    running statistics serve and stay as they are.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and distributed.world() == 1 and x.numel() > self.num_features:
            return super().forward(x)  # the same in one library call
        if self.training:
            x = x if mask is None else x * mask
            y = affine(x, *self._scale_and_shift(x, mask))
        else:
            y = super().forward(x)
        # The bias makes padding non-zero, and the next convolution would read it.
        return y if mask is None else y.mul_(mask)

    def _scale_and_shift(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalisation, (C,) float64 each; x must be 0 where the mask is False."""
        frames = torch.ones_like(x[:, 0]) if mask is None else mask
        sums = torch.cat([_Sums.apply(x), frames.sum(dtype=torch.float64).view(1)])
        sums = _SumOverRanks.apply(sums)
        count = sums[-1]
        # In silence count is 0. NaN from 0 / 0 would enter the running statistics: NaN * 0 is NaN.
        mean, mean_square = (sums[:-1] / count.clamp_min(1)).chunk(2)
        # In float64, because this cancels where the mean is far from 0.
        var = (mean_square - mean.square()).clamp_min(0)
        self._update_running(mean, var, count)
        enough = count > 1  # `if` would wait for a GPU
        mean = torch.where(enough, mean, self.running_mean)
        var = torch.where(enough, var, self.running_var)
        scale = self.weight * (var + self.eps).rsqrt()
        # The first lines' equation as one product and one sum: y = scale * x + shift.
        return scale, self.bias - mean * scale

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        rate = self.momentum * (count > 1).to(self.running_mean)  # 0 in silence
        # As torch does: normalise with the biased variance, keep the unbiased one.
        unbiased = var * count / (count - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(rate), rate)
        self.running_var.lerp_(unbiased.to(rate), rate)
        self.num_batches_tracked += count > 1
