"""The compiled losses as torch's operators: opcheck, compile, autocast, hooks; and their budget."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from mcn_ext import ops, reference
from tests import test_loss
from tests.test_loss import (
    BITS,
    PAIRS,
    check,
    cluster,
    contrastive,
    embeddings,
    everything,
    problem,
    values,
)

THREADS = test_loss.THREADS
device, mode = test_loss.device, test_loss.mode  # fixtures: of this module, too


WANTED, KEEP = slice(20, 22), 22  # of the operator's arguments


def noisy(kind, options, n):
    """Options of mcn_loss with all that the losses for noisy pairs take."""
    number = torch.arange(n, device=options["labels"].device)
    form = {"kind": kind, "bias": number.sum() * -0.1, "positives": number // 3}
    return options | form | {"weight": {PAIRS[0]: number / 4, PAIRS[1]: (number % 2, number / n)}}


def spy(monkeypatch):
    """Arguments of every call of the operator from here on."""
    calls, run = [], torch.ops.mcn.loss
    monkeypatch.setattr(torch.ops.mcn, "loss", lambda *args: calls.append(args) or run(*args))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "rince", "sigmoid"])
def test_opcheck(device, mode, monkeypatch, kind):
    rows, options = problem(9, 5, device)
    options = noisy(kind, options, 9) if kind else options
    calls = spy(monkeypatch)
    values(ops, everything(**options), rows)
    monkeypatch.undo()
    assert calls[0][KEEP] is (mode == "keep")
    torch.library.opcheck(torch.ops.mcn.loss.default, calls[0])
    with torch.no_grad():
        total, *found = torch.ops.mcn.loss(*calls[0])
    # Not test_aot_dispatch: it asks for second derivatives.
    torch.library.opcheck(
        torch.ops.mcn.loss_backward.default,
        (total, *found, *calls[0]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend, kind", [("aot_eager", "sigmoid"), ("inductor", "")])
def test_compile_has_no_graph_break(device, mode, backend, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not sizes of an older build
    torch._dynamo.reset()
    rows, options = problem(13, 5, device)
    call = everything(**noisy(kind, options, 13) if kind else options)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    assert_close(values(ops, compiled, rows), values(ops, call, rows), rtol=1e-6, atol=1e-7)


def test_a_loss_scale_meets_gradients_that_fp16_has_not_rounded_away(device, mode):
    def scaled(module, rows, t):
        return module.contrastive_loss(*rows, temperature=t) * 65536

    got = check(scaled, embeddings(64, 9, torch.float16, device, scale=1e4))
    # Without the scale fp16 would lose digits below 2^-14.
    assert all(0 < g.abs().max() < 65536 * 2**-14 for g in got[1:3])


@pytest.mark.parametrize("wrt", ["rows", "temperature", "loss"])
def test_double_backward_is_refused(device, mode, wrt):
    x, y = embeddings(5, 3, device=device)
    t = torch.tensor(0.25, device=device, requires_grad=wrt == "temperature")
    x.requires_grad_(wrt != "temperature"), y.requires_grad_(wrt == "rows")
    loss = ops.contrastive_loss(x, y, temperature=t)
    loss = loss.square() if wrt == "loss" else loss
    (gradient,) = torch.autograd.grad(loss, t if wrt == "temperature" else x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.slow
def test_a_compiled_call_takes_any_number_of_rows(device, mode):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(contrastive(), fullgraph=True, backend=counter)
    for n in (5, 9, 17, 33):
        rows = embeddings(n, 3, device=device)
        for x in rows:
            torch._dynamo.mark_dynamic(x, 0)
        assert_close(compiled(ops, rows, 0.25), contrastive()(ops, rows, 0.25))
    assert counter.frame_count == 1


def test_under_autocast_and_without_gradients(device, mode, monkeypatch):
    rows = embeddings(32, 17, device=device)
    outside, calls = values(ops, contrastive(), rows), spy(monkeypatch)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_close(values(ops, contrastive(), rows), outside, **BITS)
    rows = [x.requires_grad_() for x in rows]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(ops.contrastive_loss(*rows, temperature=0.25), outside[0])
    assert [args[WANTED] for args in calls] == [([1, 1], True)] + 2 * [([0, 0], False)]


@pytest.mark.parametrize("side", [0, 1])
def test_one_input_its_hook_and_a_second_backward(device, mode, side):
    rows, seen = embeddings(9, 5, device=device), []
    full = values(ops, contrastive(), rows)[1 + side]
    rows[side].requires_grad_().register_hook(lambda g: seen.append(g.clone()))
    loss = ops.contrastive_loss(*rows, temperature=0.25)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(seen, [full, full])
    assert torch.equal(rows[side].grad, 2 * seen[0]) and rows[1 - side].grad is None


def test_budget_comes_from_the_argument_or_the_environment(monkeypatch):
    calls, (x, y), needed = spy(monkeypatch), embeddings(10, 3), 10 * 10 * 4
    for variable, budget, keep in (
        (None, None, True),
        (0, None, False),
        (needed, None, True),
        (needed - 1, None, False),
        (0, needed, True),
        (2**40, 0, False),
    ):
        monkeypatch.delenv("MCN_LOSS_BUDGET", raising=False)
        if variable is not None:
            monkeypatch.setenv("MCN_LOSS_BUDGET", str(variable))
        ops.contrastive_loss(x, y, budget=budget)
        assert calls[-1][KEEP] is keep, (variable, budget)


def test_the_reference_runs_where_nothing_is_compiled(monkeypatch):
    rows, options = problem(9, 5, "cpu")
    monkeypatch.setattr(ops, "_unavailable", "not built")
    monkeypatch.setattr(ops, "_cuda", False)  # as it is then, also where the kernels are built
    calls = spy(monkeypatch)
    assert ops.build_info() == {"error": "not built"} and not ops.has_cuda()
    for call, some in (
        (contrastive(), rows[:2]),
        (everything(**options), rows),
        (cluster(options["centroids"], options["labels"]), rows),
    ):
        assert torch.equal(*(torch.as_tensor(call(m, some, 0.25)) for m in (ops, reference)))
    assert not calls
