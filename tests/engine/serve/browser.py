"""A headless browser, driven through chromedriver's HTTP interface (W3C WebDriver)."""

import base64
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


def missing() -> str | None:
    """Why there is no browser; None if there is one."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"the status page is not looked at: no {program} in PATH"
    return None


class Browser:
    """One window."""

    def __init__(self, driver: httpx.Client) -> None:
        self._driver = driver

    def open(self, url: str) -> None:
        self._driver.post("url", json={"url": url}).raise_for_status()

    def run(self, script: str, *args: Any) -> Any:
        """What a script returns; a promise is awaited."""
        answer = self._driver.post("execute/sync", json={"script": script, "args": list(args)})
        value = answer.json()["value"]
        assert answer.is_success, value["message"]
        return value

    def wait(self, condition: str, timeout_s: float = 20.0) -> None:
        """Return when a condition holds; it is looked at before every frame."""
        script = """
            const [condition, limit_ms] = arguments, holds = new Function(`return ${condition}`);
            return new Promise((resolve) => {
                const began = performance.now();
                const look = () => holds() ? resolve(true)
                    : performance.now() - began > limit_ms ? resolve(false)
                    : requestAnimationFrame(look);
                look();
            });"""
        assert self.run(script, condition, 1000 * timeout_s), f"never: {condition}"

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """The page's size in CSS pixels, a phone's as well, and its colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def complaints(self) -> list[str]:
        """What the console has said since the last call, warnings and worse."""
        entries = self._driver.post("se/log", json={"type": "browser"}).json()["value"]
        return [f"{entry['level']} {entry['message']}" for entry in entries]

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        shot = self._devtools("Page.captureScreenshot", {})
        path.write_bytes(base64.b64decode(shot["data"]))

    def _devtools(self, command: str, params: dict[str, Any]) -> Any:
        answer = self._driver.post("goog/cdp/execute", json={"cmd": command, "params": params})
        return answer.raise_for_status().json()["value"]


@contextmanager
def browser() -> Generator[Browser]:
    """A window without a past, which is gone afterwards."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        _driver() as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        options = {"args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "WARNING"}}
        answer = client.post("session", json={"capabilities": {"alwaysMatch": wanted}})
        value = answer.json()["value"]
        assert answer.is_success, value["message"]
        client.base_url = f"{url}/session/{value['sessionId']}"
        try:
            yield Browser(client)
        finally:
            client.delete("")


@contextmanager
def _driver() -> Generator[str]:
    """The address of a chromedriver at a free port."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "started successfully on port" in line:
                    yield f"http://127.0.0.1:{line.split()[-1].rstrip('.')}"
                    break
            else:
                raise AssertionError("chromedriver did not start")
        finally:
            process.terminate()
