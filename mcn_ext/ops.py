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
from pathlib import Path

import torch
from torch import Tensor

from mcn_ext import reference
from mcn_ext.distributed import gather
from mcn_ext.reference import LossTerms

__all__ = ["LossTerms", "build_info", "cluster_loss", "contrastive_loss", "has_cuda", "mcn_loss"]

_tile = 0  # rows and columns of a tile; 0 lets csrc/loss.cpp choose (tests try ragged ones)


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
                 valid: Tensor | None = None) -> Tensor:
    """Cross entropy of each row against its centroid; arguments and values of
    :func:`mcn_ext.reference.cluster_loss`. On a GPU a label outside [0, K) is printed and ends the
    context, as in torch's own losses: the host does not wait for the device; and centroids are
    rounded to the rows' dtype, for one matrix product."""
    if not _compiled_for(x):
        return reference.cluster_loss(x, centroids, labels, temperature=temperature, margin=margin,
                                      normalize=normalize, valid=valid)
    return _loss([x], [], [], [] if valid is None else [valid], centroids, labels, [0],
                 temperature=temperature, margin=margin, normalize=normalize).total


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
        if first == second:  # a pair's sides are distinct to csrc/loss.cpp
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
    if group is not None:
        rows, valid = [gather(x, group) for x in rows], [gather(mask, group) for mask in valid]
        ids, labels = [gather(i, group) for i in ids], gather(labels, group)
    if None in ids:
        distinct = torch.arange(len(rows[0]), device=rows[0].device)
        ids = [distinct if i is None else i for i in ids]
    dtype = rows[0].dtype
    for x in rows:
        if x.dim() != 2 or x.shape != rows[0].shape or x.device != rows[0].device:
            raise ValueError("embeddings must be (N, D), all of one shape, on one device, got "
                             f"{', '.join(f'{tuple(x.shape)} {x.device}' for x in rows)}")
        dtype = torch.promote_types(dtype, x.dtype)
    for name, vectors, kind in (("ids", ids, torch.int64), ("valid", valid, torch.bool),
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
    rows = [x.to(dtype) for x in rows]
    if isinstance(temperature, Tensor):
        temperature = temperature.to(rows[0].device, accumulate, non_blocking=True).reshape(())
    else:  # not torch.tensor: its copy to a GPU would wait for the device
        temperature = torch.full((), temperature, dtype=accumulate, device=rows[0].device)
    if budget is None:
        text = os.environ.get("MCN_LOSS_BUDGET", str(2**31))
        if not text.isdecimal():
            raise ValueError(f"MCN_LOSS_BUDGET={text!r} must be bytes, such as {2**31}")
        budget = int(text)
    grad = torch.is_grad_enabled()
    columns = max(len(rows[0]) if pairs else 0, 0 if centroids is None else len(centroids))
    values, _, _, _ = torch.ops.mcn.loss(
        rows, pairs, ids, valid, centroids, labels, list(clustered), temperature, margin, normalize,
        cluster_weight, cluster_scale, [int(grad and x.requires_grad) for x in rows],
        grad and temperature.requires_grad,
        budget >= len(rows[0]) * columns * accumulate.itemsize and budget > 0, _tile)
    total, contrastive, cluster = values.unbind()
    return LossTerms(total, contrastive.detach(), cluster.detach())


def _shapes(inputs) -> tuple[int, list[int]]:
    """Elements of ``state``, and indices of the embeddings whose gradient is wanted."""
    rows, pairs, clustered, wanted = inputs[0], inputs[1], inputs[6], inputs[12]
    n = rows[0].shape[0]
    size = len(pairs) // 2 * (5 * n + 2)
    size += 0 if inputs[4] is None else len(clustered) * (3 * n + 2)
    return size, [i for i, want in enumerate(wanted) if want]


def _fake_loss(*inputs):
    rows, temperature, keep = inputs[0], inputs[7], inputs[14]
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
    rows, pairs, ids, valid, centroids, labels, clustered, temperature = inputs[:8]
    ctx.mark_non_differentiable(state, d_temperature, *gradients)
    ctx.set_materialize_grads(False)
    ctx.rest, ctx.lengths = inputs[8:], (len(rows), len(ids), len(valid))
    # One None for each input; a list for each list of tensors, to which torch counts empty lists.
    ctx.none = [[None] * len(x) if isinstance(x, list | tuple)
                and all(isinstance(t, Tensor) for t in x) else None for x in inputs]
    ctx.pairs, ctx.clustered, ctx.keep = pairs, clustered, inputs[14]
    ctx.wanted = _shapes(inputs)[1]
    if ctx.keep:
        ctx.dtype = rows[0].dtype
        ctx.save_for_backward(d_temperature, *gradients)
    else:
        ctx.save_for_backward(state, temperature, centroids, labels, *rows, *ids, *valid)


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
            gradients = [torch.mul(g, total, out=torch.empty_like(g, dtype=ctx.dtype))
                         for g in gradients]
            d_temperature = d_temperature * total
        else:
            state, temperature, centroids, labels, *rest = ctx.saved_tensors
            n_rows, n_ids, _ = ctx.lengths
            rows, ids, valid = rest[:n_rows], rest[n_rows:n_rows + n_ids], rest[n_rows + n_ids:]
            d_temperature, gradients = torch.ops.mcn.loss_backward(
                total, state, rows, ctx.pairs, ids, valid, centroids, labels, ctx.clustered,
                temperature, *ctx.rest)
    if torch.is_grad_enabled():  # create_graph=True
        d_temperature, *gradients = _Last.apply(total, d_temperature, *gradients)
    none = [list(x) if isinstance(x, list) else x for x in ctx.none]
    for i, gradient in zip(ctx.wanted, gradients, strict=True):
        none[0][i] = gradient
    none[7] = d_temperature if ctx.needs_input_grad[7] else None
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
