"""Predicts the memory of training steps of one model: what every cell shares is done once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gcbench.checkpointing import own_checkpointing
from gcbench.simulate import costs
from gcbench.simulate.compose import layer_pieces
from gcbench.simulate.compose import whole_step as assembly
from gcbench.simulate.compose.layer_pieces import Passes
from gcbench.simulate.compose.whole_step import Assembly, Ints, Kind, LayerPolicy, Standing
from gcbench.simulate.costs import Figures, Work
from gcbench.simulate.timeline import Timeline
from gcbench.simulate.trace.fake_model import CPU_TRACE, FakeModel, NotComposable, Segment, TraceMode
from gcbench.simulate.trace.optimizer_step import UpdateTrace, trace_update
from gcbench.simulate.trace.representative_layers import sample
from gcbench.strategies import Plan, Policy
from gcbench.training.step import output_embeddings


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a step whose layers were told apart was put together from.

    Attributes:
        params: the parameters that the optimizer steps, by their place among all.
        gradients: for each of them, the block of its gradient in `passes`.
        accumulated: for each of them, the number of events of `passes` after which it is complete.
        standing: what the device holds besides.
    """

    passes: Passes
    params: tuple[int, ...]
    gradients: tuple[int, ...]
    accumulated: tuple[int, ...]
    standing: tuple[Standing, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step whose memory is known block by block.

    Attributes:
        assembly: its events, and what each block is for.
        layers_traced: how many layers stood for all.
        why_in_full: why all were traced; None where a few stood for them.
        works: (segment, what its operators have the device do), in order; one stretch without a name where the step was
            traced in full, with the update in it.
        update: the optimizer phase, where it was traced by itself.
        parts: what the assembly was put together from; None where the step was traced in full.
    """

    assembly: Assembly
    layers_traced: int
    why_in_full: str | None
    works: tuple[tuple[Segment | None, tuple[Work, ...]], ...]
    update: UpdateTrace | None = None
    parts: Parts | None = None

    @property
    def timeline(self) -> Timeline:
        return self.assembly.timeline

    def accumulating(self) -> Timeline | None:
        """The last of several micro-batches, which begins with all gradients; None where it was traced in full."""
        parts, update = self.parts, self.update
        if parts is None or update is None:
            return None
        passes = parts.passes.nbytes()
        return assembly.line_of(
            parts.passes.events,
            np.concatenate([self.timeline.nbytes, passes]),
            parts.gradients,
            num_blocks=parts.passes.num_blocks,
            backward_at=parts.passes.backward_at,
            requested=assembly.requests(parts.standing, parts.passes),
            update=update,
            accumulated=parts.accumulated,
        )

    def seconds(self, figures: Figures) -> float:
        """How long the step takes, by figures of its operators; an estimate."""
        known: dict[int, float] = {}
        for _, works in self.works:
            if id(works) not in known:
                known[id(works)] = costs.total(works, figures)
        passes = sum(known[id(works)] for _, works in self.works)
        return figures.step_s + passes + (0.0 if self.update is None else self.update.seconds(figures))


class Predictor:
    """One model, precision and optimizer on one kind of device; any plan, batch size and length."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        precision: str,
        optim: str,
        road: TraceMode = CPU_TRACE,
        standing: Sequence[Standing] = (),
        steps_on_device: bool = True,
        exact: bool = False,
    ) -> None:
        """`model` is on the meta device, with its adapters if it has any; it is taken over.

        `standing` is what the device holds besides the model. With `exact` every layer is traced.
        """
        self.fake_model = FakeModel(model, precision=precision, road=road)
        self.precision = precision
        self.optim = optim
        self.road = road
        self.standing = tuple(standing)
        self.steps_on_device = steps_on_device
        self.exact = exact
        self._layers = list(range(len(self.fake_model.layers)))
        """Those that training runs; all until a trace shows otherwise."""
        self._updates: dict[tuple[int, ...], UpdateTrace] = {}
        self._vocab_size = _vocab_size(model)
        self._model_blocks = [
            Standing(name=name, nbytes=nbytes, kind=Kind.PARAMETERS if is_parameter else Kind.STANDING)
            for name, nbytes, is_parameter in self.fake_model.blocks
        ]

    def step(self, plan: Plan, *, batch_size: int, seq_len: int) -> Step:
        """The second training step; raises what the model's code raises on tensors without values."""
        if self.exact:
            return self._in_full(plan, batch_size, seq_len, "asked for")
        try:
            return self._composed(plan, batch_size, seq_len)
        except NotComposable as err:
            why = str(err)
        except Exception as err:  # a model's own code, which may not bear that layers are left out
            why = f"with layers left out, it raises {type(err).__name__}"
        return self._in_full(plan, batch_size, seq_len, why)

    def with_optimizer(
        self, step: Step, optim: str, *, steps_on_device: bool, state_bytes: Callable[[Ints], Ints] | None = None
    ) -> Timeline | None:
        """The same step with another optimizer; None where it was traced in full.

        `state_bytes` has the optimizer's states take other sizes than they do.
        """
        parts = step.parts
        if parts is None:
            return None
        update = self._traced_update(parts.params, optim, steps_on_device)
        passes = parts.passes.nbytes()
        own = np.array([block.nbytes for block in update.own], np.int64)
        if state_bytes is not None:
            states = assembly.states_of(update) - update.num_params
            own[states] = state_bytes(own[states])
        standing = np.array([term.nbytes for term in parts.standing], np.int64)
        return assembly.line_of(
            parts.passes.events,
            np.concatenate([standing, passes, own, passes]),
            parts.gradients,
            num_blocks=parts.passes.num_blocks,
            backward_at=parts.passes.backward_at,
            requested=assembly.requests(parts.standing, parts.passes),
            update=update,
        )

    def _composed(self, plan: Plan, batch_size: int, seq_len: int) -> Step:
        if not self._layers:
            raise NotComposable("there are no layers to tell apart")
        if plan.own and own_checkpointing.is_all(self.fake_model.model):
            raise NotComposable("its own code checkpoints them")
        treatments = _treatments(plan)
        for _ in range(2):
            pairs = [(self.fake_model.kinds[layer], treatments.get(layer)) for layer in self._layers]
            chosen = sample(_with_edges(pairs), beside=pairs)
            kept = [self._layers[place] for place in chosen.kept]
            groups = _groups(kept, treatments)
            traced = self.fake_model.trace_layers(groups, kept, batch_size=batch_size, seq_len=seq_len, own=plan.own)
            if list(traced.called) == self._layers:
                break
            # Layers that training on text never runs, as those of a vision tower, are in no one's neighbourhood.
            self._layers = sorted(set(traced.called))
        else:
            raise NotComposable("layers run several times, or out of order")
        cut = layer_pieces.cut(traced)
        stand_in = [self._layers[place] for place in chosen.stand_in]
        passes = layer_pieces.put_together(cut, self._layers, stand_in)
        params, gradients, accumulated = self._gradients(cut, passes, dict(zip(self._layers, stand_in, strict=True)))
        standing = [
            *self._model_blocks,
            *(Standing(name="batch", nbytes=block.nbytes, kind=Kind.STANDING) for block in traced.batch),
            *self.standing,
        ]
        update = self._update(params)
        assembled = assembly.assemble(
            passes,
            update,
            gradients,
            standing=standing,
            treatments={layer: treatments.get(layer) for layer in self._layers},
            layers=self._layers,
            vocab_size=self._vocab_size,
        )
        return Step(
            assembly=assembled,
            layers_traced=len(kept),
            why_in_full=None,
            works=tuple((segment, piece.works) for segment, piece, _ in passes.instances),
            update=update,
            parts=Parts(
                passes=passes,
                params=tuple(params),
                gradients=tuple(gradients),
                accumulated=tuple(accumulated),
                standing=tuple(standing),
            ),
        )

    def _gradients(
        self, cut: layer_pieces.Pieces, passes: layer_pieces.Passes, played: dict[int, int]
    ) -> tuple[list[int], list[int], list[int]]:
        """The parameters that get a gradient, by their place among all.

        With them the blocks of their gradients, and the number of events after which each is complete.
        """
        owners = self.fake_model.owners
        by_name = {owners[param]: (param, home) for param, home in cut.gradients.items() if param in owners}
        params: list[int] = []
        blocks: list[int] = []
        accumulated: list[int] = []
        for place, param in enumerate(self.fake_model.parameters):
            layer, name = owners.get(id(param), (-1, ""))
            home: tuple[Segment, int] | None
            owner = id(param)
            if layer in played:
                owner, home = by_name.get((played[layer], name), (owner, None))
                if home is not None and home[0][1] != played[layer]:
                    raise NotComposable("a layer's gradients are made outside of it")
                segment = None if home is None else (home[0][0], layer)
            else:
                home = cut.gradients.get(owner)
                segment = None if home is None else home[0]
            if home is not None and segment is not None:
                params.append(place)
                blocks.append(passes.bases[segment] + home[1])
                (part, where), offset = cut.accumulated[owner]
                accumulated.append(passes.moment((part, layer if where == played.get(layer) else where), offset))
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
            road=self.road,
            steps_on_device=steps_on_device,
        )

    def _in_full(self, plan: Plan, batch_size: int, seq_len: int, why: str) -> Step:
        trace, gradients, works = self.fake_model.trace_in_full(
            plan, batch_size=batch_size, seq_len=seq_len, optim=self.optim, steps_on_device=self.steps_on_device
        )
        kinds = [block.kind for block in self._model_blocks]
        assembled = assembly.of_trace(
            trace,
            gradients,
            standing=self.standing,
            num_params=kinds.count(Kind.PARAMETERS),
            vocab_size=self._vocab_size,
        )
        return Step(
            assembly=assembled, layers_traced=len(self.fake_model.layers), why_in_full=why, works=((None, works),)
        )


