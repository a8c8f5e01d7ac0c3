"""Models and steps on this machine, as a run makes them."""

from __future__ import annotations

import tiny

from gcbench import strategies
from gcbench.checkpointing import apply as checkpointing
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.training import step as training

BATCH_SIZE, SEQ_LEN = 4, 64


def build(source: sources.ModelSource, precision: str, optim: str, strategy: str) -> training.TrainingStep:
    model = models.build(
        source,
        models.build_config(source, layers=None, overrides={}),
        device="cpu",
        dtype=training.parameter_dtype(precision),
        attn_implementation=None,
        seed=0,
    )
    checkpointing.apply(model, strategies.parse(strategy).plan_for(tiny.NUM_LAYERS))
    batch = training.random_batch(model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=0)
    return training.TrainingStep(model, batch=batch, precision=precision, optim=optim, seed=0)


def run_until_state(step: training.TrainingStep) -> None:
    step()
    while not step.has_optimizer_state:
        step()
