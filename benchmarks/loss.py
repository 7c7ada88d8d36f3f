"""The fused losses against their alternatives: time and extra memory, side by side in one run.

    python benchmarks/loss.py            # CPU fp32, 6 minutes on 2 idle cores; GPU bf16, 2 minutes
    QUICK=1 python benchmarks/loss.py    # a trial of seconds, at tiny sizes

Each implementation normalises rows x, y (N, D), takes the softmax at temperature 0.05 in both
directions, with margin 0.001 where it has one, and must first agree with mcn_ext.reference. With
16-bit inputs "eager" has 16-bit similarities and log_softmax. "terms" is mcn_loss of three
modalities with K 256 clusters.

Time: forward and backward together; on a GPU among calls in a row that do not wait, as in training.
There host_ms is the part of it until all is launched, and graph_ms a replay of a CUDA graph,
without the host.

Memory: the peak above the inputs, less the gradients returned. On a CPU (Linux) a process of its
own calls the loss at a tiny size (thread pools; torch.compile at full size), notes VmRSS, resets
VmHWM by /proc/self/clear_refs, calls the loss, and reads VmHWM. At N 16384 eager needs 6 GiB.
"""

import ctypes
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common import DEVICE, QUICK, ROOT, capture, describe, now, relative, save, show, take_turns
from torch.nn import functional as F

import mcn_ext

