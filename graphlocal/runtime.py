"""`LocalModule`: a compiled model that stands in for the user's own, in any training loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphlocal.arguments import UNSIGNED, Binder, ExampleInputs, with_signature
from graphlocal.artefact.write import write_model
from graphlocal.compiler import COMPUTED, Compiled, Options, build, require_schedule
from graphlocal.errors import GuardFailure, InputError, LocalTrainingError
from graphlocal.execution import Run, signature
from graphlocal.fitting import STEPS
from graphlocal.ir import LocalGraph
from graphlocal.local_step import LocalStep
from graphlocal.preserve import training_mode, undone_on
from graphlocal.repeat import Last, Repeat
from graphlocal.statistics_lag import StatisticsLag
from graphlocal.targets import exports
from graphlocal.targets.show import Drawing, draw, write
from graphlocal.watch import ModelWatch, State

MANY_RECOMPILATIONS = 8


class LocalModule(nn.Module):
    """A model whose `loss.backward()` runs local updates; made by `graphlocal.compile`.

    In training mode every subgraph runs on inputs that are cut off from the others, and the gradient that
    reaches the outputs starts the error graph, whose updates land in the `grad` of the model's parameters.
    In evaluation mode, or without gradients, it *is* the original model. `torch.compile` leaves its training steps as
    they are (`target="inductor"` compiles those), and compiles what is around them, and the original model.

    original: the user's model, trained in place. error_weights: the feedback maps E. check_finite: raise
    LocalTrainingError, naming the subgraph, when an update is not a number (under float16 autocast a gradient scaler
    looks for those, and skips the step). labels: those of the next backward pass,
    if the rule has local heads; losses: of its samples, if the rule needs them. Both are used once. calibrating: for
    rules with calibration steps (`rule="auto"`): None lets every N-th forward pass in training mode be one, True or
    False all or none.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, options: Options) -> None:
        binder = Binder(model)
        self._adopt(build(model, binder.example(example_inputs), options, nn.Module()), binder)

    @classmethod
    def of(cls, compiled: Compiled) -> LocalModule:
        """The module of a compilation that was made elsewhere."""
        local = cls.__new__(cls)
        local._adopt(compiled, Binder(compiled.model))
        return local

    def _adopt(self, compiled: Compiled, binder: Binder) -> None:
        super().__init__()
        self.check_finite = True
        self.calibrating: bool | None = None
        self.labels: Any = None
        self.losses: Any = None
        self.options = compiled.options
        self.original = compiled.model
        self.error_weights = compiled.error_weights
        self._reset(binder)
        self._remember(compiled)
        self.training = self.error_weights.training = compiled.model.training

    def _reset(self, binder: Binder) -> None:
        self._binder = binder
        self.__class__ = with_signature(self._own_class, binder.signature)
        self._cache: list[tuple[State, Compiled]] = []
        self._last: Last | None = None  # of the compilation that the cache begins with
        self._recompilations = 0
        self._lag = StatisticsLag(self.original)
        self._watch = ModelWatch(self.original)

    @property
    def _own_class(self) -> type[LocalModule]:
        """The class without the signature of the model."""
        return getattr(type(self), UNSIGNED, type(self))

    # What was compiled.

    @property
    def compiled(self) -> Compiled:
        """The compilation used last.

        Raises InputError after the module was moved or copied, until it has run in training mode.
        """
        if not self._cache:
            raise InputError(
                "the model was moved or copied since it was compiled",
                remedy="run it once in training mode; it is compiled anew for its device and dtype",
            )
        return self._cache[0][1]

    @property
    def graph(self) -> LocalGraph:
        """Subgraphs, error neurons, connections and schedule; `print` shows them."""
        return self.compiled.graph

    @property
    def training_graph(self) -> fx.GraphModule:
        """The whole training step as one `torch.fx` graph: `training_graph(*inputs, loss)`."""
        return self.compiled.training.module

    def show(self, path: Path | str | None = None, **options: Any) -> Drawing | None:
        """Write the graph in the format of the path's suffix, or return a drawing that a notebook shows.

        options: of the format; drawings take `operations=True` (open the subgraphs) and `errors`: "all", "none", or
        names of subgraphs whose error connections to draw. Raises InputError for an unknown suffix or option, where
        Graphviz is needed and not installed, and for a file that can't be written.
        """
        if path is None:
            return draw(self.graph, **options)
        write(self.graph, path, **options)
        return None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to one file, from which `graphlocal.load` restores it; JSON and safetensors, no pickle.

        It holds the weights, buffers, feedback maps and twins, modes, frozen parameters, rule, partition and graph,
        and the example inputs that the module was compiled with. It does not hold optimizers, gradients, random
        state, or what the model keeps in plain Python attributes.

        Raises InputError for a tensor that safetensors can't hold, or where the file can't be written.
        """
        with training_mode(self.original):
            compiled = self._for_training()
            modes = {name: module.training for name, module in self.original.named_modules()}
        write_model(path, compiled, modes, training=self.training, check_finite=self.check_finite)

    def _for_training(self) -> Compiled:
        """The compilation for the modes and the frozen parameters that the model has now."""
        last = self.compiled
        state = self._watch.state()
        found = next((compiled for known, compiled in self._cache if known == state), None)
        if found is not None:
            return found
        return self._recompile(list(last.traced.arguments.leaves), last.traced.arguments.spec, set(last.traced.dynamic))

    def export(self, path: str | Path, kind: str = "model", **options: Any) -> Any:
        """Write the model for other tools; `targets.onnx`, and `targets.torch_export` for .pt2, have kinds and options.

        kind="training-step" writes the whole training step: loss_fn=, optimizer=, and y=, example labels.
        """
        if kind == exports.TRAINING_STEP:
            with training_mode(self.original):
                compiled = self._for_training()
                return exports.export_step(compiled, partial(self._unflatten, compiled), path, **options)
        c = self.compiled
        return exports.export(c.graph, c.traced, self.original, path, kind, **options)

    @property
    def credit_depth(self) -> float:
        """Of how many subgraphs the mean sample's error reached the error neuron in the last step.

        Raises InputError for a rule that lets no sample stop.
        """
        if self.options.rule.halting is None:
            raise InputError(
                f"the rule {self.options.rule} lets errors go all the way", remedy="give epsilon to an LRA rule"
            )
        return self.compiled.depth.mean

    # Running.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(LocalModule.forward)(self, *args, **kwargs)
        leaves, spec = self._binder.flatten(args, kwargs)
        last = self._last_like(leaves, spec)
        if last is not None and last.repeat is not None:
            output = last.repeat.forward(self, leaves)
            if output is not None:
                return output
        found = self._run_again(last, leaves, fused=False)
        if found is None:
            self._look_for_changes()
            if not any(p.requires_grad for p in self._watch.weights):  # nothing learns
                return self.original(*args, **kwargs)
            if self.options.rule.engine != "schedule":
                require_schedule(self.options.rule)
            found = self._run_first(leaves, spec, fused=False)
        compiled, run = found
        if last is not None and not self._lag.present and Repeat.can(compiled, run):
            last.repeat = Repeat(compiled, run)
        return self._unflatten(compiled, LocalStep(self, compiled, run, leaves).attach())

    def _forward_pass(self, leaves: list[Any], spec: pytree.TreeSpec, *, fused: bool) -> tuple[Compiled, Run]:
        """Run all subgraphs of the compilation that fits the call and its data."""
        last = self._last_like(leaves, spec)
        return self._run_again(last, leaves, fused=fused) or self._run_first(leaves, spec, fused=fused)

    def _last_like(self, leaves: list[Any], spec: pytree.TreeSpec) -> Last | None:
        """The last call, if this one is like it."""
        last = self._last
        return last if last is not None and last.fits(leaves, spec) else None

    def _run_again(self, last: Last | None, leaves: list[Any], *, fused: bool) -> tuple[Compiled, Run] | None:
        """The same as in the `last` call, without another look; None if there was none like it."""
        if last is None:
            return None
        if not self._lag.due():
            return last.compiled, last.compiled.execution.run(leaves, fused, last.inputs)
        with self._lag.watching():
            return last.compiled, last.compiled.execution.run(leaves, fused, last.inputs)

    def _run_first(self, leaves: list[Any], spec: pytree.TreeSpec, *, fused: bool) -> tuple[Compiled, Run]:
        """The same for a call that may differ from the last one, which this one becomes."""
        known = signature(leaves)
        run: tuple[Compiled, Run] = self._run_fitting(leaves, spec, lambda c: c.execution.run(leaves, fused, known))
        repeats = self.options.rule.calibration is None and not run[0].guarded and None not in known
        self._last = Last(run[0], spec, known, self._watch) if repeats else None
        return run

    def _run_fitting(
        self, leaves: list[Any], spec: pytree.TreeSpec, run: Callable[[Compiled], Any]
    ) -> tuple[Compiled, Any]:
        """The compilation that fits a call and its data, and what `run` returns for it."""
        self._look_for_changes()
        due = self._calibration_is_due()
        for fitting in self._fitting(leaves, spec):
            compiled = fitting.calibration if due else fitting
            if not compiled.guarded:
                if not self._lag.due():
                    return compiled, run(compiled)
                with self._lag.watching():
                    return compiled, run(compiled)
            with suppress(GuardFailure), undone_on(GuardFailure, self.original):
                return compiled, run(compiled)
        raise LocalTrainingError(
            f"{self.compiled.graph.name} takes another path through its forward than when it was recorded just before",
            why="its control flow depends on more than the inputs, parameters, buffers and torch's random numbers",
            remedy="put the deciding part into a submodule of its own, which then runs as an opaque leaf",
        )

    def _look_for_changes(self) -> None:
        """Forget what was compiled if a layer or a parameter was replaced."""
        if self._watch.replaced():
            self._forget()
            self._watch.renew()
            self._lag.look()

    def _forget(self) -> None:
        """Forget all compilations."""
        self._cache.clear()
        self._last = None

    def _calibration_is_due(self) -> bool:
        """Whether this step is a calibration; counts it."""
        calibration = self.options.rule.calibration
        steps = None if calibration is None else getattr(self.error_weights, STEPS, None)
        if calibration is None or steps is None:
            return False
        if self.calibrating is not None:
            return self.calibrating
        done = int(steps)
        steps.add_(1)
        return done % calibration.every == 0

    def _fitting(self, leaves: list[Any], spec: pytree.TreeSpec) -> Iterator[Compiled]:
        """The compilations for calls like this one, the last used first; at last a new one."""
        state = self._watch.state()
        dynamic: set[tuple[int, int]] = set()
        for entry in list(self._cache):
            compiled_state, compiled = entry
            if compiled_state == state:
                sizes = compiled.mismatch(leaves, spec)
                if sizes is None:
                    if entry is not self._cache[0]:
                        self._cache.remove(entry)
                        self._cache.insert(0, entry)
                        self._last = None
                    yield compiled
                else:
                    dynamic |= sizes | compiled.traced.dynamic if sizes else set()
        yield self._recompile(leaves, spec, dynamic)

    def _known(self, leaves: list[Any], spec: pytree.TreeSpec) -> Compiled | None:
        """The compilation for calls like this one, if there is one yet."""
        if self._watch.replaced():
            return None
        state = self._watch.state()
        return next((c for known, c in self._cache if known == state and c.mismatch(leaves, spec) is None), None)

    def _recompile(self, leaves: list[Any], spec: pytree.TreeSpec, dynamic: set[tuple[int, int]]) -> Compiled:
        arguments = self._binder.arguments(*pytree.tree_unflatten(leaves, spec))
        axes = {(i, 0) for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() > 0}
        compiled = build(self.original, arguments, self.options, self.error_weights, frozenset(axes | dynamic))
        self._recompilations += 1
        if self._recompilations == MANY_RECOMPILATIONS:
            warnings.warn(
                f"{compiled.graph.name} was compiled {MANY_RECOMPILATIONS} times for calls that differ; each takes "
                "seconds. Pad the inputs to one size, and keep options that are not tensors constant.",
                stacklevel=4,
            )
        self._remember(compiled)
        return compiled

    def _remember(self, compiled: Compiled) -> None:
        self._cache.insert(0, (self._watch.state(), compiled))
        self._last = None

    def _unflatten(self, compiled: Compiled, flat: Sequence[Any]) -> Any:
        if compiled.returns_one:
            return flat[0]
        computed = iter(flat)
        leaves = [next(computed) if x is COMPUTED else x for x in compiled.output_template]
        return pytree.tree_unflatten(leaves, compiled.traced.out_spec)

    # nn.Module.

    def train(self, mode: bool = True) -> LocalModule:
        if self.training and not mode:
            self._warn_of_lag()
        self.training = mode
        self.original.train(mode)
        self.error_weights.train(mode)
        return self

    def _warn_of_lag(self) -> None:
        worst = self._lag.worst()
        self._lag.reset()
        if worst is not None:
            layer, deviation, factor = worst
            warnings.warn(
                f"the running statistics of the BatchNorm {layer or 'layer'} trail those of the last batches: the mean "
                f"by {deviation:.1f} standard deviations, the variance by a factor of {factor:.2g}. The model "
                "evaluates worse than it is; graphlocal.recalibrate(model, batches) renews them.",
                stacklevel=4,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LocalModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()  # devices and dtypes are written into the graph
        return self

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_binder", "_cache", "_last", "_recompilations", "_lag", "_watch")
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset(Binder(self.original))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._own_class.__new__, (self._own_class,), self.__getstate__()

    def extra_repr(self) -> str:
        return f"rule={self.options.rule}"
