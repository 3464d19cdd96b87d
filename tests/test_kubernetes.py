"""What `--profile profiles/kubernetes` asks of Kubernetes, and the small pipeline on a simulated cluster."""

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import snakemake_executor_plugin_kubernetes as plugin
import yaml
from kubernetes.client import CoreV1Api
from snakemake_interface_common.exceptions import WorkflowError

from conftest import ROOT
from d2o import preflight, records
from d2o.plan import Plan
from snakemake_executor_plugin_kubernetes_volume import Executor, ExecutorSettings
from test_pipeline import CONFIG, Project
from test_slurm import job, training

FOLDER = ROOT / "profiles" / "kubernetes"
PROFILE = yaml.safe_load((FOLDER / "config.yaml").read_text())
KEY = "hf_planted_83ab"


class Cluster:
    """Simulates the API of Kubernetes and one node: a pod's command runs here, as a process in an empty folder.

    It answers the plugin's requests as Kubernetes does; a pod that ended has no earlier container.
    """

    def __init__(self, folder: Path, runs: bool):
        self.folder, self.runs = folder, runs
        self.asked: list[str] = []  # each request, as METHOD /path
        self.jobs: dict[str, dict] = {}  # as they were submitted
        self.secrets: dict[str, dict[str, str]] = {}
        self.pods: dict[str, subprocess.Popen] = {}

    def answer(self, method: str, path: str, query: str, body: dict) -> tuple[int, dict | str]:
        self.asked.append(f"{method} {path}")
        match [method, *path.strip("/").split("/")]:
            case ["POST", *_, "secrets"]:
                self.secrets[body["metadata"]["name"]] = {k: b64decode(v).decode() for k, v in body["data"].items()}
            case ["POST", *_, "jobs"]:
                self.jobs[body["metadata"]["name"]] = body
                if self.runs:
                    self.start(body["metadata"]["name"])
            case ["GET", *_, "jobs", name, "status"]:
                ended = self.ended(name)
                state = "active" if ended is None else "failed" if ended else "succeeded"
                return 200, {"metadata": {"name": name}, "status": {state: 1}}
            case ["GET", *_, "pods"]:
                name = re.search(r"job-name%3D([\w-]+)", query)[1]
                ended = self.ended(name)
                state = {"running": {}} if ended is None else {"terminated": {"exitCode": ended}}
                status = {"name": "snakemake", "image": "", "imageID": "", "ready": False, "restartCount": 0}
                pod = {"metadata": {"name": name}, "status": {"containerStatuses": [status | {"state": state}]}}
                return 200, {"items": [pod]}
            case ["GET", *_, "log"]:
                return (400, {}) if "previous=True" in query else (200, "the end of the log")
        return 200, {}

    def start(self, name: str) -> None:
        (container,) = self.jobs[name]["spec"]["template"]["spec"]["containers"]
        workdir = self.folder / name
        workdir.mkdir()
        keys = {}
        for entry in container.get("env", []):
            source = entry["valueFrom"]["secretKeyRef"]
            keys[entry["name"]] = self.secrets[source["name"]][source["key"]]
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "HF_HUB_OFFLINE") if name in os.environ}
        self.pods[name] = subprocess.Popen(
            [*container["command"], *container["args"]], cwd=workdir, start_new_session=True,
            stdout=(workdir / "log").open("w"), stderr=subprocess.STDOUT,
            env=environment | keys | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ended(self, name: str) -> int | None:
        """The exit status of a pod, as of a container; None while it runs."""
        status = self.pods[name].poll() if self.runs else 1
        return status if status is None or status >= 0 else 128 - status


@contextmanager
def cluster(folder: Path, runs: bool = False) -> Iterator[Cluster]:
    played = Cluster(folder, runs)

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            path, _, query = self.path.partition("?")
            status, reply = played.answer(self.command, path, query, json.loads(body or "{}"))
            content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(reply, str) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, *_) -> None:
            pass

    folder.mkdir(exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    address = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    config = {"clusters": [address], "users": [{"name": "u", "user": {}}], "contexts": [context]}
    (folder / "kubeconfig").write_text(yaml.safe_dump(config | {"current-context": "c"}))
    try:
        yield played
    finally:
        server.shutdown()
        server.server_close()
        for pod in played.pods.values():
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)


@pytest.fixture
def played(tmp_path, monkeypatch) -> Iterator[Cluster]:
    with cluster(tmp_path / "cluster") as one:
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", f"{one.folder}/kubeconfig")
        yield one


@pytest.fixture
def executor(played, tmp_path) -> Executor:
    """The executor of a run with this profile, and with a key that its jobs get."""
    one = Executor.__new__(Executor)
    volumes = plugin.parse_persistent_volumes(PROFILE["kubernetes-volume-persistent-volumes"])
    one.workflow = MagicMock(executor_settings=ExecutorSettings(persistent_volumes=volumes))
    one.workflow.remote_execution_settings.container_image = PROFILE["container-image"]
    one.workflow.deployment_settings.deployment_method = set()
    one.workflow.spawned_job_args_factory.envvars.return_value = {"HF_TOKEN": KEY}
    one.workflow.persistence.aux_path = tmp_path
    one.logger, one.lock, one.status_rate_limiter = MagicMock(), threading.Lock(), nullcontext()
    one.format_job_exec = lambda job: "COMMAND"
    one.report_job_submission, one.report_job_error = MagicMock(), MagicMock()
    one.__post_init__()
    return one


