"""Chromium that tests drive by clicks and keys, over the pipe of its DevTools protocol."""

import base64
import fcntl
import io
import json
import os
import shutil
import subprocess
import tempfile
import time

from PIL import Image

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """A window; what goes wrong on a page is kept in ``errors``, what it asks for in ``asked``."""

    def __init__(self):
        self.errors, self.asked, self._number, self._text = [], [], 0, b""
        self._profile = tempfile.mkdtemp()
        own, theirs = os.pipe(), os.pipe()
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (own[0], theirs[1]))
        for fd in (own[0], theirs[1]):
            os.close(fd)

        def as_3_and_4():
            os.dup2(read, 3)
            os.dup2(write, 4)

        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        words += ["--disable-background-networking", "--disable-component-update"]
        words += ["--disable-sync", "--remote-debugging-pipe", f"--user-data-dir={self._profile}"]
        self._process = subprocess.Popen(
            [PROGRAM, *words, "about:blank"],
            stderr=subprocess.DEVNULL,
            preexec_fn=as_3_and_4,
            pass_fds=(3, 4),
        )
        os.close(read)
        os.close(write)
        self._to, self._from = own[1], os.fdopen(theirs[0], "rb")
        self._session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        """The next message; of several that come at once the others wait."""
        while b"\0" not in self._text:
            more = self._from.read1(1 << 16)
            assert more, "the browser has ended"
            self._text += more
        text, _, self._text = self._text.partition(b"\0")
        found = json.loads(text)
        self._note(found)
        return found

    def _note(self, message):
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"])
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(message["params"]["request"]["url"])

    def open(self, page, width=1280, height=900, dark=False):
        self.errors, self.asked = [], []
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=page.as_uri())
        there = f"location.href === {json.dumps(page.as_uri())} && document.readyState"
        while self.run(there) != "complete":
            time.sleep(0.02)

    def run(self, script):
        """What an expression gives, when it is there."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector, number=0):
        """Click into the middle of an element, as a hand does."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{number}];"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name):
        text = {"text": "\r"} if name == "Enter" else {}
        told = {"key": name, "code": name, "windowsVirtualKeyCode": _KEYS[name]}
        self.send("Input.dispatchKeyEvent", type="keyDown", **told, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def type(self, text):
        self.send("Input.insertText", text=text)
        self.run("new Promise(done => setTimeout(done, 200))")

    def picture(self):
        data = self.send("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data)))
