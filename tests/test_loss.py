"""The compiled losses against the float64 reference: values, gradients and edges. The edges are
tested in plain PyTorch, too, which runs where nothing is compiled.

An error budget: at most that of the reference in the inputs' own dtype, plus 1e-12 in fp64, else
2e-6 (16 units in fp32's last place). Temperatures are numbers that fp32 holds exactly.
"""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mcn_ext import ops, reference

try:  # a machine with a GPU may have pytest alone
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    given = None

ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-11}  # of a gradient that leaves in 16 bit
BITS = {"rtol": 0, "atol": 0}
REPEATS = 9
THREADS = 2  # of this process: equal bits are to be equal with several
NAMES = ("video", "audio", "text")
PAIRS = [("audio", "text"), ("video", "audio"), ("text", "video")]


no_gpu = not (torch.cuda.is_available() and ops.has_cuda())
on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(no_gpu, reason="no GPU, or built without CUDA"),
]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request):
    return request.param


@pytest.fixture(params=["keep", "stream"])
def mode(request, monkeypatch):
    """Both ways through csrc/loss.cpp: the matrix kept within its budget, or tiles streaming."""
    monkeypatch.setenv("MCN_LOSS_BUDGET", str(2**31 if request.param == "keep" else 0))
    return request.param


@pytest.fixture(params=["keep", "stream", "reference"])
def way(request, monkeypatch):
    """As `mode`, or in plain PyTorch."""
    monkeypatch.setenv("MCN_LOSS", request.param)
    monkeypatch.setenv("MCN_LOSS_BUDGET", str(2**31 if request.param == "keep" else 0))


def embeddings(n, d, dtype=torch.float32, device="cpu", count=2, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, d, generator=g, dtype=torch.float64) * scale).to(dtype).to(device)
        for _ in range(count)
    ]


def problem(n, d, device, dtype=torch.float32):
    """Three modalities, and all that mcn_loss takes beside them; the last cluster is empty."""
    number, (mu,) = torch.arange(n, device=device), embeddings(6, d, dtype, device, 1, seed=1)
    return embeddings(n, d, dtype, device, count=3), {
        "centroids": mu,
        "labels": number % 5,
        "cluster_weight": 0.5,
        "margin": 0.125,
        "valid": {"audio": number % 4 != 1, "text": number % 5 != 2},
        "ids": {(a, b): number // (i + 1) for i, a in enumerate(NAMES) for b in NAMES},
    }


def contrastive(**options):
    return lambda m, rows, t: m.contrastive_loss(*rows, temperature=t, **options)


def cluster(mu, labels, **options):
    return lambda m, rows, t: m.cluster_loss(rows[0], mu, labels, temperature=t, **options)


def everything(pairs=PAIRS, **options):
    return lambda m, rows, t: m.mcn_loss(
        dict(zip(NAMES, rows, strict=True)), pairs, temperature=t, **options
    )


def values(module, call, rows, temperature=0.25, frozen=()):
    """Terms of the loss, then gradients of the rows that are not frozen and of the temperature."""
    rows = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(rows)]
    kind = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    t = torch.tensor(temperature, dtype=kind, device=rows[0].device, requires_grad=True)
    terms = call(module, rows, t)
    total, *others = terms if isinstance(terms, tuple) else (terms,)
    wanted = [x for x in (*rows, t) if x.requires_grad]
    gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
    assert total.dtype == kind and not total.shape and not any(v.requires_grad for v in others)
    assert [(g.dtype, g.shape) for g in gradients] == [(x.dtype, x.shape) for x in wanted]
    return [v.detach() for v in (total, *others, *gradients)]


def check(call, rows, temperature=0.25, tolerance=None, frozen=()):
    """Each value within its budget; a row's gradient times its norm, so that all rows count alike.
    Where the exact number is about 0, rounding is relative to the size of what cancels."""
    exact = [x.double() for x in rows]
    norms = iter([x.norm(dim=1, keepdim=True) for i, x in enumerate(exact) if i not in frozen])
    got, eager, want = (
        values(module, call, x, temperature, frozen)
        for module, x in ((ops, rows), (reference, rows), (reference, exact))
    )
    for i, (g, e, w) in enumerate(v for v in zip(got, eager, want, strict=True) if v[0].numel()):
        assert torch.isfinite(g).all(), f"value {i}"
        norm = next(norms).nan_to_num(1.0, 1.0) if w.dim() == 2 else 1.0
        error, budget, size = ((v * norm).abs().max() for v in (g.double() - w, e.double() - w, w))
        size = max(size, 1 / (temperature * len(w)) if w.dim() == 2 else 1.0)
        relative = tolerance or (1e-12 if rows[0].dtype == torch.float64 else 2e-6)
        budget += (relative + ROUNDING.get(g.dtype, 0.0)) * size
        assert error <= budget, f"value {i}: error {error:.3g} > budget {budget:.3g}"
    return got


