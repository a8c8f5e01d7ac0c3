"""Predicts the memory and time of training steps of one model; what all cells share is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gcbench.checkpointing import own_checkpointing
from gcbench.simulate.compose.block_kinds import Ints, Kind, LayerPolicy
from gcbench.simulate.compose.layer_traces import LayerTraces, cut
from gcbench.simulate.compose.passes import Passes, compose_passes
from gcbench.simulate.compose.resident import ResidentMemory, request_positions
from gcbench.simulate.compose.step_timeline import state_blocks, step_timeline
from gcbench.simulate.compose.whole_step import Assembly, assemble, assemble_full_trace
from gcbench.simulate.costs import Figures, Work
from gcbench.simulate.step_times import StepSeconds, step_seconds
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.fake_model import CPU_TRACE, FakeModel, LayeredTrace, NotComposable, Section, TraceMode
from gcbench.simulate.trace.optimizer_step import UpdateTrace, trace_update
from gcbench.simulate.trace.representative_layers import Sample, sample
from gcbench.strategies import Plan, Policy
from gcbench.training.step import output_embeddings


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a step was composed from.

    Attributes:
        params: the parameters that the optimizer steps, by their place among all.
        gradients: for each of them, the block of its gradient in `passes`.
        accumulated: for each of them, the number of events of `passes` after which its gradient is complete.
        resident: the model's tensors, the batch, and libraries' workspaces.
    """

    passes: Passes
    params: tuple[int, ...]
    gradients: tuple[int, ...]
    accumulated: tuple[int, ...]
    resident: tuple[ResidentMemory, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step whose memory is known block by block.

    Attributes:
        assembly: its events, and what each block is for.
        layers_traced: how many layers represent all.
        why_in_full: why all layers were traced; None if a few represent them.
        works: (section, the work of its operators), in order; if the step was traced in full, a single entry without a
            section, which includes the update.
        update: the optimizer phase, if it was traced by itself.
        parts: what the assembly was composed from; None if the step was traced in full.
    """

    assembly: Assembly
    layers_traced: int
    why_in_full: str | None
    works: tuple[tuple[Section | None, tuple[Work, ...]], ...]
    update: UpdateTrace | None = None
    parts: Parts | None = None

    @property
    def timeline(self) -> Timeline:
        return self.assembly.timeline

    @property
    def calls(self) -> Iterator[Work]:
        """Every call of the step that was traced, as often as it is made; of the update, each once."""
        for _, works in self.works:
            yield from works
        yield from () if self.update is None else self.update.works

    def accumulating(self) -> Timeline | None:
        """The last of several micro-batches, which begins with all gradients; None if the step was traced in full."""
        parts, update = self.parts, self.update
        if parts is None or update is None:
            return None
        passes = parts.passes.nbytes()
        return step_timeline(
            parts.passes.events,
            np.concatenate([self.timeline.nbytes, passes]),
            parts.gradients,
            num_blocks=parts.passes.num_blocks,
            backward_at=parts.passes.backward_at,
            update_at=parts.passes.update_at,
            requested=request_positions(parts.resident, parts.passes),
            update=update,
            accumulated=parts.accumulated,
        )

    def seconds(self, figures: Figures) -> float:
        """Estimate the step's time from the device's figures for its operators."""
        return self.time(figures).seconds

    def time(self, figures: Figures) -> StepSeconds:
        """The same, with the part of it in which the device computes."""
        update = self.update
        done = () if update is None else zip(update.works, update.times, strict=True)
        return step_seconds(self.works, done, figures)


class Predictor:
    """Predicts steps of one model, precision and optimizer on one kind of device: any plan, batch size and length."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        precision: str,
        optim: str,
        trace_mode: TraceMode = CPU_TRACE,
        resident: Sequence[ResidentMemory] = (),
        steps_on_device: bool = True,
        exact: bool = False,
    ) -> None:
        """`model` is on the meta device, with its adapters if it has any; the predictor owns and changes it.

        `resident` are the libraries' workspaces on the device. With `exact`, every layer is traced.
        """
        self.fake_model = FakeModel(model, precision=precision, trace_mode=trace_mode)
        self.precision = precision
        self.optim = optim
        self.trace_mode = trace_mode
        self.resident = tuple(resident)
        self.steps_on_device = steps_on_device
        self.exact = exact
        self._layers = list(range(len(self.fake_model.layers)))
        """Those that training runs; all until a trace shows otherwise."""
        self._updates: dict[tuple[int, ...], UpdateTrace] = {}
        self._vocab_size = _vocab_size(model)
        self._model_blocks = [
            ResidentMemory(name=name, nbytes=nbytes, kind=Kind.PARAMETERS if is_parameter else Kind.RESIDENT)
            for name, nbytes, is_parameter in self.fake_model.blocks
        ]

    def step(self, plan: Plan, *, batch_size: int, seq_len: int) -> Step:
        """Predict the second training step; raises what the model's code raises on fake tensors."""
        if self.exact:
            return self._in_full(plan, batch_size, seq_len, "requested")
        try:
            return self._composed(plan, batch_size, seq_len)
        except NotComposable as err:
            why = str(err)
        except Exception as err:  # a model's own code, which may fail when layers are left out
            why = f"with layers left out, it raises {type(err).__name__}"
        return self._in_full(plan, batch_size, seq_len, why)

    def with_optimizer(
        self, step: Step, optim: str, *, steps_on_device: bool, state_bytes: Callable[[Ints], Ints] | None = None
    ) -> Timeline | None:
        """The same step with another optimizer; None if it was traced in full.

        `state_bytes` maps the sizes of the optimizer's states to other ones.
        """
        parts = step.parts
        if parts is None:
            return None
        update = self._traced_update(parts.params, optim, steps_on_device)
        passes = parts.passes.nbytes()
        own = np.array([block.nbytes for block in update.own], np.int64)
        if state_bytes is not None:
            states = state_blocks(update) - update.num_params
            own[states] = state_bytes(own[states])
        resident = np.array([term.nbytes for term in parts.resident], np.int64)
        return step_timeline(
            parts.passes.events,
            np.concatenate([resident, passes, own, passes]),
            parts.gradients,
            num_blocks=parts.passes.num_blocks,
            backward_at=parts.passes.backward_at,
            update_at=parts.passes.update_at,
            requested=request_positions(parts.resident, parts.passes),
            update=update,
        )

    def _composed(self, plan: Plan, batch_size: int, seq_len: int) -> Step:
        """The step composed from a few traced layers; raises NotComposable if they cannot represent the others."""
        if not self._layers:
            raise NotComposable("the model has no layers")
        if plan.own and own_checkpointing.is_all(self.fake_model.model):
            raise NotComposable("its own code checkpoints them")
        policies = _layer_policies(plan)
        traced, chosen = self._traced(plan, policies, batch_size, seq_len)
        traces = cut(traced)
        represented_by = [self._layers[place] for place in chosen.represented_by]
        passes = compose_passes(traces, self._layers, represented_by)
        params, gradients, accumulated = self._gradients(
            traces, passes, dict(zip(self._layers, represented_by, strict=True))
        )
        resident = [
            *self._model_blocks,
            *(ResidentMemory(name="batch", nbytes=block.nbytes, kind=Kind.RESIDENT) for block in traced.batch),
            *self.resident,
        ]
        update = self._update(params)
        return Step(
            assembly=assemble(
                passes,
                update,
                gradients,
                resident=resident,
                policies={layer: policies.get(layer) for layer in self._layers},
                layers=self._layers,
                vocab_size=self._vocab_size,
            ),
            layers_traced=len(chosen.representatives),
            why_in_full=None,
            works=tuple((section, trace.works) for section, trace, _ in passes.instances),
            update=update,
            parts=Parts(
                passes=passes,
                params=tuple(params),
                gradients=tuple(gradients),
                accumulated=tuple(accumulated),
                resident=tuple(resident),
            ),
        )

    def _traced(
        self, plan: Plan, policies: Mapping[int, LayerPolicy], batch_size: int, seq_len: int
    ) -> tuple[LayeredTrace, Sample]:
        """The trace of a few layers that represent all, and which they are."""
        for _ in range(2):
            pairs = [(self.fake_model.kinds[layer], policies.get(layer)) for layer in self._layers]
            chosen = sample(_with_edges(pairs), beside=pairs)
            layers = [self._layers[place] for place in chosen.representatives]
            groups = _groups(layers, policies)
            traced = self.fake_model.trace_layers(groups, layers, batch_size=batch_size, seq_len=seq_len, own=plan.own)
            if list(traced.called) == self._layers:
                return traced, chosen
            # Layers that training on text never runs, as those of a vision tower, are nobody's neighbours.
            self._layers = sorted(set(traced.called))
        raise NotComposable("layers run several times, or out of order")

    def _gradients(
        self, traces: LayerTraces, passes: Passes, represented_by: Mapping[int, int]
    ) -> tuple[list[int], list[int], list[int]]:
        """The parameters that get a gradient, by their place among all.

        Returns them, the blocks of their gradients, and the number of events after which each gradient is complete.
        """
        owners = self.fake_model.owners
        by_name = {owners[param]: (param, home) for param, home in traces.gradients.items() if param in owners}
        params: list[int] = []
        blocks: list[int] = []
        accumulated: list[int] = []
        for place, param in enumerate(self.fake_model.parameters):
            layer, name = owners.get(id(param), (-1, ""))
            home: tuple[Section, int] | None
            owner = id(param)
            if layer in represented_by:
                owner, home = by_name.get((represented_by[layer], name), (owner, None))
                if home is not None and home[0][1] != represented_by[layer]:
                    raise NotComposable("a layer's gradients are computed outside of it")
                section = None if home is None else (home[0][0], layer)
            else:
                home = traces.gradients.get(owner)
                section = None if home is None else home[0]
            if home is not None and section is not None:
                params.append(place)
                blocks.append(passes.bases[section] + home[1])
                (part, where), offset = traces.accumulated[owner]
                accumulated.append(
                    passes.moment((part, layer if where == represented_by.get(layer) else where), offset)
                )
        if len(set(blocks)) != len(blocks):
            raise NotComposable("gradients share memory")
        return params, blocks, accumulated

    def _update(self, params: Sequence[int]) -> UpdateTrace:
        key = tuple(params)
        if key not in self._updates:
            self._updates[key] = self._traced_update(key, self.optim, self.steps_on_device)
        return self._updates[key]

    def _traced_update(self, params: Sequence[int], optim: str, steps_on_device: bool) -> UpdateTrace:
        return trace_update(
            [self.fake_model.parameters[place] for place in params],
            precision=self.precision,
            optim=optim,
            trace_mode=self.trace_mode,
            steps_on_device=steps_on_device,
        )

    def _in_full(self, plan: Plan, batch_size: int, seq_len: int, why: str) -> Step:
        trace, gradients, works = self.fake_model.trace_in_full(
            plan, batch_size=batch_size, seq_len=seq_len, optim=self.optim, steps_on_device=self.steps_on_device
        )
        kinds = [block.kind for block in self._model_blocks]
        assembled = assemble_full_trace(
            trace,
            gradients,
            resident=self.resident,
            num_params=kinds.count(Kind.PARAMETERS),
            vocab_size=self._vocab_size,
        )
        return Step(
            assembly=assembled, layers_traced=len(self.fake_model.layers), why_in_full=why, works=((None, works),)
        )


