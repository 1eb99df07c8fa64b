"""Difference target propagation: targets come down through learned decoders, corrected by what they get wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules.aligning import require_positive
from graphlocal.rules.base import Rule
from graphlocal.rules.wiring import decoders_along_data


class DecodingRule(Rule):
    """Rules whose targets come down through decoders of what subgraphs read. eta: the size of the step to the topmost
    targets; noise: standard deviation of the noise that decoders learn from.
    """

    decodes: ClassVar[bool] = True
    eta: float
    noise: float

    @property
    def learns_feedback(self) -> bool:
        return True

    @property
    def rereads(self) -> bool:
        return True


@dataclass(frozen=True)
class DifferenceTargetPropagation(DecodingRule):
    """Difference target propagation (Lee, Zhang, Fischer, Bengio, 2015).

    The subgraphs under the last one with parameters have their exact error e, and the target z - eta e. Below, each
    reader u of a representation z_v has a decoder g: y_v = z_v + sum_u (g(y_u) - g(z_u)), and the error is
    (z_v - y_v) / eta, in which eta, a step in the representations, does not scale the updates; per sample. The
    update is the vector-Jacobian product of the subgraph, with phi'.

    g(z_u) = phi_v(E z_u + c): E acts on features and phi_v is the elementwise tail of v, so that on a perceptron g
    is the paper's. Positions that both ends have are kept, the source's others averaged, and the target's others share
    one value, so that what a pooled reader has lost of an image can't be decoded, and the error of a class token
    stays with that token. E and c learn by the gradient of
    ||g(f_u(z_v + n)) - (z_v + n)||^2, mean over the batch, with noise n of standard deviation `noise` from torch's
    generator; f_u is the reader, evaluated again at z_v + n, as in LRADiff. They are among `local.parameters()`.

    feedback_share, feedback_total, max_source_features: as in RecLRA.

    Raises InputError for options out of range; compiling does for a reader whose data decide its path.
    """

    name: ClassVar[str] = "dtp"
    feedback: ClassVar[bool] = False
    eta: float = 0.1
    noise: float = 0.1
    feedback_share: float = 1.0
    feedback_total: float = 1.0
    max_source_features: int = 1024

    def __post_init__(self) -> None:
        require_positive(self, ("eta", "feedback_share", "feedback_total"))
        if not isinstance(self.noise, (int, float)) or self.noise < 0:
            raise InputError(f"{type(self).__name__}(noise={self.noise!r})", why="it must be a number, 0 or more")

    @property
    def feeds(self) -> Literal["preactivation", "representation"]:
        return "representation"

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        return decoders_along_data(graph, self.max_source_features, self.feedback_share, self.feedback_total)
