"""Files from addresses: each address's own, and nothing else under its name."""

import contextlib
import http.client
import http.server
import io
import json
import os
import threading

import pytest
import torch

import downloads
from downloads import keep_address, maybe_download
from errors import UserError


def th(value):
    data = io.BytesIO()
    torch.save({"w": torch.full((3,), float(value))}, data)
    return data.getvalue()


def value_in(path):
    return torch.load(path, weights_only=True)["w"][0].item()


FILES = {
    "/runA/latest-model-ema.th": th(1),
    "/runB/latest-model-ema.th": th(2),
    "/mirror/latest-model-ema.th": th(1),  # the same file elsewhere
    "/page.th": b"<html>log in</html>",
    "/lfs.th": b"version https://git-lfs.github.com/spec/v1\n",
    "/page.jsonl": b"<!doctype html>",
    "/log.jsonl": b'{"type": "train_loss", "step": 1, "epoch": 0}\n',
}


OK = b"HTTP/1.0 200 OK\r\n"
ODD = {
    "/odd.th": b"no HTTP at all\r\n\r\n",
    "/silent.th": b"",
    "/status.th": b"HTTP/1.1 many OK\r\n\r\n",
    "/long.th": b"HTTP/1.1 200 " + 70_000 * b"x",
    "/headers.th": OK + 200 * b"A: b\r\n",
    "/cut.th": OK + b"Content-Length: 9\r\n\r\nabc",
    "/chunks.th": OK.replace(b"1.0", b"1.1") + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "/there.th": b"HTTP/1.1 302 x\r\nLocation: http://[::1/m.th\r\n\r\n",
    "/nowhere.th": b"HTTP/1.1 302 x\r\nLocation: http://h:port/m.th\r\n\r\n",
    "/file.th": b"HTTP/1.1 302 x\r\nLocation: file:///etc/passwd\r\n\r\n",
    "/name.th": b"HTTP/1.1 302 x\r\nLocation: http://a..b/m.th\r\n\r\n",
    "/circle.th": b"HTTP/1.1 302 x\r\nLocation: /circle.th\r\n\r\n",
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Its address; server.asked are the paths it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path in ODD:
                return self.wfile.write(ODD[self.path])
            if self.path == "/busy.th":
                return self.send_error(503)
            content = FILES.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    asked = []
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        found.url, found.asked = f"http://127.0.0.1:{found.server_port}", asked
        yield found
        found.shutdown()


def test_two_addresses_with_one_last_part(server):
    a, b = (f"{server.url}/run{run}/latest-model-ema.th" for run in "AB")
    assert maybe_download(a) == "latest-model-ema.th"  # where programs expect it
    other = maybe_download(b)
    assert other.endswith("-latest-model-ema.th")
    assert (value_in("latest-model-ema.th"), value_in(other)) == (1, 2)
    assert maybe_download(a) == "latest-model-ema.th" and maybe_download(b) == other
    third = maybe_download(server.url + "/mirror/latest-model-ema.th")
    assert value_in(third) == 1 and maybe_download(a) == "latest-model-ema.th"
    assert len(server.asked) == 3  # each was fetched once
    with open(other, "wb") as file:
        file.write(th(9))  # somebody's own, by now
    with pytest.raises(UserError, match="move it away"):
        maybe_download(b)
    assert value_in(other) == 9
    assert maybe_download(b, "mine.th") == "mine.th" and value_in("mine.th") == 2
    assert value_in(maybe_download(a, "mine.th")) == 1 and value_in("mine.th") == 2


def test_a_file_of_no_known_address_is_neither_taken_nor_replaced(server, capsys):
    a, b = (f"{server.url}/run{run}/latest-model-ema.th" for run in "AB")
    with open("latest-model-ema.th", "wb") as file:
        file.write(FILES["/runA/latest-model-ema.th"])  # of wget, or of one's own run
    assert value_in(maybe_download(b)) == 2 and value_in("latest-model-ema.th") == 1
    assert maybe_download(a) == "latest-model-ema.th"  # it is that one, byte by byte
    assert maybe_download(a) == "latest-model-ema.th" and len(server.asked) == 2
    # Replaced since: what stands beside it tells of another file.
    os.utime("latest-model-ema.th", (1, 1))
    assert maybe_download(a) == "latest-model-ema.th" and len(server.asked) == 3
    with open("latest-model-ema.th", "wb") as file:
        file.write(th(7))
    assert value_in(maybe_download(a)) == 1 and value_in("latest-model-ema.th") == 7
    with contextlib.suppress(FileNotFoundError):
        os.unlink("latest-model-ema.th.address")
    server.shutdown()
    server.server_close()
    capsys.readouterr()
    unreachable = "http://127.0.0.1:9/runC/latest-model-ema.th"
    assert maybe_download(unreachable) == "latest-model-ema.th"  # as the original, but it says so
    assert "WARNING" in capsys.readouterr().err
    with pytest.raises(UserError, match="can't be fetched"):
        maybe_download("http://127.0.0.1:9/other.th")


def test_what_does_not_open_is_not_kept(server):
    for path, words in {
        "/page.th": "what it sends is no complete checkpoint .it is a web page",
        "/lfs.th": "git lfs pull",
        "/page.jsonl": "leads to no file: it is a web page",
        "/runA/": "is the address of a folder",
        "/": "is the address of a folder",
        "/absent.th": "404.*check the address",
        "/busy.th": "503.*later",
        **dict.fromkeys(ODD, "can't be fetched"),
        "/a b.th": "can't be fetched",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            maybe_download(server.url + path)
        assert "\n" not in str(error.value) and ".part" not in str(error.value)
    for address in (
        *("http://", "http://[::1/m.th", "https://127.0.0.1:9/m.th", "http://h:x/m.th"),
        *("http://a..b/m.th", f"http://{'a' * 70}.b/m.th", f"{server.url}/ü.th", "http:///m.th"),
    ):
        with pytest.raises(UserError, match="check the address|is the address of a folder"):
            maybe_download(address)
    assert os.listdir() == []
    assert maybe_download(server.url + "/log.jsonl") == "log.jsonl"
    assert json.loads(open("log.jsonl").read())["step"] == 1


@pytest.mark.parametrize(
    "error", [LookupError("unknown encoding: x"), AttributeError(), EOFError()]
)
def test_whatever_an_answer_raises_is_one_line(error, server, monkeypatch):
    def fail(*_):
        raise error

    for name in ("begin", "read"):
        with monkeypatch.context() as m:
            m.setattr(http.client.HTTPResponse, name, fail)
            with pytest.raises(UserError, match="can't be fetched .*by hand") as caught:
                maybe_download(f"{server.url}/runA/latest-model-ema.th")
            assert (str(error) or type(error).__name__) in str(caught.value)
    assert os.listdir() == []


def test_two_processes_that_fetch_one_address_have_one_file(server, monkeypatch, capsys):
    """The other is done while this one still fetches."""
    path, fetch, others = f"{server.url}/runA/latest-model-ema.th", downloads._fetch, []

    def slowly(address, partial):
        if not others:
            others.append(address)
            assert maybe_download(address) == "latest-model-ema.th"
        fetch(address, partial)

    monkeypatch.setattr(downloads, "_fetch", slowly)
    assert maybe_download(path) == "latest-model-ema.th"
    assert sorted(os.listdir()) == ["latest-model-ema.th", "latest-model-ema.th.address"]
    assert "another address" not in capsys.readouterr().out


def test_an_address_that_a_script_has_fetched(server):
    with open("x.th", "wb") as file:
        file.write(th(3))
    keep_address("x.th", f"{server.url}/x.th")
    assert maybe_download(f"{server.url}/x.th") == "x.th" and server.asked == []


def test_a_place_that_cannot_be_written(server, monkeypatch):
    with pytest.raises(UserError, match="can't be written .No such file"):
        maybe_download(f"{server.url}/runA/latest-model-ema.th", "absent/m.th")
    assert server.asked == ["/runA/latest-model-ema.th"]  # once: no later attempt would do better
