"""Models of the Hub, from a server on this machine that answers like the Hub."""

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from conftest import ROOT
from d2o import hub as hub_module
from d2o import preflight
from d2o.errors import D2OError
from d2o.plan import Plan
from d2o.settings import Source

COMMIT = "c4549779" + 32 * "0"
REFUSED = {
    "/api/models/a/gated/auth-check": (403, "GatedRepo"),
    "/api/models/a/gone/revision/main": (404, "RepoNotFound"),
    "/api/datasets/a/rows/revision/old": (404, "RevisionNotFound"),
    "/api/models/a/barred/revision/main": (403, "Barred"),
}
# A data set whose files are refused after its revision was told.
BARRED = f"/api/datasets/a/barred/tree/{COMMIT}"
SECRET = "hf_planted"
# The first requests to it are refused, with the seconds to wait in the Hub's own header.
BUSY = "/api/models/a/busy/revision/main"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"code"}
HERE = [{"rfilename": name} for name in FILES]
ANSWERS = {
    "/api/models/a/b/revision/refs%2Fpr%2F3": {"id": "a/b", "sha": COMMIT, "siblings": HERE},
    **{
        f"/api/models/a/{name}/tree/{COMMIT}?recursive=true&expand=false": [
            {"type": "file", "path": path, "size": len(content) * (100 if name == "slow" else 1), "oid": path}
            for path, content in FILES.items()
        ]
        for name in ("b", "half", "busy", "forged", "slow")
    },
    "/api/models/a/bin/revision/main": {"id": "a/bin", "siblings": [{"rfilename": "pytorch_model.bin"}]},
    "/api/models/a/gated/revision/main": {"id": "a/gated", "siblings": HERE},
    "/api/models/a/half/revision/main": {"id": "a/half", "sha": COMMIT, "siblings": HERE},
    **{
        f"/api/models/a/{name}/revision/main": {"id": f"a/{name}", "sha": COMMIT, "siblings": HERE}
        for name in ("busy", "forged", "slow")
    },
    "/api/models/a/b/auth-check": {},
    "/api/models/a/named/revision/main": {"id": "a/named", "cardData": {"license": "other", "license_name": "mine"}},
    "/api/datasets/a/two/revision/main": {"id": "a/two", "cardData": {"license": ["mit", "cc0-1.0"]}},
    "/api/datasets/a/plain/revision/main": {"id": "a/plain"},
    **{
        f"/api/datasets/a/barred/revision/{revision}": {"id": "a/barred", "sha": COMMIT, "siblings": []}
        for revision in ("main", COMMIT)
    },
    "/api/models/a/bin/auth-check": {},
}


@pytest.fixture
def hub():
    """The address of a fake Hub, and the list of requested paths."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.rsplit("/", 1)[-1]
            if self.path == BUSY and asked.count(BUSY) < 3:
                self.send_response(429)
                self.send_header("RateLimit", '"api";r=0;t=1')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.path in REFUSED or self.path.startswith(BARRED):
                status, code = REFUSED.get(self.path, (403, "Barred"))
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                if status == 403:
                    self.send_header("X-Error-Message", f"\x1b[31mbad credentials {self.headers['Authorization']}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = json.dumps(ANSWERS[self.path]).encode() if self.path in ANSWERS else FILES.get(name)
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            slow = self.path.startswith("/a/slow/")
            self.send_header("Content-Length", str(len(content or b"") * (100 if slow else 1)))
            # The Hub's cache takes the ETag of a large file for its SHA-256.
            self.send_header("ETag", f'"{"0" * 64 if self.path.startswith("/a/forged/") else name}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                for _ in range(100 if slow else 1):
                    self.wfile.write((content or b"")[: 3 if self.path.startswith("/a/half/") else None])
                    time.sleep(0.03 * slow)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    """Where Slurm is installed and does not run, `sinfo` waits for it."""
    monkeypatch.setattr(preflight, "_slurm", lambda jobs: ())


def test_a_revision_may_be_a_pull_request(hub, tmp_path):
    address, asked = hub
    code = (
        "from d2o import hub; from d2o.settings import Source\n"
        "print(hub.locate(Source(hub='a/b', revision='refs/pr/3')))"
    )
    variables = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    for offline in ("0", "1"):
        variables["HF_HUB_OFFLINE"] = offline
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert COMMIT in done.stdout
    (snapshot,) = tmp_path.glob(f"hub/models--a--b/snapshots/{COMMIT}")
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", "model.safetensors"]
    assert all("refs/pr" not in path for path in asked)


@pytest.mark.parametrize("away", ["silent", "gone"])
@pytest.mark.slow
def test_a_hub_that_is_away_is_told_in_a_line(tmp_path, away):
    """Whichever HTTP library the Hub's client uses; a Hub that does not answer is not waited for forever."""
    server = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    if away == "gone":
        server.close()
    code = (
        "from d2o import hub; from d2o.errors import D2OError; from d2o.settings import Source\n"
        "hub._PATIENCE = 1\n"
        "print(hub.lacking('a/b', 'main', 'model'), hub.lacking('a/b', 'main', 'dataset'), sep='\\n')\n"
        "try:\n    hub.locate(Source(hub='a/b', revision='main'))\nexcept D2OError as error:\n    print(error)"
    )
    done = asking(address, tmp_path, code)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other, fetched = done.stdout.splitlines()
    assert one == other and one.startswith("a/b@main: the Hub is not reached (")
    assert fetched.startswith("a/b@main: not in the Hub's cache and not fetched (")


