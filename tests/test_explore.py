"""explore.py over its HTTP API: every control, what is refused, what can be stopped, what is kept
from whom."""

import asyncio
import contextlib
import http.client
import io
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from explorer import Explorer, Listener, Refused, png, write_weights
from fakes import nearly_equal
from runs import ROOT, environment, free_port, python

import answering
import explore
import gate
from answering import LARGEST, forget_oldest, upload
from batches import of_channels
from errors import UserError
from exploring import as_rgb
from image_files import read_images
from scores import scores_of
from synthesis import (
    decode_latents,
    draw_samples,
    forming,
    latents_of,
    mix,
    reconstruct,
)
from watching import Watch
from weights import load_model

# Of the digits model.
BASES, SIZE = [1, 4, 4, 4, 8, 8, 8], 8
LAYERS, UP_TO_4 = len(BASES), 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    write_weights(folder, "digits")
    (folder / "a.png").write_bytes(png(0))
    (folder / "b.png").write_bytes(png(1))
    (folder / "secret.txt").write_text("nobody's business")
    return folder


@pytest.fixture(scope="module")
def proxy():
    return Listener()


@pytest.fixture(scope="module")
def page(folder, proxy):
    """A running page, one picture at a time, in an environment that asks for all that is off."""
    page = Explorer(
        folder / "digits.th", folder, "--n_batch", "1",
        GRADIO_SHARE="True", GRADIO_ALLOWED_PATHS="/", GRADIO_MCP_SERVER="True",
        GRADIO_ANALYTICS_ENABLED="True", GRADIO_SERVER_NAME="0.0.0.0",
        GRADIO_ROOT_PATH="/elsewhere", GRADIO_SSR_MODE="True",
        FASTAPI_OTEL_AUTO_CONFIGURE="true", OTEL_EXPORTER_OTLP_ENDPOINT=proxy.address,
        HTTP_PROXY=proxy.address, HTTPS_PROXY=proxy.address, http_proxy=proxy.address,
        https_proxy=proxy.address, all_proxy=proxy.address,
    )  # fmt: skip
    yield page
    assert page.end(signal.SIGINT) == 130


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "digits.th", device="cpu")


@pytest.fixture(scope="module")
def images(folder):
    """Two pictures as the model sees them, uint8 (2, S, S, 1)."""
    images = read_images([folder / "a.png", folder / "b.png"], SIZE)
    return np.asarray(of_channels(images, 1))


def same(shown, images):
    """Whether pictures of the page, (n, S, S, 3), are these, (n, S, S, 1)."""
    return nearly_equal(shown, as_rgb(images))


@pytest.fixture(scope="module")
def uploads(page, folder):
    return [page.upload((folder / name).read_bytes())[1] for name in ("a.png", "b.png")]


# ---- Sample --------------------------------------------------------------------------------

TEMPERATURES = {"Temperature at 1x1": 0.5, "Temperature at 4x4": 0.9, "Temperature at 8x8": 0.7}
T = [{1: 0.5, 4: 0.9, 8: 0.7}[r] for r in BASES]


def test_samples_are_those_of_the_library(page, model):
    data, line = page.ask("samples", Pictures=3, Seed=7, **TEMPERATURES)
    expected = draw_samples(model, range(3), T, seed=7)
    assert same(page.gallery(data), expected)
    assert "3 samples of seed 7; temperature 0.5 at 1x1, 0.9 at 4x4, 0.7 at 8x8" in line
    for name, value in [("Seed", 8), *((name, 0) for name in TEMPERATURES)]:
        other, _ = page.ask("samples", **{"Pictures": 3, "Seed": 7} | TEMPERATURES | {name: value})
        assert not same(page.gallery(other), expected), name


def test_a_label_is_told_to_the_model(page, model, images, uploads):
    for name, number in (("none", -1), ("3", 3)):
        labels = torch.full((2,), number)
        data, _ = page.ask("samples", Pictures=2, Label=name)
        assert same(page.gallery(data), draw_samples(model, range(2), labels=labels)), name
        kept, _, _ = page.ask("reconstruct", Picture=uploads[0], Label=name)
        expected = reconstruct(model, images[:1], [0], LAYERS, labels=labels[:1],
                               from_labels=labels[:1])  # fmt: skip
        assert same(page.image(kept)[None], expected), name
        both = {"A: coarse latents": uploads[0], "B: fine latents": uploads[1]}
        mixed, _ = page.ask("mix", **both, **{"Layers of A": 4, "Label": name})
        assert same(
            page.image(mixed)[None], mix(model, images[:1], images[1:], 4, labels=labels[:1])
        )
        assert page.ask("way", **both, Label=name)
    assert not same(page.gallery(data), draw_samples(model, range(2)))


