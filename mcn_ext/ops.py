"""The losses as users call them: compiled where the extension loads, else the reference.

:mod:`mcn_ext.reference` is the specification, in arguments and in values. The compiled losses never
hold more of a similarity matrix than ``budget`` bytes, and compute all terms in one call.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from mcn_ext import reference
from mcn_ext.distributed import Ranks
from mcn_ext.reference import LossTerms

__all__ = ["LossTerms", "build_info", "cluster_loss", "contrastive_loss", "has_cuda", "mcn_loss"]

_tile = 0  # rows and columns of a tile; 0 lets csrc/losses.h choose (tests try ragged ones)


def _load() -> str | None:
    """Load the compiled library; None when it loaded, else one sentence that says why not and what
    to do."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "the extension is not built; run `pip install -e . --no-build-isolation`"
    try:
        torch.ops.load_library(str(libraries[0]))
        torch.ops.mcn.loss  # noqa: B018  (an older build has none)
    except (OSError, AttributeError) as error:
        return (f"{libraries[0].name} does not load in torch {torch.__version__} "
                f"({error.__cause__ or error}); rebuild it")
    if torch.cuda.is_available() and not json.loads(torch.ops.mcn.build_info())["cuda"]:
        warnings.warn("mcn_ext: the extension was built without CUDA; on GPUs the plain PyTorch "
                      "losses run. `MCN_CUDA=1 pip install -e . --no-build-isolation` says what is "
                      "missing.", stacklevel=3)
    return None


_unavailable = _load()
if _unavailable:
    warnings.warn(f"mcn_ext: {_unavailable}. The plain PyTorch losses run instead.", stacklevel=2)


def build_info() -> dict:
    """How the extension was built (compiler, torch, cuda), or {"error": why it is not there}."""
    return {"error": _unavailable} if _unavailable else json.loads(torch.ops.mcn.build_info())


_cuda = bool(build_info().get("cuda"))  # once: torch.compile does not trace an operator of strings


def has_cuda() -> bool:
    """True when the extension was built with CUDA kernels and loaded."""
    return _cuda


def _compiled_for(x: Tensor) -> bool:
    return not _unavailable and (x.device.type == "cpu" or (x.is_cuda and _cuda))


def contrastive_loss(x: Tensor, y: Tensor, *, temperature: float | Tensor = 0.05,
                     margin: float = 0.001, normalize: bool = True, ids: Tensor | None = None,
                     valid: Tensor | None = None, group=None, budget: int | None = None) -> Tensor:
    """Masked-margin softmax in both directions; arguments and values of
    :func:`mcn_ext.reference.contrastive_loss`.

    budget: bytes that the similarity matrix may take (default: the environment variable
    MCN_LOSS_BUDGET, else 2 GiB). Within it the matrix is computed once and gradients are taken in
    forward, in fp32; above it, and always with 0, tiles stream and backward computes them again.

    group: each rank computes its own rows against all ranks' rows of one side: half of the traffic
    of gathering both with gradients, and 1/ranks of the products. All ranks must call with the same
    arguments but for the rows, of which each may hold another number, or none; ValueError on all of
    them if they do not.
    """
    if not _compiled_for(x):
        return reference.contrastive_loss(x, y, temperature=temperature, margin=margin,
                                          normalize=normalize, ids=ids, valid=valid, group=group)
    if x.shape != y.shape:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} must have the same shape: rows are pairs")
    return _loss([x, y], [0, 1], [] if ids is None else [ids],
                 [] if valid is None else [valid, valid], temperature=temperature, margin=margin,
                 normalize=normalize, group=group, budget=budget).total


def cluster_loss(x: Tensor, centroids: Tensor, labels: Tensor, *,
                 temperature: float | Tensor = 0.05, margin: float = 0.001, normalize: bool = True,
                 valid: Tensor | None = None, group=None) -> Tensor:
    """Cross entropy of each row against its centroid; arguments and values of
    :func:`mcn_ext.reference.cluster_loss`. On a GPU a label outside [0, K) is printed and ends the
    context, as in torch's own losses: the host does not wait for the device; and centroids are
    rounded to the rows' dtype, for one matrix product."""
    if not _compiled_for(x):
        return reference.cluster_loss(x, centroids, labels, temperature=temperature, margin=margin,
                                      normalize=normalize, valid=valid, group=group)
    return _loss([x], [], [], [] if valid is None else [valid], centroids, labels, [0],
                 temperature=temperature, margin=margin, normalize=normalize, group=group).total