@pytest.mark.parametrize(
    ("one", "gpus"),
    [
        (lambda: job("kubernetes", gpu=0), "0"),
        (lambda: job("kubernetes", gpu=1), "1"),
        (lambda: training(8, 1, 8, "kubernetes"), "8"),
    ],
    ids=["no GPU", "one GPU", "training on eight"],
)
def test_a_job_is_a_pod_with_its_limits_the_volume_and_the_names_of_keys(one, gpus, executor, played):
    asked = one()
    asked.resources["_cores"] = 16
    executor.run_job(asked)
    (handed_in,) = played.jobs.values()
    assert KEY not in json.dumps(handed_in)
    pod = handed_in["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["image"], container["args"]) == ("NAME/d2o:gpu", ["-c", "COMMAND"])
    assert pod["restartPolicy"] == "Never"
    limits = {"cpu": "16000m", "memory": "8000M", "ephemeral-storage": "20000M", "nvidia.com/gpu": gpus}
    assert container["resources"] == {"limits": limits, "requests": limits | {"cpu": "15200m"}}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/d2o"]["persistentVolumeClaim"] == {"claimName": "d2o"}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    (key,) = container["env"]
    reference = key["valueFrom"]["secretKeyRef"]
    assert key["name"] == "HF_TOKEN" and played.secrets[reference["name"]][reference["key"]] == KEY


def failures(executor: Executor, name: str) -> None:
    async def look():
        return [one async for one in executor.check_active_jobs([SimpleNamespace(external_jobid=name)])]

    asyncio.run(look())


def test_a_pod_that_failed_is_one_job_that_failed_with_its_log(executor, played, tmp_path):
    executor.run_job(job("kubernetes", gpu=0))
    (name,) = played.jobs
    failures(executor, name)
    assert executor.report_job_error.call_count == 1
    assert (tmp_path / "kubernetes-logs" / f"{name}.log").read_text() == "the end of the log\n"
    executor.kubeapi = CoreV1Api()
    with pytest.raises(WorkflowError, match="Kubernetes request failed"):
        failures(executor, name)  # the plugin alone; once it raises no error, `_Pods` can be removed


def test_the_pod_of_snakemake_may_do_what_the_plugin_does_and_has_the_same_image_and_volume():
    account, role, _, driver = yaml.safe_load_all((FOLDER / "snakemake.yaml").read_text())
    allowed = {(verb, kind) for rule in role["rules"] for kind in rule["resources"] for verb in rule["verbs"]}
    calls = re.findall(r"(?:kubeapi|batchapi)\.(\w+?)_namespaced_(\w+)", Path(plugin.__file__).read_text())
    kinds = {"job": "jobs", "secret": "secrets", "pod": "pods", "pod_log": "pods/log", "job_status": "jobs/status"}
    assert allowed == {("get" if verb == "read" else verb, kinds[kind]) for verb, kind in calls}
    pod = driver["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert container["image"] == PROFILE["container-image"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert [f"{claim}:{mount['mountPath']}"] == PROFILE["kubernetes-volume-persistent-volumes"]
    assert container["workingDir"] == mount["mountPath"] and mount["name"] == volume["name"]
    assert all("value" not in entry for entry in container["env"])


def test_a_training_over_nodes_is_refused_before_the_first_job():
    plan = Plan(yaml.safe_load((ROOT / "tests" / "data" / "config.yaml").read_text()), "c")
    jobs = [training(16, nodes, 8, "kubernetes") for nodes in (1, 2, 2)]
    for one in jobs:
        one.is_local = False
    (line,) = preflight.problems(jobs, plan, PROFILE["executor"])
    assert line == "a training asks for 2 nodes, and a pod has one: set train.nodes: 1, or run on Slurm"


@pytest.mark.slow
def test_the_small_pipeline_in_pods(tiny_model, tmp_path, monkeypatch):
    """Each pod starts in a folder of its own and works on the volume; a training whose pod is lost resumes from its
    checkpoint in another pod."""
    project = Project(tmp_path / "volume", tiny_model)
    tiny = CONFIG["experiments"]["tiny"] | {"methods": ["initial", "dpo"], "rewards": [], "tasks": []}
    train = CONFIG["train"] | {"steps": 200, "checkpoint_minutes": 0.001}
    project.configure(project.config | {"experiments": {"tiny": tiny}, "train": train})
    run = project.folder / "results" / "demo" / "tiny" / "dpo" / "seed0"
    with cluster(tmp_path / "cluster", runs=True) as played, ThreadPoolExecutor() as beside:
        monkeypatch.setenv("KUBECONFIG", f"{played.folder}/kubeconfig")
        printed = beside.submit(
            project.snakemake, "all", "--profile", "profiles/kubernetes", "--envvars", "HF_TOKEN",
            "--kubernetes-volume-persistent-volumes", f"d2o:{project.folder}", "--seconds-between-status-checks", "1",
        )  # fmt: skip
        lost = None
        while not printed.done():
            if not lost and any((run / "checkpoints").glob("step*/whole.json")):
                (lost,) = [pod for pod in played.pods.values() if pod.poll() is None]
                os.killpg(lost.pid, signal.SIGKILL)
            time.sleep(0.1)
        assert printed.result().count("Trying to restart job") == 1
        rules = [re.search(r"--allowed-rules (\w+)", str(one["spec"]))[1] for one in played.jobs.values()]
        assert sorted(rules) == [
            "answer_prompts", "answer_prompts", "compute_heldout_logprobs", "compute_heldout_logprobs",
            "compute_reference_logprobs", "extract_negatives", "train_method", "train_method",
        ]  # fmt: skip
        assert all({path.name for path in (played.folder / name).iterdir()} == {"log"} for name in played.pods)
        assert sum(line.startswith("DELETE") and "/secrets/" in line for line in played.asked) == 1
    assert records.read_manifest(run / "model")["resumed_at"] > 0
    assert (project.folder / "results" / "reports" / "tiny" / "report.html").exists()
    assert "Nothing to be done" in project.snakemake("all")
