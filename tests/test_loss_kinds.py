"""Contrastive losses for noisy pairs: weights, bags, DCL, RINCE, sigmoid; the reference against
textbooks, the compiled ones against the reference."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid
from torch.testing import assert_close

import mcn_ext
from mcn_ext import ops
from mcn_ext.reference import KINDS, contrastive_loss, mcn_loss, unit_rows, volume
from tests import test_loss
from tests.test_loss import BITS, check, device, mode, problem, values  # noqa: F401

N, T, MARGIN = 9, 0.3, 0.05
IDS = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7, 8])
VALID = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1]).bool()
BAGS = torch.tensor([0, 0, 0, 1, 0, 2, 2, 3, 4])  # 0 and 4 have one id: in no sum
WEIGHT = torch.tensor([1, 0.5, 3, 0, 2, 1, 0.25, 1, 4], dtype=torch.float64)
CASES = [
    {},
    {"ids": IDS, "valid": VALID},
    {"positives": BAGS},
    {"weight": WEIGHT},
    {"weight": (WEIGHT, WEIGHT.flip(0)), "positives": BAGS, "ids": IDS, "valid": VALID},
]


def rows(n=N, d=5, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(0)
    both = torch.randn(2, n, d, generator=g, dtype=torch.float64) * scale
    return [x.to(dtype).requires_grad_() for x in both.unbind()]


def textbook(x, y, kind, ids=None, valid=None, positives=None, weight=None, bias=-1.0, q=0.4):
    """One number after another, as the papers write them; nothing shared with the implementation.
    RINCE's lambda is 0.2."""
    n = len(x)
    x, y = (torch.stack([row / row.norm() for row in side]) for side in (x, y))
    weights = weight if isinstance(weight, tuple) else (weight, weight)
    weights = [torch.ones(n, dtype=x.dtype) if w is None else w for w in weights]
    there = [i for i in range(n) if (valid is None or valid[i]) and weights[0][i] + weights[1][i]]
    total = 0.0
    for a, b, w in ((x, y, weights[0]), (y, x, weights[1])):
        of_rows = 0.0
        for i in there:
            near, far = [], []
            for j in there:
                if i != j and ids is not None and ids[i] == ids[j]:
                    continue
                right = i == j or (positives is not None and bool(positives[i] == positives[j]))
                (near if right else far).append((a[i] @ b[j] - MARGIN * right) / T)
            near, far = torch.stack(near), torch.stack([*far, torch.tensor(-math.inf).double()])
            s, o = near.exp().sum(), far.exp().sum()
            row = {
                "softmax": lambda s=s, o=o: -(s / (s + o)).log(),
                "dcl": lambda s=s, o=o: -(s / o).log(),
                "rince": lambda s=s, o=o: -(s**q) / q + (0.2 * (s + o)) ** q / q,
                "sigmoid": lambda near=near, far=far: (
                    -0.5 * (logsigmoid(near + bias).sum() + logsigmoid(-far - bias).sum())
                ),
            }[kind]()
            of_rows = of_rows + w[i] * row
        total = total + of_rows / sum(w[i] for i in there)
    return total


def loss_of(x, y, kind, **options):
    options = {"temperature": T, "margin": MARGIN, "q": 0.4, "lam": 0.2, "bias": -1.0} | options
    return contrastive_loss(x, y, kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_textbook(kind, case):
    x, y = rows()
    got, want = loss_of(x, y, kind, **case), textbook(x, y, kind, **case)
    assert_close(got, want, rtol=1e-10, atol=1e-12)
    got, want = (torch.autograd.grad(v, (x, y)) for v in (got, want))
    assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_with_temperature_and_bias(kind):
    x, y = rows()
    t, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, -1.0))
    options = {**CASES[-1], "margin": MARGIN, "kind": kind, "q": 0.4, "lam": 0.2}
    assert torch.autograd.gradcheck(
        lambda x, y, t, bias: contrastive_loss(x, y, temperature=t, bias=bias, **options),
        (x, y, t, bias),
    )