def mcn_loss(embeddings: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]],
             centroids: Tensor | None = None, labels: Tensor | None = None, *,
             clustered: Sequence[str] | None = None, cluster_weight: float = 1.0,
             temperature: float | Tensor = 0.05, margin: float = 0.001, normalize: bool = True,
             ids: Tensor | Mapping[tuple[str, str], Tensor] | None = None,
             valid: Mapping[str, Tensor] | None = None, group=None,
             budget: int | None = None) -> LossTerms:
    """All contrastive and clustering terms in one call that reuses one buffer; arguments and values
    of :func:`mcn_ext.reference.mcn_loss`, ``budget`` of :func:`contrastive_loss`."""
    names = list(embeddings)
    nothing = not names or not (pairs or centroids is not None)
    if nothing or not _compiled_for(embeddings[names[0]]):
        return reference.mcn_loss(embeddings, pairs, centroids, labels, clustered=clustered,
                                  cluster_weight=cluster_weight, temperature=temperature,
                                  margin=margin, normalize=normalize, ids=ids, valid=valid,
                                  group=group)
    index = {name: i for i, name in enumerate(names)}
    flat = []
    for first, second in pairs:
        if first == second:  # a pair's sides are distinct to csrc/losses.h
            names.append(second)
        flat += [index[first], index[second] if first != second else len(names) - 1]
    rows = [embeddings[name] for name in names]
    masks = []
    if valid:
        everything = torch.ones(len(rows[0]), dtype=torch.bool, device=rows[0].device)
        masks = [valid.get(name, everything) for name in names]
    if ids is not None:
        ids = [ids.get(tuple(p)) if isinstance(ids, Mapping) else ids for p in pairs]
    clusters = [index[name] for name in (embeddings if clustered is None else clustered)]
    k = 0 if centroids is None else len(centroids)
    return _loss(rows, flat, ids or [], masks, centroids, labels, clusters, temperature=temperature,
                 margin=margin, normalize=normalize, cluster_weight=cluster_weight, group=group,
                 cluster_scale=1 / math.log(k) if normalize and k > 1 else 1.0, budget=budget)


