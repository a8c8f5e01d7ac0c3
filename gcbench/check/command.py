"""Turns the flags and the file of `gcbench check` into options, and runs it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gcbench.core.errors import UsageError
from gcbench.job import settings as configs
from gcbench.job import settings_file
from gcbench.job.settings_file import tell


def run(
    flags: dict[str, object],
    *,
    precision: str | None,
    optim: str | None,
    attn_implementation: str | None,
    tuned: str | None,
    compiled: bool,
    full_size: bool,
    config: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Check whether checkpointing works for a model: run small real steps of every combination, and show verdicts."""
    from gcbench.check import cases as checks

    file = settings_file.read(config, "check")
    choices = {
        "precision": precision if precision is not None else file.values.get("precision"),
        "optim": optim if optim is not None else file.values.get("optim"),
        "attn_implementation": (
            attn_implementation if attn_implementation is not None else file.values.get("attn_implementation")
        ),
        "train": tuned if tuned is not None else file.values.get("train"),
    }
    others = {key: value for key, value in file.settings.items() if key not in choices}
    settings = configs.settings({"batch_size": "2", **others, **flags})
    for flag, values in (("--batch", settings.batch_size), ("--seq-len", settings.seq_len or ())):
        if len(values) > 1:
            raise UsageError(f"{flag}: a check takes one value, not {len(values)}; leave the others out")
    if settings.strategies == ("off",):
        raise UsageError(
            "--strategies off: this is what all others are compared with; name another, or leave the flag out"
        )
    parsed = {
        "precisions": configs.several("--precision", choices["precision"], configs.precision),
        "optims": configs.several("--optim", choices["optim"], configs.optimizer),
        "attentions": configs.several("--attn-implementation", choices["attn_implementation"], configs.attention),
        "tuned": configs.several("--train", choices["train"], configs.one_of(checks.TUNED)),
    }
    compiled = compiled and not file.is_set("no_compile", False)
    full_size = file.is_set("full_size", full_size)
    tell(file, {**others, **flags, **choices}, quiet=quiet)
    from gcbench.check import (
        session as check_session,  # only now: a wrong value is reported before anything else is imported
    )

    check_session.check(
        check_session.CheckOptions(
            model=settings.model,
            strategies=tuple(s for s in settings.strategies if s != "off") if settings.strategies else None,
            compiled=compiled,
            device=settings.device,
            emulate=settings.emulate,
            batch_size=settings.batch_size[0],
            seq_len=settings.seq_len[0] if settings.seq_len else None,
            layers=settings.layers,
            overrides=settings.set,
            full_size=full_size,
            trust_remote_code=settings.trust_remote_code,
            seed=settings.seed,
            timeout_s=settings.timeout,
            **parsed,
        ),
        out=out,
        command=shlex.join(["gcbench", *argv]),
        as_json=as_json,
        quiet=quiet,
    )