def test_equals_siglip_and_clip():
    """SigLIP as its paper's Algorithm 1 writes it; RINCE's limit q -> 0; CLIP's cross entropy."""
    x, y = rows()
    logits = 10 * unit_rows(x) @ unit_rows(y).T - 10
    labels = 2 * torch.eye(N) - 1
    want = -logsigmoid(labels * logits).sum() / N
    assert_close(contrastive_loss(x, y, kind="sigmoid", temperature=0.1, margin=0), want)
    same = torch.arange(N)
    logits = unit_rows(x) @ unit_rows(y).T / T
    want = cross_entropy(logits, same) + cross_entropy(logits.T, same)
    got = contrastive_loss(x, y, kind="rince", temperature=T, margin=0, q=1e-6, lam=1.0)
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    got = contrastive_loss(
        x, y, temperature=T, margin=0, positives=same, weight=torch.full((N,), 7)
    )
    assert_close(got, want)


def test_equals_symile(monkeypatch):
    """Symile's in-batch form, its shuffles taken out: a product of two modalities is the third's
    candidate. The package has queries of one side alone, so the other direction weighs nothing."""
    symile = pytest.importorskip("symile")
    monkeypatch.setattr(torch, "randperm", torch.arange)
    x, y = rows()
    (z, _) = rows(scale=0.5)
    x, y, z = (unit_rows(v + k) for k, v in enumerate((x, y, z)))
    want = symile.Symile()([x, y, z], torch.tensor(4.0))
    one_side = (torch.ones(N), torch.zeros(N))
    options = {"temperature": 1 / 4, "margin": 0, "normalize": False, "weight": one_side}
    got = sum(
        contrastive_loss(a, b * c, **options) for a, b, c in ((x, y, z), (y, x, z), (z, x, y))
    )
    assert_close(got / 3, want)


@pytest.mark.parametrize("kind", KINDS)
def test_never_nan_on_finite_input(kind):
    for scale, normalize in ((1.0, True), (1e-30, True), (0.0, True), (1e4, False), (1e18, False)):
        for case in CASES:
            x, y = rows(dtype=torch.float32, scale=scale)
            t = torch.tensor(0.01, requires_grad=True)
            options = {"temperature": t, "normalize": normalize, "q": 1.0}
            loss = loss_of(x, y, kind, **{**case, **options})
            gradients = torch.autograd.grad(loss, (x, y, t))
            finite = [bool(torch.isfinite(v).all()) for v in (loss, *gradients)]
            # Dot products of 1e36 and their gradient with respect to the temperature leave fp32.
            assert all(finite) or scale == 1e18, (kind, scale, case, finite)
            assert not loss.isnan() or scale == 1e18


@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind):
    x, y = rows()
    nothing = torch.zeros(N)
    for options in (
        {"valid": torch.zeros(N, dtype=torch.bool)},
        {"weight": nothing},
        {"weight": (nothing, nothing)},
    ):
        loss = loss_of(x, y, kind, **options)
        assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (x, y)))
    # Nothing to be told from: one row, all in one bag, all with one id.
    for n, options in (
        (0, {}),
        (1, {}),
        (N, {"positives": nothing.long()}),
        (N, {"ids": nothing.long()}),
    ):
        loss = loss_of(x[:n], y[:n], kind, **options)
        assert (loss == 0) == (kind != "sigmoid" or n == 0) and torch.isfinite(loss)
    # A weight of 0 is a row that is not valid; a common factor changes nothing.
    gone = torch.arange(N) != 3
    want = loss_of(x, y, kind, valid=gone)
    assert_close(loss_of(x, y, kind, weight=gone.double() * 1e-30), want)
    bad = gone.double()
    for value in (math.nan, math.inf, -1.0):
        bad[5] = value
        assert loss_of(x, y, kind, weight=bad).isnan()
        assert not loss_of(x, y, kind, weight=bad, valid=torch.arange(N) != 5).isnan()
    assert not loss_of(*rows(), kind, weight=gone).isnan()
    with torch.no_grad():
        x[3] = math.nan
    assert loss_of(x, y, kind).isnan() and not loss_of(x, y, kind, weight=gone).isnan()


