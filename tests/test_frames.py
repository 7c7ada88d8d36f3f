"""Packed frames and convolutions' lines: as if each clip had been convolved alone."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mcn_ext import minimal, packed
from mcn_ext.encoders import ResDAVEnet
from mcn_ext.packed import Convolution, Frames, Shortcut

CPU = torch.device("cpu")


def test_clips_lie_apart_in_lines():
    rng = np.random.default_rng(0)
    for _ in range(200):
        frames = Frames(rng.integers(0, rng.integers(1, 300), rng.integers(0, 60)), CPU)
        while True:
            real, there = frames.real.numpy(), frames.lengths > 0
            assert len(set(real)) == frames.n
            begin = np.sort(frames.place[there])
            end = np.sort((frames.place + frames.lengths)[there])
            assert (begin[1:] - end[:-1] >= 4).all() and not (begin % 2).any()
            assert (begin // frames.width == (end + 3) // frames.width).all()
            assert frames.n == 0 or real.max() < frames.n_lines * frames.width
            if frames.lengths.max(initial=0) <= 1:
                break
            frames = frames.halved


def test_full_clips_leave_little_empty():
    for n, length in ((1, 62), (96, 25), (128, 1000)):
        frames = Frames(np.full(n, length), CPU)
        assert frames.n_lines * frames.width <= 1.06 * n * (length + 6)


def whole_where_long(monkeypatch):
    """Clips of the longest length are convolved where they lie, as on a GPU."""
    monkeypatch.setattr(packed, "n_whole", lambda lengths, _: int((lengths == lengths.max()).sum()))


@pytest.mark.parametrize(
    "lengths", [[7, 0, 300, 1, 24, 2, 151], [300, 0, 12, 300, 299, 300], [31, 31], [2, 1]]
)
@pytest.mark.parametrize(
    "kind, stride, block, whole",
    [
        (Convolution, 1, 0, False),
        (Convolution, 2, 0, False),
        (Shortcut, 2, 0, False),
        (Convolution, 1, 1, False),
        (Convolution, 1, 2**18, False),
        (Convolution, 1, 0, True),
        (Convolution, 2, 0, True),
        (Shortcut, 2, 0, True),
    ],
)
def test_a_convolution_is_that_of_each_clip_alone(kind, stride, block, whole, lengths, monkeypatch):
    """``block``: by :mod:`mcn_ext.minimal`, so many numbers at a time, 256 frames at least."""
    torch.manual_seed(0)
    monkeypatch.setattr(minimal, "pays", lambda *_: bool(block))
    monkeypatch.setattr(minimal, "_BLOCK", block)
    if whole:
        whole_where_long(monkeypatch)
    frames, layer = Frames(np.array(lengths), CPU), kind(5, 3, stride).double()
    assert frames.whole == whole * lengths.count(max(lengths))
    lengths = frames.lengths
    assert len(frames.order) == len(lengths) == len(set(frames.order))
    rows = torch.randn(frames.n, 5, dtype=torch.float64, requires_grad=True)
    got = layer(rows, frames)
    want = torch.cat(
        [
            F.conv2d(
                clip.t()[None, :, None], layer.weight, stride=(1, stride), padding=layer.padding
            )[0, :, 0].t()
            for clip in rows.split(lengths.tolist())
            if len(clip)
        ]
    )
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    inputs = (rows, layer.weight)
    for g, w in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


def test_clips_are_convolved_where_they_lie_on_gpus_where_they_are_most():
    for lengths, n in (([10, 10, 7, 0], 2), ([10, 7, 7], 0), ([10, 9], 1), ([0, 0], 0), ([], 0)):
        lengths = np.array(lengths, np.int64)
        assert packed.n_whole(lengths, torch.device("cuda")) == n
        assert packed.n_whole(lengths, CPU) == 0


@pytest.mark.parametrize("training", [True, False])
def test_whole_clips_are_embedded_as_others(training, monkeypatch):
    """DAVEnet's means and every gradient, in the clips' own order."""
    torch.manual_seed(0)
    net, found = ResDAVEnet(0.0625).double().train(training), []
    n_frames = torch.tensor([97, 160, 0, 160, 160, 31, 160, 16])
    mel = torch.randn(8, 40, 160, dtype=torch.float64, requires_grad=True)
    for whole in (False, True):
        if whole:
            whole_where_long(monkeypatch)
        out = net(mel, n_frames)
        weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out)
        found.append([out, *torch.autograd.grad((out * weights).sum(), [mel, *net.parameters()])])
    for apart, together in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "dim_in, dim_out", [(96, 128), pytest.param(256, 96, marks=pytest.mark.slow)]
)
def test_fewer_products_do_not_cost_accuracy(dim_in, dim_out, monkeypatch):
    """In fp32, output and gradients against float64: no further from it than a direct convolution,
    and what is near it for the wrong reason (the slow way taken) is found."""
    torch.manual_seed(0)
    frames, calls = Frames(np.array([300, 17, 998, 64]), CPU), []
    layer, upstream = Convolution(dim_in, dim_out), torch.randn(frames.n, dim_out)
    rows = torch.randn(frames.n, dim_in, requires_grad=True)
    for name in ("convolve", "input_gradient", "weight_gradient"):
        function = getattr(minimal, name)
        monkeypatch.setattr(minimal, name, lambda *x, f=function: calls.append(f) or f(*x))

    def results(dtype):
        x, w = rows.detach().to(dtype).requires_grad_(), layer.weight.detach().to(dtype)
        w.requires_grad_()
        y = F.conv2d(frames_alone(x, frames), w, padding=(0, 4))
        y = y[:, :, 0].transpose(1, 2).flatten(0, 1)[alone_index(frames)]
        return [y, *torch.autograd.grad(y, (x, w), upstream.to(dtype))]

    got = layer(rows, frames)
    got = [got, *torch.autograd.grad(got, (rows, layer.weight), upstream)]
    assert len(calls) == 3
    for g, direct, want in zip(got, results(torch.float32), results(torch.float64), strict=True):
        error, budget = ((x.double() - want).abs().max() for x in (g, direct))
        print(f"error {error:.2g}, of a direct convolution {budget:.2g}, of {want.abs().max():.2g}")
        assert error <= budget + 1e-6 * want.abs().max()


def frames_alone(rows, frames):
    """Clips filled up with zeros: (B, C, 1, longest)."""
    clips = rows.split(frames.lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).transpose(1, 2)[:, :, None]


def alone_index(frames):
    longest = int(frames.lengths.max())
    return torch.cat([i * longest + torch.arange(n) for i, n in enumerate(frames.lengths.tolist())])


def test_no_clip_is_no_error():
    net = ResDAVEnet(0.0625)
    out = net(torch.zeros(0, 40, 32), torch.zeros(0, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, 64)