def _loss(rows: list[Tensor], pairs: list[int], ids: list[Tensor | None], valid: list[Tensor],
          centroids: Tensor | None = None, labels: Tensor | None = None,
          clustered: Sequence[int] = (), *, temperature: float | Tensor, margin: float,
          normalize: bool, cluster_weight: float = 1.0, cluster_scale: float = 1.0, group=None,
          budget: int | None = None) -> LossTerms:
    """Arguments checked, gathered and in the types that ``torch.ops.mcn.loss`` takes."""
    reference.check_temperature(temperature)
    dtype = rows[0].dtype
    for x in rows:
        if x.dim() != 2 or x.shape != rows[0].shape or x.device != rows[0].device:
            raise ValueError("embeddings must be (N, D), all of one shape, on one device, got "
                             f"{', '.join(f'{tuple(x.shape)} {x.device}' for x in rows)}")
        dtype = torch.promote_types(dtype, x.dtype)
    given = [i for i in ids if i is not None]
    for name, vectors, kind in (("ids", given, torch.int64), ("valid", valid, torch.bool),
                                ("labels", [] if labels is None else [labels], torch.int64)):
        for vector in vectors:
            if (vector.shape != rows[0].shape[:1] or vector.dtype != kind
                    or vector.device != rows[0].device):
                raise ValueError(f"{name} must be ({len(rows[0])},) {kind} on {rows[0].device}, "
                                 f"got {tuple(vector.shape)} {vector.dtype} on {vector.device}")
    if centroids is not None:
        if labels is None or centroids.dim() != 2 or centroids.shape[1] != rows[0].shape[1]:
            raise ValueError(f"embeddings {tuple(rows[0].shape)} and centroids "
                             f"{tuple(centroids.shape)} must be (N, D) and (K, D), with labels")
        centroids = centroids.detach().to(rows[0].device)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    if not rows[0].is_cuda:
        dtype = accumulate  # few CPUs multiply 16-bit matrices well
    if budget is None:
        text = os.environ.get("MCN_LOSS_BUDGET", str(2**31))
        if not text.isdecimal():
            raise ValueError(f"MCN_LOSS_BUDGET={text!r} must be bytes, such as {2**31}")
        budget = int(text)
    grad = torch.is_grad_enabled()
    wanted = [int(grad and x.requires_grad) for x in rows]
    learn_temperature = isinstance(temperature, Tensor) and temperature.requires_grad and grad
    k = 0 if centroids is None else len(centroids)
    columns, ranks = [], Ranks.of(group)
    if ranks is not None:
        ranks.share_sizes(rows[0], {
            "width": rows[0].shape[1], "dtypes": [str(x.dtype) for x in rows], "pairs": pairs,
            "clustered": list(clustered), "centroids": k, "ids": len(given), "masks": len(valid),
            "margin": margin, "normalize": normalize, "gradients": wanted, "budget": budget,
            "temperature": learn_temperature or isinstance(temperature, Tensor) or temperature})
        vectors = ranks.gather_vectors([*given, *valid])
        given, valid = vectors[:len(given)], [v.bool() for v in vectors[len(given):]]
        pairs, second = _columns(pairs, wanted)
        columns = [ranks.gather(x.detach()).to(dtype) if i in second else x.detach().to(dtype)
                   for i, x in enumerate(rows)]
    everything = len(rows[0]) if ranks is None else sum(ranks.sizes)
    if None in ids:
        distinct = torch.arange(everything, device=rows[0].device)
        found = iter(given)
        given = [distinct if i is None else next(found) for i in ids]
    rows = [x.to(dtype) for x in rows]
    if isinstance(temperature, Tensor):
        temperature = temperature.to(rows[0].device, accumulate, non_blocking=True).reshape(())
    else:  # not torch.tensor: its copy to a GPU would wait for the device
        temperature = torch.full((), temperature, dtype=accumulate, device=rows[0].device)
    largest = (len(rows[0]) if ranks is None else max(ranks.sizes)) * max(
        everything if pairs else 0, k)
    values, _, _, _ = torch.ops.mcn.loss(
        rows, pairs, given, valid, columns, centroids, labels, list(clustered), temperature, margin,
        normalize, cluster_weight, cluster_scale, wanted, learn_temperature,
        0 < budget >= largest * accumulate.itemsize, _tile, [] if ranks is None else ranks.sizes,
        0 if ranks is None else ranks.rank, "" if ranks is None else ranks.name)
    total, contrastive, cluster = values.unbind()
    return LossTerms(total, contrastive.detach(), cluster.detach())


def _columns(pairs: list[int], wanted: list[int]) -> tuple[list[int], set[int]]:
    """(pairs, the second of each is in the set; which modalities all ranks must see).

    The set in which every pair has a member that is cheapest to send: rows there, and back the
    gradients that are wanted.
    """
    both = list(zip(pairs[::2], pairs[1::2], strict=True))
    modalities = sorted(set(pairs))
    covers = [set(some) for size in range(len(modalities) + 1)
              for some in combinations(modalities, size) if all(set(some) & {*p} for p in both)]
    second = min(covers, key=lambda some: sum(1 + wanted[i] for i in some))
    return [i for a, b in both for i in ((a, b) if b in second else (b, a))], second


def _shapes(inputs) -> tuple[int, list[int]]:
    """Elements of ``state``, and indices of the embeddings whose gradient is wanted."""
    rows, pairs, centroids, clustered, wanted = (inputs[i] for i in (0, 1, 5, 7, 13))
    n, sizes = rows[0].shape[0], inputs[17]
    size = len(pairs) // 2 * (2 + 3 * n + 2 * (sum(sizes) if sizes else n))
    size += 0 if centroids is None else len(clustered) * (3 * n + 2)
    return size, [i for i, want in enumerate(wanted) if want]


