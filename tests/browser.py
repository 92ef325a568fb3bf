"""A page in headless Chromium, spoken to over the DevTools protocol through a pipe.

The protocol's messages are JSON with a null byte behind each, written to the browser's file
descriptor 3 and read from 4 (`--remote-debugging-pipe`), so that no port is opened and nothing but
the standard library is needed.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"),
)
PATIENCE = 120.0
"""Seconds; a browser on a machine that has other work is slow."""


def chromium() -> str:
    """The browser's path; skips the test, with the reason, where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: install Debian's package 'chromium'")
    return found


@contextmanager
def browser(folder: Path) -> Iterator["Tab"]:
    """A tab of a new browser, whose profile and output lie in `folder`.

    It is let go of with everything it started, however the block ends.
    """
    down, up = os.pipe(), os.pipe()
    program = f'exec "$0" "$@" 3<&{down[0]} 4>&{up[1]}'
    command = ["bash", "-c", program, chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "about:blank"],
            stdout=log,
            stderr=log,
            pass_fds=(down[0], up[1]),
            start_new_session=True,
        )
    os.close(down[0])
    os.close(up[1])
    try:
        yield Tab(down[1], up[0])
    finally:
        for end in (down[1], up[0]):
            os.close(end)
        try:
            process.wait(5)  # it ends as its pipe does
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


class Tab:
    """One page: commands, and the events that came meanwhile."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._last = write, read, b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result; fails with the browser's words."""
        self._last += 1
        number = self._last
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(f"no answer to {method}")
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next(self, complaint: str) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"{complaint} within {PATIENCE:g} s"
            piece = os.read(self._read, 1 << 20)
            assert piece, f"{complaint}: the browser has ended"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def look(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.look(f"Boolean({expression})"):
            assert time.monotonic() < until, f"{expression}: not within {PATIENCE:g} s"
            time.sleep(0.05)

    def open(self, path: Path, media: Mapping[str, str] | None = None) -> None:
        """Load a file; `media`: features such as {"prefers-color-scheme": "dark"}."""
        self.media(media or {})
        self.events.clear()
        failed = self.call("Page.navigate", url=path.resolve().as_uri()).get("errorText")
        assert failed is None, f"{path}: {failed}"
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def media(self, features: Mapping[str, str]) -> None:
        """Emulate media features on the page that is open."""
        given = [{"name": name, "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media="", features=given)

    def size(self, width: int, height: int = 900) -> None:
        """The window, in CSS pixels."""
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **shape)

    def scripts(self, allowed: bool) -> None:
        """Whether pages opened from now on may run any."""
        self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

    def key(self, name: str) -> None:
        """Press and release a key such as ``Tab``."""
        codes = {"Tab": 9, "Enter": 13}
        for kind in ("rawKeyDown", "keyUp"):
            key = {"type": kind, "key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
            self.call("Input.dispatchKeyEvent", **key)

    def requests(self) -> list[str]:
        """Every address asked for since the page was opened."""
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Exceptions, and errors and warnings of console and log, since the page was opened."""
        found = []
        for event in self.events:
            method, given = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(given["exceptionDetails"]))
            if method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
                found.append(str(given["args"]))
            if method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                found.append(str(given["entry"]["text"]))
        return found

    def picture(self, whole: bool = False) -> bytes:
        """What is seen, as PNG; the whole page if asked for."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])
