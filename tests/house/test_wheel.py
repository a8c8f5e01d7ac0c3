"""The wheel has all that a command needs: data files, no checkout around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built package; its dependencies are those of the tests' environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, since setuptools leaves its files beside the sources
    shutil.copytree(ROOT / "gcbench", source / "gcbench", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", source]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = (folder / "dist").glob("gcbench-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder / "site", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(("predict", "-m", "gpt2", "-b", "1", "--device", "h100"), "per-layer"), (("models",), "gpt2")],
)
def test_the_installed_package_runs_outside_of_the_checkout(installed: Path, arguments: tuple[str, ...], shown: str):
    environment = {**os.environ, "PYTHONPATH": str(installed / "site"), "HF_HUB_OFFLINE": "1"}
    where = [sys.executable, "-c", "import gcbench; print(gcbench.__file__)"]
    home = subprocess.run(where, cwd=installed, env=environment, capture_output=True, text=True, timeout=60)
    assert str(installed / "site") in home.stdout
    ended = subprocess.run(
        [sys.executable, "-m", "gcbench", *arguments],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert shown in ended.stdout


@pytest.mark.slow
def test_the_wheel_carries_its_license(installed: Path):
    (metadata,) = (installed / "site").glob("gcbench-*.dist-info/METADATA")
    assert "License-Expression: Apache-2.0" in metadata.read_text(encoding="utf-8")
    assert list(metadata.parent.rglob("LICENSE"))
