"""What a model trained by nonlinear transforms has learned: its codes, and how well neighbours among them agree."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphlocal.arguments import call_of
from graphlocal.compiler import Compiled
from graphlocal.errors import InputError
from graphlocal.preserve import preserved
from graphlocal.runtime import LocalModule


def representations(local: LocalModule, x: Any, node: str | None = None, batch_size: int = 1000) -> Tensor:
    """The codes u of the samples at a node, as samples x features, without gradients.

    x: a tensor, a tuple (or list) of positional inputs, or a dict of keyword inputs; run `batch_size` samples at a
    time (along axis 0) if it is one tensor. node: a value or subgraph of `local.graph`; None is the model's first
    float output. Thresholds that no training step has set yet are set by the first batch; else nothing is changed.

    Raises InputError for a model of another rule than nlp, or a node that it does not have.
    """
    if not isinstance(local, LocalModule) or local.options.rule.engine != "nonlinear":
        raise InputError(
            "representations needs a model compiled with rule='nlp'",
            remedy="for other rules, local.eval() is the model: read its outputs, or hook its modules",
        )
    parts = x.split(batch_size) if isinstance(x, Tensor) else [x]
    found = []
    for part in parts:
        args, kwargs = call_of(part, "x")
        leaves, spec = local._binder.flatten(args, kwargs)
        with preserved(local.original):
            _, u = local._run_fitting(leaves, spec, partial(_codes, leaves=leaves, node=node))
        found.append(u.flatten(1))
    return torch.cat(found)


def _codes(compiled: Compiled, leaves: list[Any], node: str | None) -> Tensor:
    engine: Any = compiled.engine
    u: Tensor = engine.codes(leaves).u[engine.node(node)]
    return u


def knn_error(train_u: Tensor, train_y: Tensor, test_u: Tensor, test_y: Tensor, k: int = 5) -> float:
    """Per cent of the test samples whose label is not the most frequent one of their k nearest training samples.

    Nearest by the cosine; of equally frequent labels the smallest wins. train_u, test_u: samples x features. Look at
    it beside the same on the raw inputs and on an untrained net: neighbours alone already classify well.

    Raises InputError for unlike lengths, or a k that is not from 1 to the number of training samples.
    """
    if len(train_u) != len(train_y) or len(test_u) != len(test_y) or not len(test_y):
        raise InputError(
            f"{len(train_u)} and {len(test_u)} samples, but {len(train_y)} and {len(test_y)} labels",
            remedy="pass one label for each sample, and at least one sample to test",
        )
    if not 1 <= k <= len(train_u):
        raise InputError(f"k={k}", why=f"there are {len(train_u)} training samples")
    train, test = (torch.nn.functional.normalize(u.flatten(1), dim=1) for u in (train_u, test_u))
    wrong = 0
    for rows, labels in zip(test.split(1000), test_y.split(1000), strict=True):
        nearest = (rows @ train.T).topk(k, dim=1).indices
        votes = torch.nn.functional.one_hot(train_y[nearest], int(train_y.max()) + 1).sum(1)
        wrong += int((votes.argmax(1) != labels).sum())
    return 100 * wrong / len(test_y)