def forms(kind, n, device):  # noqa: F811
    """Calls for test_loss.check: plain, bags, weights, and all there is in one."""
    number = torch.arange(n, device=device)
    bags, weight = number // 3, (number % 7) / 4
    ids, there = number // 2 % (n - n // 4 + 1), number % 5 != 2
    noisy = {"positives": bags, "weight": (weight, weight.flip(0)), "ids": ids, "valid": there}
    loss = {"kind": kind, "q": 0.5, "lam": 0.25, "margin": 0.125}

    def call(**options):
        # A bias made of the temperature: its gradient is in the temperature's.
        return lambda m, rows, t: m.contrastive_loss(
            *rows, temperature=t, bias=-4 * t, **{**loss, **options}
        )

    return [call(), call(positives=bags), call(weight=weight), call(**noisy)], call, noisy, loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype, n, d, tile",
    [
        *((dtype, 70, 24, 0) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
        # 200: blocks of 64 x 128 that hold negatives alone.
        *((torch.float32, *size) for size in [(0, 5, 0), (2, 1, 0), (131, 9, 64), (200, 8, 0)]),
    ],
)
def test_compiled_errors_in_budget(device, mode, monkeypatch, kind, dtype, n, d, tile):  # noqa: F811
    monkeypatch.setattr(ops, "_tile", tile)
    rows, options = problem(n, d, device, dtype)
    calls, call, noisy, loss = forms(kind, n, device)
    for one in calls:
        check(one, rows[:2])
    check(calls[-1], rows[:2], frozen=(1,))
    check(call(**noisy, normalize=False), rows[:2], temperature=4.0)
    weight = {("audio", "text"): noisy["weight"], ("text", "video"): noisy["weight"][0]}
    options |= loss | {"positives": noisy["positives"], "weight": weight}
    names, pairs = ("video", "audio", "text"), [*weight, ("video", "audio")]

    def everything(m, rows, t):
        return m.mcn_loss(
            dict(zip(names, rows, strict=True)), pairs, temperature=t, bias=-4 * t, **options
        )

    got = check(everything, rows)
    for _ in range(test_loss.REPEATS if n else 0):
        assert_close(values(ops, everything, rows), got, **BITS)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_edges(device, mode, kind):  # noqa: F811
    x, y = (v.to(device).float() for v in rows())
    zero = torch.zeros(N, device=device)
    gone = (torch.arange(N, device=device) != 3).float()
    call = forms(kind, N, device)[1]
    for options in (
        {"positives": zero.long()},
        {"ids": zero.long()},
        {"valid": zero.bool()},
        {"weight": zero},
        {"weight": (gone, zero)},
        {"weight": gone * 1e-30},
        {"weight": 1 - gone},
        {"positives": zero.long(), "weight": gone},
        {"weight": torch.tensor([1, 1, 1e-30, 1e30, 1, 1, 1, 1, 1], device=device)},
        {"weight": torch.tensor([1e-50] * 3 + [1] * 6, dtype=torch.float64, device=device)},
    ):
        check(call(**options), [x, y])
    for scale, temperature in ((1e-30, 0.25), (0.0, 0.25), (1.0, 2**-13)):
        for one in forms(kind, N, device)[0]:
            loose = None if temperature == 0.25 else 2e-3
            check(one, [x * scale, y * scale], temperature, loose)
    broken = x.clone()
    broken[3] = math.nan
    assert values(ops, call(), [broken, y])[0].isnan()
    assert_close(
        values(ops, call(weight=gone), [broken, y]),
        values(ops, call(weight=gone), [x.where(gone[:, None] > 0, 0), y]),
    )
    for value in (math.nan, -1.0, math.inf):
        bad = torch.where(gone == 0, value, gone)
        assert all(v.isnan().any() for v in values(ops, call(weight=bad), [x, y])[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_any_size_fit_16_bits(device, mode, dtype):  # noqa: F811
    """Of many mates, and of a sigmoid that is nearly 0: what lifts them must know the largest."""
    x, y = (v.to(device, dtype) for v in rows(64, 16))
    bags = torch.arange(64, device=device) // 32
    for kind in KINDS:
        options = {"kind": kind, "q": 0.5, "positives": bags, "bias": -30.0}
        check(lambda m, rows, t, o=options: m.contrastive_loss(*rows, temperature=t, **o), [x, y])


def test_rince_where_its_powers_are_nearly_equal(device, mode):  # noqa: F811
    """q near 0 is the softmax; for q = lam = 1 three orthogonal rows have 2 exp(0) a direction."""
    eye = torch.eye(3, device=device)
    for module in (ops, mcn_ext.reference):
        for temperature in (1 / 10, 1 / 30, 1 / 59):
            options = {"kind": "rince", "temperature": temperature, "margin": 0.0}
            loss = module.contrastive_loss(eye, eye, q=1.0, lam=1.0, **options)
            assert_close(loss, torch.tensor(4.0, device=device), rtol=1e-5, atol=0)
        x, y = (v.detach().to(device).float() for v in rows())
        got = module.contrastive_loss(x, y, kind="rince", q=1e-12, lam=1.0)
        assert_close(got, module.contrastive_loss(x, y), rtol=1e-5, atol=0)
    short = {"kind": "rince", "q": 1.0, "lam": 0.5, "margin": 0.0}
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(device) * 1e-7
    for row in values(
        ops, lambda m, rows, t: m.contrastive_loss(*rows, temperature=t, **short), [x, x], 1 / 59
    ):
        assert torch.isfinite(row).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_nan_is_hidden(device, mode, kind):  # noqa: F811
    """A logit that is NaN, among others and among mates; and a temperature."""
    x = torch.tensor([[1e25, 1e25], [1, 1], [2, 1], [3, 1]], device=device)
    y = torch.tensor([[1, 1], [1e25, -1e25], [1, 2], [1, 3]], device=device)
    infinite, zero = x.clone(), y.clone()
    infinite[0], zero[1] = torch.tensor([math.inf, 1]), torch.tensor([0.0, -1])
    bags = torch.tensor([0, 0, 1, 2], device=device)
    options = {"kind": kind, "normalize": False, "bias": -1.0}
    # 1e50 - 1e50 is inf - inf, or inf where products are added with FMA; inf * 0 is NaN everywhere.
    rows = [[infinite, zero]] + [[x, y]] * bool((x @ y.t()).isnan().any())
    for more, xy in itertools.product(({}, {"positives": bags}), rows):
        call = lambda m, xy, t, o=options | more: m.contrastive_loss(*xy, temperature=t, **o)  # noqa: E731
        assert values(ops, call, xy, 1.0)[0].isnan()
    nan = torch.tensor(math.nan, device=device)
    assert ops.contrastive_loss(x[1:], y[2:].repeat(2, 1)[:3], temperature=nan, kind=kind).isnan()


def test_wrong_positives_pull_less():
    """A partner far from its row: the softmax pulls it hardest, RINCE with q = 1 hardly at all."""
    right = torch.eye(8, dtype=torch.float64)
    wrong = right.clone()
    wrong[0], wrong[1] = right[1].clone(), right[0].clone()  # two partners changed places
    pulls = {}
    for kind, q in (("softmax", 0.5), ("rince", 0.1), ("rince", 1.0)):
        x = right.clone().requires_grad_()
        loss = contrastive_loss(x, wrong, kind=kind, q=q, temperature=0.2, lam=0.01)
        rows_of = torch.autograd.grad(loss, x)[0].norm(dim=1)
        pulls[kind, q] = float(rows_of[0] / rows_of[2:].mean())
    assert pulls["softmax", 0.5] > pulls["rince", 0.1] > pulls["rince", 1.0]


def test_all_terms_and_the_extension_take_them():
    x, y = rows(dtype=torch.float32)
    pair, both = ("a", "b"), {"a": x, "b": y}
    options = {"kind": "rince", "q": 0.5, "positives": BAGS}
    want = contrastive_loss(x, y, weight=WEIGHT, **options)
    for module in (mcn_ext, None):
        call = module.mcn_loss if module else mcn_loss
        assert_close(call(both, [pair], weight={pair: WEIGHT}, **options).total, want)
    assert_close(mcn_ext.contrastive_loss(x, y, weight=WEIGHT, **options), want)
    with pytest.raises(ValueError, match=r"weight is of \[\('b', 'a'\)\]"):
        mcn_ext.mcn_loss(both, [pair], weight={("b", "a"): WEIGHT})
    for wrong in ({"kind": "clip"}, {"q": 0.0, "kind": "rince"}, {"lam": 0.0, "kind": "rince"}):
        with pytest.raises(ValueError, match="must be"):
            mcn_ext.contrastive_loss(x, y, **wrong)


def test_the_volume_is_blind_where_video_and_audio_agree():
    text, video = rows(4, 6)
    audio = rows(4, 6, scale=2.0)[1].flip(0)
    a, b, c = (unit_rows(v)[i] for v, i in ((text, 2), (video, 1), (audio, 1)))
    ab, ac, bc = a @ b, a @ c, b @ c
    want = (1 + 2 * ab * ac * bc - ab**2 - ac**2 - bc**2).sqrt()  # a 3 x 3 determinant
    assert_close(volume(text, video, audio)[2, 1], want)
    assert_close(volume(text, video), (1 - (unit_rows(text) @ unit_rows(video).T) ** 2).sqrt())
    assert volume(text, video, video * 3).max() < 1e-7  # whatever the text
