"""Faults at random moments: whatever is killed, the same command ends with the results of an undisturbed run.

D2O_FAULTS is their number (4: kills and a full disk; `make test-faults` takes 100 of all kinds), D2O_FAULTS_SEED
chooses them. With more than four, the config has online rounds, a judge and released weights, too.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from d2o import records, verify
from d2o.progress import LOG
from test_judge import CHECK, Server
from test_pipeline import CONFIG, KEYS, Project

pytestmark = pytest.mark.slow

FAULTS, SEED = int(os.environ.get("D2O_FAULTS", "4")), int(os.environ.get("D2O_FAULTS_SEED", "0"))
# Samples in two shards, a training on two ranks.
SMALL = CONFIG | {
    "experiments": {"tiny": {"datasets": ["demo"], "models": ["tiny"], "methods": ["initial", "d2o"],
                             "rewards": ["safety"], "tasks": ["mmlu"]}},
    "positives": CONFIG["positives"] | {"shards": 2},
    "engine": {"backend": "transformers", "max_num_seqs": 16},
    "train": CONFIG["train"] | {"ranks": 2, "steps": 12, "checkpoint_minutes": 0.001},
}  # fmt: skip
# Methods that wait for other jobs, and weights that are removed when these are done.
ROUNDS = {"datasets": ["demo"], "models": ["tiny"], "methods": ["initial", "online"], "judges": ["wise"],
          "keep": "nothing"}  # fmt: skip
ONLINE = {"extends": "d2o", "online": {"start": 4, "every": 6, "share": 0.5}}
ALL = [sys.executable, "-m", "snakemake", "--cores", "2", "all"]
# Every Python process of a run loads this: while the first of these files lies beside the Snakefile, no fsync
# succeeds, and each leaves the second.
FLAG, REFUSED = "no-fsync", "fsync-refused"
PATCH = f"""
import os
fsync = os.fsync
def failing(handle):
    if os.path.exists({FLAG!r}):
        open({REFUSED!r}, "w").close()
        raise OSError(5, "Input/output error")
    fsync(handle)