def test_the_mean_of_the_mixture_has_no_noise(page, model):
    values = {"Pictures": 2, "Without noise of pixels": True} | TEMPERATURES
    data, _ = page.ask("samples", **values)
    assert same(page.gallery(data), draw_samples(model, range(2), T, mean=True))


def test_a_chosen_sample_is_kept_down_to_a_resolution(page, model):
    values = {"Pictures": 3, "Chosen picture": 2, "Keep down to": "4x4", "Seed of the rest": 9,
              "Seed": 7, "Without noise of pixels": True}  # fmt: skip
    data, line = page.ask("variations", **values | TEMPERATURES)
    latents = load_latents(
        page.file(page.ask("samples_npz", Pictures=3, Seed=7, **TEMPERATURES)[0])
    )
    kept = [z[2:].expand(3, -1, -1, -1) for z in latents[:UP_TO_4]]
    expected = decode_latents(model, kept, range(3), T, seed=9, mean=True)
    assert same(page.gallery(data), expected)
    assert "Sample 2 of seed 7, kept to 4x4" in line
    for name, value in {"Keep down to": "1x1", "Chosen picture": 1, "Seed of the rest": 3}.items():
        other, _ = page.ask("variations", **values | TEMPERATURES | {name: value})
        assert not same(page.gallery(other), expected), name
    for name in ("variations", "variations_png", "variations_npz"):
        words = "Chosen picture is 3: of 3 pictures it must be a number from 0 to 2"
        with pytest.raises(Refused, match=words):
            page.ask(name, **values | {"Chosen picture": 3})


def load_latents(data):
    with np.load(io.BytesIO(data)) as arrays:
        return [torch.from_numpy(arrays[f"z{i:03}"]) for i in range(LAYERS)]


# ---- Picture -------------------------------------------------------------------------------


def test_a_picture_is_kept_scored_taken_apart(page, model, images, uploads):
    values = {"Picture": uploads[0], "Layers kept": UP_TO_4, "Temperature of the rest": 0.3,
              "Seed": 4}  # fmt: skip
    original, kept, score, bars, added, line = page.ask("picture", **values)
    a = images[:1]
    assert np.array_equal(page.image(original)[None], as_rgb(a))
    expected = reconstruct(model, a, [0], UP_TO_4, 0.3, seed=4)
    assert same(page.image(kept)[None], expected)
    figures = scores_of(model, a, [0], 4)
    assert f"<b>{figures['bits_per_dim'].item():.3f} bits/dim</b>" in score
    per_layer = (figures["rates"][:, 0] / np.log(2)).tolist()
    for i, (bit, r) in enumerate(zip(per_layer, BASES, strict=True)):
        assert f'title="layer {i}, {r}x{r}: {bit:.4f} bits/dim"' in bars
    assert bars.count('class="gone"') == LAYERS - UP_TO_4
    latents = [s["z"] for s in latents_of(model, a, [0], 4)]
    steps = [forming(model, k, [0], None, latents=latents, seed=4) for k in (1, 4, 7)]
    assert same(page.gallery(added), np.concatenate(steps))
    captions = [item["caption"] for item in added]
    assert captions[1] == f"to 4x4, 4 of 7 layers: +{sum(per_layer[1:4]):.3f}"
    assert "4 of 7 layers kept, the rest at temperature 0.3; seed 4" in line
    changes = {"Layers kept": 2, "Seed": 5, "Temperature of the rest": 1.5, "Label": "3",
               "Without noise of pixels": True}  # fmt: skip
    for name, value in changes.items():
        other = page.ask("picture", **values | {name: value})
        assert not same(page.image(other[1])[None], expected), name
    other = page.ask("picture", **values | {"Picture": uploads[1]})
    assert np.array_equal(page.image(other[0])[None], as_rgb(images[1:])) and other[2] != score


