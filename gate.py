"""Which requests the page's server answers: those that the page itself makes, of this machine.

Gradio's server has more doors than the page needs: a proxy, a history of runs, a fetcher of other
hosts' files. Here they are closed, as is any that a later Gradio adds.
"""

import asyncio
import contextlib
import json
import os
import re
from urllib.parse import urlsplit

from answering import LARGEST, forget_oldest, is_within

API = "/gradio_api"
GET = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"
    r"|/(assets|static|svelte)/[^%]*"
    rf"|{API}/(info|theme\.css|startup-events|queue/data|queue/status|upload_progress)"
    rf"|{API}/heartbeat/\w+|{API}/call/\w+/\w+"
)
POST = re.compile(rf"{API}/(queue/join|upload|cancel|reset|call/\w+)")
FILE = f"{API}/file="
LARGEST_JSON = 2**20  # bytes of a request that is no upload; more than any of the page's
HEADERS = {
    # The browser too asks no other host, whatever the page's code may come to hold.
    "content-security-policy": "default-src 'self' data: blob:; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with none, the page's own requests may be of origin null
}


class Gate:
    """An ASGI application that lets through to `app` what the page asks.

    Args:
        folder: the only one whose files are served.
        hosts: names that a request may call this server by (any: None). A page of another host
            whose name was made to lead here has its own name.
    """

    def __init__(self, app, folder, hosts=None):
        self.app, self.folder, self.hosts = app, os.path.realpath(folder), hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in
                   scope["headers"]}  # fmt: skip
        if self.hosts is not None and _name_of(headers.get("host", "")) not in self.hosts:
            return await _refuse(send, 403, "this page has another address")
        origin = headers.get("origin")  # "null": of a frame without an origin, of any page
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            return await _refuse(send, 403, "only the page itself may ask")
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            known = GET.fullmatch(path)
            if path.startswith(FILE):
                known = is_within(path.removeprefix(FILE), self.folder)
            if not known or ".." in path.split("/"):
                return await _refuse(send, 404, "not found")
        elif method == "POST" and POST.fullmatch(path):
            size = headers.get("content-length", "")
            is_upload = path == f"{API}/upload"
            if not size.isdecimal():
                return await _refuse(send, 411, "the length is missing")
            if int(size) > (LARGEST + 2**16 if is_upload else LARGEST_JSON):
                return await _refuse(send, 413, f"larger than {LARGEST >> 20} MB")
            if not is_upload:
                body = await _body(receive)
                if not self.may_be_asked(body):
                    return await _refuse(send, 400, "this names a file that is no upload")
                receive = _again(body, receive)
        else:
            return await _refuse(send, 404, "not found")
        await self.app(scope, receive, _with_headers(send))
        if method == "POST":  # it may have brought a file, or asked for some
            await asyncio.to_thread(forget_oldest, self.folder)

    def may_be_asked(self, body):
        """Whether JSON names no file but of the folder: Gradio fetches or copies what it names."""
        try:
            stack = [json.loads(body)] if body else []
        except (ValueError, RecursionError):
            return False
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                path = value.get("path", None)
                if path is not None and not (
                    isinstance(path, str) and is_within(path, self.folder)
                ):
                    return False
                if path is not None:  # forget_oldest leaves it to a request that waits
                    with contextlib.suppress(OSError, ValueError):
                        os.utime(path)
                stack += value.values()
            elif isinstance(value, list):
                stack += value
        return True


def _name_of(host):
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _body(receive):
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body, receive):
    """A `receive` that gives the body first, then what comes."""
    given = False

    async def again():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send):
    async def with_headers(message):
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = message | {"headers": [*message["headers"], *own]}
        await send(message)

    return with_headers


async def _refuse(send, status, words):
    start = {"type": "http.response.start", "status": status,
             "headers": [(b"content-type", b"text/plain; charset=utf-8")]}  # fmt: skip
    await send(start)
    await send({"type": "http.response.body", "body": words.encode()})
