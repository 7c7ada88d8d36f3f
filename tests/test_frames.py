"""Packed frames and convolutions' lines: as if each clip had been convolved alone."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

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


@pytest.mark.parametrize("kind, stride", [(Convolution, 1), (Convolution, 2), (Shortcut, 2)])
def test_a_convolution_is_that_of_each_clip_alone(kind, stride):
    torch.manual_seed(0)
    lengths = np.array([7, 0, 300, 1, 24, 2, 151])
    frames, layer = Frames(lengths, CPU), kind(5, 3, stride).double()
    rows = torch.randn(frames.n, 5, dtype=torch.float64, requires_grad=True)
    got = layer(rows, frames)
    want = torch.cat([F.conv2d(clip.t()[None, :, None], layer.weight, stride=(1, stride),
                               padding=layer.padding)[0, :, 0].t()
                      for clip in rows.split(lengths.tolist()) if len(clip)])
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    inputs = (rows, layer.weight)
    for g, w in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


def test_no_clip_is_no_error():
    net = ResDAVEnet(0.0625)
    out = net(torch.zeros(0, 40, 32), torch.zeros(0, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, 64)
