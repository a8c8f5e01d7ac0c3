"""`own`: switch on the checkpointing in the model's own code, for all layers that it covers."""

from __future__ import annotations

from gcbench.strategies._base import Kind, Plan, Strategy, singles


def _parse(argument: str | None) -> Strategy:
    if argument is not None:
        raise ValueError(
            f"'own:{argument}' chooses layers, and the model's own checkpointing is all or nothing; write own"
        )
    return Strategy(
        spec="own",
        plan_for=lambda num_layers: Plan(num_layers=num_layers, groups=singles(range(num_layers)), own=True),
        is_own=True,
    )


KIND = Kind(
    syntax="own",
    kept="whatever the model's own code saves; in transformers' models each layer's input",
    recomputed="whatever its code recomputes, in most models every layer; the only choice for Hub code that reads a "
    "flag of its own",
    elsewhere="model.gradient_checkpointing_enable(), activation_checkpointing_enable() since transformers 5.23",
    parse=_parse,
)
