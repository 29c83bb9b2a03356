"""The wheel and the sdist install and work in an environment without the checkout, with a compiler and without one."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from scripts.common.check_wheel import check_wheel
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

QUIET = ["-q", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check"]


def run(*command: object, cwd: Path, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist, of a copy of the checkout without what an earlier build left."""
    folder = tmp_path_factory.mktemp("built")
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name)
    code = "import setuptools.build_meta as build; build.build_sdist('../dist')"
    run(sys.executable, "-c", code, cwd=folder / "source")
    run(sys.executable, "-m", "pip", "wheel", *QUIET, "-w", folder / "dist", ".", cwd=folder / "source")
    (wheel,), (sdist,) = (list((folder / "dist").glob(ending)) for ending in ("*.whl", "*.tar.gz"))
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The Python of an environment that has the dependencies of this one, and not the package."""
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # A folder of packages that a .pth file adds has its own .pth files left alone, that of the checkout among them.
    (purelib / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python


@pytest.mark.parametrize(("kind", "copies"), [("wheel", "compiled"), ("sdist", "numpy")])
def test_a_bare_environment_trains_with_what_is_installed(
    kind: str, copies: str, built: dict[str, Path], bare: Path, tmp_path: Path
) -> None:
    compiler = {"CC": "/nonexistent"} if copies == "numpy" else {}
    run(bare, "-m", "pip", "install", *QUIET, built[kind], cwd=tmp_path, **compiler)
    place = run(bare, "-c", "import rehearsal_plugin; print(rehearsal_plugin.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(tmp_path)
    printed = run(bare, ROOT / "scripts" / "common" / "first_job.py", copies, cwd=tmp_path)
    assert printed.count("installed without its compiled copies") == (copies == "numpy")
    assert run(bare.with_name("rehearsal"), "--version", cwd=tmp_path).startswith("rehearsal_plugin ")


def test_the_wheel_is_one_to_publish(built: dict[str, Path]) -> None:
    check_wheel(built["wheel"])


def test_the_sdist_has_what_its_tests_need(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = run("git", "ls-files", cwd=ROOT).splitlines()
    needed = ("tests/", "scripts/", "docs/", "configs/", "rehearsal_plugin/", "README.md", "constraints.txt")
    assert not {name for name in listed if name.startswith(needed)} - names


LOADED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_copies", sys.argv[1])
copies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copies)
rows = memoryview(bytearray(range(12))).cast("B", (4, 3))
index = memoryview(bytearray((2).to_bytes(8, "little") + (0).to_bytes(8, "little"))).cast("q")
out = memoryview(bytearray(6)).cast("B", (2, 3))
copies.gather(rows, index, out)
assert out.tolist() == [[6, 7, 8], [0, 1, 2]]
copies.scatter(rows, index, [0], [out], None)
try:
    copies.gather(rows, memoryview(bytes([9] + [0] * 7)).cast("q"), out[:1])
except IndexError:
    print("works")
"""


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_one_build_serves_every_python(version: str, tmp_path: Path) -> None:
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    pythons = [str(python) for python in found if python]
    if not pythons:
        pytest.skip(f"there is no Python {version} here")
    copies = pytest.importorskip("rehearsal_plugin.buffer.rows._copies", reason="installed without a compiler")
    library = Path(copies.__file__)
    assert sysconfig.get_config_var("Py_GIL_DISABLED") or library.name == "_copies.abi3.so"
    assert run(pythons[-1], "-c", LOADED, library, cwd=tmp_path) == "works\n"