def test_a_move_of_the_slider_is_the_picture_again(page, model, images, uploads):
    for k in (0, 3, LAYERS):
        kept, bars, _ = page.ask("reconstruct", Picture=uploads[1], Layers_kept=k)
        expected = reconstruct(model, images[1:], [0], k, 0.1)
        assert same(page.image(kept)[None], expected)
        assert bars.count('class="gone"') == LAYERS - k


# ---- Mix -----------------------------------------------------------------------------------


def test_a_mixture_and_the_way(page, model, images, uploads):
    a, b = images[:1], images[1:]
    both = {"A: coarse latents": uploads[0], "B: fine latents": uploads[1]}
    for k, stored in ((4, False), (4, True), (0, False), (LAYERS, True)):
        mixed, line = page.ask(
            "mix", **both, **{"Layers of A": k, "B's latents as stored": stored, "Seed": 3}
        )
        assert same(page.image(mixed)[None], mix(model, a, b, k, stored, seed=3))
        assert f"Layers: {k} of A, {LAYERS - k} of B, {'as stored' if stored else 'given'}" in line
    way, _ = page.ask("way", **both, **{"Steps from A to B": 5, "Without noise of pixels": True})
    ends = [mix(model, image, image, LAYERS, mean=True) for image in (a, b)]
    frames = page.gallery(way)
    assert len(frames) == 5 and same(frames[[0, 4]], np.concatenate(ends))
    mixed, way, line = page.ask("mix_and_way", **both, **{"Layers of A": 4, "Seed": 3})
    assert same(page.image(mixed)[None], mix(model, a, b, 4, seed=3)) and len(way) == 8


def test_one_picture_waits_for_the_other(page, uploads):
    for name, other in (("A: coarse latents", "B"), ("B: fine latents", "A")):
        assert f"Now choose picture {other}" in page.ask("mix_and_way", **{name: uploads[0]})[-1]


