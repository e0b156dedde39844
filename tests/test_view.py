"""`jaxflow view`: what the server reads, whom it answers, and that it stops."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import jaxflow.view.metrics
import jaxflow.view.runs
from jaxflow import _page
from jaxflow._folder import write_settings
from jaxflow.cli import app
from jaxflow.view import WatchedRun, serving
from jaxflow.view.metrics import MOST_CURVES, Table

SECRET = "what no run holds"


def line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def training(folder: Path, lines: bytes = b"", **settings: Any) -> Path:
    folder.mkdir()
    write_settings(folder, "train", {"dim": 8} | settings)
    (folder / "metrics.jsonl").write_bytes(lines)
    return folder


def table(*rows: Any) -> dict[str, Any]:
    made = Table()
    for row in rows:
        made.add(row if isinstance(row, bytes) else line(row))
    return made.to_json()


# ------------------------------------------------------------------ metrics


def test_curves_have_a_place_on_each_clock():
    read = table(
        {"step": 1, "loss": 3.0, "seconds": 0.5},
        {"step": 2, "loss": 2.0, "seconds": 1.0, "validation_loss": 2.5, "total_evaluations": 64.0},
    )
    assert read["axis"] == "step" and read["lines"] == 2 and read["damaged"] == 0
    assert read["curves"]["loss"] == {
        "y": [3.0, 2.0], "own": [1.0, 2.0], "seconds": [0.5, 1.0],
        "total_evaluations": [None, 64.0],
    }  # fmt: skip
    assert read["curves"]["validation_loss"]["own"] == [2.0]
    assert read["last"]["loss"] == 2.0 and read["last"]["step"] == 2.0


def test_long_curves_are_thinned_and_keep_their_peaks(monkeypatch):
    most = 32
    monkeypatch.setattr(jaxflow.view.metrics, "MOST_POINTS", most)
    made = Table()
    rows = 40 * most + 3
    for k in range(rows):
        made.add(b'{"step": %d, "loss": %r}' % (k, 1e3 if k == 77 else math.sin(k / 9)))
    curve = made.to_json()["curves"]["loss"]
    assert most / 2 <= len(curve["y"]) < most + 3
    assert curve["own"] == sorted(curve["own"]) and curve["own"][-1] == rows - 1
    assert (77.0, 1e3) in zip(curve["own"], curve["y"], strict=True)
    gaps = [b - a for a, b in zip(curve["own"], curve["own"][1:], strict=False)]
    assert max(gaps) <= 2 * 2 * rows / (most / 2)  # two buckets, nowhere more


def test_damaged_lines_are_told_and_what_is_no_number_is_left_out():
    read = table(
        {"step": 1, "loss": 2.0},
        b"{\x00\n",
        [1],
        {"loss": 1.0},
        {"step": math.nan, "loss": 1.0},
        {"step": 10**400},
        {"step": 2, "loss": math.nan, "big": 10**400, "ready": True, "name": "x", "none": None},
        {"step": 3, "loss": math.inf},
    )
    assert read["damaged"] == 5 and read["told"][0] == "line 2 is not JSON"
    assert read["told"][2] == "line 4 has no number 'step'"
    assert read["curves"]["loss"]["own"] == [1.0] and set(read["curves"]) == {"loss"}
    assert read["last"]["loss"] == "inf" and set(read["last"]) == {"step", "loss", "big"}
    assert json.loads(json.dumps(read, allow_nan=False)) == read


def test_more_metrics_than_a_page_shows_are_left_out():
    read = table({"step": 1} | {f"m{k}": k for k in range(2 * MOST_CURVES)})
    assert len(read["last"]) == MOST_CURVES


def test_a_log_is_read_as_it_grows(tmp_path):
    folder = training(tmp_path / "run")
    log = folder / "metrics.jsonl"
    run = WatchedRun(folder, "run")
    assert run.state()["error"] is None and run.metrics()["lines"] == 0
    with log.open("ab", buffering=0) as opened:
        opened.write(line({"step": 1, "loss": 2.0}) + b'{"step": 2, "lo')
        first = run.state()
        assert run.metrics()["lines"] == 1 and run.metrics()["damaged"] == 0
        assert run.state()["version"] == first["version"]
        opened.write(b'ss": 1.0}\n')
    assert run.state()["version"] > first["version"]
    assert run.metrics()["curves"]["loss"]["y"] == [2.0, 1.0]
    # A training that goes on writes the file anew, cut where it goes on.
    beside = folder / "new"
    beside.write_bytes(b"".join(line({"step": k, "loss": 5.0}) for k in range(1, 9)))
    os.replace(beside, log)
    run.state()
    assert run.metrics()["curves"]["loss"]["y"] == [5.0] * 8
    log.write_bytes(line({"step": 1, "loss": 9.0}))
    run.state()
    assert run.metrics()["curves"]["loss"]["y"] == [9.0]
    log.unlink()
    run.state()
    assert run.metrics()["lines"] == 0


def test_a_large_log_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxflow.view.runs, "AT_ONCE", 64)
    rows = [{"step": k, "loss": 0.5} for k in range(9)]
    run = WatchedRun(training(tmp_path / "run", b"".join(map(line, rows))), "run")
    parts = 1
    while run.state()["more"]:
        parts += 1
    assert parts > 3 and run.metrics()["lines"] == 9 and run.metrics()["damaged"] == 0
    # A line without an end is passed.
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as opened:
        opened.write(b"x" * 200 + b"\n" + line({"step": 9, "loss": 0.25}))
    while run.state()["more"]:
        pass
    assert run.metrics()["curves"]["loss"]["y"][-1] == 0.25 and run.metrics()["damaged"] > 0


# ------------------------------------------------------------------ what is no run


def view(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["view", "--no-browser", *map(str, arguments)])


def test_what_is_no_run_is_refused_before_the_server_starts(tmp_path):
    refused = view(tmp_path)
    assert refused.exit_code == 2 and "has no config.json. Give folders that" in refused.output
    assert "exists" in view(tmp_path / "none").output
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in view(tmp_path).output
    folder = training(tmp_path / "run")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("8", "9"))
    assert "edited or damaged" in view(folder).output
    write_settings(folder, "reproduce", {})
    assert "open the page" in view(folder).output
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # which would be waited for
    assert "no regular file" in view(folder).output


def test_a_port_in_use_is_refused(tmp_path):
    run = training(tmp_path / "run")
    with serving([WatchedRun(run, "run")]) as url:
        refused = view(run, "--port", url.split("/")[2].split(":")[1])
    assert refused.exit_code == 2 and "--port must be one that is free" in refused.output


# ------------------------------------------------------------------ the server


class Client:
    """Requests to a server, as they are written."""

    def __init__(self, url: str):
        _, _, host, self.token, _ = url.split("/")
        self.host, port = host.split(":")
        self.port = int(port)

    def __call__(
        self, path: str, method: str = "GET", host: str | None = None
    ) -> tuple[int, str, str]:
        """The status, the text and the headers of the answer."""
        request = f"{method} {path} HTTP/1.0\r\nHost: {host or f'{self.host}:{self.port}'}\r\n\r\n"
        with socket.create_connection((self.host, self.port), timeout=30) as connection:
            connection.sendall(request.encode())
            answer = b"".join(iter(lambda: connection.recv(2**16), b"")).decode()
        headers, _, text = answer.partition("\r\n\r\n")
        return int(headers.split()[1]), text, headers

    def get(self, path: str) -> str:
        status, text, _ = self(f"/{self.token}/{path}")
        assert status == 200, text
        return text


@pytest.fixture
def outside(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"step": 1, SECRET: 2.0}) + "\n")
    return secret


def test_the_server_answers_its_host_and_its_token_alone(tmp_path):
    run = training(tmp_path / "run", line({"step": 1, "loss": 2.0}))
    threads = threading.active_count()
    with serving([WatchedRun(run, "run")]) as url:
        ask = Client(url)
        assert ask.host == "127.0.0.1" and len(ask.token) >= 32
        root = f"/{ask.token}/"
        status, text, headers = ask(root)
        assert status == 200 and "jaxflow view" in text
        for guard in ("no-store", "no-referrer", "nosniff", "frame-ancestors 'self'"):
            assert guard in headers, guard
        assert ask(root, host=f"localhost:{ask.port}")[0] == 200
        for name in ("evil.example", f"evil.example:{ask.port}", "127.0.0.1", f"{ask.host}@x"):
            assert ask(root, host=name)[0] == 403, name
        near = f"/{ask.token[:-1]}/", f"/{ask.token}x/", f"/?{ask.token}"
        for path in ("/", "/state", "/\xe9/", "*", *near):
            assert ask(path)[0] == 403, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(root, method)[0] == 501, method
    with pytest.raises(ConnectionRefusedError):
        ask(root)
    assert threading.active_count() <= threads


def test_no_path_leads_out_of_a_run(tmp_path, outside):
    run = training(tmp_path / "run")
    for name in ("metrics.jsonl", "flow.html"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside)
    watched = WatchedRun(run, "../../../secret")
    with serving([watched]) as url:
        ask = Client(url)
        paths = ["../secret", "film/../../secret", "film/..%2f..%2fsecret", "film/1", "film/-1"]
        paths += ["film/0/..", "metrics/../../secret", "config.json", "state/", "film/٠"]
        for path in paths:
            status, text, _ = ask(f"/{ask.token}/{path}")
            assert status == 404 and SECRET not in text, path
        [state] = json.loads(ask.get("state"))
        assert "link out of the run" in state["error"] and state["film"] is None
        assert SECRET not in ask.get("metrics/0") + ask.get("film/0")
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to("metrics.jsonl")
        assert json.loads(ask.get("state"))[0]["error"] is not None
        # Within the run, a link is as good as a file.
        (run / "kept.jsonl").write_bytes(line({"step": 1, "loss": 2.0}))
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to("kept.jsonl")
        assert json.loads(ask.get("state"))[0]["error"] is None
        assert json.loads(ask.get("metrics/0"))["lines"] == 1
        (run / "metrics.jsonl").unlink()
        os.mkfifo(run / "metrics.jsonl")
        assert "no regular file" in json.loads(ask.get("state"))[0]["error"]
    (run / "config.json").unlink()
    (run / "config.json").symlink_to(outside)
    with pytest.raises(ValueError, match="link out of the run"):
        WatchedRun(run, "run")


def test_nothing_of_a_run_is_html_or_script(tmp_path):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = training(tmp_path / "run", line({"step": 1, attack: 2.0}), text=attack)
    film = _page.film("t", {"title": attack}).replace("</body>", "<script>alert(2)</script></body>")
    (run / "flow.html").write_text(film)
    with serving([WatchedRun(run, attack)]) as url:
        ask = Client(url)
        for path in ("", "film/0"):
            page = ask.get(path)
            assert (
                "<img" not in page and "alert(2)" not in page and "</script><script>a" not in page
            )
            assert "unsafe-inline'; script" not in page and "script-src 'sha256-" in page
        assert _page.embedded(ask.get("film/0")) == {"title": attack}
        (run / "flow.html").write_text("<b>an older page</b>")
        assert "holds no data" in ask.get("film/0") and "older page</b>" not in ask.get("film/0")
        # A config that was damaged meanwhile is told.
        (run / "config.json").write_text("{<b>")
        assert "not valid JSON" in _page.embedded(ask.get(""))[0]["error"]


# ------------------------------------------------------------------ the command


def test_the_command_says_its_url_and_stops_on_either_signal(tmp_path):
    run = training(tmp_path / "run", line({"step": 1, "loss": 2.0}))
    command = [sys.executable, "-m", "jaxflow", "view", "--no-browser", str(run)]
    servers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for server, number in zip(servers, (signal.SIGINT, signal.SIGTERM), strict=True):
        assert server.stdout is not None
        ask = Client(server.stdout.readline().strip())
        assert "Ctrl-C ends it" in server.stdout.readline()
        assert '"lines": 0' in ask.get("metrics/0") and '"error": null' in ask.get("state")
        server.send_signal(number)
        rest, _ = server.communicate(timeout=60)
        assert server.returncode == 0 and rest == ""
        with pytest.raises(ConnectionRefusedError):
            ask.get("")
    assert not list(run.glob(".*"))  # nothing was written