TEMPERATURE, MARGIN, K = 0.05, 0.001, 256
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
PAIR, TERMS = ("eager", "compile", "open_clip", "ours_stream", "ours"), ("eager", "ours")
SWEEP = ("eager", "compile", "ours", "ours_stream")
HALF = [("ms", "eager", 0.5), ("ms", "open_clip", 0.5)]
# Losses for noisy pairs, each beside the softmax; bags of 4 rows, as --loss milnce has.
KINDS = {
    "weight": lambda x: {"weight": torch.arange(len(x), device=x.device) % 4 / 2},
    "dcl": lambda x: {"kind": "dcl"},
    "rince": lambda x: {"kind": "rince"},
    "sigmoid": lambda x: {"kind": "sigmoid"},
    "bags": lambda x: {"positives": torch.arange(len(x), device=x.device) // 4},
}


def kinds(n, d, like, repeats):
    """Rows of the plan: each loss' time and memory are to be near the softmax's."""
    for kind in KINDS:
        limit = 1.2 if kind == "bags" else 1.1
        targets = [(what, like, limit) for what in ("ms", "extra_mib")]
        yield n, d, False, (like, f"{like}_{kind}"), repeats, targets


# N, D, mcn_loss?, implementations, repeats, and targets of the last implementation:
# (what, whose, at most so many times that), or (what, None, at most so much)
ROWS = {
    "cpu": [
        (4096, 512, False, PAIR, 5, [("ms", "eager", 0.45), ("extra_mib", "eager", 0.3)]),
        (2048, 1024, False, PAIR, 5, [("ms", "eager", 0.85)]),
        (4096, 6144, False, TERMS, 3, [("ms", "eager", 0.97), ("extra_mib", "eager", 0.25)]),
        (2048, 1024, True, TERMS, 5, [("ms", "eager", 0.8), ("extra_mib", "eager", 0.45)]),
        (16384, 256, False, SWEEP, 2, [("ms", "eager", 0.4), ("extra_mib", None, 128)]),
        *((n, 256, False, SWEEP, 5, []) for n in (256, 1024, 4096)),  # the figure's
        *(row for like in ("ours", "ours_stream") for row in kinds(4096, 1024, like, 5)),
    ],
    "cuda": [
        (4096, 512, False, PAIR, 20, [*HALF, ("ms", "compile", 0.9)]),
        (4096, 6144, False, PAIR, 20, [*HALF, ("ms", "compile", 1.0)]),
        (2048, 1024, True, ("eager", "compile", "ours"), 20, []),
        (16384, 512, False, PAIR, 5, HALF),
        (
            *(65536, 1024, False, ("eager", "compile", "open_clip", "ours_stream"), 3),
            [*HALF, ("ms", "compile", 1.3), ("extra_mib", None, 512)],
        ),
        (262144, 1024, False, ("ours_stream",), 2, [("ms", None, 1400)]),
        *kinds(4096, 6144, "ours", 20),
        *kinds(65536, 1024, "ours_stream", 3),
    ],
    "quick": [
        (256, 64, False, (*PAIR[:1], *PAIR[2:]), 3, [("ms", "eager", 1)]),
        (128, 64, True, TERMS, 3, []),
        *kinds(256, 64, "ours", 3),
    ],
}


# ------------------------------------------------------------------------------ implementations
def symmetric(z):
    target = torch.arange(len(z), device=z.device)
    return F.nll_loss(F.log_softmax(z, 1), target) + F.nll_loss(F.log_softmax(z.t(), 1), target)


def eager(x, y, temperature=TEMPERATURE, margin=MARGIN):
    s = F.normalize(x) @ F.normalize(y).t()
    return symmetric((s - margin * torch.eye(len(s), dtype=s.dtype, device=s.device)) / temperature)


def eager_terms(video, audio, text, centroids, labels):
    pairs = eager(video, audio) + eager(video, text) + eager(audio, text)
    mu = F.normalize(centroids)
    own = MARGIN * F.one_hot(labels, len(mu)).to(mu.dtype)
    clusters = sum(
        F.cross_entropy((F.normalize(rows) @ mu.t() - own) / TEMPERATURE, labels)
        for rows in (video, audio, text)
    )
    return pairs / 3 + clusters / (3 * math.log(len(mu)))


def fused(module, *inputs, margin=MARGIN, **more):
    """mcn_ext's loss, or its reference's, for a pair or for three modalities."""
    settings = dict(temperature=TEMPERATURE, margin=margin, **more)
    if len(inputs) == 2:
        return module.contrastive_loss(*inputs, **settings)
    rows = dict(zip(("video", "audio", "text"), inputs, strict=False))
    pairs = [("video", "audio"), ("video", "text"), ("audio", "text")]
    return module.mcn_loss(rows, pairs, *inputs[3:], **settings).total


def open_clip(x, y):
    """Its ClipLoss in one process, without the factor 1/2."""
    logits, target = F.normalize(x) @ F.normalize(y).t() / TEMPERATURE, torch.arange(len(x))
    target = target.to(x.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)


def implementation(name, terms):
    plain = eager_terms if terms else eager
    if name.startswith("ours"):
        _, _, rest = name.partition("ours")
        budget = {"budget": 0} if rest.startswith("_stream") else {}
        kind = KINDS.get(rest.removeprefix("_stream").removeprefix("_"), lambda x: {})
        return lambda *inputs: fused(mcn_ext, *inputs, **budget, **kind(inputs[0]))
    return {
        "eager": plain,
        "compile": torch.compile(plain, dynamic=False),
        "open_clip": open_clip,
    }[name]


# ------------------------------------------------------------------------------ measuring
def make(n, d, terms):
    """Inputs, the embeddings first; rows of a pair are similar."""
    options = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
    first = torch.randn(n, d, **options)
    rows = [first] + [first + 2 * torch.randn(n, d, **options) for _ in range(2 if terms else 1)]
    rows = [x.to(DTYPE).requires_grad_() for x in rows]
    if not terms:
        return rows
    return [*rows, torch.randn(K, d, **options).to(DTYPE), torch.randint(K, (n,), **options)]


def gradients(call, inputs):
    """[loss, gradients of the embeddings]."""
    loss = call(*inputs)
    return [loss, *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])]


def proc_status(field):
    """A size in bytes that Linux keeps of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def extra_mib(name, n, d, terms):
    """Of one call, on a CPU in a process that has done nothing else."""
    call, inputs = implementation(name, terms), make(n, d, terms)
    if DEVICE == "cpu":
        gradients(call, inputs if name == "compile" else make(min(n, 64), d, terms))
        ctypes.CDLL(None).malloc_trim(0)
        before = proc_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    else:
        gradients(call, inputs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    returned = sum(g.nbytes for g in gradients(call, inputs)[1:])
    peak = proc_status("VmHWM") if DEVICE == "cpu" else torch.cuda.max_memory_allocated()
    return max(peak - before - returned, 0) / 2**20


def memory(*arguments):
    if DEVICE == "cuda":
        return extra_mib(*arguments)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # what is freed goes back to the system
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # imported once, not yet used
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(extra_mib, *arguments).result()


def graph_ms(call, n=20):
    """A replay of the call's CUDA graph; why it has none, if not all in it can be captured."""
    try:
        graph, _ = capture(call)
        graph.replay()
        begin = now()
        for _ in range(n):
            graph.replay()
        return (now() - begin) / n
    except RuntimeError as error:
        return str(error).splitlines()[0][:100]


