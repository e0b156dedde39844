"""Run folders: of one kind of run, of one process at a time, written whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxflow import _folder
from jaxflow._folder import claim, read_json, read_settings, write_bytes, write_settings, write_text

ROOT = Path(__file__).parent.parent


def run(folder, kind="simulate", **settings):
    with claim(folder, kind) as path:
        write_settings(path, kind, {"beta": 2.0} | settings)
    return path


# ------------------------------------------------------------------ whose it is


def test_a_folder_belongs_to_one_kind_of_run(tmp_path):
    folder = run(tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json"]
    before = (folder / "config.json").read_bytes()
    with (
        pytest.raises(ValueError, match=r"another kind of run: .*config.json says simulate"),
        claim(folder, "train", going_on=None),
    ):
        raise AssertionError
    with pytest.raises(ValueError, match="holds a run already"), claim(folder, "simulate"):
        raise AssertionError
    assert (folder / "config.json").read_bytes() == before
    for going_on in (True, None):
        with claim(folder, "simulate", going_on=going_on) as path:
            assert path == folder


def test_what_is_no_run_is_not_taken(tmp_path):
    with (
        pytest.raises(ValueError, match="no run to go on with: there is no such folder"),
        claim(tmp_path / "none", "train", going_on=True),
    ):
        raise AssertionError
    with (
        pytest.raises(ValueError, match="no run to go on with: it has no config.json"),
        claim(tmp_path, "train", going_on=True),
    ):
        raise AssertionError
    (tmp_path / "thesis.tex").write_text("ten years")
    (tmp_path / "summary.png").write_text("of the thesis")
    for folder, message in {
        tmp_path: r"no run folder, .*holds summary.png, which would be overwritten",
        tmp_path / "thesis.tex": r"thesis.tex is, or is in, a file",
        tmp_path / "thesis.tex" / "run": r"is, or is in, a file",
    }.items():
        with pytest.raises(ValueError, match=message), claim(folder, "train", going_on=None):
            raise AssertionError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["summary.png", "thesis.tex"]
    with claim(tmp_path, "train", own=["summary.png"]):
        pass
    (tmp_path / "summary.png").unlink()
    with claim(tmp_path, "train") as folder:
        write_settings(folder, "train", {})
    assert (tmp_path / "thesis.tex").read_text() == "ten years"


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "a" / "b", "train"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), claim(tmp_path, "train"):
        raise ZeroDivisionError
    assert tmp_path.is_dir()  # it was there before
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "a" / "b", "train") as folder:
        write_settings(folder, "train", {})
        raise ZeroDivisionError
    assert (folder / "config.json").is_file()


def test_two_jobs_in_one_second_take_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_folder.time, "strftime", lambda _: "20260131-093000")
    names = [run(None).name for _ in range(3)]
    assert names == ["20260131-093000", "20260131-093000-2", "20260131-093000-3"]
    with pytest.raises(ZeroDivisionError), claim(None, "train"):
        raise ZeroDivisionError
    assert len(list((tmp_path / "runs").iterdir())) == 3


# ------------------------------------------------------------------ one process at a time

# The module alone: the package takes seconds to import.
HOLDER = """
import runpy, sys
with runpy.run_path("jaxflow/_folder.py")["claim"](sys.argv[1], "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_share_a_folder(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        who = f"in use by process {holder.pid} on {socket.gethostname()}"
        for going_on in (False, None, True):
            with pytest.raises(ValueError, match=who), claim(folder, "train", going_on=going_on):
                raise AssertionError
        (folder / ".lock-holder").write_text("{")
        with pytest.raises(ValueError, match="by another process"), claim(folder, "train"):
            raise AssertionError
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    # The lock died with its process; the files that it left are in nobody's way.
    assert (folder / ".lock").exists() and (folder / ".lock-holder").exists()
    assert run(folder, "train") == folder
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_a_thread_claims_its_own_folder_again_and_no_other(tmp_path):
    refused = []

    def other():
        try:
            with claim(tmp_path, "train", going_on=None):
                raise AssertionError
        except ValueError as error:
            refused.append(str(error))

    with claim(tmp_path, "train") as folder:
        write_settings(folder, "train", {})
        with claim(tmp_path / "." / "", "train"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()}" in refused[0]


# ------------------------------------------------------------------ what is written


def test_settings_are_sealed_and_still_plain_json(tmp_path):
    file = run(tmp_path / "run", name="é", nested={"1": [1e-3, None, True]}) / "config.json"
    expected = {
        "command": "simulate",
        "beta": 2.0,
        "name": "é",
        "nested": {"1": [1e-3, None, True]},
    }
    assert read_settings(file, unchanged=True) == expected
    assert {k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"} == expected
    # A copy that a user edits is input.
    file.write_text(file.read_text().replace("2.0", "3.0"))
    with pytest.raises(ValueError, match=r"config.json does not have the sha256 that it states"):
        read_settings(file, unchanged=True)
    assert read_settings(file, unchanged=False) == expected | {"beta": 3.0}


def test_a_flipped_bit_of_settings_is_found_or_harmless(tmp_path):
    file = run(tmp_path / "run") / "config.json"
    expected, content = read_settings(file, unchanged=True), file.read_bytes()
    refused = 0
    for i in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << i % 8
        file.write_bytes(bytes(flipped))
        try:
            assert read_settings(file, unchanged=True) == expected
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > len(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b"[1]", "must hold a JSON object, got a list"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"1" * 10_000, "is not valid JSON"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_json(file)
    assert str(file) in str(raised.value)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no .*none.json"):
        read_json(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="no regular file"):
            read_json(path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(ValueError, match=r"1,099,511,627,776 bytes"):
        read_json(huge)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_text(file, "before")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_folder.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_bytes(file, b"after")
    assert file.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(TypeError):
        write_settings(tmp_path, "train", {"a": {1, 2}})
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