def test_a_client_in_the_place_of_one_that_failed_has_the_time_limit_too():
    """The Hub's own code makes a new client after a failed connection."""
    code = (
        "from d2o import hub; hub._PATIENCE = 1; hub.bound_waiting()\n"
        "from huggingface_hub import get_session, close_session\n"
        "close_session()\n"
        "import socket; server = socket.create_server(('127.0.0.1', 0))\n"
        "try:\n    get_session().get(f'http://127.0.0.1:{server.getsockname()[1]}', timeout=None)\n"
        "except Exception as error:\n    print(type(error).__name__)"
    )
    variables = os.environ | {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ReadTimeout\n", done.stderr[-2000:]


def _drips(connection: socket.socket, begin: bytes) -> None:
    connection.sendall(begin)
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


def _pours(connection: socket.socket, begin: bytes) -> None:
    connection.sendall(begin)
    while True:
        connection.sendall(b" " * 65_536)


_PACKED = zlib.compress(bytes(200_000_000), 1)
_HEAD = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(("answer", "begin", "reason"), [
    (_drips, b"HTTP/1.1 200 X\r\nX-Slow: ", "no whole reply within 2 s"),
    (_drips, _HEAD % 200 + b"\r\n[", "no whole reply within 2 s"),
    (_drips, _HEAD % 403 + b"\r\n[", "no whole reply within 2 s"),
    (_pours, _HEAD % 200 + b"\r\n[", "a reply of more than 1,000,000 bytes"),
    (_pours, _HEAD % 403 + b"\r\n[", "a reply of more than 1,000,000 bytes"),
    (_pours, _HEAD % 307 + b"Location: /other\r\n\r\n", "a reply of more than 1,000,000 bytes"),
    (_pours, _HEAD % 200 + b"Content-Encoding: deflate\r\n\r\n" + _PACKED, "a reply of more than 1,000,000 bytes"),
])  # fmt: skip
@pytest.mark.slow
def test_a_hub_whose_reply_has_no_end_is_told_in_a_line(tmp_path, answer, begin, reason):
    """Each byte arrives in time."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            answer(connection, begin)

    code = (
        "from d2o import hub; from d2o.errors import D2OError; from d2o.settings import Source\n"
        "hub._PATIENCE, hub._SPANS, hub._LARGEST = 1, 2, 1_000_000\n"
        "print(hub.lacking('a/b', 'main', 'dataset'))\n"
        "try:\n    hub.locate(Source(hub='a/b', revision='main'))\nexcept D2OError as error:\n    print(error)\n"
        # Its own peak: `ru_maxrss` begins at that of the process that started it.
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    with serving(serve) as address:
        done = asking(address, tmp_path, code)
    lacking, fetched, peak = done.stdout.splitlines()
    assert lacking == f"a/b@main: the Hub is not reached ({reason}); check the network, or give a local `path`"
    assert fetched.startswith("a/b@main: not in the Hub's cache and not fetched (")
    assert int(peak) < 500_000  # kilobytes


def asking(address: str, home: Path, code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that asks a Hub at an address, with an empty cache."""
    variables = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | more
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that answers each connection by a function."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    with server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_a_file_may_take_longer_and_be_larger_than_other_replies(hub, tmp_path):
    """700 bytes in three seconds."""
    code = (
        "from d2o import hub; from d2o.settings import Source\n"
        "hub._PATIENCE, hub._SPANS, hub._LARGEST = 1, 2, 500\n"
        "print(hub.locate(Source(hub='a/slow', revision='main')))"
    )
    done = asking(hub[0], tmp_path, code)
    assert COMMIT in done.stdout, done.stderr[-2000:]
    (weights,) = tmp_path.glob(f"hub/models--a--slow/snapshots/{COMMIT}/model.safetensors")
    assert weights.read_bytes() == b"weights" * 100


def test_no_message_holds_the_token_or_a_terminals_commands(hub, tmp_path):
    """Which a Hub's own message may echo."""
    task = {"task": "barred", "dataset_path": "a/barred", "output_type": "multiple_choice", "test_split": "test",
            "doc_to_text": "q", "doc_to_choice": ["a", "b"], "doc_to_target": 0}  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "barred.yaml").write_text(yaml.safe_dump(task))
    code = f"""
from pathlib import Path
from d2o import datasets, hub, questions
from d2o.errors import D2OError
from d2o.settings import Questions, Reading, Source

print(hub.lacking("a/barred", "main", "model"))
barred = dict(hub="a/barred", revision="main")
task = Questions(task="barred", include={str(tmp_path / "tasks")!r}, revision="main")
for refused in (
    lambda: hub.locate(Source(**barred)),
    lambda: list(datasets.rows(Reading(format="negatives", train=["train"], **barred))),
    lambda: questions.fetch(Questions(**barred), Path("barred")),
    lambda: questions.fetch(task, Path("barred")),
):
    try:
        refused()
    except D2OError as error:
        print(error)
"""
    done = asking(hub[0], tmp_path, code, HF_TOKEN=SECRET)
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr[-2000:]
    model, rows = "a/barred@main: ", "a/barred, split train, revision main: "
    for line, begins in zip(lines, [model, model, rows, model, "a/barred of barred: "], strict=True):
        assert line.startswith(begins) and line.isprintable()
        assert "\\u001b[31mbad credentials Bearer ***" in line and SECRET not in line


