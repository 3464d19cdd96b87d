"""What `--profile profiles/slurm` asks of Slurm, and the small pipeline on a real one of two nodes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import snakemake_executor_plugin_slurm_jobstep
import yaml
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from conftest import ROOT
from d2o import preflight, records
from d2o.needs import Needs
from d2o.plan import Plan
from test_pipeline import CONFIG, Project

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort=16817
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port=16818 CPUs={cpus} RealMemory=16000 State=UNKNOWN
NodeName={host}2 NodeHostname={host} NodeAddr=127.0.0.1 Port=16819 CPUs={cpus} RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def run(*command: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=True, **kwargs)


@pytest.fixture(scope="module")
def slurm():
    """A Slurm controller and two nodes, all on this machine, from Debian's packages, stopped afterwards."""
    if os.environ.get("D2O_TEST_SLURM") != "1":
        pytest.skip("D2O_TEST_SLURM is not 1: this test installs slurm-wlm and munge, and starts Slurm, as root")
    if os.geteuid() != 0:
        pytest.fail("D2O_TEST_SLURM is 1, and starting Slurm needs root")
    if shutil.which("slurmctld") is None:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "slurm-wlm", "munge")
    if Path("/etc/slurm/slurm.conf").exists() and "ClusterName=test" not in Path("/etc/slurm/slurm.conf").read_text():
        pytest.skip("this machine has a Slurm of its own")
    if subprocess.run(["pgrep", "-x", "slurmctld"], capture_output=True).returncode == 0:
        pytest.fail("a slurmctld runs here, perhaps of another run of this test, which this one would end")
    folder, host = Path("/tmp/d2o-slurm"), socket.gethostname().split(".")[0]
    nodes = (host, f"{host}2")
    for name in ("state", *(f"spool.{node}" for node in nodes)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if subprocess.run(["getent", "hosts", host], capture_output=True).returncode:
        with Path("/etc/hosts").open("a") as hosts:
            hosts.write(f"127.0.0.1 {host}\n")
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        run("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "/usr/sbin/munged")
    # The system path: the plugin drops SLURM_CONF from the environment of its jobs.
    Path("/etc/slurm").mkdir(exist_ok=True)
    Path("/etc/slurm/slurm.conf").write_text(CONF.format(host=host, folder=folder, cpus=max(4, os.cpu_count())))
    run("slurmctld", "-c")
    for node in nodes:
        run("slurmd", "-N", node)
    for _ in range(300):
        if run("sinfo", "-h", "-N", "-o", "%t").stdout.split() == ["idle", "idle"]:
            break
        time.sleep(1)
    else:
        pytest.fail(f"the nodes never became idle: {run('sinfo').stdout}")
    yield
    for name in (*(f"slurmd.{node}" for node in nodes), "slurmctld"):
        pid = folder / f"{name}.pid"
        if pid.exists():
            os.kill(int(pid.read_text()), 15)
    # Otherwise every Snakemake on this machine would wait ten seconds for a controller that is gone.
    Path("/etc/slurm/slurm.conf").unlink()


class Resources(dict):
    """Like a job's resources: by key or by attribute."""

    __getattr__ = dict.__getitem__


def job(profile: str = "slurm", **resources) -> MagicMock:
    """A job as the plugins see it: with the profile's default resources, and without those that are None."""
    settings = yaml.safe_load((ROOT / "profiles" / profile / "config.yaml").read_text())
    given = settings["default-resources"] | {"mem_mb": 8000, "runtime": 60} | resources
    return MagicMock(
        resources=Resources({name: value for name, value in given.items() if value is not None}), threads=16
    )


def training(ranks: int, nodes: int, gpus: int, profile: str = "slurm") -> MagicMock:
    """The job of a training, with what the rule itself asks of the plan."""
    config = yaml.safe_load((ROOT / "tests" / "data" / "config.yaml").read_text())
    config["train"] |= {"ranks": ranks, "nodes": nodes}
    plan = Plan(config | {"compute": config["compute"] | {"gpus": gpus}}, "c")
    rule = (ROOT / "workflow" / "rules" / "train.smk").read_text()
    asked = re.findall(r'(\w+)=needs\.training\("(\w+)"\)', rule)
    return job(profile, **{name: Needs(plan).training(need)(SimpleNamespace(method="dpo")) for name, need in asked})


def submitted(job: MagicMock) -> dict[str, str]:
    """The options for nodes, tasks, cores and GPUs in the line that the plugin itself passes to Slurm."""
    names = ("run_uuid", "slurm_logfile", "comment_str", "account", "partition", "workdir")
    line = get_submit_command(job, dict.fromkeys(names, "x")) + set_gres_string(job)
    assert "--signal=TERM@300" in line
    return dict(re.findall(r"--([a-z-]*tasks?[a-z-]*|gpus|gres|nodes)=(\S+)", line))


def started(job: MagicMock, monkeypatch) -> str:
    """The command that the plugin starts inside the job, on its first node."""
    lines = []
    monkeypatch.setattr(
        snakemake_executor_plugin_slurm_jobstep.subprocess,
        "Popen",
        lambda line, **_: lines.append(line) or SimpleNamespace(wait=lambda: 0),
    )
    executor = MagicMock(
        format_job_exec=lambda job: "COMMAND", gpu_job=job.resources.get("gpu"), job_array_task=False
    )
    executor.workflow.executor_settings.pass_command_as_script = False
    snakemake_executor_plugin_slurm_jobstep.Executor.run_job(executor, job)
    return " ".join(lines[0].split())


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_a_job_is_one_task_whatever_its_gpus(gpus, monkeypatch):
    """Slurm starts one task per node where the line names no number."""
    asked = {"nodes": "1", "cpus-per-task": "16"} | ({"gpus": str(gpus)} if gpus else {"ntasks": "1"})
    for one in (job(gpu=gpus), training(max(gpus, 1), 1, gpus)):
        assert submitted(one) == asked
        step = f"srun -n1 --cpu-bind=q --cpus-per-task=16 {f'--gpus={gpus} ' if gpus else ''}--nodes=1 COMMAND"
        assert started(one, monkeypatch) == step


@pytest.mark.parametrize(("nodes", "gpus"), [(2, 8), (4, 8), (2, 0)])
def test_a_training_over_nodes_is_a_task_a_node_with_as_many_gpus_each(nodes, gpus, monkeypatch):
    """Not in a step: Slurm reduces a step with one task to one node, without the GPUs of the others."""
    one = training(8 * nodes, nodes, gpus)
    asked = {"nodes": str(nodes), "ntasks": str(nodes), "cpus-per-task": "16"}
    assert submitted(one) == asked | ({"gpus": str(8 * nodes), "gres": "gpu:8"} if gpus else {})
    assert one.resources.leased == gpus
    assert started(one, monkeypatch) == "COMMAND"


SINFO = """\
long|infinite|256000|64|(null)
main*|1-00:00:00|64000+|32|gpu:a100:4(S:0-1),nvme:1
main*|1-00:00:00|128000|16|gpu:8(S:0-1)
short|30:00|64000|32|(null)
"""


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, None),
        ({"mem_mb": 128000, "runtime": 1440}, None),
        (
            {"mem_mb": 128001},
            r"asks for 128,001 MB of memory, and the partition of Slurm has 128,000: lower `compute`",
        ),
        ({"runtime": 1441}, r"asks for 1,441 minutes, and the partition of Slurm has 1,440"),
        ({"threads": 33, "slurm_partition": "main"}, r"asks for 33 cores, and the partition main has 32"),
        ({"runtime": 31, "slurm_partition": "short"}, r"asks for 31 minutes, and the partition short has 30"),
        ({"runtime": 99999, "slurm_partition": "long"}, None),
        ({"runtime": 99999, "slurm_partition": "short,long"}, None),
        ({"slurm_partition": "mian"}, r"Slurm has no partition 'mian': name one"),
        ({"slurm_partition": "mian", "clusters": "another"}, None),
        ({"gpu": 16, "leased": 8, "nodes": 2}, None),
        ({"gpu": 9}, r"asks for 9 GPUs, and the partition of Slurm has 8"),
        ({"gpu": 1, "slurm_partition": "short"}, r"asks for 1 GPUs, and the partition short has 0"),
        (
            {"mem_mb": 128000, "threads": 32},
            r"asks for 30 minutes, 128,000 MB of memory, 32 cores, and no node of the partition of Slurm has all",
        ),
        ({"mem_mb": 50000, "attempts": 3}, r"asks for 150,000 MB of memory, and the partition of Slurm has 128,000"),
        ({"mem_mb": 50000, "attempts": 2}, None),
    ],
)
def test_more_than_a_partition_has_is_told_before_the_first_job(asked, told, tmp_path, monkeypatch):
    """Slurm refuses such a job only when it is submitted, after all earlier jobs."""
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(f"#!/bin/sh\ncat << END\n{SINFO}END\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jobs = [Asking("small", {"mem_mb": 10}), Asking("train_method", asked), Asking("small", {"mem_mb": 10})]
    lines = list(preflight._slurm(jobs))
    assert len(lines) == bool(told)
    assert not told or re.search(f"^train_method: .*{told}", lines[0])


class Asking:
    """A job with Snakemake's attributes; each further attempt asks for as much memory again."""

    def __init__(self, rule: str, asked: dict):
        self.rule, self.attempt, self.restart_times = SimpleNamespace(name=rule), 1, asked.get("attempts", 1) - 1
        self.threads, self._asked = asked.get("threads", 4), {"mem_mb": 8000, "runtime": 30} | asked

    @property
    def resources(self) -> dict:
        return self._asked | {"mem_mb": self._asked["mem_mb"] * self.attempt}


ON_SLURM = (
    "--profile", "profiles/slurm", "--jobs", "8", "--slurm-no-account",
    "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5",
)  # fmt: skip


@pytest.mark.slow
def test_the_small_pipeline_on_slurm(slurm, tiny_model, tmp_path):
    """A training resumes after Slurm has ended it: one when its time is up, one over both nodes by `scancel`.

    The shards of a pool run side by side, and one that is killed at its first try is submitted again.
    """
    project = Project(tmp_path, tiny_model)
    tiny = CONFIG["experiments"]["tiny"] | {"methods": ["initial", "dpo"], "rewards": [], "tasks": []}
    methods = CONFIG["methods"] | {"over-two": {"extends": "dpo", "train": {"nodes": 2}}}
    train = CONFIG["train"] | {"steps": 300, "ranks": 2}
    positives = CONFIG["positives"] | {"shards": 2}
    project.configure(
        project.config | {"experiments": {"tiny": tiny}, "methods": methods, "train": train, "positives": positives}
    )
    runs = {name: project.folder / "results" / "demo" / "tiny" / name / "seed0" for name in ("dpo", "over-two")}
    over_two = str((runs["over-two"] / "model" / "manifest.json").relative_to(project.folder))
    pool = "results/demo/tiny/positives/corrected-k2.parquet"
    with ThreadPoolExecutor() as beside:
        printed = beside.submit(project.snakemake, "all", over_two, pool, *ON_SLURM)
        under_way, shards, ended = dict(runs), [], []
        while (under_way or not shards) and not printed.done():
            if not shards and len(running := jobs_of("sample_positives")) == 2:
                shards = running
                run("scancel", "--signal=KILL", shards[0])
            for name, folder in list(under_way.items()):
                log = folder / "checkpoints" / "train.jsonl"
                if log.exists() and log.read_text():
                    ended.append(beside.submit({"dpo": time_is_up, "over-two": cancel}[name], name))
                    del under_way[name]
            time.sleep(0.2)
        assert "has been submitted with SLURM jobid" in printed.result()
        assert [one.result() for one in ended] == [None, None]
    assert len(shards) == 2, "never side by side"
    assert printed.result().count("Trying to restart job") == 3
    assert (project.folder / pool).exists()
    for folder in runs.values():
        facts = records.read_manifest(folder / "model")
        assert (facts["steps"], facts["ranks"]) == (300, 2)
        assert facts["resumed_at"] > 0
    weights = {records.file_digest(folder / "model" / "model.safetensors") for folder in runs.values()}
    assert len(weights) == 1, "over two nodes the weights are others"
    assert (project.folder / "results" / "reports" / "tiny" / "report.html").exists()
    assert "Nothing to be done" in project.snakemake("all")


def cancel(name: str) -> None:
    run("scancel", "--signal=TERM", *jobs_of("train_method", name))


def time_is_up(name: str) -> None:
    """Leave a training five minutes, so that Slurm sends the SIGTERM of the profile's `--signal`.

    Slurm checks every half minute: the training is stopped until then, however fast this machine is.
    """
    held = [int(pid) for pid in run("pgrep", "-f", "--", f"--checkpoints [^ ]*/{name}/seed0/").stdout.split()]
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    run("scontrol", "update", f"JobId={','.join(jobs_of('train_method', name))}", "TimeLimit=5")
    while any(map(waiting, held)):
        time.sleep(0.2)
    for pid in held:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def waiting(pid: int) -> bool:
    """Whether a stopped process has not received a SIGTERM yet."""
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status["State"].startswith("T") and not int(status["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1


def jobs_of(rule: str, name: str = "") -> list[str]:
    """The numbers of the running Slurm jobs of a rule with a wildcard; the plugin comments rule and wildcards."""
    jobs = run("squeue", "-h", "-t", "running", "-o", "%i %k").stdout.splitlines()
    return [job.split()[0] for job in jobs if rule in job and name in job]