def _fake_loss(*inputs):
    rows, temperature, keep = inputs[0], inputs[8], inputs[15]
    size, wanted = _shapes(inputs)
    return (temperature.new_empty(3), temperature.new_empty(size), temperature.new_empty(()),
            [torch.empty_like(rows[i], dtype=temperature.dtype,
                              memory_format=torch.contiguous_format) for i in wanted if keep])


def _fake_backward(upstream, state, *inputs):
    rows = inputs[0]
    return upstream.new_empty(()), [
        torch.empty_like(rows[i], memory_format=torch.contiguous_format)
        for i in _shapes(inputs)[1]]


def _setup(ctx, inputs, output):
    values, state, d_temperature, gradients = output
    rows, pairs, ids, valid, columns, centroids, labels, clustered, temperature = inputs[:9]
    ctx.mark_non_differentiable(state, d_temperature, *gradients)
    ctx.set_materialize_grads(False)
    ctx.rest, ctx.ranks = inputs[9:], max(len(inputs[17]), 1)
    ctx.lengths = [len(tensors) for tensors in (rows, ids, valid, columns)]
    # One None for each input; a list for each list of tensors, to which torch counts empty lists.
    ctx.none = [[None] * len(x) if isinstance(x, list | tuple)
                and all(isinstance(t, Tensor) for t in x) else None for x in inputs]
    ctx.pairs, ctx.clustered, ctx.keep = pairs, clustered, inputs[15]
    ctx.wanted = _shapes(inputs)[1]
    if ctx.keep:
        ctx.dtype = rows[0].dtype
        ctx.save_for_backward(d_temperature, *gradients)
    else:
        ctx.save_for_backward(state, temperature, centroids, labels, *rows, *ids, *valid, *columns)


def _backward(ctx, upstream, *_):
    """d total; contrastive and cluster, for the log only, carry no gradient."""
    if upstream is None:
        return tuple(ctx.none)
    total = upstream[0].contiguous()
    with torch.no_grad():
        if ctx.keep:
            d_temperature, *gradients = ctx.saved_tensors
            # The upstream gradient once, in fp32, in the last cast: a loss scale of 2^16 never
            # meets a gradient that fp16 has already rounded to nothing.
            scale = total * ctx.ranks if ctx.ranks > 1 else total
            gradients = [torch.mul(g, scale, out=torch.empty_like(g, dtype=ctx.dtype))
                         for g in gradients]
            d_temperature = d_temperature * total
        else:
            state, temperature, centroids, labels, *rest = ctx.saved_tensors
            rest = iter(rest)
            rows, ids, valid, columns = ([next(rest) for _ in range(n)] for n in ctx.lengths)
            d_temperature, gradients = torch.ops.mcn.loss_backward(
                total, state, rows, ctx.pairs, ids, valid, columns, centroids, labels,
                ctx.clustered, temperature, *ctx.rest)
    if torch.is_grad_enabled():  # create_graph=True
        d_temperature, *gradients = _Last.apply(total, d_temperature, *gradients)
    none = [list(x) if isinstance(x, list) else x for x in ctx.none]
    for i, gradient in zip(ctx.wanted, gradients, strict=True):
        none[0][i] = gradient
    none[8] = d_temperature if ctx.needs_input_grad[8] else None
    return tuple(none)


class _Last(torch.autograd.Function):
    """Gradients as they are, but an error for whoever differentiates them."""

    @staticmethod
    def forward(ctx, upstream, *gradients):
        return tuple(g.clone() for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("mcn_ext's compiled losses have no second derivative; "
                                  "mcn_ext.reference's losses have")


if not _unavailable:
    torch.library.register_fake("mcn::loss", _fake_loss)
    torch.library.register_fake("mcn::loss_backward", _fake_backward)
    torch.library.register_autograd("mcn::loss", _backward, setup_context=_setup)
