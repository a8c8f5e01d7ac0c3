"""Building the library: for which torch, with which compiler, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gcbench.core.errors import UnavailableError
from gcbench.devices import cards
from gcbench.emulate import environment as emulated
from gcbench.emulate import library, smi, symbols
from gcbench.emulate.symbols import Library


def _torch(folder: Path, version: str, cuda: str | None) -> Path:
    """An interpreter that finds a torch of this version."""
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__ = {version!r}\ncuda: str | None = {cuda!r}\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_a_torch_without_cuda_is_refused_with_the_line_that_installs_one(tmp_path: Path) -> None:
    python = _torch(tmp_path, "2.13.0+cpu", None)
    with pytest.raises(UnavailableError, match=r"without CUDA.*pip install .*--no-deps torch===2\.13\.0 "):
        library.find_torch(python)


def test_a_torch_that_is_too_old_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"torch 2\.8\.0\+cu128 is too old"):
        library.find_torch(_torch(tmp_path, "2.8.0+cu128", "12.8"))


def test_a_build_with_cuda_is_found_without_importing_it(tmp_path: Path) -> None:
    found = library.find_torch(_torch(tmp_path, "2.9.1+cu128", "12.8"))
    assert (found.version, found.cuda_version, found.folder) == ("2.9.1+cu128", 12080, tmp_path / "torch")


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be run to find its torch"):
        library.find_torch(tmp_path / "nothing")


def test_a_missing_compiler_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="no C compiler is installed; install one"):
        library._compiler()
    monkeypatch.setenv("CC", "no-such-cc -O2")
    with pytest.raises(UnavailableError, match=r"\$CC is no-such-cc -O2, which is not there"):
        library._compiler()


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo 'fatal error: no headers here' >&2; exit 1", "no headers here"), ("exit 3", "ended with exit code 3")],
)
def test_a_compiler_that_fails_is_one_sentence_with_its_reason(tmp_path: Path, script: str, reason: str) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    with pytest.raises(UnavailableError, match=rf"failed to build the emulated card \(.*{reason}.*\); set CC"):
        library._compile(Library(soname="libcuda.so.1"), str(compiler), [], tmp_path)


def test_functions_that_would_leave_a_size_undefined_are_refused() -> None:
    assert "emu_refuse" in library._stub("cusolver", "cusolverDnXgeqrf_bufferSize")
    assert "emu_refuse" in library._stub("cudnn", "cudnnGetRNNWorkspaceSize")
    assert "emu_refuse" not in library._stub("cusolver", "cusolverDnXgeqrf")


@pytest.mark.parametrize(
    ("soname", "key"),
    [("libcublasLt.so.13", "cublasLt"), ("libcuda.so.1", "cuda"), ("libstdc++.so.6", ""), ("libcupti.so", "")],
)
def test_libraries_of_nvidia_are_told_by_their_file_name(soname: str, key: str) -> None:
    assert symbols.key_of(soname) == key


def test_what_a_file_takes_from_each_library_is_read_from_its_symbols(tmp_path: Path) -> None:
    """An extension built against a stand-in, as torch's libraries and those of other packages are."""
    source = tmp_path / "runtime.c"
    source.write_text("int cudaMalloc(void) { return 0; }\nint cudaNew(void) { return 0; }\n")
    runtime = tmp_path / "libcudart.so.13"
    script = tmp_path / "map"
    script.write_text("libcudart.so.13 { global: *; };\n")
    flags = ["cc", "-shared", "-fPIC"]
    subprocess.run(
        [*flags, "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script,{script}", "-o", runtime, source], check=True
    )
    user = tmp_path / "user.c"
    user.write_text("int cudaMalloc(void);\nint mine(void) { return cudaMalloc(); }\n")
    lib = tmp_path / "torch" / "lib"
    lib.mkdir(parents=True)
    subprocess.run([*flags, "-o", lib / "libtorch_cuda.so", user, runtime], check=True)
    extension = tmp_path / "extra"
    extension.mkdir()
    user.write_text("int cudaNew(void);\nint mine(void) { return cudaNew(); }\n")
    subprocess.run([*flags, "-o", extension / "ops.so", user, runtime], check=True)
    (extension / "empty.so").touch()

    found = symbols.wanted(lib, tmp_path)

    assert list(found) == ["libcudart.so.13"]
    assert found["libcudart.so.13"].tag == "libcudart.so.13"
    assert found["libcudart.so.13"].functions >= {"cudaMalloc", "cudaNew"}


def test_no_process_is_emulated_unless_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GCBENCH_EMULATED")]:
        monkeypatch.delenv(name)
    assert emulated.emulated_card() is None
    assert emulated.emulated_context_bytes() is None
    monkeypatch.setenv("GCBENCH_EMULATED_CARD", "t4")
    monkeypatch.setenv("GCBENCH_EMULATED_PROPERTIES", "num_cards=1|context_bytes=5")
    assert (emulated.emulated_card(), emulated.emulated_context_bytes()) == ("t4", 5)


def test_a_card_that_cannot_be_emulated_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "build", lambda python: pytest.fail("built"))
    with pytest.raises(UnavailableError, match="only NVIDIA's can be emulated"):
        emulated.environment(cards.find("mi300x"))


def test_the_environment_names_the_card_and_keeps_what_else_was_preloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = library.Torch(version="2.13.0+cu130", cuda="13.0", folder=tmp_path)
    built = library.Built(
        folder=tmp_path, preload=(tmp_path / "libcuda.so.1",), architectures="sm_80 sm_90", torch=torch
    )
    monkeypatch.setattr(library, "build", lambda python: built)
    monkeypatch.setenv("LD_PRELOAD", "/lib/other.so")
    added = emulated.environment(cards.find("h100"), num_cards=2, ledger=tmp_path / "ledger")
    assert added["LD_PRELOAD"] == f"{tmp_path}/libcuda.so.1:/lib/other.so"
    assert added["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert added["GCBENCH_EMULATED_CARD"] == "h100"
    assert "num_cards=2" in added["GCBENCH_EMULATED_PROPERTIES"]
    assert os.environ["LD_PRELOAD"] == "/lib/other.so"


def test_nvidia_smi_reports_the_processes_of_the_ledger(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger"
    used = [0] * 16
    used[1] = 300 << 20
    gone = [1 << 30] * 16
    ledger.write_bytes(smi.SLOT.pack(os.getpid(), 0, *used) + smi.SLOT.pack(2**22 + 1, 0, *gone))
    monkeypatch.setenv("GCBENCH_EMULATED_LEDGER", str(ledger))
    monkeypatch.setenv("GCBENCH_EMULATED_PROPERTIES", "num_cards=2|name=Tesla T4|memory_bytes=1073741824")
    smi.main(["--query-gpu=index,memory.used,memory.free,fan.speed", "--format=csv,noheader,nounits", "--id=1"])
    smi.main(["--query-compute-apps=pid,used_memory", "--format=csv"])
    smi.main(["-L"])
    assert capsys.readouterr().out.splitlines() == [
        "1, 300, 724, [N/A]",
        "pid, used_memory",
        f"{os.getpid()}, 300 MiB",
        "GPU 0: Tesla T4 (UUID: GPU-6c6c6c6c-6c6c-6c6c-6c6c-6c6c6c6c6c00)",
        "GPU 1: Tesla T4 (UUID: GPU-6c6c6c6c-6c6c-6c6c-6c6c-6c6c6c6c6c01)",
    ]