@pytest.mark.slow
def test_half_a_file_is_not_taken(hub, tmp_path):
    """The connection ends before the file does."""
    code = "from d2o import hub; from d2o.settings import Source; hub.locate(Source(hub='a/half', revision='main'))"
    done = asking(hub[0], tmp_path, code)
    assert "D2OError: a/half@main: not in the Hub's cache and not fetched (" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_of_another_digest_is_not_taken(hub, tmp_path):
    code = "from d2o import hub; from d2o.settings import Source; hub.locate(Source(hub='a/forged', revision='main'))"
    done = asking(hub[0], tmp_path, code)
    blob = tmp_path / "hub" / "models--a--forged" / "blobs" / ("0" * 64)
    assert f"D2OError: a/forged@main: model.safetensors is not the file of the Hub; delete {blob}" in done.stderr


def test_a_hub_that_wants_fewer_requests_is_waited_for(hub, tmp_path):
    """Before the first job this is no reason to stop; the job asks again when it may."""
    address, asked = hub
    code = (
        "from d2o import hub; from d2o.settings import Source\n"
        "print(hub.lacking('a/busy', 'main', 'model'))\n"
        "print(hub.locate(Source(hub='a/busy', revision='main')))"
    )
    done = asking(address, tmp_path, code)
    lacking, folder = done.stdout.splitlines()
    assert lacking == "None" and COMMIT in folder, done.stderr[-2000:]
    assert done.stderr.count("a/busy: the Hub wants fewer requests; waiting 2 s") == asked.count(BUSY) - 2 == 1


class Refused(Exception):
    response = SimpleNamespace(status_code=429, headers={"Retry-After": "7"})


@pytest.mark.parametrize("tries", [3, 9])
def test_a_library_that_wraps_the_hubs_error_waits_as_well(monkeypatch, tries):
    """`datasets` raises an error of its own, with the Hub's error as its context."""
    failures, waited = iter(range(tries)), []
    monkeypatch.setattr(hub_module.time, "sleep", waited.append)

    def load():
        if next(failures, None) is None:
            return "rows"
        try:
            raise Refused
        except Refused:
            raise ConnectionError("not reached") from None  # which keeps the context

    if tries < hub_module._TRIES:
        assert hub_module.patiently("a/b", load) == "rows" and waited == [8] * tries
    else:
        with pytest.raises(ConnectionError, match="not reached"):
            hub_module.patiently("a/b", load)


