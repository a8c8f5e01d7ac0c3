"""Judges how a dry run ended: it fits, it does not, the script failed by itself, or the emulation has a limit."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

from gcbench.core.units import counted, format_bytes
from gcbench.devices.cards import Card
from gcbench.dry_run import values
from gcbench.dry_run.process import Ended
from gcbench.dry_run.records import Observed, Place, ScriptError, Verdict

FITS, DOES_NOT_FIT, NOT_JUDGED, INTERRUPTED = 0, 1, 3, 130
_LEAVE_OUT = {
    "bitsandbytes": "its quantisation and its optimizers (train with optim=adamw_torch)",
    "flash_attn": 'it, for example with attn_implementation="sdpa", which takes the same kernels within PyTorch',
    "flash_attn_interface": 'it, for example with attn_implementation="sdpa"',
    "flashinfer": "it",
    "xformers": 'its attention, for example with attn_implementation="sdpa"',
    "deepspeed": "its operators and launcher (run the script with python)",
    "apex": "its fused optimizers and norms",
    "transformer_engine": "its layers",
    "causal_conv1d": "it: the model's own PyTorch code takes its place",
    "mamba_ssm": "it: the model's own PyTorch code takes its place",
    "torchao": "its kernels",
    "vllm": "generation with it",
    "auto_gptq": "the quantisation",
    "awq": "the quantisation",
    "pynvml": "its questions about the machine",
    "cupy": "it",
    "torchvision": "its CUDA operators",
    "torchaudio": "its CUDA operators",
}
"""Package with compiled CUDA code of its own -> what to leave out."""
_NO_LIBRARY = re.compile(r"undefined symbol|cannot open shared object file|ImportError.*\.so")
_OF_THE_CARD = re.compile(r"CUDA error|cudaError|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|CUSOLVER|CUSPARSE|CUFFT|NVRTC")


def judge(ended: Ended, card: Card, num_cards: int) -> Verdict:
    """Return the verdict on a command that ended."""
    observed = ended.observed[0] if ended.observed else None
    if ended.was_interrupted:
        seen = "nothing was seen" if observed is None else f"{counted(observed.num_steps, 'step')} finished"
        return Verdict(ending="interrupted", sentence=f"interrupted; {seen} before that", exit_code=INTERRUPTED)
    if observed is None:
        return _unobserved(ended)
    error = observed.failure
    ran_out = _ran_out(observed)
    if ran_out:
        return _does_not_fit(observed, card)
    if ended.exit_code == 0:
        if not observed.peak_reserved_bytes:
            return _unused(observed, card)
        return _fits(observed, card)
    limit = _limit(error, ended, num_cards) if error is not None or ended.exit_code < 0 else None
    if limit is not None:
        return Verdict(ending="not emulated", sentence=limit, exit_code=NOT_JUDGED)
    return _failed(ended, error)


def _ran_out(observed: Observed) -> bool:
    """Whether memory ran out and no step followed; a script may catch the error and end as if nothing had happened."""
    error = observed.failure
    if error is not None and error.is_out_of_memory:
        return True
    if error is not None and any(cause.type == "OutOfMemoryError" for cause in error.chain):
        return True
    if not observed.out_of_memory:
        return False
    # Also where another error follows: accelerate raises its own when no batch size is left.
    return observed.num_steps <= observed.out_of_memory[-1].done_steps


def _fits(observed: Observed, card: Card) -> Verdict:
    needed = observed.process_bytes or observed.peak_reserved_bytes
    left = card.memory_bytes - needed
    text = (
        f"it fits: about {format_bytes(needed)} of {format_bytes(card.memory_bytes)} at most, which leaves "
        f"{format_bytes(max(0, left))}"
    )
    if not observed.num_steps:
        text = f"the script ended without an optimizer step; it took about {format_bytes(needed)}, which fits"
    if observed.num_out_of_memory:
        text += f"; memory ran out {_times(observed.num_out_of_memory)} before, and the script went on"
    return Verdict(ending="fits", sentence=text, exit_code=FITS)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _does_not_fit(observed: Observed, card: Card) -> Verdict:
    event = observed.out_of_memory[-1] if observed.out_of_memory else None
    if event is None:
        text = f"it does not fit: memory ran out on {card.title}"
    else:
        where = "before the first step" if event.phase == "start" else f"in the {event.phase} phase"
        if event.phase in ("forward", "backward", "optimizer"):
            where += f" of step {event.done_steps + (0 if event.phase == 'optimizer' and _is_open(observed) else 1)}"
        text = (
            f"it does not fit: memory ran out {where}: {format_bytes(event.requested)} more were asked for, with "
            f"{format_bytes(event.allocated)} allocated and {format_bytes(event.reserved)} reserved of "
            f"{format_bytes(card.memory_bytes)}"
        )
    return Verdict(ending="does not fit", sentence=text, exit_code=DOES_NOT_FIT)


def _is_open(observed: Observed) -> bool:
    """Whether the step that ran out had an optimizer step already: a second optimizer of the same step."""
    event = observed.out_of_memory[-1]
    return observed.unfinished is None and event.done_steps == observed.num_steps


def _unused(observed: Observed, card: Card) -> Verdict:
    steps = f"took {counted(observed.num_steps, 'step')} on the CPU" if observed.num_steps else "trained nothing on it"
    return Verdict(
        ending="unobserved",
        sentence=(
            f"the script never used the card, and {steps}; have it train on cuda to see whether it fits {card.title}"
        ),
        exit_code=NOT_JUDGED,
    )


def _unobserved(ended: Ended) -> Verdict:
    if ended.exit_code:
        limit = _limit(None, ended, 1) if ended.exit_code < 0 else None
        if limit is not None:
            return Verdict(ending="not emulated", sentence=limit, exit_code=NOT_JUDGED)
        return _failed(ended, None)
    return Verdict(
        ending="unobserved",
        sentence=(
            "no Python process of the command imported torch where it could be observed; leave out python's -I, -E "
            "and -S, and run the script itself rather than a scheduler"
        ),
        exit_code=NOT_JUDGED,
    )


def _failed(ended: Ended, error: ScriptError | None) -> Verdict:
    code = ended.exit_code
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the kernel may have ended it for lack of host memory" if name == "SIGKILL" else ""
        return Verdict(
            ending="script failed",
            sentence=f"the script itself failed: it was ended by {name}{hint}; nothing was judged",
            exit_code=128 - code,
        )
    what = f": {error.type}{_at(error.place)}, with its traceback above" if error is not None else ""
    if ended.observed and values.told(ended.observed[0].reads):
        what += "; it had read values from the card, which were not computed and may be the cause"
    return Verdict(
        ending="script failed", sentence=f"the script itself failed with exit code {code}{what}", exit_code=code
    )


def _limit(error: ScriptError | None, ended: Ended, num_cards: int) -> str | None:
    """Return what the emulated card cannot serve, in a sentence with the remedy; None where the script is at fault."""
    if error is None:
        library = next((name for name in _in_stacks(ended.stacks) if name in _LEAVE_OUT), None)
        crash = signal.Signals(-ended.exit_code).name
        if library is not None:
            return f"{_names(library)}; the process was ended by {crash} within it"
        if crash in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGFPE"):
            near = next(iter(_in_stacks(ended.stacks)), None)
            return (
                f"the process was ended by {crash}{f' within {near}' if near else ''}: a compiled extension touched "
                "memory of the emulated card, which nothing can read; leave that extension out"
            )
        return None
    text = "\n".join(f"{cause.type}: {cause.message}" for cause in error.chain)
    at = _at(error.place)
    if re.search(
        r"invalid device ordinal|Invalid device id|device >= 0 && device < num_gpus|no such CUDA device", text
    ):
        return (
            f"the script asks for a card that is not there{at}, as {counted(num_cards, 'card')} "
            f"{'is' if num_cards == 1 else 'are'} emulated; add --num-devices {num_cards + 1}, or have it train on "
            "cuda:0"
        )
    if any(file.endswith("torch/cuda/graphs.py") for file in error.files) or re.search(r"captur", text):
        return (
            f"CUDA graphs cannot be captured on an emulated card{at}; leave out torch.cuda.graph, and "
            'mode="reduce-overhead" of torch.compile'
        )
    if re.search(r"NCCL|DistBackendError", text):
        return (
            f"cards do not communicate in an emulation{at}; run one process (torchrun --nproc-per-node 1), or with the "
            "gloo backend"
        )
    extension = next((name for name in error.libraries if name in _LEAVE_OUT), None)
    named = next((name for name in _LEAVE_OUT if re.search(rf"\b{name}", text)), None)
    if extension is not None and (error.libraries[0] == extension or _OF_THE_CARD.search(text)):
        return _names(extension) + at
    if _NO_LIBRARY.search(text) and (extension or named):
        return _names(extension or named or "") + at
    if _OF_THE_CARD.search(text):
        first = error.message.splitlines()[0] if error.message else error.type
        return f"the emulated card cannot serve a call{at} ({first}); leave it out of the dry run"
    return None


def _names(library: str) -> str:
    return f"{library} has compiled CUDA code that an emulated card cannot serve; leave out {_LEAVE_OUT[library]}"


def _in_stacks(stacks: str) -> Iterator[str]:
    """Yield the installed packages in the stacks of processes that a signal ended, the innermost first."""
    for path in re.findall(r'File "([^"]+)"', stacks):
        for marker in ("/site-packages/", "/dist-packages/"):
            if marker in path:
                name = path.rpartition(marker)[2].partition("/")[0]
                if name != "torch":
                    yield name


def _at(place: Place | None) -> str:
    return "" if place is None else f" at {place.file}:{place.line}"
