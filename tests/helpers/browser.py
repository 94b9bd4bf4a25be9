"""A headless Chromium under ChromeDriver, by the W3C WebDriver protocol over plain HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def missing() -> str | None:
    """Return what is not installed, or None."""
    if _chromium() is None:
        return "no browser: chromium is not installed"
    if shutil.which("chromedriver") is None:
        return "no browser: chromedriver is not installed"
    return None


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One page at a time; use as a context manager."""

    def __enter__(self):
        self._profile = tempfile.mkdtemp()
        self._driver = subprocess.Popen(
            [shutil.which("chromedriver"), "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._session = ""
        try:
            line = next(line for line in self._driver.stdout if "successfully on port" in line)
            self._address = f"http://127.0.0.1:{line.rstrip().rstrip('.').rsplit(' ', 1)[1]}"
            options = {
                "binary": _chromium(),
                "args": [*FLAGS, f"--user-data-dir={self._profile}"],
            }
            wanted = {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            body = {"capabilities": {"alwaysMatch": wanted}}
            self._session = f"/session/{self._call('/session', body)['sessionId']}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        try:
            if self._session:
                self._call(self._session, method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait()
            self._driver.stdout.close()
            shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, address, *, width, dark=False, scripts=True):
        """Load a page into a window `width` CSS pixels wide."""
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.command("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._call(f"{self._session}/url", {"url": address})

    def command(self, name, **parameters):
        """Run a command of the DevTools protocol."""
        body = {"cmd": name, "params": parameters}
        return self._call(f"{self._session}/goog/cdp/execute", body)

    def script(self, code):
        """Run JavaScript in the page, to the end of its promise, and return its result."""
        body = {"script": code, "args": []}
        return self._call(f"{self._session}/execute/sync", body)

    def press(self, key):
        """Press and release a key; the focus decides where it goes."""
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self._call(f"{self._session}/actions", body)

    def console(self):
        """Return what the console has said since the last call."""
        return [entry["message"] for entry in self._log("browser")]

    def requests(self):
        """Return the addresses asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self):
        """Return the window as a PNG file in base64."""
        return self._call(f"{self._session}/screenshot", method="GET")

    def _log(self, kind):
        return self._call(f"{self._session}/se/log", {"type": kind})

    def _call(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path,
            data,
            {"Content-Type": "application/json"},
            method=method or "POST",
        )
        for attempt in range(20):
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return json.load(answer)["value"]
            except urllib.error.HTTPError as error:
                raise RuntimeError(json.load(error)["value"]["message"]) from None
            except urllib.error.URLError:
                if attempt == 19:
                    raise
                time.sleep(0.1)  # the driver has named its port and is about to listen
        raise AssertionError
