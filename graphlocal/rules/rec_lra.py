"""Recursive local representation alignment: skip-errors from the output to blocks, and on inside the blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import networkx as nx
import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.feedback import shared_map
from graphlocal.ir import Connection, LocalGraph, Subgraph
from graphlocal.rules.base import Neuron, Rule, features, loss_connections, vjp_connections
from graphlocal.verify import learning_values


@dataclass(frozen=True)
class RecLRA(Rule):
    """rec-LRA (Ororbia et al., Algorithms 1 and 2) on any model.

    For a subgraph with pre-activation h and representation z = phi(h), and the error e_j of a source:
    displacement d = sum_j E_j e_j, target y = phi(h - beta d), error e = z - y, update VJP(e).

    depth: 1 wires the output to the blocks of the partition; 2 wires each block's own error to its parts, and
    so on down to single parametric operations. beta: modulation factor. error_weights: E is `"fixed"`, follows
    the forward weights (`"kp"`, mean(z eᵀ)), or takes the paper's `"literal"` update, -gamma mean(d eᵀ), which
    grows without bound under descent. rescale: `"rms"` evaluates the target at a displacement of batch RMS 1
    and gives the error its scale back, so that updates stay proportional to the loss; None is the paper's.
    derivative: multiply the error with phi'. reprojection: bound c on the norm of every update,
    c Delta / ||Delta||. max_source_features: an output with more features than this (a vocabulary), or with a
    number of features that changes from batch to batch, sends its error through its own exact derivative, and
    skip-errors start below it. feedback_share: no E holds more than this share of the model's trainable parameters,
    and all of them together no more than `feedback_total`; an E
    that would becomes the product of two factors of the rank that fits (`print(local.graph)` shows it).

    Raises InputError for options out of range.
    """

    name: ClassVar[str] = "rec-lra"
    depth: int = 1
    beta: float = 0.1
    error_weights: Literal["fixed", "kp", "literal"] = "fixed"
    gamma: float = 0.01
    rescale: Literal["rms"] | None = "rms"
    derivative: bool = False
    reprojection: float | None = None
    max_source_features: int = 1024
    feedback_share: float = 0.25
    feedback_total: float = 1.0

    def __post_init__(self) -> None:
        choices = {"error_weights": ("fixed", "kp", "literal"), "rescale": ("rms", None)}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise InputError(f"RecLRA({field}={getattr(self, field)!r})", remedy=f"use one of {allowed}")
        for field in ("depth", "max_source_features"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"RecLRA({field}={value!r})", why="it is a number of levels or features, 1 or more")
        for field in ("beta", "gamma", "reprojection", "feedback_share", "feedback_total"):
            value = getattr(self, field)
            optional = field == "reprojection" and value is None
            if not optional and not (isinstance(value, (int, float)) and value > 0):
                raise InputError(f"RecLRA({field}={value!r})", why="it must be a number above 0")

    @property
    def feeds(self) -> Literal["preactivation", "representation"]:
        return "representation" if self.derivative else "preactivation"

    @property
    def learns_feedback(self) -> bool:
        return self.error_weights != "fixed"

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        exact, sources = self._exact_paths(graph)
        wired = {(c.target, c.value) for c in exact}
        learning = learning_values(graph)
        wired.update((s.name, z.value) for s in graph.subgraphs for z in s.outputs if z.value not in learning)
        skip_errors = _skip_errors(graph, sources, graph.subgraphs, 0, wired)
        return (*exact, *self._bounded(graph, skip_errors))

    def _bounded(self, graph: LocalGraph, connections: list[Connection]) -> list[Connection]:
        """Connections whose feedback maps keep to `feedback_share` and `feedback_total`."""
        parameters = sum(math.prod(map(int, s.type.shape)) for s in graph.states if s.trainable)
        limit = int(self.feedback_share * parameters)
        maps = {shared_map(graph, c): c for c in connections}.values()
        wanted = sum(min(math.prod(c.weight), limit) for c in maps)
        limit = min(limit, int(limit * self.feedback_total * parameters / max(wanted, 1)))
        return [replace(c, weight=_fitting(c.weight, limit)) for c in connections]

    def _exact_paths(self, graph: LocalGraph) -> tuple[list[Connection], list[str]]:
        """The loss's gradient, carried down through what has no parameters or too many features."""
        connections = list(loss_connections(graph))
        pending = list(dict.fromkeys(c.target for c in connections))
        sources: list[str] = []
        for name in pending:  # grows while it is walked
            if graph.trainable(graph.subgraph[name]) and not self._is_wide(graph, name):
                sources.append(name)
                continue
            for connection in vjp_connections(graph, name):
                connections.append(connection)
                if connection.target not in pending:
                    pending.append(connection.target)
        return connections, sources

    def _is_wide(self, graph: LocalGraph, name: str) -> bool:
        sizes = (features(graph, value) for value in graph.neuron[name].values)
        wide = any(not isinstance(size, int) or size > self.max_source_features for size in sizes)
        return wide and bool(vjp_connections(graph, name))

    def local_error(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        if self.rescale is None:
            return neuron.z - neuron.phi(neuron.h - self.beta * displacement)
        norm: Tensor = torch.linalg.vector_norm(displacement) * displacement.numel() ** -0.5
        scale = norm.clamp_min(torch.finfo(displacement.dtype).tiny)
        return (neuron.z - neuron.phi(torch.addcdiv(neuron.h, displacement, scale, value=-self.beta))) * scale

    def feedback_cotangent(self, neuron: Neuron, displacement: Tensor) -> Tensor | None:
        if self.error_weights == "fixed":
            return None
        return neuron.z if self.error_weights == "kp" else -self.gamma * displacement

    def project(self, update: Tensor) -> Tensor:
        if self.reprojection is None:
            return update
        norm: Tensor = torch.linalg.vector_norm(update)
        return update * (self.reprojection / norm.clamp_min(self.reprojection))


def _skip_errors(
    graph: LocalGraph, sources: list[str], inside: tuple[Subgraph, ...], level: int, wired: set[tuple[str, str]]
) -> list[Connection]:
    """Wire `sources` to the exits of each unit at this level of the partition tree, then go into each unit.

    wired: the (subgraph, value) pairs that have their error already, or learn nothing; grows.
    """
    units: dict[str, list[Subgraph]] = {}
    for subgraph in inside:
        path = (*subgraph.regions, subgraph.name)
        units.setdefault(path[level], []).append(subgraph)
    above = {name: nx.ancestors(graph.quotient, name) for name in sources}
    connections: list[Connection] = []
    for members in units.values():
        exits = _exits(graph, members)
        for name, values in exits.items():
            open_values = [value for value in values if (name, value) not in wired]
            wired.update((name, value) for value in open_values)
            reachable = [source for source in sources if name in above[source]]
            connections += _feedback(graph, reachable, name, open_values, level + 1)
        if len(members) > 1:
            connections += _skip_errors(graph, list(exits), tuple(members), level + 1, wired)
    return connections


def _exits(graph: LocalGraph, members: list[Subgraph]) -> dict[str, list[str]]:
    """The subgraphs of a unit with error neurons whose values are read outside it, and those values."""
    names = {subgraph.name for subgraph in members}
    exits: dict[str, list[str]] = {}
    for subgraph in members:
        neuron = graph.neuron.get(subgraph.name)
        values = [
            value
            for value in (neuron.values if neuron else ())
            if value in graph.outputs or any(r.name not in names for r in graph.readers.get(value, ()))
        ]
        if values:
            exits[subgraph.name] = values
    return exits


def _feedback(graph: LocalGraph, sources: list[str], target: str, values: list[str], depth: int) -> list[Connection]:
    return [
        feedback_connection(graph, source, source_value, target, value, depth)
        for value in values
        for source in sources
        for source_value in graph.neuron[source].values
    ]


def feedback_connection(
    graph: LocalGraph, source: str, source_value: str, target: str, value: str, depth: int
) -> Connection:
    """A skip-error connection with the shape of its feedback map.

    Raises InputError if a feature axis has no fixed size.
    """
    shape = (features(graph, value), features(graph, source_value))
    for size, name in zip(shape, (value, source_value), strict=True):
        if not isinstance(size, int):
            raise InputError(
                f"no feedback map can be drawn for the representation {name}",
                why=f"the size of its feature axis, {size}, changes from batch to batch",
                remedy="compile with a partition that cuts elsewhere, such as a list of module globs",
            )
    return Connection(source, target, value, "feedback", depth=depth, source_value=source_value,
                      weight=(int(shape[0]), int(shape[1])))  # fmt: skip


def _fitting(weight: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The shape of a feedback map with at most `limit` entries: full, or of the largest rank (at least 1) that fits."""
    rows, columns = weight
    if rows * columns <= max(limit, rows + columns):
        return weight
    return rows, max(1, limit // (rows + columns)), columns
