"""A model is pushed to the Hub whole, with its card and report, or not at all: a server here answers like the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from d2o import push, records, weights
from d2o.errors import D2OError

TOKEN = "hf_planted_5d10"
COMMIT = 40 * "a"
SECRET = "/home/somebody/models"


class Hub(ThreadingHTTPServer):
    """Repositories by id, each with its files and whether it is private; `refuses` fails a request with a status."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict] = {}
        self.stored: dict[str, bytes] = {}
        self.refuses: tuple[str, int, str] | None = None
        self.asked: list[str] = []

    def holding(self, name: str, *files: str, private: bool = True, pushed: tuple[str, ...] = ()) -> None:
        """Add a repository with these files, of which an earlier push brought `pushed`."""
        held = dict.fromkeys([*files, *pushed], b"")
        if push.MARK in held:
            held[push.MARK] = json.dumps({"content": dict.fromkeys(pushed, "1")}).encode()
        self.repositories[name] = {"private": private, "files": held}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def _answer(self, status: int, body: dict, **headers: str) -> None:
        content = json.dumps(body).encode()
        self._send(status, content, **headers)

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _do(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        if hub.refuses and re.search(hub.refuses[0], path):
            return self._answer(hub.refuses[1], {"error": hub.refuses[2]}, X_Error_Message=hub.refuses[2])
        if path.startswith("/upload/"):  # the upload store must not see the token
            assert "Authorization" not in self.headers
            hub.stored[path.removeprefix("/upload/")] = body
            return self._answer(200, {})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.holding(
                    name, ".gitattributes", private=asked.get("visibility") == "private" or asked.get("private")
                )
                return self._answer(200, {"url": f"{hub.address}/{name}"})
            case ["api", "validate-yaml"]:
                return self._answer(200, {"warnings": []})
            case ["api", "models", owner, name, *rest]:
                return self._repository(f"{owner}/{name}", rest[:1], body)
            case [owner, name, "resolve", revision, file] if revision == COMMIT:
                content = hub.repositories[f"{owner}/{name}"]["files"][file]
                digest = hashlib.sha256(content).hexdigest()
                return self._send(200, content, ETag=f'"{digest}"', X_Repo_Commit=COMMIT)
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    one | {"actions": {"upload": {"href": f"{hub.address}/upload/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                return self._answer(200, {"objects": objects})
        return self._answer(404, {})

    def _repository(self, name: str, what: list[str], body: bytes) -> None:
        hub = self.server
        if name not in hub.repositories:
            return self._answer(404, {}, X_Error_Code="RepoNotFound")
        repository = hub.repositories[name]
        match what:
            case []:
                files = [{"rfilename": file} for file in repository["files"]]
                return self._answer(
                    200, {"id": name, "private": repository["private"], "sha": COMMIT, "siblings": files}
                )
            case ["preupload"]:
                files = [
                    {"path": f["path"], "shouldIgnore": False}
                    | {"uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(body)["files"]
                ]
                return self._answer(200, {"files": files})
            case ["commit"]:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    match line["key"]:
                        case "file":
                            repository["files"][value["path"]] = base64.b64decode(value["content"])
                        case "lfsFile":
                            repository["files"][value["path"]] = hub.stored[value["oid"]]
                        case "deletedFile":
                            del repository["files"][value["path"]]
                return self._answer(200, {"commitUrl": f"{hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._answer(404, {})

    do_GET = do_HEAD = do_POST = do_PUT = _do

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    addresses = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", addresses)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


@pytest.fixture
def run(tmp_path) -> Path:
    """A training with its model, its card and the report that the card is from."""
    run, page = tmp_path / "results/pku/smol/d2o/seed0", tmp_path / "results/reports/demo/report.html"
    with records.artifact(run / "model", {"seed": 0}, [__file__]) as draft:
        (draft.path / "adapter").mkdir(parents=True)
        for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "optimizer.pt", "adapter/a.json"):
            (draft.path / name).write_bytes(name.encode())
        (draft.path / "config.json").write_text(json.dumps({"_name_or_path": SECRET, "vocab_size": 512}))
        draft.facts |= {"source": SECRET, "steps": 30}
    with records.artifact(page) as draft:
        draft.path.write_text("<html>")
    (page.parent / "figures").mkdir()
    for name in ("table.csv", "figures/f.csv", "figures/f.svg"):
        (page.parent / name).write_text(name)
    with records.artifact(run / "card.md", None, [run / "model/manifest.json", page]) as draft:
        draft.path.write_text("---\nlicense: mit\n---\n# Card\n")
        draft.facts["experiment"] = "demo"
    return run


def test_a_new_repository_is_private_and_has_the_model_card_and_report_in_one_commit(hub, run, tmp_path):
    """With the command itself; the token is not printed."""
    variables = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    line = [sys.executable, "-m", "d2o", "push", str(run), "me/mended"]
    done = subprocess.run(line, env=variables | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/mended/commit/{COMMIT}"
    assert "me/mended was made, private" in done.stderr and TOKEN not in done.stdout + done.stderr
    repository = hub.repositories["me/mended"]
    assert repository["private"] is True and sum("/commit/" in one for one in hub.asked) == 1
    files = repository["files"]
    assert {*files} == {
        ".gitattributes", "README.md", "report.html", "d2o.json", "config.json", "tokenizer.json",
        "chat_template.jinja", "model.safetensors", "table.csv", "figures/f.csv",
    }  # fmt: skip
    assert files["model.safetensors"] == b"model.safetensors" and files["README.md"] == (run / "card.md").read_bytes()
    assert json.loads(files["config.json"]) == {"vocab_size": 512}
    about = json.loads(files["d2o.json"])
    assert (
        about["steps"] == 30
        and about["content"]["model.safetensors"] == hashlib.sha256(b"model.safetensors").hexdigest()
    )
    for content in files.values():
        assert not any(secret.encode() in content for secret in (TOKEN, SECRET, str(tmp_path), __file__))


@pytest.mark.parametrize("given", ["", "model", "model/manifest.json"])
def test_what_was_pushed_is_pushed_again_and_no_stale_shard_stays(hub, run, given):
    """The owner's other files stay, weights or not."""
    shard = "model-00001-of-00002.safetensors"
    own = {"LICENSE", "adapter/adapter_model.safetensors", "v1.safetensors"}
    hub.holding("me/mended", push.MARK, *own, private=False, pushed=(shard, "model.safetensors", "gone.json"))
    del hub.repositories["me/mended"]["files"]["gone.json"]
    assert push.push(run / given, "me/mended", public=True).endswith(COMMIT)
    files = hub.repositories["me/mended"]["files"]
    assert shard not in files and own | {"model.safetensors", push.MARK} <= {*files}
    assert not any("create" in one for one in hub.asked)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"content": 1}', b'{"content": [[]]}'])
def test_where_it_is_not_known_what_was_pushed_nothing_is_deleted(hub, run, content):
    hub.holding("me/mended", push.MARK, "model-00001-of-00002.safetensors")
    before = dict(hub.repositories["me/mended"]["files"] | {push.MARK: content})
    hub.repositories["me/mended"]["files"] = dict(before)
    with pytest.raises(D2OError, match=r"^me/mended: its d2o\.json is damaged, so .*; name another id$"):
        push.push(run, "me/mended", public=False)
    assert hub.repositories["me/mended"]["files"] == before


@pytest.mark.parametrize(
    ("holding", "public", "message"),
    [
        ({"files": ["config.json"]}, False, r"me/mended: holds what was not pushed from here .* name another id"),
        ({"files": [push.MARK], "private": False}, False, r"me/mended: is public; say --public, or change it"),
        ({"files": [".gitattributes"]}, True, r"me/mended: is private; leave --public out, or change it"),
    ],
)
def test_a_repository_of_another_kind_is_left_as_it_is(hub, run, holding, public, message):
    hub.holding("me/mended", *holding.pop("files"), **holding)
    with pytest.raises(D2OError, match=message):
        push.push(run, "me/mended", public)
    # The library makes other requests as well, once per process.
    assert [one for one in hub.asked if "mended" in one] == ["GET /api/models/me/mended"]
    assert {one.split()[0] for one in hub.asked} == {"GET"}


@pytest.mark.parametrize(
    ("path", "status", "way_out"),
    [
        ("/repos/create", 401, "check HF_TOKEN"),
        ("/repos/create", 403, "give the token the right to write there"),
        ("/repos/create", 409, "somebody else writes there: look at it, and push again"),
        ("/preupload/", 403, "give the token the right to write there"),
        ("/upload/", 400, "check the network, and push again"),
        ("/commit/", 412, "somebody else has written there: look at it, and push again"),
    ],
)
def test_what_the_hub_does_not_take_is_told_in_a_line(hub, run, path, status, way_out):
    """Without the token, even if the Hub echoes it; and nothing is committed."""
    hub.refuses = (path, status, f"not for {TOKEN}")
    with pytest.raises(D2OError) as error:
        push.push(run, "me/mended", public=False)
    told = str(error.value)
    assert re.fullmatch(rf"me/mended: nothing was committed \({status}: .*\); {way_out}", told)
    assert TOKEN not in told
    assert "model.safetensors" not in hub.repositories.get("me/mended", {"files": {}})["files"]


def test_an_upload_that_breaks_off_is_told(hub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(_Handler, "do_PUT", lambda self: self.connection.close())
    with pytest.raises(D2OError, match=r"^me/mended: nothing was committed \(.+\); check the network,"):
        push.push(run, "me/mended", public=False)
    assert hub.repositories["me/mended"]["files"] == {".gitattributes": b""}


@pytest.mark.slow
def test_a_hub_that_says_nothing_is_not_waited_for(run, tmp_path):
    """In a process of its own, whose client has no time limit yet."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
        code = f"from d2o import push; push._PATIENCE = 1; push.push(push.Path({str(run)!r}), 'me/mended', False)"
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == (
        "d2o.errors.D2OError: me/mended: nothing was committed (timed out); check the network, and push again"
    )


def gone(file: Path) -> None:
    file.unlink()


def flipped(file: Path) -> None:
    file.write_bytes(b"?" + file.read_bytes()[1:])


def retrained(manifest: Path) -> None:
    with records.artifact(manifest.parent, {"seed": 1}) as draft:
        draft.path.mkdir()
        (draft.path / "model.safetensors").write_text("others")


def released(manifest: Path) -> None:
    weights.release("nothing", manifest.parents[1])


def coded(manifest: Path) -> None:
    records.write_json(manifest, records.read_manifest(manifest) | {"trust_remote_code": True})


RUN = "results/pku/smol/d2o/seed0"
# Commands with the names by which Snakemake knows its outputs.
CARD, WEIGHTS = (f"snakemake --cores all {RUN}/{name}" for name in ("card.md", "restored.json"))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model/model.safetensors", flipped, r"model\.safetensors: damaged since it was written; delete .* and run"),
        ("model/tokenizer.json", gone, r"tokenizer\.json: gone since it was written; delete .* and run again"),
        ("model/manifest.json", gone, r"seed0: no training's folder: it has no model/manifest\.json"),
        ("model/manifest.json", released, rf"its weights were released; train it again: {WEIGHTS}$"),
        (
            "model/manifest.json",
            retrained,
            rf"manifest\.json: not as .* the card is of another one; make it with: {CARD}$",
        ),
        ("model/manifest.json", coded, r"model: runs code of its own \(trust_remote_code\), which is not"),
        ("card.md", gone, rf"^{RUN}/card\.md: no card; make it with: {CARD}$"),
        ("card.md", flipped, rf"card\.md: not as it was written; make it with: {CARD}$"),
        (
            "../../../../reports/demo/report.html",
            flipped,
            r"^results/reports/demo/report\.html: not as .*; the card is of",
        ),
        ("../../../../reports/demo/report.html", gone, r"report\.html: no such file; the card is of another one"),
    ],
)
def test_what_is_not_whole_or_not_of_one_state_is_not_pushed(hub, run, file, damage, message, tmp_path, monkeypatch):
    """The message contains a remedy that can be typed as it is, however the run was named."""
    damage((run / file).resolve())
    monkeypatch.chdir(tmp_path)
    for given in (run, run.relative_to(tmp_path), run / "model"):
        with pytest.raises(D2OError, match=message):
            push.push(given, "me/mended", public=False)
    assert hub.asked == []


@pytest.mark.parametrize(("name", "message"), [
    ("me/a b", "me/a b: no id of the Hub"), ("../x", "no id of the Hub"), ("mended", "mended: no owner"),
])  # fmt: skip
def test_a_wrong_id_or_no_token_is_told_before_anybody_is_asked(hub, run, name, message, monkeypatch):
    with pytest.raises(D2OError, match=message):
        push.push(run, name, public=False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run / "none"))
    with pytest.raises(D2OError, match="no token of the Hub: set HF_TOKEN"):
        push.push(run, "me/mended", public=False)
    assert hub.asked == []
