"""Finds which functions of NVIDIA's libraries a build of torch, and what is installed beside it, call. No torch."""

from __future__ import annotations

import mmap
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PREFIXES = {
    "cuda": r"cu[A-Z]\w+",
    "cudart": r"(?:__)?cuda[A-Z]\w+",
    "cublas": r"cublas(?!Lt)\w+",
    "cublasLt": r"cublasLt\w+",
    "cudnn": r"cudnn\w+",
    "cufft": r"cufft\w+",
    "cufile": r"cuFile\w+",
    "cupti": r"cupti\w+",
    "curand": r"curand\w+",
    "cusolver": r"cusolver\w+",
    "cusparse": r"cusparse(?!Lt)\w+",
    "cusparseLt": r"cusparseLt\w+",
    "nccl": r"p?nccl\w+",
    "nvrtc": r"nvrtc\w+",
    "nvshmem_host": r"nvshmem\w+",
}
"""Library -> its functions, where the caller names no version of the symbol."""
_SONAME = re.compile(r"lib(\w+)\.so\.\d+")
_OTHERS = ("torch", "nvidia", "numpy", "numpy.libs", "pandas", "scipy", "pyarrow", "matplotlib", "PIL", "pillow.libs")
_MARK = b"libcudart.so."


@dataclass(kw_only=True)
class Library:
    """One library: its file name, the functions that callers want, and the tag of their versions ("" without)."""

    soname: str
    tag: str = ""
    functions: set[str] = field(default_factory=set)

    @property
    def key(self) -> str:
        """`cublas` for libcublas.so.13."""
        return key_of(self.soname)


def key_of(soname: str) -> str:
    """Return `cublas` for libcublas.so.13, and "" for a library that is none of NVIDIA's."""
    match = _SONAME.fullmatch(soname)
    return match[1] if match and match[1] in PREFIXES else ""


def wanted(torch_lib: Path, site_packages: Path) -> dict[str, Library]:
    """Return soname -> what torch's libraries, and compiled extensions beside it, take from it."""
    found: dict[str, Library] = {}
    for path in sorted(torch_lib.glob("lib*.so*")):
        _add(found, path)
    for path in extensions(site_packages):
        _add(found, path, only_known=True)
    for original in sorted(site_packages.glob("nvidia/**/lib*.so.*")):
        if original.name in found:  # another library may call more of it than torch does
            found[original.name].functions |= set(_exported(original))
    return found


def extensions(site_packages: Path) -> Iterator[Path]:
    """Compiled extensions of other packages that call CUDA's runtime."""
    for package in sorted(site_packages.iterdir()):
        if not package.is_dir() or package.name in _OTHERS:
            continue
        for path in sorted(package.rglob("*.so*")):
            if path.is_file() and path.stat().st_size and _mentions(path, _MARK):
                yield path


def in_sources(paths: Iterable[Path]) -> set[str]:
    """Return the names of functions of the driver in texts, such as Triton's."""
    names: set[str] = set()
    for path in paths:
        names |= set(re.findall(rf"\b{PREFIXES['cuda']}\b", path.read_text(encoding="utf-8", errors="replace")))
    return names


def in_strings(path: Path) -> set[str]:
    """Return what looks like the name of a function of the driver in a compiled library's data."""
    return {name.decode() for name in re.findall(rb"\0(cu[A-Z][A-Za-z0-9]{2,60}(?:_v\d)?)(?=\0)", path.read_bytes())}


def _mentions(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content[:4] == b"\x7fELF" and content.find(mark) >= 0


def _add(found: dict[str, Library], path: Path, *, only_known: bool = False) -> None:
    """Add what one file takes; if `only_known`, from libraries that are there already."""
    text = _readelf("-W", "-d", "-V", "--dyn-syms", str(path))
    sonames = [name for name in re.findall(r"NEEDED.*\[(\S+)\]", text) if key_of(name)]
    if only_known:
        sonames = [name for name in sonames if name in found]
    for soname in sonames:
        found.setdefault(soname, Library(soname=soname))
    owners: dict[str, str] = {}
    for soname, versions in re.findall(r"File: (\S+).*\n((?:.*Name: \S+.*\n)*)", text):
        if soname in found:
            owners |= dict.fromkeys(re.findall(r"Name: (\S+)", versions), soname)
    for symbol in re.findall(r"\bUND\s+(\S+)", text):
        name, _, tag = symbol.replace("@@", "@").partition("@")
        if tag in owners:
            found[owners[tag]].tag = tag
            found[owners[tag]].functions.add(name)
        elif not tag:
            for soname in sonames:
                if re.fullmatch(PREFIXES[key_of(soname)], name):
                    found[soname].functions.add(name)


def _exported(path: Path) -> Iterator[str]:
    for line in _readelf("-W", "--dyn-syms", str(path)).splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[3] == "FUNC" and fields[6] != "UND":
            yield fields[7].partition("@")[0]


def _readelf(*arguments: str) -> str:
    return subprocess.run(["readelf", *arguments], capture_output=True, text=True, errors="replace", check=True).stdout