os.fsync = failing
"""


class Run:
    """One `snakemake all` in a session of its own, and by their names further files."""

    def __init__(self, project: Project, *files: str, log: str = "printed.log"):
        self._project = project
        self._log = (project.folder / log).open("w+")
        patched = project.folder / "patched"
        patched.mkdir(exist_ok=True)
        (patched / "sitecustomize.py").write_text(PATCH)
        path = os.pathsep.join([str(patched), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self._process = subprocess.Popen(
            [*ALL, *files], cwd=project.folder, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True, env=os.environ | KEYS | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )  # fmt: skip

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status; None if it still runs after `seconds`."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def printed(self) -> str:
        return Path(self._log.name).read_text()

    def stages(self) -> list[psutil.Process]:
        """The processes, ranks included, that run a stage."""
        at_work = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            line = process.info["cmdline"] or []
            if process.info["cwd"] == str(self._project.folder) and "d2o" in line and "snakemake" not in line:
                at_work.append(process)
        lines = {process.pid: process.info["cmdline"] for process in at_work}
        # Beside each runs a watcher with the same command line, which reports a kill; it is left out.
        return [process for process in at_work if lines.get(_parent(process)) != process.info["cmdline"]]

    def strike(self, victim: str, random: random.Random) -> str:
        """Strike the run with one fault; returns the stage that a random process was running then."""
        stages = self.stages()
        struck = random.choice(stages) if stages else None
        line = struck.info["cmdline"] if struck else []
        doing = next((word for word in line[line.index("d2o") + 1 :] if word.isalpha()), "-") if struck else "-"
        match victim:
            case "stage" if struck:  # a rank as well
                _send([struck], signal.SIGKILL)
            case "stage" | "snakemake":
                _send([psutil.Process(self._process.pid)], signal.SIGKILL)
            case "SIGTERM":
                _send([*stages, psutil.Process(self._process.pid)], signal.SIGTERM)
            case "everything":
                _send([psutil.Process(self._process.pid), *stages], signal.SIGKILL)
            case "table":  # vanishes while jobs read it
                tables = sorted((self._project.folder / "results").rglob("*.parquet"))
                if tables:
                    random.choice(tables).unlink()
            case "clock":  # as if it had been set forward or back; not for links, which lead out of the results
                for path in sorted((self._project.folder / "results").rglob("*")):
                    if random.random() < 0.3 and path.exists() and not path.name.startswith("."):
                        os.utime(path, 2 * (random.uniform(9e8, 2.2e9),), follow_symlinks=False)
            case "second":  # Snakemake in the same folder
                for _ in range(3):
                    second = Run(self._project, log="second.log")
                    refused = second.wait(300) == 1 and "cannot be locked" in second.printed()
                    # Before it asks for the lock, it may meet a folder that the first is just putting in its place.
                    if "concurrent process" not in second.printed():
                        break
                assert refused or self.wait(0) is not None, second.printed()[-2000:]  # or the first run has ended
            case "disk":  # full until the run ends
                ballast = self._project.folder / "results" / "ballast"
                fill(ballast, random.randrange(1 << 20))
                self.wait(300)
                ballast.unlink()
            case "fsync":  # fails until the run ends
                (self._project.folder / FLAG).touch()
                self.wait(300)
                (self._project.folder / FLAG).unlink()
            case "bit" | "page":
                files = sorted((self._project.folder / "results").rglob("*"))
                if whole := [path for path in files if keeps_data(path)]:
                    damage(random.choice(whole), victim, random)
        return doing


VICTIMS = ("snakemake", "stage", "SIGTERM", "everything", "table", "clock", "second", "bit", "page", "disk", "fsync")
# A small sample has only these faults, which most users will meet.
SAMPLE = ("stage", "SIGTERM", "disk", "everything")
SAMPLED = len(SAMPLE) >= FAULTS
# Faults after which the run goes on, to its end or to the job that fails; others may strike it on the way.
HARMLESS = ("table", "clock", "second", "bit", "page")
# What a run says that ends of a fault of the disk.
REASONS = {"disk": "No space left|GB are free", "fsync": "Input/output error"}
# Faults after which a table may be gone: it vanished, or was deleted because a message asked for it.
GONE = ("table", "bit", "page")


def keeps_data(path: Path) -> bool:
    """Whether a file is one that a stage has finished or continues from; links lead out of the results."""
    kept = path.suffix in (".parquet", ".safetensors", ".jsonl", ".json", ".pt") and not path.name.startswith(".")
    return kept and path.is_file() and not path.is_symlink() and path.stat().st_size > 0


def damage(path: Path, what: str, random: random.Random) -> None:
    """Flip a bit of a file, or make a page of it zeros."""
    with path.open("r+b") as file:
        place = random.randrange(path.stat().st_size)
        start = place if what == "bit" else place - place % 4096
        file.seek(start)
        there = file.read(1 if what == "bit" else 4096)
        file.seek(start)
        file.write(bytes([there[0] ^ 1 << random.randrange(8)]) if what == "bit" else bytes(len(there)))


@pytest.fixture
def disturbed(undisturbed, tiny_model, tmp_path):
    """Makes projects whose results lie on a disk of their own, if this user may mount one."""
    disks = []

    def project() -> Project:
        made = Project(tmp_path / str(len(disks)), tiny_model)
        made.configure(undisturbed.config)
        disk = made.folder / "results"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk], capture_output=True)
        disks.append(disk if mounted.returncode == 0 else None)
        return made

    yield project
    for disk in filter(None, disks):
        subprocess.run(["umount", "-l", disk], check=True)


def fill(ballast: Path, free: int) -> None:
    """Leave at most `free` bytes on the disk of a file, which takes up the rest."""
    with ballast.open("wb") as file:
        while (left := shutil.disk_usage(ballast.parent).free - free) > 0:
            with suppress(OSError):  # a job has taken them meanwhile
                os.posix_fallocate(file.fileno(), ballast.stat().st_size, left)


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def finished(project: Project, *files: str) -> None:
    """Run the same command, and do what its messages ask for, until nothing is left to do."""
    for _ in range(12):
        run = Run(project, *files)
        if run.wait(300) == 0:
            return
        if not remedied(project, run):
            pytest.fail(run.printed()[-4000:])
    pytest.fail(f"it never ends: {run.printed()[-4000:]}")


def remedied(project: Project, run: Run) -> bool:
    """Do what the message of a run that failed asks for; False where it asks for nothing."""
    printed = run.printed()
    if "--unlock" in printed:
        subprocess.run([*ALL, "--unlock"], cwd=project.folder, check=True, capture_output=True)
    elif "another process is at work here" in printed:  # processes of a killed Snakemake
        psutil.wait_procs(run.stages(), timeout=120)
    elif told := re.search(f"(?:error: |^)(\\S+): .*{DELETE}", printed, re.MULTILINE):
        delete(project, *told.groups())
    else:
        return False
    return True


# The remedy for a damaged file, or for a table that has vanished from a folder whose manifest Snakemake knows.
DELETE = r"; delete (\S+)(?: and (\S+))?,? (?:and run(?: snakemake)? again|to start again)"


def delete(project: Project, named: str, *told: str | None) -> None:
    """Delete what a message names: files or folders, or `it`, the one that the message is about."""
    for name in filter(None, told):
        path = project.folder / (named if name == "it" else name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def mended(project: Project) -> None:
    """As `finished`; what only `d2o verify` misses or finds damaged is made again by name, as its messages ask."""
    finished(project)
    again = []
    for problem in verify.verify(project.folder / "results")[0]:
        if broken := re.match(f"(\\S+): (?:damaged|is gone){DELETE}", problem):
            delete(project, *broken.groups())
            again.append(broken[2])
        else:
            again.append(problem.partition(": is gone; run again")[0])
    names = dict.fromkeys(str(Path(name).relative_to(project.folder)) for name in again)
    finished(project, *names)


# What differs between two equal trainings.
TIMED = {"seconds", "tokens_per_second", "memory_gb", "utilisation", "crc"}


def made(project: Project) -> dict[str, object]:
    """The content of the results: tables' rows, trainings' steps, digests of weights; names of all other files."""
    results = project.folder / "results"
    content: dict[str, object] = {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if path.is_dir() or "/logs/" in name or "events.out" in name or name.endswith(".svg"):
            continue
        content[name] = None
        if path.suffix == ".parquet":
            content[name] = pq.read_table(path).to_pylist()
        elif path.suffix == ".safetensors":
            content[name] = records.file_digest(path)
        elif path.name == LOG:
            steps = map(json.loads, path.read_text().splitlines())
            content[name] = [{key: value for key, value in step.items() if key not in TIMED} for step in steps]
    return content


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory) -> Iterator[Project]:
    project = Project(tmp_path_factory.mktemp("undisturbed"), tiny_model)
    wise = Server(lambda text: "yes" if text == CHECK else "[[A]]")
    config = SMALL | {"models": project.config["models"]}
    if not SAMPLED:
        config["experiments"] = config["experiments"] | {"rounds": ROUNDS}
        config["methods"] = config["methods"] | {"online": ONLINE}
        config["judges"] = {"wise": wise.settings().model_dump(exclude_defaults=True)}
    project.configure(config)
    project.snakemake("all")
    yield project
    wise.close()


def test_whatever_dies_the_same_command_ends_with_the_same(undisturbed, disturbed):
    print(f"{FAULTS} faults of seed {SEED}")
    chance, expected, struck = random.Random(SEED), made(undisturbed), []
    dealt: list[str] = []  # each victim once before any comes again
    while len(struck) < FAULTS:
        project = disturbed()
        victims = SAMPLE if SAMPLED else VICTIMS
        if not (project.folder / "results").is_mount():
            print("no disk is filled: this user may mount none")
            victims = [victim for victim in victims if victim != "disk"]
        run, before = Run(project), len(struck)
        while len(struck) < FAULTS and (ended := run.wait(after := chance.uniform(2, 30))) != 0:
            if ended:  # it met what a fault has left
                if not remedied(project, run):
                    break
                run = Run(project)
                continue
            dealt = dealt or chance.sample(victims, len(victims))
            victim = dealt.pop()
            fault = {"victim": victim, "after": round(after, 1), "doing": run.strike(victim, chance)}
            struck.append(fault)
            print(json.dumps(fault), flush=True)
            if victim in HARMLESS:
                continue
            ended = run.wait(120)
            assert ended is not None, fault
            if victim == "fsync" and (project.folder / REFUSED).exists():
                (project.folder / REFUSED).unlink()
                assert ended != 0, fault
            if victim in REASONS and ended != 0:
                # Or it met first what an earlier fault has damaged, or dated later than now.
                earlier = {one["victim"] for one in struck[before:]}
                reasons = [REASONS[victim], *([DELETE] if earlier & {*GONE} else [])]
                reasons += ["clock skew"] if "clock" in earlier else []
                assert re.search("|".join(reasons), run.printed()), run.printed()[-3000:]
            if chance.random() < 0.5:  # else processes that Snakemake left meet the next run
                psutil.wait_procs(run.stages(), timeout=120)
            subprocess.run([*ALL, "--unlock"], cwd=project.folder, capture_output=True)
            run = Run(project)
        assert run.wait(600) is not None, run.printed()[-3000:]
        mended(project)
        there = made(project)
        assert there.keys() == expected.keys(), struck
        others = [name for name, content in there.items() if expected[name] != content]
        assert not others, struck
        assert not verify.verify(project.folder / "results")[0], struck
    print(Counter(one["victim"] for one in struck), Counter(one["doing"] for one in struck))