def _layer_policies(plan: Plan) -> dict[int, LayerPolicy]:
    """How each layer in a group is recomputed."""
    return {
        layer: LayerPolicy(policy=policy, place=place, size=len(group))
        for group, policy in plan.treated()
        for place, layer in enumerate(group)
    }


def _groups(layers: Sequence[int], policies: Mapping[int, LayerPolicy]) -> list[tuple[list[int], Policy]]:
    """The groups of the traced layers, which are side by side once those between them are left out."""
    groups: list[tuple[list[int], Policy]] = []
    for layer in layers:
        policy = policies.get(layer)
        if policy is None:
            continue
        if policy.place == 0:
            groups.append(([], policy.policy))
        groups[-1][0].append(layer)
    return groups


def _with_edges(pairs: Sequence[tuple[Hashable, Hashable]]) -> list[Hashable]:
    """Label each layer by its kind, its policy, and whether it is the first or last of that kind or of that pair.

    What layers of one kind share, a mask or rotary embeddings, is freed by the last of them.
    """
    alone = [kind for kind, _ in pairs]
    return [(pair, *_edges(alone, place), *_edges(pairs, place)) for place, pair in enumerate(pairs)]


def _edges(labels: Sequence[Hashable], place: int) -> tuple[bool, bool]:
    """Whether the label at `place` occurs there for the first and for the last time."""
    return labels[place] not in labels[:place], labels[place] not in labels[place + 1 :]


def _vocab_size(model: torch.nn.Module) -> int | None:
    head = output_embeddings(model)
    return None if head is None else len(head.weight)  # type: ignore[arg-type]
