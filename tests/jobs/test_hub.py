"""Exports on the hub, against a stand-in of its calls on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from srpo_lightning.cli import main
from tests import tiny
from tests.refusals import refused


class Hub(ThreadingHTTPServer):
    """What is asked of it, and the files of its one repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.refuses: set[str] = set()


class Calls(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        """Silence."""

    def answer(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        is_known = any(name in self.path for name in self.server.repositories) or "whoami" in self.path
        self.answer(
            200 if is_known else 404, {"name": "me", "type": "user", "id": "me", "sha": "0" * 40, "siblings": []}
        )

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        call = next((own for own in ("create", "validate-yaml", "preupload", "commit") if f"/{own}" in self.path), "")
        if call in self.server.refuses:
            self.answer(403, {"error": "Forbidden: you may not write here"})
        elif call == "create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            is_there = name in self.server.repositories
            self.server.repositories.setdefault(name, asked.get("visibility") == "private")
            url = f"http://127.0.0.1:{self.server.server_port}/{name}"
            self.answer(409 if is_there else 200, {"url": url, "name": name, "id": name, "error": "exists already"})
        elif call == "validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif call == "preupload":
            files = [{"path": own["path"], "uploadMode": "regular"} for own in json.loads(body)["files"]]
            self.answer(200, {"files": [own | {"shouldIgnore": False, "oid": None} for own in files]})
        else:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://127.0.0.1:{self.server.server_port}/me/tiny/commit/{'0' * 40}"
            self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True, "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def run(models, features, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = tiny.config(models, folder, features)
    settings["trainer"] |= {"max_steps": 1, "limit_val_batches": 0, "callbacks": [], "logger": False}
    settings["checkpoint"] = {"every_n_steps": 1}
    folder.with_suffix(".yaml").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["srpo_lightning"])
        main(["fit", "--config", str(folder.with_suffix(".yaml"))])
    return folder


def words(run: Path, output: Path, *more: str) -> list[str]:
    return [
        *("export", "--config", str(run / "config.yaml"), "--output", str(output), "--weights", "policy"),
        *("--check", "false", "--push_to_hub", "me/tiny", *more),
    ]


def test_what_was_written_is_in_the_repository(hub, run, tmp_path, capsys):
    main(words(run, tmp_path / "tiny"))
    written = {path.relative_to(tmp_path / "tiny").as_posix(): path for path in (tmp_path / "tiny").rglob("*")}
    expected = {name: path.read_bytes() for name, path in written.items() if path.is_file()}
    assert hub.files == expected
    assert b"library_name" in hub.files["README.md"]
    assert hub.repositories == {"me/tiny": True}
    assert f"on the hub: http://127.0.0.1:{hub.server_port}/me/tiny" in capsys.readouterr().out
    main(words(run, tmp_path / "again", "--private", "false"))
    assert hub.repositories == {"me/tiny": True}  # one that is there stays as it is


def test_a_token_that_may_not_write_ends_the_command_before_it_works(hub, run, tmp_path, capsys):
    hub.refuses = {"create"}
    refused(words(run, tmp_path / "tiny"), r"--push_to_hub me/tiny: .*403.*; log in with `hf auth login`", capsys)
    assert not (tmp_path / "tiny").exists()


def test_no_repository_is_made_for_what_cannot_be_exported(hub, run, tmp_path, capsys):
    refused(words(run, tmp_path / "tiny", "--format", "lora"), "there is no adapter that --format lora", capsys)
    assert not hub.repositories


def test_an_upload_that_fails_leaves_the_export_and_says_how_to_repeat_it(hub, run, tmp_path, capsys):
    hub.refuses = {"commit"}
    output = tmp_path / "tiny"
    cure = rf"{output} is whole, repeat with `hf upload me/tiny {output} --exclude 'check/\*'`"
    refused(words(run, output), f"the upload to me/tiny failed: .*; {cure}", capsys)
    assert (output / "README.md").is_file()
    assert not hub.files


def test_a_name_that_is_none_is_refused(hub, run, tmp_path, capsys):
    wrong = [word.replace("me/tiny", "me/a b") for word in words(run, tmp_path / "tiny")]
    refused(wrong, "--push_to_hub me/a b: Repo id must", capsys)
