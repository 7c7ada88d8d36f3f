"""The building blocks: ResDAVEnet, gated embedding unit, sentence max-pool, reconstruction head.

Parameter names and shapes are as published (Chen et al., ICCV 2021; Harwath et al., ICLR 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mcn_ext import distributed


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
    return nn.Sequential(nn.Linear(embd_dim, hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, dim_out), nn.ReLU(inplace=True))


class _Frames:
    """Which of a padded batch's B * T frames are real, at one of the network's frame rates."""

    def __init__(self, n_frames: Tensor, length: int):
        self.n_frames, self.length = n_frames, length
        mask = torch.arange(length, device=n_frames.device) < n_frames[:, None]
        self.real = mask.flatten().nonzero().flatten()

    def halved(self) -> _Frames:
        """After a convolution of stride 2, whose frame i is centred on frame 2 i."""
        return _Frames((self.n_frames + 1) // 2, (self.length + 1) // 2)

    def pack(self, x: Tensor) -> Tensor:
        """(B, C, 1, T) -> real frames only, (n, C)."""
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(0, self.real)

    def unpack(self, rows: Tensor) -> Tensor:
        """(n, C) -> (B, C, 1, T) in channels_last, zero where there is padding."""
        padded = rows.new_zeros(len(self.n_frames) * self.length, rows.shape[1])
        padded = padded.index_copy(0, self.real, rows)
        shape = len(self.n_frames), 1, self.length, rows.shape[1]
        return padded.view(shape).permute(0, 3, 1, 2)


class _Normalize(torch.autograd.Function):
    """Batch norm of rows (n, C) by the mean and variance of all ranks' rows."""

    @staticmethod
    def forward(ctx, rows, weight, bias, mean, var, count, eps):
        """count: rows of all ranks that mean and var are of; 0: they are constants."""
        ctx.save_for_backward(rows, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(rows, mean, var, weight, bias, False, 0.0, eps) if len(rows) else rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, mean, var, count = ctx.saved_tensors
        d_rows, d_weight, d_bias = grad, torch.zeros_like(weight), torch.zeros_like(weight)
        invstd = (var + ctx.eps).rsqrt()
        if len(rows):  # as if mean and var were constants
            d_rows, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                grad, rows, weight, mean, var, mean, invstd, False, ctx.eps, [True] * 3)
        # Through mean and var: what all ranks' rows have in common is taken off each.
        along_weight, along_bias = distributed.stack(torch.stack([d_weight, d_bias])).sum(dim=0)
        scale = torch.where(count > 0, weight * invstd / count.clamp_min(1), 0.0)
        slope = scale * along_weight * invstd
        offset = scale * along_bias - slope * mean
        d_rows = d_rows - (offset + slope * rows.to(slope.dtype)).to(d_rows.dtype)
        return d_rows, d_weight, d_bias, None, None, None, None


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm over the packed frames (n, C) of all ranks, without padding; fewer than 2
    (silence): as in eval."""

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training or distributed.world() == 1:
            if self.training and len(rows) < 2:
                return F.batch_norm(rows, self.running_mean, self.running_var, self.weight,
                                    self.bias, False, 0.0, self.eps)
            return super().forward(rows)
        with torch.no_grad():
            count, mean, var = self._statistics(rows.to(self.running_mean.dtype))
            some = count > 1  # nothing here waits for a GPU
            for running, now in ((self.running_mean, mean), (self.running_var,
                                                             var * count / (count - 1))):
                running.copy_(torch.where(some, running.lerp(now, self.momentum), running))
            self.num_batches_tracked += some
            mean = torch.where(some, mean, self.running_mean)
            var = torch.where(some, var, self.running_var)
        return _Normalize.apply(rows, self.weight, self.bias, mean, var, count * some, self.eps)

    @staticmethod
    def _statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(number, mean (C,), variance (C,)) of all ranks' rows, merged in rank order (Chan et al.
        1979), so that ranks' buffers are equal to the bit."""
        mean = rows.sum(dim=0) / max(len(rows), 1)
        square = (rows - mean).square().sum(dim=0)
        number = mean.new_full((1,), len(rows))
        table = distributed.stack(torch.cat([number, mean, square])).double()
        number, mean, square = table.split([1, rows.shape[1], rows.shape[1]], dim=1)
        count = number.sum()
        whole = (number * mean).sum(dim=0) / count.clamp_min(1)
        square = square.sum(dim=0) + (number * (mean - whole).square()).sum(dim=0)
        var = square / count.clamp_min(1)
        return count.to(rows.dtype), whole.to(rows.dtype), var.to(rows.dtype)


class _Block(nn.Module):
    """Residual block of two width-9 convolutions in time; the first may halve the rate."""

    def __init__(self, dim_in: int, dim_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim_out, (1, 9), stride=(1, stride), padding=(0, 4),
                               bias=False)
        self.bn1 = _BatchNorm(dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, (1, 9), padding=(0, 4), bias=False)
        self.bn2 = _BatchNorm(dim_out)
        self.stride = stride
        self.downsample = None
        if stride != 1 or dim_in != dim_out:
            conv = nn.Conv2d(dim_in, dim_out, 1, stride=(1, stride), bias=False)
            # The strides its gradient comes with, which DistributedDataParallel asks for.
            self.downsample = nn.ModuleList([conv.to(memory_format=torch.channels_last),
                                             _BatchNorm(dim_out)])

    def forward(self, x: Tensor, frames: _Frames) -> tuple[Tensor, _Frames]:
        """x (B, C, 1, T), zero on padding -> the same at the block's rate."""
        out = frames.halved() if self.stride == 2 else frames
        y = out.unpack(F.relu(self.bn1(out.pack(self.conv1(x)))))
        y = self.bn2(out.pack(self.conv2(y)))
        if self.downsample is None:
            shortcut = out.pack(x)
        else:
            shortcut = self.downsample[1](out.pack(self.downsample[0](x)))
        return out.unpack(F.relu(y + shortcut)), out


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
        self.bn1 = _BatchNorm(widths[0])
        for i in range(1, 5):
            self.add_module(f"layer{i}", nn.ModuleList([_Block(widths[i - 1], widths[i], 2),
                                                        _Block(widths[i], widths[i], 1)]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, fan-out
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, mel: Tensor, n_frames: Tensor, heard: Tensor | None = None) -> Tensor:
        frames = _Frames(n_frames if heard is None else heard, mel.shape[-1])
        # A (40, 1) kernel over one channel is (1, 1) over 40: on packed frames, one matmul.
        rows = F.linear(frames.pack(mel[:, :, None]), self.conv1.weight.flatten(1))
        x = frames.unpack(F.relu(self.bn1(rows)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x, frames = block(x, frames)
        # As published: the mean is over whole pooled frames, T // 16, at least one.
        pooled = (torch.arange(x.shape[-1], device=x.device)
                  < (n_frames[:, None] // 16).clamp_min(1)).float()
        return (torch.einsum("bct,bt->bc", x.squeeze(2).float(), pooled)
                / pooled.sum(dim=1, keepdim=True))