def test_a_licence_is_asked_for_and_none_is_made_up(hub, monkeypatch):
    address, asked = hub
    assert hub_module.licence("a/named", "main", "model") is None and asked == []  # offline
    hub_module.licence.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    assert hub_module.licence("a/named", "main", "model") == "mine"
    assert hub_module.licence("a/two", "main", "dataset") == "mit, cc0-1.0"
    for asked_for in (("a/plain", "main", "dataset"), ("a/rows", "old", "dataset"), ("a/gone", "main", "model")):
        assert hub_module.licence(*asked_for) == ""
    assert hub_module.licence("a/nowhere", "main", "model") is None  # an answer that is not the Hub's
    with socket.create_server(("127.0.0.1", 0)) as away:
        port = away.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert hub_module.licence("a/away", "main", "model") is None


def test_a_file_that_is_not_the_hubs_is_refused(tmp_path, monkeypatch):
    """The Hub's cache names a large file by its SHA-256, and never checks it again."""
    blob = tmp_path / "blobs" / hashlib.sha256(b"weights").hexdigest()
    blob.parent.mkdir()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    source = Source(hub="a/b", revision="main")
    blob.write_bytes(b"weights")
    assert hub_module.locate(source) == snapshot
    blob.write_bytes(b"weightz")
    with pytest.raises(D2OError, match=rf"a/b@main: model.safetensors is not the file of the Hub; delete {blob}"):
        hub_module.locate(source)