def measure(n, d, terms, names, repeats):
    """{name: {"ms", "host_ms", "extra_mib", ...} or {"error"}}."""
    torch._dynamo.reset()  # sizes compile anew, and past 8 of one function torch would give up
    inputs, calls, found = make(n, d, terms), {}, {}
    for name in names:
        calls[name] = partial(gradients, implementation(name, terms), inputs)
        try:
            calls[name]()
        except Exception as error:  # out of memory, or no compiler: a result
            if name.startswith("ours"):
                raise
            del calls[name]
            found[name] = {"error": f"{type(error).__name__}: {error}"[:100]}
    found |= take_turns(calls, repeats, 1 if DEVICE == "cpu" else 2 if n > 8192 else 10)
    for name, call in calls.items():
        found[name]["extra_mib"] = memory(name, n, d, terms)
        if DEVICE == "cuda" and n <= 16384:
            found[name]["graph_ms"] = graph_ms(call)
    return found


def check(name, terms):
    """SystemExit if an implementation does not give the loss and gradients of the reference."""
    limits = (1e-5, 1e-4) if DTYPE == torch.float32 else (5e-2, 1e-1)
    inputs, margin = make(320, 256, terms), 0 if name == "open_clip" else MARGIN
    kind = KINDS.get(name.rpartition("_")[2], lambda x: {})(inputs[0])
    true = gradients(lambda *x: fused(mcn_ext.reference, *x, margin=margin, **kind), inputs)
    found = gradients(implementation(name, terms), inputs)
    for part, limit in zip((slice(1), slice(1, None)), limits, strict=True):
        error = relative(found[part], true[part])
        if not error <= limit:  # also NaN
            raise SystemExit(f"{name} is off mcn_ext.reference by {error:.1e}: nothing to time")


def verdicts(ours, found, targets):
    """Each target, and whether it is met."""
    for what, whose, limit in targets:
        value = ours.get(what, math.nan)
        value /= found[whose].get(what, math.nan) if whose else 1
        met = "met" if value <= limit else "missed" if value > limit else "not measured"
        yield f"{what} <= {limit}{f' of {whose}' if whose else ''}: {value:.3g}, {met}"


def draw(rows, facts):
    """docs/loss.png: time and extra memory against N at D 256."""
    from mcn_ext.train.curves import _pyplot, _save

    plt = _pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = sorted((row for row in rows if row["d"] == 256), key=lambda row: row["n"])
    for axis, key, title in zip(
        axes,
        ("ms", "extra_mib"),
        ("time, ms", "memory beyond inputs and gradients, MiB"),
        strict=True,
    ):
        for name in SWEEP:
            points = [(row["n"], max(row["results"][name].get(key, math.nan), 1)) for row in rows]
            axis.loglog(*zip(*points, strict=True), "o-", markersize=3, label=name)
        axis.set_title(title, loc="left")
        axis.set_xticks([row["n"] for row in rows], [str(row["n"]) for row in rows])
        axis.set_xlabel("N")
        axis.minorticks_off()
    axes[0].legend()
    figure.suptitle(f"contrastive loss, forward and backward, D 256, fp32, {facts['cpu']}")
    print(f"figure: {_save(figure, ROOT / 'docs/loss.png')}")


def main():
    facts = describe() | {"dtype": str(DTYPE)[6:]}
    report = facts | {"rows": []}
    plan = ROWS["quick" if QUICK else DEVICE]
    for name, terms in {(name, terms) for _, _, terms, names, *_ in plan for name in names}:
        if name != "compile":
            check(name, terms)
    for n, d, terms, names, repeats, targets in plan:
        found = measure(n, d, terms, names, repeats)
        row = {"loss": "mcn_loss" if terms else "contrastive_loss", "n": n, "d": d}
        row |= {"results": found, "targets": list(verdicts(found[names[-1]], found, targets))}
        report["rows"].append(row)
        save("loss", report)
        show(f"{row['loss']}, N {n}, D {d}", [{"": name} | found[name] for name in names])
        print(*row["targets"], sep="\n", flush=True)
    if DEVICE == "cpu" and not QUICK:
        draw(report["rows"], facts)


if __name__ == "__main__":
    main()
