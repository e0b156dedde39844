"""Chromium without a window, driven by its protocol of messages over two pipes."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--hide-scrollbars --remote-debugging-pipe"
).split()
# Chromium reads from descriptor 3 and writes to 4.
_LAUNCH = """import fcntl, os, sys
ours = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
[os.dup2(fd, number) for fd, number in zip(ours, (3, 4))]
os.execv(sys.argv[3], sys.argv[3:])"""


def chromium() -> str:
    """The path of the browser; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip("no Chromium on this machine")


class Browser:
    """One process of Chromium; `page(url)` opens a page in it."""

    def __init__(self, profile: Path):
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()
        ours = [str(from_us), str(to_us)]
        command = [sys.executable, "-S", "-c", _LAUNCH, *ours, chromium(), *_FLAGS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"],
            pass_fds=[from_us, to_us],
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self.reader, self.writer = from_browser, to_browser
        self.numbers, self.rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result; events that come before it are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {} if session is None else {"sessionId": session}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (found := self._receive()).get("id") != number:
            self.events.append(found)
        assert "error" not in found, (method, found["error"])
        return found["result"]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + 60
        while b"\0" not in self.rest:
            assert select.select([self.reader], [], [], end - time.monotonic())[0], "no answer"
            part = os.read(self.reader, 2**20)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def page(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> "Tab":
        """Opens a page of that size in CSS pixels, and waits until it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        tab.colours(dark)
        tab.call("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return tab

    def close(self):
        try:
            self.call("Browser.close")
        finally:
            os.close(self.reader)
            os.close(self.writer)  # which ends a browser, too
            self.process.wait(30)


class Tab:
    """An open page."""

    def __init__(self, browser: Browser, session: str, target: str):
        self.browser, self.session, self.target = browser, session, target

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def value(self, expression: str) -> Any:
        """The value of an expression, awaited, as JSON."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 60):
        """Waits until an expression holds."""
        end = time.monotonic() + seconds
        while not self.value(condition):
            assert time.monotonic() < end, f"never came: {condition}"
            time.sleep(0.05)

    def press(self, key: str, *, shift: bool = False):
        """A key goes down and up."""
        about = dict(key=key, modifiers=8 if shift else 0)
        about |= dict(text=key) if len(key) == 1 else {}
        about |= dict(windowsVirtualKeyCode=9) if key == "Tab" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def colours(self, dark: bool):
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def errors(self) -> list[str]:
        """What the page, and the frames within it, said on the console but for notes."""
        self.value("0")
        bad = []
        for event in self.browser.events:
            params = event.get("params", {})
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                bad.append(params["exceptionDetails"].get("exception", params)["description"])
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] in (
                "error",
                "warning",
            ):
                bad.append(str(params["args"]))
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] in (
                "error",
                "warning",
            ):
                bad.append(params["entry"]["text"])
        return bad

    def screenshot(self, path: Path, *, whole: bool = False):
        content = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(content))

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)
