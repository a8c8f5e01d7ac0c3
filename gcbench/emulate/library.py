"""Builds the library that stands in for NVIDIA's, once for each build of torch, with the user's C compiler."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from gcbench.core.errors import UnavailableError
from gcbench.core.files import cache_folder
from gcbench.emulate import smi, symbols
from gcbench.emulate.symbols import Library

_SOURCES = {
    "cuda": ("driver.c", "device.c", "ledger.c", "activity.c"),
    "cudart": ("runtime.c",),
    "cublas": ("cublas.c",),
    "cublasLt": ("cublas.c",),
    "cudnn": ("cudnn.c",),
    "nvidia-ml": ("nvml.c",),
    "nvrtc": ("nvrtc.c",),
    "nccl": ("nccl.c",),
    "cupti": ("cupti.c",),
}
_DRIVER, _NVML = "libcuda.so.1", "libnvidia-ml.so.1"
_FLAGS = ("-O2", "-fPIC", "-std=gnu11", "-fno-builtin", "-Wall", "-Wextra", "-Wno-missing-field-initializers")
_STUB = '__attribute__((weak)) long {name}(void) {{ emu_call("{name}"); return {status}; }}\n'
_REFUSED_STUB = '__attribute__((weak)) long {name}(void) {{ return emu_refuse("{name}", {status}); }}\n'
_REFUSED = re.compile(r"(?i)buffer_?size|workspace_?size|Get\w+Size$")
"""Functions whose result is a size: one that nobody wrote would leave it undefined."""
_NOT_SUPPORTED = {"cusolver": 9, "cusparse": 10, "cudnn": 3000, "cufft": 16}
_OLDEST = (2, 9)
_CUDNN_VERSION = 91900
_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Torch:
    """A build of torch, as its files describe it."""

    version: str
    cuda: str | None
    folder: Path

    @property
    def cuda_version(self) -> int:
        """13000 for CUDA 13.0."""
        major, _, minor = (self.cuda or "0").partition(".")
        return int(major) * 1000 + int(minor or 0) * 10


@dataclass(frozen=True, kw_only=True)
class Built:
    """The library for one build of torch.

    Attributes:
        preload: the files that LD_PRELOAD has to name.
        architectures: what torch was built for, as it says it: `sm_80 sm_90 compute_90`.
    """

    folder: Path
    preload: tuple[Path, ...]
    architectures: str
    torch: Torch


def build(python: Path | None = None) -> Built:
    """Return the library for the torch of `python` (this interpreter's), built if the cache does not have it.

    Raises UnavailableError when this machine, its compiler or its torch does not allow it.
    """
    python = python or Path(sys.executable)
    torch = find_torch(python)
    folder = cache_folder() / "emulate" / _key(torch)
    if not (folder / "built.json").exists():
        from filelock import FileLock  # lazily: only the first use in an environment builds

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "built.json").exists():
                _build(torch, python, folder)
    stored = json.loads((folder / "built.json").read_text(encoding="utf-8"))
    preload = tuple(folder / name for name in stored["preload"])
    return Built(folder=folder, preload=preload, architectures=stored["architectures"], torch=torch)


def find_torch(python: Path) -> Torch:
    """Return the torch of an interpreter, without importing it.

    Raises UnavailableError where it is missing, too old or a build without CUDA.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnavailableError(
            f"cards are emulated on Linux on x86-64, and this is {platform.system()} on {platform.machine()}; predict "
            "instead: gcbench predict --device CARD"
        )
    question = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    try:
        done = subprocess.run([str(python), "-c", question], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        raise UnavailableError(
            f"{python} cannot be run to find its torch; name the interpreter of the script"
        ) from None
    origin = done.stdout.strip().splitlines()[-1:] or [""]
    if not origin[0]:
        raise UnavailableError(f"{python} has no torch; {_remedy('2.13.0')}")
    folder = Path(origin[0]).parent
    text = (folder / "version.py").read_text(encoding="utf-8")
    version = _assigned(text, "__version__") or "0"
    torch = Torch(version=version, cuda=_assigned(text, "cuda"), folder=folder)
    plain = version.partition("+")[0]
    if torch.cuda is None:
        raise UnavailableError(
            f"torch {version} is a build without CUDA, and an emulated card runs PyTorch's CUDA code; {_remedy(plain)}"
        )
    if tuple(int(part) for part in plain.split(".")[:2]) < _OLDEST:
        raise UnavailableError(f"torch {version} is too old to be emulated; {_remedy('2.13.0')}")
    return torch


def _remedy(version: str) -> str:
    return (
        "in an environment of its own, after gcbench: pip install --force-reinstall --no-deps torch==="
        f"{version} (the build from PyPI for Linux has CUDA; the NVIDIA packages are not needed)"
    )


def _assigned(text: str, name: str) -> str | None:
    match = re.search(rf"^{name}\b[^=\n]*= '([^']+)'", text, re.MULTILINE)
    return match[1] if match else None


def _key(torch: Torch) -> str:
    digest = hashlib.sha256()
    for source in sorted(_csrc().iterdir()):
        digest.update(source.read_bytes())
    for path in (Path(__file__), Path(symbols.__file__), Path(smi.__file__)):
        digest.update(path.read_bytes())
    site = torch.folder.parent
    digest.update(f"{torch.folder} {torch.version} {site.stat().st_mtime_ns}".encode())
    return f"torch-{torch.version.partition('+')[0]}-{digest.hexdigest()[:16]}"


def _csrc() -> Path:
    return Path(str(resources.files("gcbench.emulate").joinpath("csrc")))


def _compiler() -> str:
    chosen = os.environ.get("CC")
    for name in (chosen.split()[0],) if chosen else ("cc", "gcc", "clang"):
        if shutil.which(name):
            return name
    where = f"$CC is {chosen}, which is not there" if chosen else "no C compiler is installed"
    raise UnavailableError(
        f"emulating a card needs a C compiler once, and {where}; install one (apt install gcc, or dnf install gcc)"
    )


def _build(torch: Torch, python: Path, folder: Path) -> None:
    compiler = _compiler()
    if shutil.which("readelf") is None:
        raise UnavailableError("emulating a card needs readelf once; install it (apt install binutils)")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as work:
        place = Path(work)
        libraries = _libraries(torch)
        flags = _defines(torch)
        driver = next(library for library in libraries if library.soname == _DRIVER)
        _compile(driver, compiler, flags, place)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            others = [library for library in libraries if library is not driver]
            list(pool.map(lambda library: _compile(library, compiler, flags, place), others))
        (place / "libcuda.so").symlink_to(_DRIVER)  # where Triton looks for it
        _write_shim(place / "bin", python)
        preload = [_DRIVER, *(library.soname for library in others)]
        architectures = _probe(python, [place / name for name in preload])
        document = {"preload": preload, "architectures": architectures}
        (place / "built.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        place.rename(folder)
        place.mkdir()  # for the end of the temporary folder


def _libraries(torch: Torch) -> list[Library]:
    """The libraries to build, with every function that somebody may call."""
    site = torch.folder.parent
    found = symbols.wanted(torch.folder / "lib", site)
    driver = found.setdefault(_DRIVER, Library(soname=_DRIVER))
    driver.functions |= symbols.in_sources((site / "triton" / "backends" / "nvidia").glob("*.[cp]*"))
    for name in ("libc10_cuda.so", "libtorch_cuda.so"):
        driver.functions |= symbols.in_strings(torch.folder / "lib" / name)
    found[_NVML] = Library(soname=_NVML)
    installed = {path.name for path in site.glob("nvidia/**/libnvrtc.so.*")}
    return [library for library in found.values() if library.soname not in installed]


def _defines(torch: Torch) -> list[str]:
    cublas = torch.cuda_version // 1000 * 10000 + 100
    metadata = next(torch.folder.parent.glob("torch-*.dist-info/METADATA"), None)
    text = metadata.read_text(encoding="utf-8") if metadata else ""
    required = re.search(r"Requires-Dist: nvidia-cudnn-cu\d+==(\d+)\.(\d+)\.(\d+)", text)
    cudnn = int(required[1]) * 10000 + int(required[2]) * 100 + int(required[3]) if required else _CUDNN_VERSION
    return [f"-DCUDA_VERSION={torch.cuda_version}", f"-DCUBLAS_VERSION={cublas}", f"-DCUDNN_VERSION={cudnn}"]


def _compile(library: Library, compiler: str, flags: list[str], place: Path) -> None:
    """Compile one library: what its sources define, and for all else a function that does nothing."""
    key = library.soname[3:].partition(".so")[0]
    work = place / "objects" / key
    work.mkdir(parents=True)
    sources = [_csrc() / name for name in _SOURCES.get(key, ())]
    common = [*_FLAGS, *flags, f"-DBUILD_{key.upper().replace('-', '_')}", f"-I{_csrc()}"]
    names = sorted(name for name in library.functions if name.isidentifier() and not name.startswith("emu_"))
    stubs = work / "stubs.c"
    stubs.write_text('#include "device.h"\n' + "".join(_stub(key, name) for name in names), encoding="utf-8")
    command = [compiler, *common, "-shared", f"-Wl,-soname,{library.soname}", "-Wl,-rpath,$ORIGIN"]
    if library.tag:
        script = work / "versions.map"
        script.write_text(f"{library.tag} {{ global: *; }};\n", encoding="utf-8")
        command.append(f"-Wl,--version-script,{script}")
    command += ["-o", str(place / library.soname), *map(str, sources), str(stubs)]
    if library.soname != _DRIVER:
        command.append(str(place / _DRIVER))
    done = subprocess.run([*command, "-ldl", "-lpthread"], capture_output=True, text=True)
    if done.returncode != 0:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:]).strip()
        reason = said or f"it ended with exit code {done.returncode} and said nothing"
        raise UnavailableError(
            f"the C compiler {compiler} failed to build the emulated card ({reason}); set CC to a working one"
        )


def _stub(key: str, name: str) -> str:
    if key in _NOT_SUPPORTED and _REFUSED.search(name):
        return _REFUSED_STUB.format(name=name, status=_NOT_SUPPORTED[key])
    return _STUB.format(name=name, status=0)


def _write_shim(folder: Path, python: Path) -> None:
    """Write an `nvidia-smi` that answers for the emulated cards."""
    folder.mkdir()
    shim = folder / "nvidia-smi"
    code = Path(smi.__file__).read_text(encoding="utf-8")
    shim.write_text(
        f"#!/bin/sh\nunset LD_PRELOAD\nexec {shlex.quote(str(python))} -I -S - \"$@\" <<'END'\n{code}\nEND\n", "utf-8"
    )
    shim.chmod(0o755)


def _probe(python: Path, preload: list[Path]) -> str:
    """Import torch on the emulated card once, and return the architectures that it was built for."""
    code = "import torch; assert torch.cuda.is_available(); print('ARCH', torch._C._cuda_getArchFlags())"
    env = os.environ | {"LD_PRELOAD": ":".join(map(str, preload)), "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=env, timeout=_SECONDS)
    match = re.search(r"^ARCH (.*)$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or match is None:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise UnavailableError(
            f"torch cannot be imported on an emulated card ({last.strip()[:200]}); take torch 2.9 to 2.13 from PyPI"
        )
    return match[1]
