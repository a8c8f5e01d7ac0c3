"""The observer in the process of a real script, on the CPU build of torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gcbench.dry_run import process
from gcbench.dry_run.process import Ended
from gcbench.dry_run.records import Observed

TRAINS = """
import torch
from torch.utils.checkpoint import checkpoint
layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = layers
    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = checkpoint(layer, x, use_reentrant=REENTRANT) if number else layer(x)
        return x
net = Net()
try:
    for step in range(5):
        for _ in range(2):
            net(torch.randn(2, 4, requires_grad=True)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        net(torch.randn(2, 4))
    torch.save(net.state_dict(), "weights.pt")
finally:
    print("finally")
"""


def observed(folder: Path, code: str, *, steps: int | None = None, **extra: str) -> tuple[Ended, str]:
    private = folder / "private"
    private.mkdir()
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code), encoding="utf-8")
    child = process.child_environment({**os.environ, **extra}, {}, folder=private, max_steps=steps, snapshot=None)
    done = subprocess.run(
        [sys.executable, str(script)], env=child, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    ended = Ended(
        exit_code=done.returncode, was_interrupted=False, observed=process._observed(private), stacks=done.stderr
    )
    return ended, done.stdout


def only(ended: Ended) -> Observed:
    (found,) = ended.observed
    return found


@pytest.mark.parametrize("reentrant", [True, False])
def test_steps_micro_batches_and_recomputed_layers_are_counted(tmp_path, reentrant):
    ended, out = observed(tmp_path, TRAINS.replace("REENTRANT", str(reentrant)))
    found = only(ended)
    assert ended.exit_code == 0, ended.stacks
    assert found.num_steps == 5 and found.stopped is None
    assert found.first is not None and found.later is not None
    for step in (found.first, found.later):
        assert step.backwards == 2
        assert (step.layers_checkpointed, step.layers_recomputed) == (2, 2)
        assert (step.checkpointed, step.recomputed) == (4, 4)
    assert found.checkpoint_reentrant is reentrant
    assert found.evaluations == 1
    assert found.saved_files == (str(tmp_path / "weights.pt"),)
    assert (found.workload.model_class, found.workload.optimizer) == ("Net", "SGD")
    assert found.workload.on_card is False
    assert "finally" in out


def test_the_script_ends_after_its_steps_through_finally(tmp_path):
    ended, out = observed(tmp_path, TRAINS.replace("REENTRANT", "False"), steps=2)
    found = only(ended)
    assert ended.exit_code == 0
    assert found.num_steps == 2 and found.stopped is not None and found.stopped.why == "steps"
    assert found.failure is None
    assert out.split() == ["finally"]
    assert not (tmp_path / "weights.pt").exists()


def test_a_failure_is_the_scripts_own_and_shows_no_frame_of_the_observer(tmp_path):
    """The trap: the observer wraps Module.__call__, and stood in every traceback."""
    ended, _ = observed(
        tmp_path,
        """
        import torch
        class Net(torch.nn.Module):
            def forward(self, x):
                raise ValueError("mine")
        Net()(1)
        """,
    )
    error = only(ended).failure
    assert ended.exit_code == 1 and error is not None
    assert (error.type, error.message, error.is_out_of_memory) == ("ValueError", "mine", False)
    assert error.place is not None and error.place.function == "Net.forward"
    assert "ValueError: mine" in ended.stacks and "dry_run/observer" not in ended.stacks


def test_the_users_own_sitecustomize_runs_and_ours_is_nowhere(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import builtins; builtins.mine = True\n", encoding="utf-8")
    code = "import sys; print(mine, any('startup' in entry for entry in sys.path))"
    ended, out = observed(tmp_path, code, PYTHONPATH=str(own))
    assert ended.exit_code == 0, ended.stacks
    assert out.split() == ["True", "False"]
    assert ended.observed == ()


def test_a_forked_worker_reports_nothing(tmp_path):
    ended, _ = observed(
        tmp_path,
        """
        import os, torch
        if os.fork() == 0:
            raise SystemExit(0)
        os.wait()
        """,
    )
    assert len(ended.observed) == 1


def test_torchscript_still_knows_the_functions_that_are_wrapped(tmp_path):
    ended, _ = observed(
        tmp_path,
        """
        import torch, warnings
        warnings.simplefilter("ignore")
        def f(x):
            if bool(torch.isnan(x).any()):
                return torch.unique(x)
            return x * 2
        torch.jit.script(f)(torch.ones(3))
        """,
    )
    assert ended.exit_code == 0, ended.stacks


def test_values_on_the_host_are_read_as_they_are(tmp_path):
    ended, out = observed(
        tmp_path,
        """
        import torch
        x = torch.tensor([1.0, float("nan")])
        print(bool(torch.isnan(x).any()), x[0].item(), (x == x).tolist(), x[x > 0].tolist(), int(x[0]))
        """,
    )
    assert out.strip() == "True 1.0 [True, False] [1.0] 1"
    assert only(ended).reads == ()
