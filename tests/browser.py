"""A headless Chromium that opens pages as a reader has them: on a screen or a phone, in the light or in the dark.

It is driven by the DevTools protocol through two pipes: JSON, ended by a zero byte. https://chromedevtools.github.io
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"

MEASURE = """(() => {
  const luminance = (c) => c.slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const scrolls = (element) => {
    for (let e = element.parentElement; e; e = e.parentElement)
      if (getComputedStyle(e).overflowX !== 'visible') return true;
    return false;
  };
  const found = {overflow: [], faint: [], tiny: []};
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) found.overflow.push('the page');
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect(), own = [...e.childNodes].some((x) => x.nodeType === 3 && x.data.trim());
    const name = `${e.tagName} ${e.textContent.slice(0, 40)}`;
    if (box.right > width + 1 && !scrolls(e)) found.overflow.push(name);
    if (!own || !box.width) continue;
    const style = getComputedStyle(e), drawn = e instanceof SVGElement;
    const [a, b] = [luminance(numbers(drawn ? style.fill : style.color)), luminance(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.faint.push(name);
    const scale = drawn ? e.getScreenCTM().a : 1;
    if (parseFloat(style.fontSize) * scale < 10) found.tiny.push(name);
  }
  return found;
})()"""
"""Texts that are cut or make the page scroll sideways, that have less contrast than WCAG's 4.5, or less than 10 px."""


class Seen(NamedTuple):
    """What was wrong with a page, and a picture of all of it."""

    errors: list[str]
    requests: list[str]
    overflow: list[str]
    faint: list[str]
    tiny: list[str]
    picture: bytes


def find() -> str | None:
    """The program, if this machine has it."""
    return next(filter(None, map(shutil.which, (*NAMES, MACOS))), None)


class Browser:
    """A running Chromium with one tab."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._count, self._rest = 0, b""
        self._session: dict[str, str] = {}
        self._events: list[tuple[str, dict[str, Any]]] = []
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._do(f"{domain}.enable")

    def look(self, file: Path, width: int, dark: bool) -> Seen:
        """Open a page at a width in pixels; a narrow one is a phone's."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self._do("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._do("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self._do("Page.navigate", url=file.resolve().as_uri())
        while not any(name == "Page.loadEventFired" for name, _ in self._events):
            self._read()
        found = self._do("Runtime.evaluate", expression=MEASURE, returnByValue=True)["result"]["value"]
        shot = self._do("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return Seen(**self._wrong(), **found, picture=base64.b64decode(shot))

    def _wrong(self) -> dict[str, list[str]]:
        errors, requests = [], []
        for name, x in self._events:
            if name == "Log.entryAdded" and x["entry"]["level"] in ("error", "warning"):
                errors.append(x["entry"]["text"])
            elif name == "Runtime.consoleAPICalled" and x["type"] in ("error", "warning", "assert"):
                errors.append(" ".join(str(part.get("value")) for part in x["args"]))
            elif name == "Runtime.exceptionThrown":
                errors.append(x["exceptionDetails"]["text"])
            elif name == "Network.requestWillBeSent" and not x["request"]["url"].startswith(("file:", "data:")):
                requests.append(x["request"]["url"])
        return {"errors": errors, "requests": requests}

    def _do(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while "id" not in (answer := self._read()) or answer["id"] != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._receive, 2**16)
            assert part, "Chromium has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self._events.append((message["method"], message.get("params", {})))
        return message


@contextlib.contextmanager
def running(program: str, folder: Path) -> Iterator[Browser]:
    """A browser whose files are in `folder`."""
    commands, answers = os.pipe(), os.pipe()
    # Chromium reads from 3 and writes to 4. Numbers above, as one of the pipes' own ends may be 3 or 4.
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (commands[0], answers[1])]
    moves = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(theirs, (3, 4), strict=True)]
    log = (os.POSIX_SPAWN_OPEN, 2, str(folder / "log.txt"), os.O_WRONLY | os.O_CREAT, 0o600)
    options = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
               "--disable-background-networking", f"--user-data-dir={folder}"]  # fmt: skip
    options += ["--no-sandbox"] if os.getuid() == 0 else []  # which Chromium refuses to root
    process = os.posix_spawn(program, [program, *options], os.environ, file_actions=[*moves, log], setsid=True)
    for end in (commands[0], answers[1], *theirs):
        os.close(end)
    try:
        yield Browser(commands[1], answers[0])
    finally:
        os.killpg(process, signal.SIGKILL)  # it has not been waited for, so the number is still its own
        os.waitpid(process, 0)
        os.close(commands[1])
        os.close(answers[0])
