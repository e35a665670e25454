"""A headless Chromium, spoken to over two pipes by the DevTools protocol: no driver and no library needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOUND = shutil.which("chromium")
AT_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""  # chromium reads from 3 and writes to 4
SECONDS = 60.0  # for any one thing, on a busy machine


class Tab:
    """One page. Failures of the page's script, and requests to other places, are kept in `complaints`."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._held, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        self.requested: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        limit = time.monotonic() + SECONDS
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, limit - time.monotonic()))
            assert ready, "chromium does not answer"
            block = os.read(self._reading, 1 << 20)
            assert block, "chromium has ended"
            self._held += block
        line, _, self._held = self._held.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        said = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.complaints.append(said["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requested.append(said["request"]["url"])
        return message

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Until a JavaScript expression is true."""
        limit = time.monotonic() + SECONDS
        while not self.run(script):
            assert time.monotonic() < limit, f"never true: {script}; {self.complaints}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """In the place of what a field holds, as a keyboard would."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def look(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """The size of the window and the reader's choice of colours."""
        self.call("Emulation.setScrollbarsHidden", hidden=True)  # a photograph has none, and would be cut by its width
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def photograph(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A new Chromium with one page. Needs `chromium` on PATH."""
    assert FOUND is not None, "chromium is on PATH"
    to_child, from_us = os.pipe()
    to_us, from_child = os.pipe()
    words = [
        *(FOUND, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
        f"--user-data-dir={profile}",
    ]
    ends = [str(to_child), str(from_child)]
    words = [sys.executable, "-c", AT_3_AND_4, *ends, *words]
    with open(profile.parent / "chromium.log", "wb") as log:
        child = subprocess.Popen(words, pass_fds=(to_child, from_child), stdout=log, stderr=log)
    os.close(to_child)
    os.close(from_child)
    try:
        yield Tab(to_us, from_us)
    finally:
        os.close(from_us)
        os.close(to_us)
        child.terminate()
        child.wait(timeout=30)
