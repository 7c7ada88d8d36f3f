"""DAVEnet and BatchNorm beside a plain formulation: each clip convolved alone."""

import copy

import pytest
import torch
from torch.nn import functional as F

from mcn_ext.encoders import ResDAVEnet, SentenceMaxPool
from mcn_ext.model import MCN
from tests.test_model import SIZES, batch

LENGTHS = {"ragged": [97, 160, 0, 33, 31, 16, 1, 2, 17], "full": [160] * 3, "one": [0, 1, 0]}


def network(dtype=torch.float64, **options):
    torch.manual_seed(0)
    net = ResDAVEnet(0.0625, **options)
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        # Not the ones and zeros of the start.
        if value.is_floating_point() and ("bn" in name or "running" in name):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return net.to(dtype)


def sounds(lengths, dtype=torch.float64):
    """Spectrograms that are NaN after their frames, (n, 40, T), and their numbers of frames."""
    n_frames = torch.tensor(lengths)
    mel = torch.randn(len(lengths), 40, max(*lengths, 16) + 16).to(dtype) * 20 - 40
    there = torch.arange(mel.shape[2]) < n_frames[:, None, None]
    return torch.where(there, mel, torch.nan).requires_grad_(), n_frames


def plain(net, clips, n_averaged):
    """Means over time (C,) of clips (40, T), each convolved alone; BatchNorm over all frames."""

    def conv(clips, layer):
        weight, stride = layer.weight[:, :, 0], layer.stride[1]
        return [
            F.conv1d(x[None], weight, stride=stride, padding=weight.shape[2] // 2)[0] for x in clips
        ]

    def norm(clips, bn):
        mean, var = bn.running_mean, bn.running_var
        frames = torch.cat(clips, dim=1)
        if net.training and frames.shape[1] > 1:
            mean, var = frames.mean(dim=1), frames.var(dim=1, correction=0)
        scale = bn.weight / (var + bn.eps).sqrt()
        return [(x - mean[:, None]) * scale[:, None] + bn.bias[:, None] for x in clips]

    clips = [net.conv1.weight[:, 0, :, 0] @ x for x in clips]
    clips = [F.relu(x) for x in norm(clips, net.bn1)]
    for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
        inner = [F.relu(x) for x in norm(conv(clips, block.conv1), block.bn1)]
        inner = norm(conv(inner, block.conv2), block.bn2)
        if block.downsample is not None:
            clips = norm(conv(clips, block.downsample[0]), block.downsample[1])
        clips = [F.relu(x + y) for x, y in zip(clips, inner, strict=True)]
    return torch.stack([x[:, :n].mean(dim=1) for x, n in zip(clips, n_averaged, strict=True)])


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "lengths, filled", [("ragged", False), ("ragged", True), ("full", False), ("one", False)]
)
def test_davenet_is_that_of_each_clip_alone(lengths, filled, training, dtype, bound):
    """``filled``: clips are convolved with zeros to the same length, and averaged without."""
    net, (mel, n) = network(dtype).train(training), sounds(LENGTHS[lengths], dtype)
    x = mel.detach().nan_to_num(0.0).double().requires_grad_()
    found = net(mel.nan_to_num(0.0), n, n * 0 + mel.shape[2]) if filled else net(mel, n)
    exact = network().train(training)
    there = [i for i in range(len(n)) if n[i] or filled]
    clips = [F.pad(x[i, :, : n[i]], (0, filled * (x.shape[2] - n[i]))) for i in there]
    want = x.new_zeros(len(n), net.dim)
    want[there] = plain(exact, clips, [max(1, n[i] // 16) for i in there])
    gradients = []
    for y, inputs in ((found, [mel, *net.parameters()]), (want, [x, *exact.parameters()])):
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        gradients.append(torch.autograd.grad((y * weights).sum(), inputs))
    assert (found - want).norm() <= bound * want.norm()
    for got, right in zip(*gradients, strict=True):
        assert (got - right).norm() <= 10 * bound * (right.norm() + 1)


def test_running_statistics_are_of_real_frames():
    net, (mel, n) = network().train(), sounds(LENGTHS["ragged"])
    before = net.bn1.running_mean.clone(), net.bn1.running_var.clone()
    net(mel, n)
    frames = [
        net.conv1.weight[:, 0, :, 0] @ x[:, :length] for x, length in zip(mel, n, strict=True)
    ]
    frames = torch.cat(frames, dim=1)
    torch.testing.assert_close(net.bn1.running_mean, 0.9 * before[0] + 0.1 * frames.mean(dim=1))
    torch.testing.assert_close(net.bn1.running_var, 0.9 * before[1] + 0.1 * frames.var(dim=1))
    assert net.layer4[1].bn2.num_batches_tracked == 1


@pytest.mark.parametrize("shape", [(4, 40, 32), (4, 40, 0), (0, 40, 32)])
def test_silence_trains_and_leaves_statistics_alone(shape):
    net = network().train()
    before = copy.deepcopy(list(net.buffers()))
    out = net(torch.zeros(shape).double(), torch.zeros(shape[0], dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (shape[0], 64) and not out.any()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_change_nothing(lengths, dtype):
    """Two steps: gradients and running statistics are equal to the bit."""
    found = []
    for checkpointed in (False, True):
        net = network(torch.float32, checkpoint_activations=checkpointed).train()
        mel, n = sounds(LENGTHS[lengths], torch.float32)
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = net(mel, n)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([out, mel.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bfloat16_is_near_float32():
    net, inputs = network(torch.float32).train(), sounds(LENGTHS["ragged"], torch.float32)
    want = net(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(*inputs)
    assert found.dtype == torch.float32 and (found - want).norm() < 0.03 * want.norm()


def test_sentence_max_pool_ignores_padding():
    pool = SentenceMaxPool(5, 7)
    torch.nn.init.constant_(pool.fc.bias, 3.0)  # ReLU(bias) of a padding word would win
    words = torch.zeros(1, 3, 5)
    words[0, 0] = -torch.ones(5)
    masked = pool(words, torch.tensor([[True, False, False]]))
    torch.testing.assert_close(masked, pool(words[:, :1], torch.ones(1, 1)))


@pytest.mark.slow
def test_a_training_step_compiles_without_a_graph_break():
    torch.manual_seed(0)
    model, data, found = MCN("AVT", **SIZES), batch(), []
    compiled = copy.deepcopy(model)
    for net in (model, torch.compile(compiled, fullgraph=True, backend="aot_eager")):
        embeddings, errors = net(data)
        outputs = [*embeddings.values(), *errors.values()]
        sum(x.square().sum() for x in outputs).backward()
        found.append([*outputs, *(p.grad for p in net.parameters()), *net.buffers()])
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)