# ---- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, n, grid",
    [("samples", 3, True), ("variations", 3, True), ("picture", 1, False), ("mixture", 1, False),
     ("way", 4, True)],
)  # fmt: skip
def test_everything_is_saved_as_png_and_latents(page, folder, uploads, tmp_path, name, n, grid):
    """sample.py decodes the latents, with their seed and pixels' mean, to what is shown."""
    values = {"Without noise of pixels": True}
    if name in ("samples", "variations"):
        values |= {"Pictures": n}
    elif name == "picture":
        values |= {"Picture": uploads[0]}
    else:
        values |= {"A: coarse latents": uploads[0], "B: fine latents": uploads[1]}
    if name == "way":
        values |= {"Steps from A to B": n}
    file, line = page.ask(f"{name}_png", **values)
    assert file["orig_name"] == f"{name}.png" and f"{name}.png: " in line
    height, width, _ = page.image(file).shape
    assert min(height, width) >= 128 if grid else (height, width) == (SIZE, SIZE)
    file, _ = page.ask(f"{name}_npz", **values)
    assert file["orig_name"] == f"{name}.npz"
    (tmp_path / "latents.npz").write_bytes(page.file(file))
    command = [ROOT / "sample.py", "--restore_ema_path", folder / "digits.th", "decode"]
    done = python(
        [*command, "latents.npz", "--mean", "--device", "cpu", "--out", "d.npz"], tmp_path
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    decoded = np.load(tmp_path / "d.npz")["arr_0"]
    of_page = {"samples": "samples", "variations": "variations", "picture": "reconstruct",
               "mixture": "mix", "way": "way"}[name]  # fmt: skip
    shown = page.ask(of_page, **values)[0]
    images = page.gallery(shown) if isinstance(shown, list) else page.image(shown)[None]
    assert len(images) == n and same(images, decoded)


def test_what_a_picture_costs_is_saved(page, uploads):
    for name in ("resolutions", "bits"):
        file, _ = page.ask(f"{name}_png", Picture=uploads[0])
        assert file["orig_name"] == f"{name}.png" and page.image(file).std() > 10


# ---- what is refused -----------------------------------------------------------------------

NUMBERS = ["x", None, True, -1, 1e300, [], {}, "1", 1.5]
OF_TEMPERATURES = ["x", None, -0.1, 1.6, "1", True, []], "must be a number from 0 to 1.5"

# Each control of the page: what it must not be, and what is then said.
WRONG = {
    "Pictures": ([*NUMBERS, 0, 65], "must be a whole number from 1 to 64"),
    "Seed": ([*NUMBERS, 2**31], "must be a whole number from 0 to 2,147,483,647"),
    "Seed of the rest": ([*NUMBERS, 2**31], "must be a whole number from 0 to 2,147,483,647"),
    **{f"Temperature at {r}x{r}": OF_TEMPERATURES for r in {*BASES}},
    "Temperature of the rest": OF_TEMPERATURES,
    "Without noise of pixels": ([1, None, "no"], "must be true or false"),
    "B's latents as stored": ([1, None, "no"], "must be true or false"),
    "Label": (["ten", 3, None, ["3"]], "Label is .* must be one of none, 0, 1, 2"),
    "Chosen picture": ([*NUMBERS, 64], "must be a whole number from 0 to 63"),
    "Keep down to": (["2x2", 4, None, ["4x4"]], "must be one of 1x1, 4x4, 8x8"),
    "Layers kept": ([*NUMBERS, 8], "must be a whole number from 0 to 7"),
    "Layers of A": ([*NUMBERS, 8], "must be a whole number from 0 to 7"),
    "Steps from A to B": ([*NUMBERS, 17], "must be a whole number from 2 to 16"),
    **{label: ([None, {}, 3, "x.png", {"path": "/etc/passwd"}, {"path": None}, {"path": "a\0"}],
               f"{words} (is missing|is no upload)|names a file that is no upload")
       for label, words in (("Picture", "Picture"), ("A: coarse latents", "Picture A"),
                            ("B: fine latents", "Picture B"))},
}  # fmt: skip
ANSWERED = {
    "samples", "variations", "picture", "reconstruct", "mix_and_way", "mix", "way",
    *(f"{name}_{kind}" for name in ("samples", "variations", "picture", "mixture", "way")
      for kind in ("png", "npz")), "resolutions_png", "bits_png",
}  # fmt: skip


def test_every_control_of_every_answer_is_checked(page, uploads):
    """With right values each answers; a wrong one of any of its controls ends in a sentence."""
    met = set()
    for name in sorted(ANSWERED):
        labels = [part["label"] for part in page.info[f"/{name}"]["parameters"]]
        good = {label: uploads[0] for label in labels if ":" in label or label == "Picture"}
        good |= {"Pictures": 2} if "Pictures" in labels else {}
        assert page.ask(name, **good)
        for label in labels:
            wrong, words = WRONG[label]
            if name == "mix_and_way" and ":" in label:  # which waits for the other picture
                wrong = wrong[1:]
            for value in wrong[:1] if label in met else wrong:
                with pytest.raises(Refused, match=words):
                    page.ask(name, **good | {label: value})
                    pytest.fail(f"{name} took {label} {value!r}")
            met.add(label)
    assert "Traceback" not in page.errors.read_text()


def test_no_answer_is_left_out(page):
    """The lists above are the page's own."""
    assert {name.removeprefix("/") for name in page.info} == ANSWERED
    labels = {part["label"] for about in page.info.values() for part in about["parameters"]}
    assert labels == WRONG.keys()


def test_bad_pictures_end_in_a_sentence(page, folder):
    for data, words in [
        (b"no picture", "This file cannot be decoded .*Choose another picture"),
        (png()[:200], "This file cannot be decoded"),
        (b"", "This file cannot be decoded"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "This file cannot be decoded"),
    ]:
        status, upload = page.upload(data)
        assert status == 200
        with pytest.raises(Refused, match=words) as refusal:
            page.ask("picture", Picture=upload)
        assert str(folder) not in str(refusal.value)  # the path of an upload is the server's affair


def test_an_upload_has_20_megabytes_at_most(page):
    assert page.upload(bytes(LARGEST - 1000))[0] == 200
    for size in (LARGEST + 1, 3 * LARGEST):
        assert page.upload(bytes(size))[0] == 413
    assert page.request("POST", "/gradio_api/queue/join", b" " * 2**21)[0] == 413
    parts = iter([b"{}"])  # of no length that is told before
    assert page.request("POST", "/gradio_api/queue/join", parts)[0] == 411


# ---- what is nobody's business -------------------------------------------------------------


def uploads_folder(folder):
    [made] = folder.glob("explore-*")
    return made


def test_no_file_of_the_machine_can_be_read(page, folder, uploads):
    secret = folder / "secret.txt"
    inside = uploads_folder(folder)
    os.symlink(secret, inside / "link.txt")
    paths = [secret, "/etc/passwd", ROOT / "README.md", "README.md", "secret.txt",
             folder / "digits.th", f"{inside}/../secret.txt", f"{inside}/link.txt", f"//{secret}",
             f"{inside}/%2e%2e/secret.txt", "/proc/self/environ", "~/.bashrc",
             "http://127.0.0.1:9/x", "file:///etc/passwd"]  # fmt: skip
    doors = ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/file/", "/static/", "/assets/",
             "/svelte/", "/gradio_api/proxy=", "/gradio_api/custom_component/1/client/file/",
             "/gradio_api/stream/"]  # fmt: skip
    for path in map(str, paths):
        for door in doors:
            for way in (path, path.lstrip("/"), "../" * 12 + path.lstrip("/"),
                        "..%2f" * 12 + path.lstrip("/").replace("/", "%2f")):  # fmt: skip
                status, body = page.get(door + way)
                assert status in (403, 404), (door, way, status)
                assert b"nobody" not in body and b"root:" not in body
        for extra in ({}, {"url": path}, {"is_stream": True}, {"mime_type": "image/png"}):
            for name, label in (("picture", "Picture"), ("samples", "Seed")):
                given = {"path": path, "meta": {"_type": "gradio.FileData"}} | extra
                with pytest.raises(Refused):
                    page.ask(name, **{label: given})
    assert page.get(f"/gradio_api/file={uploads[0]['path']}")[0] == 200


