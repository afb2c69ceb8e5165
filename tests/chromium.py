"""Headless Chromium, by its DevTools protocol over a pipe: pages as people see them, and no package for it."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(
    BROWSER is None, reason="NO CHROMIUM: pages are not looked at (Debian's package is called chromium)"
)
_SECONDS = 60  # until something that is waited for counts as missing


class Page:
    """One tab. Use as a context manager."""

    def __init__(self, folder: Path):
        """
        Args:
            folder: for the browser's profile.
        """
        self._folder = folder

    def __enter__(self) -> "Page":
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        os.set_inheritable(read_commands, True)
        os.set_inheritable(write_answers, True)
        # The browser reads commands from descriptor 3 and writes answers to 4.
        shell = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
        command = ["bash", "-c", shell, "bash", BROWSER, "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe", "--hide-scrollbars"]
        command += [f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(read_commands, write_answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_commands)
        os.close(write_answers)
        self._buffer, self._number, self._session = b"", 0, None
        self.messages: list[str] = []  # errors, and what the page wrote to its console
        self.requests: list[str] = []  # addresses that were asked for
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *exception) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def send(self, method: str, **parameters) -> dict:
        """One command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], _SECONDS)
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "the browser said nothing"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        answer = json.loads(line)
        method, given = answer.get("method"), answer.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.messages.append(str(given["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(one.get("value")) for one in given["args"]))
        elif method == "Log.entryAdded":
            self.messages.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        return answer

    def open(self, url: str) -> None:
        """Go to an address, until it is loaded."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def eval(self, expression: str):
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + _SECONDS
        while not self.eval(f"!!({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def choose_file(self, selector: str, path: str) -> None:
        """What a click on a file input and a choice do."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[path])

    def look(self, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        """Set the size of the window in CSS pixels, and what the user prefers."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path: str, whole: bool = True) -> None:
        """Save a PNG of the page."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def too_wide(self) -> list[str]:
        """Elements that stick out of the window to the right, and are not scrolled within another."""
        return self.eval(
            "[...document.querySelectorAll('body *')].filter(e => { const r = e.getBoundingClientRect();"
            " if (r.right <= innerWidth + 1 || !r.width || !e.checkVisibility()) return false;"
            " for (let p = e.parentElement; p; p = p.parentElement)"
            "  if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;"
            " return true; }).map(e => e.tagName + '#' + e.id + '.' + e.className)"
        )
