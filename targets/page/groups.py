"""The tree that the page draws: regions of the partition and paths of modules around the subgraphs.

On a ResNet cut into blocks, `layer1` holds the subgraphs `layer1.0` and `layer1.1`; with recursion depth 2 the
region `layer1.0` stands between `layer1` and its convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from graphlocal.ir import LocalGraph, Subgraph

Kind = Literal["root", "region", "module", "run"]

LARGEST = 60
"""A group of more members is cut into runs of `RUN`."""
RUN = 30
_SMALLEST_MODULE = 3
_TOO_LARGE_A_SHARE = 0.6


@dataclass(frozen=True)
class Group:
    """Subgraphs (by number, from 0) and groups that are drawn in one box.

    kind: a region of the partition tree, a path of modules, or a `run` of neighbours where there are too many.
    """

    name: str
    kind: Kind
    members: tuple[Group | int, ...]

    def subgraphs(self) -> tuple[int, ...]:
        """Everything inside."""
        return tuple(
            n for member in self.members for n in ((member,) if isinstance(member, int) else member.subgraphs())
        )


def tree(graph: LocalGraph) -> Group:
    """The root of the tree; members are in the order of their first subgraph."""
    chains = [_chain(subgraph) for subgraph in graph.subgraphs]
    root = _grouped("", "root", list(range(len(chains))), chains, 0)
    members = _simplified(root.members, len(chains))
    while len(members) == 1 and isinstance(members[0], Group):
        members = list(members[0].members)
    return _in_runs(replace(root, members=tuple(members)))


def _chain(subgraph: Subgraph) -> tuple[tuple[str, Kind], ...]:
    """The groups around a subgraph, outermost first: its regions, and the module paths above and below them."""
    chain: list[tuple[str, Kind]] = []
    above = ""
    for region in subgraph.regions:
        chain += [(path, "module") for path in _paths(region, above)]
        chain.append((region, "region"))
        above = region
    module = subgraph.name.partition(":")[0]
    if not above or module.startswith(f"{above}."):
        chain += [(path, "module") for path in _paths(module, above)]
    return tuple(chain)


def _paths(name: str, above: str) -> list[str]:
    """`a.b.c` under `a` gives `a.b`; what is not under `above` gives all of its own paths."""
    paths = list(accumulate(name.split("."), lambda path, part: f"{path}.{part}"))[:-1]
    return [path for path in paths if not above.startswith(path)]


def _grouped(
    name: str, kind: Kind, numbers: Sequence[int], chains: Sequence[tuple[tuple[str, Kind], ...]], level: int
) -> Group:
    """The subgraphs `numbers` in one group, and within it in those that their chains name at `level`."""
    inner: dict[tuple[str, Kind] | int, list[int]] = {}
    for number in numbers:
        chain = chains[number]
        inner.setdefault(chain[level] if level < len(chain) else number, []).append(number)
    members = (
        key if isinstance(key, int) else _grouped(*key, found, chains, level + 1) for key, found in inner.items()
    )
    return Group(name, kind, tuple(members))


def _simplified(members: Iterable[Group | int], total: int) -> list[Group | int]:
    """Without groups of one member, and without module paths that hold next to nothing or nearly everything."""
    found: list[Group | int] = []
    for member in members:
        if isinstance(member, int):
            found.append(member)
            continue
        inner = _simplified(member.members, total)
        share = len(member.subgraphs()) / total
        telling = member.kind == "region" or (len(inner) >= _SMALLEST_MODULE and share <= _TOO_LARGE_A_SHARE)
        found += [replace(member, members=tuple(inner))] if telling and len(inner) > 1 else inner
    return sorted(found, key=lambda member: member if isinstance(member, int) else min(member.subgraphs()))


def _in_runs(group: Group) -> Group:
    """The same tree, in which no group has more than `LARGEST` members."""
    members = [m if isinstance(m, int) else _in_runs(m) for m in group.members]
    while len(members) > LARGEST:
        count = -(-len(members) // RUN)
        cuts = [len(members) * i // count for i in range(count + 1)]
        members = [Group("", "run", tuple(members[a:b])) for a, b in pairwise(cuts)]
    return replace(group, members=tuple(members))


def short_name(name: str, siblings: Iterable[str], parent: str) -> str:
    """The shortest end of a module path that tells it from its siblings and does not begin with a number."""
    rest = name.removeprefix(f"{parent}:").removeprefix(f"{parent}.") if parent else name
    if rest.isdigit() and parent:
        return f"{parent.rpartition('.')[2]}.{rest}"
    others = [sibling for sibling in siblings if sibling != name]
    parts = rest.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        clash = any(other == end or other.endswith(f".{end}") for other in others)
        if not clash and not parts[-length][:1].isdigit():
            return end
    return rest
