"""Controls headless Chromium in tests through the pipes of its debugging protocol."""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from select import select
from time import monotonic
from typing import Any

INSTALL = "these tests open the report in a browser: apt-get install chromium (Debian's package)"


class Browser:
    """One page at a time: open it, ask it, look at it.

    Attributes:
        said: errors and warnings of the last page's console, and exceptions.
        requests: addresses that the last page asked for.
    """

    def __init__(self) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        assert program is not None, INSTALL
        self.said: list[str] = []
        self.requests: list[str] = []
        self._number, self._buffer = 0, b""
        self._profile = tempfile.mkdtemp()
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        # The protocol's pipes are descriptors 3 and 4, which only a shell can promise; clear of those until then.
        theirs, back = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write))
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"
        flags += " --remote-debugging-pipe"
        pipes = f'exec "$0" "$@" 3<&{theirs} 4>&{back}'
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, program, *flags.split(), f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(theirs, back),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (read, write, theirs, back):
            os.close(end)
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def close(self) -> None:
        """Terminates the browser with all its processes."""
        with suppress(BrokenPipeError):
            self._ask("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait(10)
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, path: Path, width: int, *, dark: bool = False) -> None:
        """Opens a file in a window of the given width in pixels, and waits until it is loaded."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setEmulatedMedia", features=scheme)
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.said.clear()
        self.requests.clear()
        self._loaded = False
        answer = self._ask("Page.navigate", url=path.resolve().as_uri())
        assert "errorText" not in answer, answer
        while not self._loaded:
            self._hear()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as plain data."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        question = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            question["sessionId"] = self._session
        text = json.dumps(question).encode() + b"\0"
        while text:
            text = text[os.write(self._out, text) :]
        while True:
            answer = self._hear()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _hear(self) -> dict[str, Any]:
        """The next message. Events are recorded."""
        deadline = monotonic() + 60
        while b"\0" not in self._buffer:
            assert select([self._in], [], [], max(0, deadline - monotonic()))[0], "Chromium does not answer"
            piece = os.read(self._in, 1 << 20)
            assert piece, f"Chromium has ended, exit code {self._process.wait(10)}"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.said.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.said.append(str(parameters["args"]))
        elif method == "Log.entryAdded":
            self.said.append(str(parameters["entry"]["text"]))
        return message
