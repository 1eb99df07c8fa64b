"""The nodes of a calibration step: feedback maps fitted to the gradients that the step computes."""

from __future__ import annotations

from torch import fx

from graphlocal.feedback import weight_names
from graphlocal.fitting import feedback_map, fitted_groups, moment_names
from graphlocal.ir import LocalGraph, Subgraph
from graphlocal.targets.calibration import Fit
from graphlocal.targets.emitter import Emitter


class Fitting:
    """fits: a graph with the emitter's subgraphs, whose fitted maps are fitted to the emitter's gradients."""

    def __init__(self, emitter: Emitter, fits: LocalGraph) -> None:
        self.emitter, self.fits = emitter, fits
        self.names, self.groups = weight_names(fits), fitted_groups(fits)
        self.exact = {c.name for c in fits.connections if c.exact}

    def emit(self, subgraph: Subgraph) -> None:
        """Fit the maps of the subgraph's values to what of its gradient does not come by exact messages."""
        emit = self.emitter
        calibration = emit.rule.calibration
        assert calibration is not None
        for output in subgraph.outputs:
            group = self.groups.get(output.value, ())
            incoming = [c for c in emit.graph.incoming(subgraph.name) if c.value == output.value]
            sent = [c for c in incoming if c.name not in self.exact]
            gradient = emit.sum([m for c in sent for m in emit.message(c)])
            errors: list[fx.Node | None] = [emit.error_read(c) for c in group]
            if not group or gradient is None or None in errors:
                continue
            maps = [feedback_map(self.fits, c) for c in group]
            names = [*moment_names(output.value), *(self.names[c.name][0] for c in group)]
            second, cross, *weights = [emit.get(f"error_weights.{name}") for name in names]
            module = Fit(calibration, maps, output.axis)
            emit.call_module(f"fit_{output.value}", module, gradient, second, cross, *errors, *weights)