@pytest.mark.parametrize(
    "dtype, n, d, tile",
    [
        *((dtype, 129, 33, 0) for dtype in (torch.float64, torch.float32, *ROUNDING)),
        *((torch.float32, *size) for size in [(0, 5, 0), (2, 1, 0), (64, 3, 7), (129, 9, 64)]),
        pytest.param(torch.float32, 4097, 5, 0, marks=pytest.mark.slow),
    ],
)
def test_errors_in_budget_and_equal_bits(device, mode, monkeypatch, dtype, n, d, tile):
    monkeypatch.setattr(ops, "_tile", tile)
    rows, options = problem(n, d, device, dtype)
    check(contrastive(), rows[:2])
    check(everything(normalize=False, **options), rows, temperature=4.0)
    got = check(everything(**options), rows)
    for _ in range(REPEATS if n < 1000 else 1):
        assert_close(values(ops, everything(**options), rows), got, **BITS)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "not aligned"])
def test_any_memory_layout(device, mode, layout):
    def lay(x):
        if layout == "not aligned":
            whole = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
            return whole[1:].view(x.shape).copy_(x)
        if layout == "expanded":
            return x[:1].expand(x.shape)
        if layout == "transposed" and x.dim() == 2:
            return x.t().contiguous().t()
        whole = torch.full([2 * s for s in x.shape], 77, dtype=x.dtype, device=device)
        return whole[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)

    d = 24 if layout == "not aligned" else 5  # rows of 24 numbers are read 16 bytes at a time
    x, y, mu = map(lay, embeddings(20, d, device=device, count=3))
    number = torch.arange(20, device=device)
    labels, ids, valid = map(lay, (number, number // 2, number % 3 != 1))
    for call, rows in (
        (lambda lay: contrastive(ids=lay(ids), valid=lay(valid)), [x, y]),
        (lambda lay: cluster(lay(mu), lay(labels), valid=lay(valid)), [x]),
    ):
        want = values(ops, call(torch.Tensor.contiguous), [x.contiguous() for x in rows])
        assert_close(values(ops, call(lambda t: t), rows), want, **BITS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_logits_of_ten_thousand(device, way, dtype):
    # Whole numbers, so that logits are exact; a log-sum of 1e4 in fp32 is rounded by 2^-11.
    x, y = (t.mul(24).round() for t in embeddings(40, 17, dtype, device))
    assert (x.double() @ y.double().t()).abs().max() > 8e3
    labels, tolerance = torch.arange(40, device=device) % 6, None if dtype.itemsize == 8 else 2**-11
    for sign in (1, -1):
        dot = {"normalize": False, "margin": 0.5}
        check(contrastive(**dot), [x, sign * y], 1.0, tolerance)
        check(cluster(sign * y[:6], labels, **dot), [x], 1.0, tolerance)
    check(contrastive(), [x, y], 2**-13, 1e-9 if tolerance is None else 2e-3)


@pytest.mark.parametrize("temperature, normalize", [(0.25, True), (2.0**33, False), (4.0, False)])
def test_the_edge_of_fp16(device, mode, temperature, normalize):
    # Dot products of 4e9 and 1.3e10 are exact in fp32. At temperature 4 many logits of 3e9 tie.
    x, y = (t.sign() * 65504 for t in embeddings(33, 3, torch.float16, device))
    common, labels = {"normalize": normalize, "margin": 0.0}, torch.arange(33, device=device) % 4
    check(contrastive(**common), [x, y], temperature)
    check(cluster(y[:4], labels, **common), [x], temperature)


@pytest.mark.parametrize("scale, other", [(1e-30, 1), (1e30, 1), (1e30, 1e-30), (1e37, 1e-10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_norm_and_rows_at_eps(device, way, dtype, scale, other):
    x, y = embeddings(24, 7, dtype, device)
    x[::2], y[1::3] = x[::2] * scale, y[1::3] * other
    for t in (x, y):
        t[:4] = torch.eye(7)[1] * torch.tensor([[0.0], [5e-13], [1e-12], [2e-12]], dtype=dtype)
    for g in check(contrastive(), [x, y])[1:3]:
        assert not g[:3].any() and g[3].any()
    check(cluster(y[3:8], torch.arange(24, device=device) % 5), [x])


def test_losses_near_zero_have_gradients(device, way):
    x = F.normalize(embeddings(16, 33, device=device, count=1)[0])
    got, want = (
        values(module, contrastive(margin=0.0), [rows, rows], 7 / 256)
        for module, rows in ((ops, x), (reference, x.double()))
    )
    assert 1e-10 < want[0] < 1e-8
    assert all((g - w).abs().max() < 1e-3 * w.abs().max() for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e7])
def test_losses_of_1e_29_have_finite_gradients_at_any_norm(device, mode, scale):
    """What lifts tiny gradients over rounding meets the inverse of a short row's norm."""
    x = torch.tensor([[1.0, 0.05, 0.2, 0.0]], device=device) * scale
    pair, mu = torch.cat([x, x.flip(1)]), torch.eye(2, 4, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    check(cluster(mu, labels, margin=0.0), [x], 1 / 72)
    check(contrastive(), [pair, pair.clone()], 1 / 72)


def test_nothing_to_tell_apart_is_zero_and_ids_are_any_int64(device, way):
    x, y, mu = embeddings(5, 3, device=device, count=3)
    none = torch.zeros(5, dtype=torch.bool, device=device)
    one, labels = torch.arange(5, device=device) == 2, none.long()
    for call, rows in (
        (contrastive(valid=none), [x, y]),
        (contrastive(valid=one), [x, y]),
        (contrastive(ids=labels - 2**63), [x, y]),
        (cluster(mu[:1], labels), [x]),
        (cluster(mu, labels, valid=none), [x]),
    ):
        assert not any(v.any() for v in values(ops, call, rows))
    check(cluster(mu, labels, valid=one), [x])
    for ids in ([-(2**63), 2**63 - 1, -(2**63), -1, 2**63 - 1], [2**32, 0, 2**33, 0, 2**32]):
        check(contrastive(ids=torch.tensor(ids, device=device)), [x, y])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_show_unless_their_row_is_not_there(device, way, bad, normalize):
    x, y, mu = embeddings(7, 3, device=device, count=3)
    number, common = torch.arange(7, device=device), {"normalize": normalize}
    x[2, 1] = bad
    clean = x.nan_to_num(0.0, 0.0, 0.0)
    for call, rows, same in (
        (contrastive, [x, y], [clean, y]),
        (contrastive, [y, x], [y, clean]),
        (lambda **o: cluster(mu, number % 4, **o), [x], [clean]),
    ):
        assert all(v.isnan().all() for v in values(ops, call(**common), rows)), "hidden"
        masked = call(valid=number != 2, **common)
        assert_close(values(ops, masked, rows), values(ops, masked, same))
    mu[3, 0] = bad
    assert values(ops, cluster(mu, number % 4, **common), [y])[0].isnan()


@pytest.mark.parametrize("n, k", [(7, 1), (7, 30), (65, 33)])
def test_number_and_type_of_centroids(device, mode, n, k):
    x, mu = embeddings(n, 5, device=device)[0], embeddings(k, 5, device=device)[1].requires_grad_()
    labels = torch.arange(n, device=device) * 3 % k
    for dtype in (torch.float32, *ROUNDING):
        check(cluster(mu.to(dtype), labels), [x])
    assert not ops.cluster_loss(x, mu, labels).requires_grad


def test_arguments_that_do_not_fit_are_errors(way):
    x, mu, labels = torch.randn(3, 4), torch.randn(2, 4), torch.zeros(3, dtype=torch.int64)
    for value in (0.0, -0.1, math.nan, math.inf, torch.ones(3)):
        with pytest.raises(ValueError, match="temperature must be a number above 0"):
            ops.contrastive_loss(x, x, temperature=value)
        with pytest.raises(ValueError, match="temperature must be a number above 0"):
            ops.cluster_loss(x, mu, labels, temperature=value)
    with pytest.raises(ValueError, match="same shape"):
        ops.contrastive_loss(x, x[:2])
    with pytest.raises(ValueError, match="must be"):
        ops.cluster_loss(x, mu[:, :3], labels)


@pytest.mark.parametrize("bad", [2, -1, 2**40 + 1])
def test_labels_outside_are_named_unless_invalid(way, bad):  # on a GPU it ends the context
    (x, mu), valid = embeddings(4, 3), torch.arange(4) != 2
    garbage, zero = (torch.tensor([0, 1, label, 0]) for label in (bad, 0))
    with pytest.raises(ValueError, match=rf"labels\[2\] = {bad} is outside \[0, 2\)"):
        ops.cluster_loss(x, mu[:2], garbage)
    got, want = (values(ops, cluster(mu[:2], y, valid=valid), [x]) for y in (garbage, zero))
    assert_close(got, want, **BITS)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": None},
        {"ids": "shared"},
        {"ids": "partly"},
        {"valid": None},
        {"cluster_weight": 0.0},
        {"clustered": ["text", "audio"]},
        {"clustered": []},
        {"centroids": None, "labels": None},
        {"pairs": []},
        {"pairs": [["video", "text"], ("audio", "video")]},
        {"pairs": [("audio", "audio"), ("text", "audio")]},
        {"pairs": PAIRS[:1], "clustered": ["text"], "frozen": [1]},
        {"frozen": [0, 1, 2]},
        {"mixed": True},
        {"alone": math.nan, "centroids": None, "labels": None},
        {"alone": math.inf, "clustered": ["text", "audio"], "normalize": False},
    ],
    ids=str,
)
def test_mcn_loss_equals_the_reference(device, mode, change):
    rows, options = problem(37, 9, device)
    ids, options = options["ids"][PAIRS[1]], options | change
    frozen, mixed = options.pop("frozen", ()), options.pop("mixed", False)
    rows[0][17] = options.pop("alone", 0.5)  # neither of this row's partners is valid: in no pair
    if mixed:
        rows = [rows[0].half(), rows[1], rows[2].bfloat16()]
    if "ids" in change:
        options["ids"] = {"shared": ids, "partly": {PAIRS[2]: ids}}.get(change["ids"])
    check(everything(**options), rows, frozen=frozen)


def test_kernels_do_not_depend_on_the_number_of_threads(mode, request):
    # The library's matrix products may: MKL splits long sums between threads (y's gradient at
    # N = 1000, D = 13). Here y is the identity: S = x, and x's gradient P, exact in any order.
    rows, results, before = [embeddings(129, 129)[0], torch.eye(129)], [], torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(values(ops, contrastive(normalize=False), rows))
    assert_close(results[0][:2], results[1][:2], **BITS)
    assert_close(*results, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_more_elements_than_32_bits_count(device):
    # Every row 100 times: all of the float64 answer comes from a matrix of 464 x 464.
    row = torch.arange(46400, device=device)
    i, j = row % 464, row // 100
    rows = embeddings(464, 4, device=device)

    def ours(x, y):
        return ops.contrastive_loss(x[i], y[j], temperature=0.5, margin=0.0, budget=0)

    def exact(x, y):
        z = F.normalize(x) @ F.normalize(y).t() / 0.5
        sums = z.logsumexp(dim=1)[i] + z.logsumexp(dim=0)[j] + 2 * math.log(100)
        return (sums - 2 * z[i, j]).mean()

    found = []
    for loss, inputs in ((ours, rows), (exact, [x.double() for x in rows])):
        inputs = [x.requires_grad_() for x in inputs]
        value = loss(*inputs)
        found.append([value, *torch.autograd.grad(value, inputs)])
    # An entry is a sum of 46,400 in fp32, in the order of the CPU's matrix library: one near 0 is
    # as good as its neighbours are large. A wrong index would be off by all of that.
    for got, want in zip(*found, strict=True):
        size = float(want.abs().max())
        assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(device, way, normalize):
    rows, options = problem(6, 3, device, torch.float64)
    call = everything(normalize=normalize, **options)
    inputs = [x.requires_grad_() for x in (*rows, torch.full_like(rows[0][0, 0], 0.5))]
    assert torch.autograd.gradcheck(lambda *x: call(ops, x[:3], x[3]).total, inputs)


if given:

    @settings(max_examples=40, deadline=None)
    @given(
        n=st.integers(0, 40),
        d=st.integers(1, 9),
        k=st.integers(1, 9),
        seed=st.integers(0, 999),
        temperature=st.integers(1, 160),
        margin=st.sampled_from([0, 0.125]),
        normalize=st.booleans(),
        tile=st.sampled_from([0, 1, 7, 33]),
        budget=st.sampled_from([0, 2**31]),
        double=st.booleans(),
    )
    def test_any_problem(device, n, d, k, seed, temperature, tile, budget, double, **common):
        g, dtype = torch.Generator().manual_seed(seed), (torch.float32, torch.float64)[double]
        x, y, mu = embeddings(max(n, k), d, dtype, device, count=3, seed=seed)
        x, y, mu, temperature = x[:n], y[:n], mu[:k], temperature / 16
        ids, labels = (torch.randint(high, (n,), generator=g).to(device) for high in (n + 1, k))
        common["valid"] = torch.randint(4, (n,), generator=g).to(device) > 0
        # An error may be some units in the last place of the largest logit.
        largest = 1 if common["normalize"] else torch.cat([x, y, mu]).square().sum(dim=1).max()
        tolerance = (1e-13 if double else 1e-6) * float(2 + largest / temperature)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "_tile", tile)
            patch.setenv("MCN_LOSS_BUDGET", str(budget))
            check(contrastive(ids=ids, **common), [x, y], temperature, tolerance)
            check(cluster(mu, labels, **common), [x], temperature, tolerance)
