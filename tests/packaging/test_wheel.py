"""The wheel and the sdist, as the distribution's own tools build them, offline."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hostagent import __version__
from tests.packaging.source import REPOSITORY, WAIT, copied, files

PYTHON = "/usr/bin/python3"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel that is built from it."""
    if subprocess.run([PYTHON, "-c", "import build, setuptools, wheel"], capture_output=True).returncode:
        pytest.skip("python3-build, python3-setuptools and python3-wheel are not installed (tools/setup.sh develop)")
    tree = copied(tmp_path_factory.mktemp("tree"))
    run(PYTHON, "-m", "build", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def test_their_names_have_the_version(dist: Path) -> None:
    names = {f"hostagent-{__version__}.tar.gz", f"hostagent-{__version__}-py3-none-any.whl"}
    assert {path.name for path in dist.iterdir()} == names


def test_the_wheel_has_all_modules_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"hostagent-{__version__}.dist-info/METADATA").decode()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
        points = archive.read(f"hostagent-{__version__}.dist-info/entry_points.txt").decode()
    assert names == {name for name in files() if name.split("/")[0] in ("hostagent", "jobs", "events")}
    assert "Requires-Dist: qemu.qmp" in metadata
    assert re.search(r"^hostagent = hostagent.cli.main:main$", points, re.MULTILINE)


def test_the_sdist_is_the_repository(dist: Path) -> None:
    with tarfile.open(dist / f"hostagent-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names - made if not name.startswith("hostagent.egg-info/")} == set(files())


def test_the_wheel_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Without what it depends on: help, version and completions need nothing but Python."""
    run(PYTHON, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    program = tmp_path / "venv/bin/hostagent"
    assert run(program, "--version", cwd=tmp_path) == f"hostagent {__version__}\n"
    assert "job" in run(program, "--help", cwd=tmp_path)
    assert "--base" in run(program, "job", "pull", "--help", cwd=tmp_path)
    assert "complete -F" in run(program, "completion", "bash", cwd=tmp_path)
    run(*pip, "uninstall", "--quiet", "--yes", "hostagent", cwd=tmp_path)
    left = [path for path in (tmp_path / "venv/lib").rglob("*.py")]
    assert not left, left


@pytest.mark.slow
def test_the_wheel_brings_all_that_it_needs(wheel: Path, tmp_path: Path) -> None:
    """With its dependencies from the package index: every module can be imported. The distribution's libnbd and libvirt
    are not in this environment, and their absence is no error at load."""
    run(PYTHON, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    run(tmp_path / "venv/bin/pip", "install", "--quiet", wheel, cwd=tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in archive.namelist()
                 if name.endswith(".py")]  # fmt: skip
    assert len(names) > 150
    run(tmp_path / "venv/bin/python", "-c", f"import importlib\nfor name in {names}: importlib.import_module(name)",
        cwd=tmp_path)  # fmt: skip


def test_the_version_is_said_once_for_all() -> None:
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    assert f'version = "{__version__}"' in pyproject