def _treatments(plan: Plan) -> dict[int, LayerPolicy]:
    """How each layer in a group is treated."""
    return {
        layer: LayerPolicy(policy=policy, place=place, size=len(group))
        for group, policy in plan.treated()
        for place, layer in enumerate(group)
    }


def _groups(kept: Sequence[int], treatments: Mapping[int, LayerPolicy]) -> list[tuple[list[int], Policy]]:
    """The groups of the layers that are kept, which stand side by side once those between are gone."""
    groups: list[tuple[list[int], Policy]] = []
    for layer in kept:
        treatment = treatments.get(layer)
        if treatment is None:
            continue
        if treatment.place == 0:
            groups.append(([], treatment.policy))
        groups[-1][0].append(layer)
    return groups


def _with_edges(pairs: Sequence[tuple[Hashable, Hashable]]) -> list[Hashable]:
    """What tells layers apart: what they are, how they are treated, and whether they are the first or last such.

    What layers of one kind share, a mask or rotary embeddings, goes with the last of them that is done.
    """
    alone = [kind for kind, _ in pairs]
    return [(pair, *_edges(alone, place), *_edges(pairs, place)) for place, pair in enumerate(pairs)]


def _edges(labels: Sequence[Hashable], place: int) -> tuple[bool, bool]:
    """Whether the label at `place` stands there for the first and for the last time."""
    return labels[place] not in labels[:place], labels[place] not in labels[place + 1 :]


def _vocab_size(model: torch.nn.Module) -> int | None:
    head = output_embeddings(model)
    return None if head is None else len(head.weight)  # type: ignore[arg-type]
