"""The wheel: what it holds, and that it works in an empty environment, used from another directory."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

SCRIPT = """
import pathlib, torch, dbf_compile
assert pathlib.Path(dbf_compile.__file__).is_relative_to(pathlib.Path({environment!r})), dbf_compile.__file__
model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 96))
model.requires_grad_(False)
options = {{"bits_per_weight": 4.0, "iterations": 4, "progress": False}}
x = torch.randn(3, 96)
compiled = torch.compile(model, backend="dbf", options=options)(x)
eager = dbf_compile.convert_(model, **options)(x)
assert (compiled - eager).abs().max() < 1e-4 * eager.abs().max()
from dbf_compile.kernels.sign_matmul import cpu_kernel
assert cpu_kernel.available()
print("works")
"""


def run(*command: object, **settings: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # By way of a source distribution, so that nothing left in the tree's own build folder gets in.
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_source_once_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "-C", ROOT, "ls-files", "dbf_compile", "passes", "kernels").split()
    links = {"dbf_compile/passes", "dbf_compile/kernels"}
    expected = {
        name if name.startswith("dbf_compile/") else f"dbf_compile/{name}"
        for name in tracked
        if name not in links
    }
    assert {name for name in names if ".dist-info/" not in name} == expected


def declared(wheel):
    """Yield the installed distributions that the wheel declares as dependencies, and those that they declare."""
    metadata = zipfile.ZipFile(wheel).read(f"{wheel.name.rsplit('-', 3)[0]}.dist-info/METADATA").decode()
    waiting = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist")
    ]
    seen = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name in seen or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        seen.add(requirement.name)
        distribution = importlib.metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), requirement
        waiting += distribution.requires or []
        yield distribution


def test_an_installed_wheel_works_from_another_directory_with_what_it_declares(wheel, tmp_path):
    """Links stand in for downloads: the environment holds the wheel and its declared dependencies, nothing else."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    for distribution in declared(wheel):
        names = {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}
        for name in names:
            if not (packages / name).exists():  # two of them may share a folder
                (packages / name).symlink_to(distribution.locate_file(name))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    output = run(python, "-c", SCRIPT.format(environment=str(environment.resolve())), cwd=tmp_path, env=clean)
    assert output.endswith("works\n")
