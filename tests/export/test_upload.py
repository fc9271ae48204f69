"""Uploads: what is sent, and what goes wrong, with huggingface_hub's own client against a server of this process."""

import http.server
import json
import shutil
import socket
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from export.teachers import saved_run
from huggingface_hub import HfApi, constants

from patchlight.command import main
from patchlight.evaluation.checkpoints import open_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def hub(monkeypatch):
    """A server in the Hub's place that answers every request with one status; requests are listed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            server.requests.append((self.command, self.path))
            body = json.dumps({"error": "no"}).encode()
            self.send_response(server.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_HEAD = do_PUT = answer

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.status = [], 401
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(monkeypatch):
    """An address at which nobody answers: a port that stays taken and does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield


def export(run, out, *words) -> None:
    main(["export", "hub", "--checkpoint", str(run), "--folder", str(out), *words])


def test_without_push_nothing_is_sent(run, tmp_path, hub):
    export(run, tmp_path / "out")
    assert not hub.requests


def test_no_token(run, tmp_path, hub):
    out = tmp_path / "out"
    sentence = r"--push me/teacher must be able to upload; .*out is complete, got .*401.*; log in with hf auth login"
    with pytest.raises(SystemExit, match=sentence):
        export(run, out, "--push", "me/teacher")
    assert any(path == "/api/repos/create" for _, path in hub.requests)
    assert open_checkpoint(str(out)).width == 48, "the folder stays"


def test_an_answer_that_nobody_expects(run, tmp_path, hub):
    hub.status = 418
    with pytest.raises(SystemExit, match=r"got .*418.*; the Hub answered 418: check the name, or try again later"):
        export(run, tmp_path / "out", "--push", "me/teacher")


def test_no_network(run, tmp_path, offline):
    with pytest.raises(
        SystemExit, match=r"is complete, got \w+ \(.*\); check the network, and the same command uploads it"
    ):
        export(run, tmp_path / "out", "--push", "me/teacher")
    assert (tmp_path / "out" / "README.md").exists()


class Recorded:
    """What was asked of the Hub."""

    def __init__(self, public: bool) -> None:
        self.public, self.calls = public, []

    def create_repo(self, _, name, **options):
        self.calls.append(("create_repo", name, options))
        return f"https://huggingface.co/{name}"

    def repo_info(self, _, name):
        return huggingface_hub.ModelInfo(id=name, private=not self.public)

    def upload_folder(self, _, **options):
        files = {path.name for path in Path(options["folder_path"]).iterdir()}
        self.calls.append(("upload_folder", options["repo_id"], files & set(options["allow_patterns"])))


def record(monkeypatch, public: bool) -> list:
    recorded = Recorded(public)
    for name in ("create_repo", "repo_info", "upload_folder"):
        method = getattr(recorded, name)
        monkeypatch.setattr(HfApi, name, lambda api, *words, m=method, **options: m(api, *words, **options))
    return recorded.calls


def test_what_is_uploaded(run, tmp_path, monkeypatch, capsys):
    calls, out = record(monkeypatch, public=False), tmp_path / "out"
    export(run, out)
    (out / "notes.txt").write_text("mine")
    export(run, out, "--push", "me/teacher", "--private")
    assert calls[0] == ("create_repo", "me/teacher", {"private": True, "exist_ok": True})
    assert calls[1][1:] == ("me/teacher", {"README.md", "config.json", "facts.json", "model.safetensors", "run.json"})
    assert "repository: https://huggingface.co/me/teacher" in capsys.readouterr().out
    assert 'create_model("hf-hub:me/teacher"' in (out / "README.md").read_text()


def test_private_is_not_taken_for_granted(run, tmp_path, monkeypatch):
    calls = record(monkeypatch, public=True)
    with pytest.raises(
        SystemExit, match=r"--private needs a repository that is private, got me/teacher, which is public"
    ):
        export(run, tmp_path / "out", "--push", "me/teacher", "--private")
    assert [name for name, *_ in calls] == ["create_repo"]


def test_a_teacher_from_the_hub(tmp_path, monkeypatch):
    run, out = saved_run(tmp_path / "run", "class attention"), tmp_path / "out"
    export(run, out)
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision))
        copy = tmp_path / "cache" / str(len(asked))
        copy.mkdir(parents=True)
        for name in allow_patterns:
            if (out / name).exists():
                shutil.copy(out / name, copy)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    encoder, pixels = open_checkpoint("hf-hub:me/teacher@main"), torch.randn(2, 3, 16, 16)
    assert asked == [("me/teacher", "main")]
    with torch.no_grad():
        assert torch.equal(encoder(pixels).summary, open_checkpoint(str(run))(pixels).summary)
    assert encoder.name == "hf-hub:me/teacher@main"
    (out / "facts.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"that patchlight export hub made, got hf-hub:me/teacher without"):
        open_checkpoint("hf-hub:me/teacher")


def test_a_hub_that_cannot_be_reached(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"can be read, got hf-hub:me/none: \w+ \(.*\); check the name and the network"):
        open_checkpoint("hf-hub:me/none")
