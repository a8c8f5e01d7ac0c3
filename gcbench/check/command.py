"""What `gcbench check` does with its flags."""

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
    """Combinations, small real steps, verdicts: does checkpointing work for this model?"""
    from gcbench.check import cases as checks

    file = settings_file.read(config, "check")
    tried = {
        "precision": precision if precision is not None else file.values.get("precision"),
        "optim": optim if optim is not None else file.values.get("optim"),
        "attn_implementation": (
            attn_implementation if attn_implementation is not None else file.values.get("attn_implementation")
        ),
        "train": tuned if tuned is not None else file.values.get("train"),
    }
    others = {key: value for key, value in file.settings.items() if key not in tried}
    wanted = configs.settings({"batch_size": "2", **others, **flags})
    for flag, values in (("--batch", wanted.batch_size), ("--seq-len", wanted.seq_len or ())):
        if len(values) > 1:
            raise UsageError(f"{flag}: a check takes one value, and here are {len(values)}; leave the others out")
    if wanted.strategies == ("off",):
        raise UsageError(
            "--strategies off: it is what all others are compared with; name another, or leave the flag out"
        )
    choice = {
        "precisions": configs.several("--precision", tried["precision"], configs.precision),
        "optims": configs.several("--optim", tried["optim"], configs.optimizer),
        "attentions": configs.several("--attn-implementation", tried["attn_implementation"], configs.attention),
        "tuned": configs.several("--train", tried["train"], configs.one_of(checks.TUNED)),
    }
    compiled = compiled and not file.is_set("no_compile", False)
    full_size = file.is_set("full_size", full_size)
    tell(file, {**others, **flags, **tried}, quiet=quiet)
    from gcbench.check import (
        session as check_session,  # only now: a wrong value is told before anything else is imported
    )

    check_session.check(
        check_session.CheckOptions(
            model=wanted.model,
            strategies=tuple(s for s in wanted.strategies if s != "off") if wanted.strategies else None,
            compiled=compiled,
            device=wanted.device,
            batch_size=wanted.batch_size[0],
            seq_len=wanted.seq_len[0] if wanted.seq_len else None,
            layers=wanted.layers,
            overrides=wanted.set,
            full_size=full_size,
            trust_remote_code=wanted.trust_remote_code,
            seed=wanted.seed,
            timeout_s=wanted.timeout,
            **choice,
        ),
        out=out,
        command=shlex.join(["gcbench", *argv]),
        as_json=as_json,
        quiet=quiet,
    )
