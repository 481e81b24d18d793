"""explore.py in a process of its own, spoken to over its HTTP API."""

import contextlib
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import uuid

import numpy as np
import torch
from golden import weight
from PIL import Image
from runs import ROOT, environment, free_port

from hps import get_hparams
from vae import VAE


def write_weights(folder, preset, **overrides):
    """Weights of a preset, or of its network but for some options, PRESET.th."""
    path = folder / f"{preset}.th"
    state = VAE(get_hparams(preset, **overrides)).state_dict()
    state = {name: weight(name, t.shape) for name, t in state.items()}
    for name in state:  # so that another picture, or layer, makes another picture
        state[name] *= 4 if name.startswith("encoder.") else 3 if ".z_proj." in name else 1
    torch.save(state, path)
    return path


def png(seed=0, size=(20, 16)):
    """The bytes of a PNG of noise."""
    file = io.BytesIO()
    levels = np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


class Refused(Exception):
    """What the page says of a request that it refuses."""


class Explorer:
    """A running explore.py; `errors` is the file of its stderr."""

    def __init__(self, weights, folder, *options, **variables):
        self.port, self.errors = free_port(), folder / "stderr"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "explore.py", "--restore_ema_path", weights, "--device",
                 "cpu", "--port", str(self.port), *options],
                env=environment(TMPDIR=str(folder), **variables), cwd=folder, text=True,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self.line = self.process.stdout.readline()
        assert "http://" in self.line, self.errors.read_text()
        _, body = self.get("/gradio_api/info")
        self.info = json.loads(body)["named_endpoints"]
        _, body = self.get("/config")
        self.numbers = {d["api_name"]: d["id"] for d in json.loads(body)["dependencies"]}

    def end(self, number):
        """Sends a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(300)

    def seconds(self):
        """Its processor's time, which other programs of the machine do not change."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def request(self, method, path, body=None, **headers):
        """(status, body) of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            if isinstance(body, dict):
                body = json.dumps(body)
                headers["content-type"] = "application/json"
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def get(self, path, **headers):
        return self.request("GET", path, **headers)

    def upload(self, data, name="a.png"):
        """(status, what an input takes as this file) of an upload."""
        edge = uuid.uuid4().hex
        head = (
            f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        )
        body = head.encode() + data + f"\r\n--{edge}--\r\n".encode()
        kind = {"content-type": f"multipart/form-data; boundary={edge}"}
        status, answer = self.request("POST", "/gradio_api/upload", body, **kind)
        if status != 200:
            return status, answer
        return status, {"path": json.loads(answer)[0], "meta": {"_type": "gradio.FileData"}}

    def begin(self, name, values=None, session=None):
        """Asks for an answer; (session, event) of the request.

        values: {label of a control: value}; those that are not named have the page's.
        """
        session, values = session or uuid.uuid4().hex[:11], dict(values or {})
        data = [
            values.pop(p["label"], p.get("parameter_default"))
            for p in self.info[f"/{name}"]["parameters"]
        ]
        assert not values, f"{name} has no control {values}"
        body = {"data": data, "fn_index": self.numbers[name], "session_hash": session}
        status, answer = self.request("POST", "/gradio_api/queue/join", body)
        if status != 200:
            raise Refused(f"{status} {answer.decode()}")
        return session, json.loads(answer)["event_id"]

    def messages(self, session):
        """The messages that a session's requests send, as dicts."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    def result(self, session):
        for message in self.messages(session):
            if message["msg"] == "process_completed":
                if not message["success"]:
                    raise Refused(message["output"]["error"])
                return message["output"]["data"]

    def ask(self, name, **values):
        """An answer's data; a control is named by its label, with _ for a space."""
        session, _ = self.begin(name, {k.replace("_", " "): v for k, v in values.items()})
        return self.result(session)

    def cancel(self, name, session, event):
        body = {"session_hash": session, "fn_index": self.numbers[name], "event_id": event}
        return self.request("POST", "/gradio_api/cancel", body)

    def file(self, data):
        """The bytes of a file that an answer names."""
        status, body = self.get(f"/gradio_api/file={data['path']}")
        assert status == 200
        return body

    def image(self, data):
        """A picture of an answer, uint8 (H, W, 3)."""
        return np.asarray(Image.open(io.BytesIO(self.file(data))).convert("RGB"))

    def gallery(self, data):
        """The pictures of a gallery, uint8 (n, S, S, 3)."""
        return np.stack([self.image(item["image"]) for item in data])


class Listener:
    """A server that notes who connects to it, such as a proxy of programs that ask other hosts."""

    def __init__(self):
        import socket

        self.socket, self.calls = socket.create_server(("127.0.0.1", 0)), []
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.calls.append(connection.recv(1000))
                connection.close()
