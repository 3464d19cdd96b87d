"""What `--profile profiles/slurm` asks of Slurm, and the small pipeline on a real one of one node."""

import os
import re
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from conftest import ROOT
from d2o import records
from test_pipeline import CONFIG, Project

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def run(*command: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=True, **kwargs)


@pytest.fixture(scope="module")
def slurm():
    """A Slurm controller and node on this machine, from Debian's packages, stopped afterwards."""
    if os.environ.get("D2O_TEST_SLURM") != "1":
        pytest.skip("D2O_TEST_SLURM is not 1: this test installs slurm-wlm and munge, and starts Slurm, as root")
    if os.geteuid() != 0:
        pytest.fail("D2O_TEST_SLURM is 1, and starting Slurm needs root")
    if shutil.which("slurmctld") is None:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "slurm-wlm", "munge")
    if Path("/etc/slurm/slurm.conf").exists() and "ClusterName=test" not in Path("/etc/slurm/slurm.conf").read_text():
        pytest.skip("this machine has a Slurm of its own")
    folder, host = Path("/tmp/d2o-slurm"), socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
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
    Path("/etc/slurm/slurm.conf").write_text(CONF.format(host=host, folder=folder, cpus=os.cpu_count()))
    run("slurmctld", "-c")
    run("slurmd", "-N", host)
    for _ in range(300):
        if "idle" in run("sinfo", "-h", "-o", "%t").stdout:
            break
        time.sleep(1)
    else:
        pytest.fail(f"the node never became idle: {run('sinfo').stdout}")
    yield
    for name in ("slurmd", "slurmctld"):
        pid = folder / f"{name}.pid"
        if pid.exists():
            os.kill(int(pid.read_text()), 15)


class Resources(dict):
    """As a job's: by key or by attribute."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_a_job_is_one_task_whatever_its_gpus(gpus):
    """By the line that the plugin itself hands to Slurm, which starts a task a node where the line names none."""
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    resources = Resources(profile["default-resources"] | {"gpu": gpus, "mem_mb": 8000, "runtime": 60})
    job = SimpleNamespace(resources=resources, threads=16)
    names = ("run_uuid", "slurm_logfile", "comment_str", "account", "partition", "workdir")
    line = get_submit_command(job, dict.fromkeys(names, "x")) + set_gres_string(job)
    assert "--signal=TERM@300" in line
    asked = dict(re.findall(r"--([a-z-]*tasks?[a-z-]*|gpus|nodes)=(\d+)", line))
    assert asked.pop("gpus", "0") == str(gpus)
    assert asked in ({"nodes": "1", "cpus-per-task": "16"}, {"nodes": "1", "ntasks": "1", "cpus-per-task": "16"})


ON_SLURM = (
    "--profile", "profiles/slurm", "--jobs", "2", "--slurm-no-account",
    "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5",
    "--default-resources", "slurm_partition=main", "nodes=1", "tasks=1", "tasks_per_gpu=0",
)  # fmt: skip


@pytest.mark.slow
def test_the_small_pipeline_on_slurm(slurm, tiny_model, tmp_path):
    """Where the scheduler ends the training by SIGTERM, as before its time is up, it goes on."""
    project = Project(tmp_path, tiny_model)
    tiny = CONFIG["experiments"]["tiny"] | {"methods": ["initial", "dpo"], "rewards": [], "tasks": []}
    train = CONFIG["train"] | {"steps": 300, "ranks": 2}
    project.configure(project.config | {"experiments": {"tiny": tiny}, "train": train})
    run_folder = project.folder / "results" / "demo" / "tiny" / "dpo" / "seed0"
    with ThreadPoolExecutor() as beside:
        printed = beside.submit(project.snakemake, "all", *ON_SLURM)
        log = run_folder / "checkpoints" / "train.jsonl"
        while not (log.exists() and log.read_text()) and not printed.done():
            time.sleep(0.2)
        for job in run("squeue", "-h", "-o", "%i", "-t", "running").stdout.split():
            run("scancel", "--signal=TERM", job)
        assert "has been submitted with SLURM jobid" in printed.result()
    assert "Trying to restart job" in printed.result()
    facts = records.read_manifest(run_folder / "model")
    assert (facts["steps"], facts["ranks"]) == (300, 2)
    assert facts["resumed_at"] > 0
    assert (project.folder / "results" / "reports" / "tiny" / "report.html").exists()
    assert "Nothing to be done" in project.snakemake("all")