@pytest.mark.parametrize(
    "method, path",
    [("POST", "/gradio_api/vibe-edit"), ("POST", "/gradio_api/component_server"),
     ("POST", "/gradio_api/run/samples"), ("POST", "/gradio_api/api/samples"),
     ("POST", "/gradio_api/mcp/"), ("GET", "/gradio_api/mcp/sse"), ("GET", "/monitoring"),
     ("GET", "/monitoring/summary"), ("GET", "/gradio_api/runs"), ("GET", "/docs"),
     ("GET", "/openapi.json"), ("GET", "/gradio_api/dev/reload"), ("PUT", "/"), ("DELETE", "/"),
     ("GET", "/gradio_api/deep_link?session_hash=x"), ("GET", "/gradio_api/vibe-code")],
)  # fmt: skip
def test_other_doors_are_closed(page, method, path):
    assert page.request(method, path, {"data": []} if method == "POST" else None)[0] == 404


def test_only_this_machine_is_answered(page):
    """By address and by name: a page elsewhere may have made its own name lead here."""
    assert page.line == f"explore.py: http://127.0.0.1:{page.port}/ (Ctrl-C ends it)\n"
    assert page.get("/", host="localhost:7")[0] == 200
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert page.get("/config", host=host)[0] == 403
    # Nor may another page in the same browser ask, which needs no name.
    origins = (("http://evil.example", 403), ("null", 403), (f"http://127.0.0.1:{page.port}", 200))
    for origin, status in origins:
        assert page.get("/config", Origin=origin)[0] == status
    listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True).stdout
    assert f"0100007F:{page.port:04X}" in listening and f"00000000:{page.port:04X}" not in listening


def test_files_longest_out_of_use_are_forgotten(tmp_path):
    paths = [tmp_path / str(i) / "a.png" for i in range(6)]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(bytes(100))
        time.sleep(0.002)
    upload("Picture", tmp_path)({"path": str(paths[0])})  # in use: now it is the newest
    forget_oldest(tmp_path, n_files=0)
    assert all(path.exists() for path in paths)  # they may just be sent
    forget_oldest(tmp_path, n_files=4, age=0)
    assert [*tmp_path.iterdir()] and not paths[1].parent.exists() and not paths[2].exists()
    assert all(path.exists() for path in (paths[0], *paths[3:]))
    forget_oldest(tmp_path, n_bytes=250, age=0)
    assert {path for path in paths if path.exists()} == {paths[0], paths[5]}


