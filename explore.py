# PYTHON_ARGCOMPLETE_OK
"""A page in the browser on which a trained model is tried: samples, pictures, mixtures.

    python explore.py --restore_ema_path latest-model-ema.th

It is served to this machine alone, unless --host says otherwise, and asks no other host.
"""

import interrupts  # noqa: F401  the first: a Ctrl-C while the others are imported is one line

# isort: split
import argparse
import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings

import options
from answering import LARGEST
from endings import run_command
from errors import UserError, one_line
from exploring import Model
from gate import Gate
from hps import HPARAMS_REGISTRY
from logs import print_line
from options import OPTIONS, OneLineParser, complete
from page import make_page
from page_controls import import_gradio
from page_parts import STYLE
from sample import open_model

LOCAL = ("127.0.0.1", "localhost", "::1")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def make_parser():
    parser = OneLineParser(prog="explore.py", description=__doc__.split("\n")[0])
    group = parser.add_argument_group("model")
    group.add_argument("--restore_ema_path", type=options.path,
                       help="weights: PREFIX-model-ema.th, a path or an address")  # fmt: skip
    meaning = "preset (none: told by the run's state.json or the weights)"
    complete(group.add_argument("--hps", help=meaning), HPARAMS_REGISTRY)
    meaning = "auto, cpu or cuda; auto is CUDA where there is one"
    action = group.add_argument("--device", type=options.device, default="auto", help=meaning)
    complete(action, options.device.values)
    group.add_argument("--n_batch", type=options.count, default=16, help="images at a time")
    group.add_argument("--background", type=options.colour, help="laid under transparent images: a "
                       "name or #rrggbb (none: as the model's run had it, else white)")  # fmt: skip
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address that the page is served on: "
                       "127.0.0.1 is for this machine alone, 0.0.0.0 for every one that reaches "
                       "it")  # fmt: skip
    group.add_argument("--port", type=options.port, default=7860, help="port that it is served on")
    group = parser.add_argument_group("network", "with --hps, for weights that are no preset's")
    for name, kind, _, meaning in OPTIONS["network"]:
        if kind is not bool:
            group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=meaning)
    return parser


def listen(host, port):
    """A socket that listens there.

    Raises:
        UserError: for a port that is taken or a host that is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)  # who comes while the page is being made waits
        return listening
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the page can't be served on {host}, port {port} ({reason}): name a free port with "
            f"--port, an address of this machine with --host"
        ) from None


def address_of(listening, host):
    """(the page's address, by the host as it was given; whether this machine alone reaches it)"""
    ip, port, *_ = listening.getsockname()
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/", ipaddress.ip_address(ip).is_loopback


def on_signals(function):
    """Has function(number, frame) meet SIGNALS, but those that are ignored; what met them before.

    Returns:
        {number: handler}.
    """
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, function) for number in heeded}


@contextlib.contextmanager
def own_folder():
    """A folder of this user's alone for all that is uploaded or made, deleted at the end.

    A signal that comes before the page is served ends the process, after that.
    """
    folder = None

    def end(number, _):
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        if number == signal.SIGINT:
            os.write(2, b"interrupted\n")
        os._exit(128 + number)  # what is being imported may catch anything that is raised

    handlers = on_signals(end)
    folder = tempfile.mkdtemp(prefix="explore-")  # of mode 700
    before = tempfile.tempdir
    # All of Gradio's files; and an upload while it comes in.
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        deadline = time.monotonic() + 5
        while os.path.exists(folder) and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)  # a thread may just be writing there
        for number, handler in handlers.items():
            signal.signal(number, handler)


def serve(listening, app, address):
    """Answers requests until a signal ends it.

    Raises:
        KeyboardInterrupt, or SystemExit with 128 + the signal's number: after which the folder of
        uploads must still be deleted.
    """
    import uvicorn  # comes with Gradio

    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            ws="none", timeout_graceful_shutdown=1,
        )
    )  # fmt: skip
    server.capture_signals = contextlib.nullcontext  # it would take them for itself
    numbers = []

    def end(number, _):
        server.force_exit = server.should_exit  # by a second one
        server.should_exit = True
        numbers.append(number)

    on_signals(end)
    print_line(f"explore.py: {address} (Ctrl-C ends it)")
    server.run(sockets=[listening])
    if signal.SIGINT in numbers:
        raise KeyboardInterrupt
    raise SystemExit(128 + numbers[0] if numbers else 1)


def main():
    args = make_parser().parse_args()
    with own_folder() as folder:
        gradio = import_gradio()
        listening = listen(args.host, args.port)
        vae = open_model(args)
        background = args.background or options.setting(vae.H, "background")
        page = make_page(Model(vae, args.n_batch, background), folder)
        address, local = address_of(listening, args.host)
        if not local:
            print(
                one_line(
                    f"WARNING: --host {args.host} serves the page to every machine that reaches "
                    f"this one: whoever opens it computes here, there is no password"
                ),
                file=sys.stderr,
            )
        names = args.host.lower(), listening.getsockname()[0]  # of 127.2 it is 127.0.0.2
        hosts = {*LOCAL, *names} if local else None
        serve(listening, Gate(mounted(gradio, page, args), folder, hosts), address)


def mounted(gradio, page, args):
    """The page as an ASGI application: nothing shared, no path allowed, no other service."""
    from fastapi import FastAPI  # comes with Gradio

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    font = gradio.themes.Font("sans-serif")
    theme = gradio.themes.Default(font=[font], font_mono=[gradio.themes.Font("monospace")])
    with warnings.catch_warnings(action="ignore"):
        gradio.mount_gradio_app(
            app, page, path="", server_name=args.host, server_port=args.port, root_path="",
            footer_links=[], run_history=False, allowed_paths=[], blocked_paths=[],
            show_error=False, max_file_size=LARGEST, ssr_mode=False, enable_monitoring=False,
            pwa=False, mcp_server=False, theme=theme, css=STYLE,
        )  # fmt: skip
    page.share, page.has_launched, page.is_running = False, True, True
    return app


if __name__ == "__main__":
    run_command(main)