def test_all_that_is_missing_is_told_before_the_first_job(hub, tmp_path):
    """In one list; nothing is started, and a dry run asks no server."""
    address, asked = hub
    models = {name: {"hub": f"a/{name}", "revision": "main"} for name in ("gated", "gone", "bin")}
    models["b"] = {"hub": "a/b", "revision": "refs/pr/3"}
    config = {
        "models": models,
        "datasets": {"rows": {"hub": "a/rows", "revision": "old", "format": "pku-saferlhf-beta", "train": ["train"]}},
        "methods": {"dpo": {"loss": "dpo", "positives": "human", "negatives": True, "beta": 0.1}},
        "judges": {"gpt": {"base_url": "https://judge.example/v1", "model": "gpt-4-0613"}},
        "train": {"trackers": ["mlflow"]},
    }
    config["experiments"] = {
        "one": {"datasets": ["rows"], "models": [*models], "methods": ["initial", "dpo"], "judges": ["gpt"]}
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    line = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "1"]
    line += ["--configfile", tmp_path / "config.yaml", "--directory", tmp_path, "all"]
    variables = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    variables.pop("OPENAI_API_KEY", None)
    dry = subprocess.run([*map(str, line), "-n", "--quiet"], env=variables, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert asked == []

    done = subprocess.run([*map(str, line)], env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.split("nothing was started, for this is missing:")[1]
    for lack in (
        "a/gated@main: gated; accept its licence on its page of the Hub, and set HF_TOKEN",
        "a/gone@main: no such model, or a private one; check the id and HF_TOKEN",
        "a/bin@main: no .safetensors file",
        "a/rows@old: no such revision; check it",
        "judges.gpt: put its key into OPENAI_API_KEY",
        "train.trackers: mlflow is not installed",
    ):
        assert lack in said
    assert "a/b@" not in said
    assert not (tmp_path / "results").exists()


class Names(dict):
    """Like a job's wildcards: names by key or by attribute."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    ("keep", "too_small", "large"),
    [
        ("model", 20e9, 60e9),
        ("nothing", 3e9, 10e9),
    ],  # a hundred models, or the checkpoints and the model of one training
)
def test_a_disk_that_will_not_hold_the_results_is_told(monkeypatch, keep, too_small, large):
    names = {"dataset": "noise-0", "model": "organism", "method": "dpo"}
    jobs = [planned("train_method", names, seed=str(n % 5)) for n in range(100)]
    jobs.append(planned("write_organism", {"organism": "noise-0"}))
    for free in (too_small, large):
        lines = lacking_room(monkeypatch, jobs, keep, free)
        assert any(f"and {free / 1e9:.0f} are free: make room" in line for line in lines) == (free == too_small)


def test_trainings_that_wait_for_a_round_need_room_for_their_checkpoints(monkeypatch):
    """About 2 GB each for 135M in bf16; later rounds find the first round's, whose bytes are no longer free."""
    names = {"dataset": "noise-0", "model": "organism", "method": "d2o-online"}
    rounds = [planned("train_to_round", names, seed=str(n), round="1") for n in range(10)]
    later = [planned("train_to_round", names, seed=str(n), round="2") for n in range(10)]
    room = {"keep": "nothing", "free": 10e9}
    (line,) = lacking_room(monkeypatch, [*rounds, *later], **room)
    assert re.search(r", others keep 1[67][.\d]* between their rounds, and 10 are free: make room", line)
    assert not lacking_room(monkeypatch, [*rounds[:1], *later], **room)


def test_a_training_that_this_machine_cannot_hold_is_told(monkeypatch):
    """16 bytes per weight in bf16, and its gradients: 2.4 GB at 135M."""
    job = planned("train_method", {"dataset": "noise-0", "model": "organism", "method": "dpo"}, seed="0")
    for there, told in ((2e9, True), (3e9, False)):
        monkeypatch.setattr(preflight, "_machine_memory", lambda there=there: there)
        lines = lacking_room(monkeypatch, [job], "nothing", 100e9, "local")
        assert any("and there are 2: take a smaller model" in line for line in lines) == told


@pytest.mark.parametrize(("limits", "told"), [
    ({"max_requests": 149}, "max_requests: 2 jobs ask for at most 150 in all, more than 149"),
    ({"max_requests": 150, "max_usd": 1000}, None),
    ({"max_usd": 6}, r"max_usd: 2 jobs ask for at most 6.\d\d in all, more than 6"),
])  # fmt: skip
def test_a_judges_budget_is_that_of_all_its_jobs(monkeypatch, limits, told):
    """Each of these jobs may ask 75 questions, for 3.13 USD."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    config = yaml.safe_load((ROOT / "tests" / "data" / "config.yaml").read_text())
    judge = {"base_url": "https://judge.example/v1", "model": "gpt-4-0613", "price": {"input": 30, "output": 60}}
    config["judges"] = {"gpt": judge | limits}
    names = {"dataset": "demo", "model": "smollm2", "judge": "gpt", "seed": "0"}
    jobs = [planned("judge_responses", names, method=method) for method in ("d2o", "dpo")]
    lines = preflight.problems(jobs, Plan(config, "c"), "slurm")
    assert len(lines) == bool(told)
    assert not told or re.fullmatch(rf"judges\.gpt\.{told}: raise it, or take fewer prompts", lines[0])


def planned(rule: str, names: dict[str, str], **more: str) -> SimpleNamespace:
    """A job with the attributes of Snakemake's."""
    about = {"resources": {}, "output": [], "is_local": True, "input": [], "params": {}}
    return SimpleNamespace(rule=SimpleNamespace(name=rule), wildcards=Names(names, **more), **about)


def test_what_is_dated_in_the_future_is_dated_anew_or_named(tmp_path):
    """Snakemake fails each job whose output is older than an input, run after run."""
    ours, linked, theirs, near = (tmp_path / name for name in ("results/a", "results/b", "c", "d"))
    ours.parent.mkdir()
    for path in (ours, theirs, near):
        path.write_text("x")
    linked.symlink_to(theirs)
    for path, ahead in ((ours, 9e6), (theirs, 9e6), (near, 20)):
        os.utime(path, 2 * (time.time() + ahead,))
    jobs = [planned("write_report", {}), planned("train_method", {})]
    jobs[0].input = [str(ours), str(linked), str(theirs), str(tmp_path / "missing"), str(tmp_path)]
    jobs[1].input = [str(ours), str(near)]
    lines = sorted(preflight._dates(jobs, tmp_path / "results"))
    assert [line.partition(": dated")[0] for line in lines] == [str(theirs), str(linked)]
    assert all(f"in the future; run: touch {line.partition(':')[0]}" in line for line in lines)
    assert ours.stat().st_mtime <= time.time() < theirs.stat().st_mtime


def lacking_room(monkeypatch, jobs: list[SimpleNamespace], keep: str, free: float, executor="slurm") -> list[str]:
    """The problems reported for jobs of the study on a disk with `free` bytes."""
    config = yaml.safe_load((ROOT / "config" / "study.yaml").read_text())
    for experiment in config["experiments"].values():
        experiment["keep"] = keep
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    return preflight.problems(jobs, Plan(config, "study.yaml"), executor)


def test_the_paper_is_pinned_to_commits_but_for_what_is_known_to_follow_a_branch():
    """`main` of OpenAssistant's reward model holds no safetensors; `refs/pr/3` is its conversion."""
    config = yaml.safe_load((ROOT / "config" / "paper.yaml").read_text())
    entries = {
        name: entry for key in ("models", "datasets", "rewards", "tasks") for name, entry in config[key].items()
    }
    revisions = {name: entry.get("source", entry)["revision"] for name, entry in entries.items()}
    assert len(revisions) == 11
    assert {name: revision for name, revision in revisions.items() if not re.fullmatch("[0-9a-f]{40}", revision)} == {
        "alpaca-7b": "main", "pku-saferlhf": "v0", "openassistant": "refs/pr/3",
    }  # fmt: skip