def test_uploads_lie_in_a_folder_of_its_own(page, folder, uploads):
    made = uploads_folder(folder)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700 and made.stat().st_uid == os.getuid()
    assert all(upload["path"].startswith(f"{made}/") for upload in uploads)
    assert not (folder / "gradio").exists() and {p.name for p in folder.iterdir()} == {
        "digits.th", "a.png", "b.png", "secret.txt", "stderr", made.name,
    }  # fmt: skip


def test_one_visitor_does_not_meet_another(page, uploads):
    """What a visitor asked is told to his session alone, and no session's state is kept."""
    first, _ = page.begin("picture", {"Picture": uploads[0]})
    page.result(first)
    second, _ = page.begin("samples", {"Pictures": 1})
    told = [m for m in page.messages(second) if m["msg"] == "process_completed"]
    assert len(told) == 1 and len(told[0]["output"]["data"]) == 2
    status, config = page.get("/config")
    assert status == 200 and uploads[0]["path"].encode() not in config


def test_no_other_host_is_asked(page, proxy, uploads):
    """Neither by the server nor by the browser, which is told so."""
    page.ask("samples", Pictures=1)
    assert proxy.calls == []
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        policy = connection.getresponse().headers["content-security-policy"]
    assert policy.startswith("default-src 'self' data: blob:; ")


# ---- a queue, its progress, its end --------------------------------------------------------


def test_a_request_stops_between_layers_and_the_next_is_served(page):
    start = page.seconds()
    page.ask("samples", Pictures=64)
    whole = page.seconds() - start
    start = page.seconds()
    session, event = page.begin("samples", {"Pictures": 64, "Seed": 1})
    progress = []
    for message in page.messages(session):
        if message["msg"] == "progress" and not progress:
            progress.append(message["progress_data"][0])
            assert page.cancel("samples", session, event)[0] == 200
        if message["msg"] == "process_completed":
            break
    data, _ = page.ask("samples", Pictures=1, Seed=1)
    assert len(data) == 1 and page.seconds() - start < 0.75 * whole
    assert progress[0]["length"] == 64 * LAYERS and progress[0]["unit"] == "layers"
    assert 0 <= progress[0]["index"] < 64 * LAYERS
    assert "Traceback" not in page.errors.read_text()


def test_for_one_who_has_left_nothing_is_computed(page):
    """The page of a browser holds a connection open, which ends with it."""
    visit = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
    visit.request("GET", "/gradio_api/heartbeat/leaving")
    answer = visit.getresponse()
    session, _ = page.begin("samples", {"Pictures": 64, "Seed": 2}, session="leaving")
    for message in page.messages(session):
        if message["msg"] == "progress":
            answer.close()
            visit.close()
        if message["msg"] == "process_completed":
            break
    assert not message["success"] and message["output"]["error"] == "stopped"


def test_requests_wait_for_their_turn(page):
    """One that waits can be given up too; the others have what they asked for."""
    waiting = [page.begin("samples", {"Pictures": 20, "Seed": i}) for i in range(4)]
    assert page.get("/config")[0] == 200  # the page itself is served meanwhile
    page.cancel("samples", *waiting[2])
    for i in (0, 1, 3):
        assert f"20 samples of seed {i}" in page.result(waiting[i][0])[1]


@pytest.mark.slow  # on a machine that is busy with other tests it may fail
def test_a_move_takes_no_more_than_the_library_and_a_moment(page, model, images, uploads):
    """At most 1.5 times the call and 0.3 s (docs/explore.md)."""
    a, b = images[:1], images[1:]
    both = {"A: coarse latents": uploads[0], "B: fine latents": uploads[1]}
    moves = {
        "samples": ({"Pictures": 1}, lambda i: draw_samples(model, range(1), seed=i)),
        "reconstruct": ({"Picture": uploads[0]}, lambda i: reconstruct(model, a, [0], 4, seed=i)),
        "mix": (both, lambda i: mix(model, a, b, 3, seed=i)),
    }

    def fastest(function):
        times = []
        for i in range(5):
            start = time.monotonic()
            function(i)
            times.append(time.monotonic() - start)
        return min(times)

    for name, (values, direct) in moves.items():
        moved = fastest(lambda i, name=name, values=values: page.ask(name, **values, Seed=i))
        assert moved <= 1.5 * fastest(direct) + 0.3, name


# ---- parts of it, in this process ------------------------------------------------------------


def test_what_is_cancelled_has_ended_before_the_next_has_its_turn():
    watch, ended = Watch(), []

    def passes():
        try:
            for _ in range(3000):
                watch.layer()
                time.sleep(0.001)
        finally:
            time.sleep(0.05)
            ended.append(watch.done)

    async def cancelled():
        task = asyncio.create_task(answering._in_a_thread(passes, watch))
        while not watch.done:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended and ended[0] < 3000

    asyncio.run(cancelled())


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(UserError, match="larger than 20 MB"):
        upload("Picture", tmp_path)({"path": str(path)})


@pytest.mark.parametrize(
    "method, path, times", [("POST", "/gradio_api/upload", 1), ("GET", "/", 0)]
)
def test_what_brings_files_has_the_oldest_forgotten(tmp_path, monkeypatch, method, path, times):
    calls = []
    monkeypatch.setattr(gate, "forget_oldest", calls.append)

    async def app(*_):
        assert not calls

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-length", b"9")]}
    asyncio.run(gate.Gate(app, tmp_path)(scope, None, None))
    assert calls == [str(tmp_path)] * times


# ---- the command ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_every_machine_is_served_with_a_warning_until_a_signal_comes(folder, tmp_path, number):
    """Then what was uploaded is gone, and what was in work has stopped."""
    page = Explorer(folder / "digits.th", tmp_path, "--host", "0.0.0.0")
    assert page.get("/", host="any.example")[0] == 200
    page.upload(png())
    page.begin("samples", {"Pictures": 64})
    assert list(tmp_path.glob("explore-*"))
    assert page.end(number) == 128 + number, page.errors.read_text()
    assert not list(tmp_path.glob("explore-*"))
    [warning] = page.errors.read_text().splitlines()
    assert warning.startswith("WARNING: --host 0.0.0.0 serves the page to every machine")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_page_is_served_leaves_nothing(tmp_path, monkeypatch, number):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    child = os.fork()
    if not child:
        try:
            with explore.own_folder() as folder:
                os.mkdir(os.path.join(folder, "upload"))
                os.kill(os.getpid(), number)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "host, address, local",
    [("127.0.0.1", "127.0.0.1", True), ("127.0.0.2", "127.0.0.2", True),
     ("localhost", "localhost", True), ("0.0.0.0", "0.0.0.0", False), ("::1", "[::1]", True),
     ("::", "[::]", False)],
)  # fmt: skip
def test_the_address_of_a_host(host, address, local):
    try:
        listening = explore.listen(host, 0)
    except UserError:
        pytest.skip(f"{host} is no address of this machine")
    with listening:
        port = listening.getsockname()[1]
        assert explore.address_of(listening, host) == (f"http://{address}:{port}/", local)


def test_errors_are_one_line(folder, page, monkeypatch):
    weights = ["--restore_ema_path", folder / "digits.th"]
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for options, words in [
        ([], "no weights given"),
        (["--restore_ema_path", folder / "a.png", "--port", free_port()], "a.png"),
        ([*weights, "--port", page.port], f"port {page.port} .*--port"),
        ([*weights, "--port", 70000], "port number"),
        ([*weights, "--host", "no.such.host.invalid"], "no.such.host.invalid.*--host"),
        ([*weights, "--hsot", "x"], "did you mean --host"),
        ([*weights, "--hps", "cifar10", "--port", free_port()], "holds the digits model"),
    ]:
        monkeypatch.setattr(sys, "argv", ["explore.py", *map(str, options)])
        with pytest.raises(UserError, match=words):
            explore.main()


def test_without_gradio_a_line_says_what_to_install(folder, tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError(\"No module named 'gradio'\")")
    done = subprocess.run(
        [sys.executable, ROOT / "explore.py", "--restore_ema_path", folder / "digits.th"],
        env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: the page needs the package gradio (No module named 'gradio'): pip install -r "
        "requirements-explore.txt\n"
    )
