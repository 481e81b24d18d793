"""The setup_*.sh scripts, run as a user runs them, against an HTTP server on this machine."""

import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import ROOT

SCRIPTS = ["setup_cifar10.sh", "setup_imagenet.sh", "setup_ffhq256.sh", "setup_ffhq1024.sh",
           "setup_checkpoints.sh"]  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files ({path: bytes}) as well or as badly as the server's fields say."""

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        data = server.files.get(self.path)
        if data is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and server.ranges else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if server.drops > 0 or server.stall:
            server.drops -= 1
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            if server.stall:
                server.released.wait(600)
            self.close_connection = True
        else:
            self.wfile.write(data[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.files, server.requests = {}, []
        server.ranges = True  # whether parts of a file can be asked for
        server.drops = 0  # this many answers break off halfway
        server.stall = False  # answers stop halfway, the connection stays
        server.released = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def start(tmp_path):
    """start(script, *args, cwd=, **variables): the started process, in a process group."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sleep").write_text("#!/bin/sh\n")  # no waiting between attempts
    (tmp_path / "bin" / "sleep").chmod(0o755)
    (tmp_path / "cwd").mkdir()
    ours = ("CIFAR10_", "IMAGENET_", "FFHQ256_")
    base = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    base |= {"PYTHON": sys.executable, "no_proxy": "127.0.0.1"}
    base["PATH"] = f"{tmp_path / 'bin'}:{base['PATH']}"

    def start(script, *args, cwd=tmp_path / "cwd", **variables):
        return subprocess.Popen(
            [ROOT / script, *map(str, args)],
            cwd=cwd,
            env=base | {name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture
def run(start):
    """run(...) as start's: (status, stdout, stderr) of the finished script."""

    def run(*args, **settings):
        process = start(*args, **settings)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr

    return run


def kill_when(process, condition):
    """Kills a script and all it started as soon as the condition holds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def assert_refused(result, *words):
    status, _, stderr = result
    assert status == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, result
    for word in words:
        assert word in stderr


def assert_done(result, *words):
    status, stdout, stderr = result
    assert status == 0 and stderr == "", result
    for word in words:
        assert word in stdout


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def size_of(path):
    return path.stat().st_size if path.exists() else 0


# ---- all of them ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_arguments(run, script):
    assert_done(run(script, "-h"), f"Usage: {script} ", "Environment: PYTHON")
    assert_refused(run(script, "--frobnicate"), "--frobnicate", "-h")
    assert_refused(
        run(script, "imagenet32", "two", "three"), "not 3" if "1024" not in script else ""
    )


def test_python_is_chosen_and_checked(run, tmp_path):
    """PYTHON, or else the .venv beside the script."""
    assert_refused(run("setup_cifar10.sh", PYTHON="/absent/python"), "/absent/python", "PYTHON")

    # One with NumPy alone would fail only when it comes to the images.
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(np.__file__).parent.parent.glob("numpy*"):
        (packages / path.name).symlink_to(path)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    subprocess.run([bare, "-c", "import numpy"], check=True)
    assert_refused(run("setup_ffhq256.sh", PYTHON=bare), "bare", "requirements.txt")

    copy = tmp_path / "copy"
    (copy / ".venv" / "bin").mkdir(parents=True)
    for path in (ROOT / "setup_common.sh", ROOT / "setup_ffhq1024.sh", *ROOT.glob("*.py")):
        shutil.copy(path, copy)
    (copy / ".venv" / "bin" / "python").write_text(
        f'#!/bin/sh\ntouch used\n"{sys.executable}" "$@"\n'
    )
    (copy / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "cwd" / "empty").mkdir()
    assert_refused(run(copy / "setup_ffhq1024.sh", "empty", PYTHON=""), "70000 of 70000")
    assert (tmp_path / "cwd" / "used").exists()


# ---- CIFAR-10 ------------------------------------------------------------------------------

BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
CIFAR = {name: name.encode() + os.urandom(20_000) for name in BATCHES + ["batches.meta"]}


def cifar_archive(files=CIFAR, extra=()):
    """A cifar-10-python.tar.gz of {name: bytes}, then extra TarInfo members, empty."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        top = tarfile.TarInfo("cifar-10-batches-py")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(top)
        for name, body in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
        for member in extra:
            tar.addfile(member)
    return data.getvalue()


ARCHIVE = cifar_archive()


@pytest.fixture
def cifar(server, run, start, tmp_path):
    """cifar(): a run of the script for the server's archive into the folder "a b"."""
    server.files["/cifar"] = ARCHIVE

    def cifar(archive=ARCHIVE, how=run):
        md5 = hashlib.md5(archive).hexdigest()
        url = f"{server.url}/cifar"
        return how("setup_cifar10.sh", "a b", CIFAR10_URL=url, CIFAR10_MD5=md5)

    cifar.folder = tmp_path / "cwd" / "a b"
    cifar.part = cifar.folder / "cifar-10-python.tar.gz.part"
    cifar.start = lambda: cifar(how=start)
    return cifar


def assert_cifar_in(folder):
    assert names_in(folder) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    batches = folder / "cifar-10-batches-py"
    assert {path.name: path.read_bytes() for path in batches.iterdir()} == CIFAR


def test_cifar10_is_fetched_once(server, cifar):
    assert_done(cifar(), "is ready", "not checked against their published md5s")
    assert_cifar_in(cifar.folder)
    assert server.requests == [("/cifar", None)]
    (cifar.folder / "cifar-10-python.tar.gz").unlink()  # it may be deleted
    assert_done(cifar(), "nothing to do")
    assert server.requests == [("/cifar", None)]


def test_a_killed_download_goes_on_where_it_was(server, cifar):
    server.stall = True
    kill_when(cifar.start(), lambda: size_of(cifar.part) > len(ARCHIVE) // 3)
    assert names_in(cifar.folder) == [cifar.part.name]
    got = size_of(cifar.part)  # curl writes in blocks, so not quite the half that was sent
    server.stall = False
    assert_done(cifar())
    assert_cifar_in(cifar.folder)
    assert server.requests == [("/cifar", None), ("/cifar", f"bytes={got}-")]


def test_a_dropped_connection_is_taken_up_again(server, cifar):
    server.drops = 1
    assert_done(cifar())
    assert_cifar_in(cifar.folder)
    assert server.requests == [("/cifar", None), ("/cifar", f"bytes={len(ARCHIVE) // 2}-")]


def test_without_ranges_a_drop_starts_over(server, cifar):
    server.drops, server.ranges = 1, False
    assert_done(cifar())
    assert_cifar_in(cifar.folder)
    half = f"bytes={len(ARCHIVE) // 2}-"
    assert server.requests == [("/cifar", None), ("/cifar", half), ("/cifar", None)]


def test_a_part_that_is_whole_is_not_fetched_again(server, cifar):
    """As a kill between download and check leaves it; the server answers 416."""
    cifar.folder.mkdir()
    cifar.part.write_bytes(ARCHIVE)
    assert_done(cifar())
    assert_cifar_in(cifar.folder)
    assert server.requests == [("/cifar", f"bytes={len(ARCHIVE)}-")]


@pytest.mark.parametrize("sent", [b"<html>sign in</html>", ARCHIVE[:-100]], ids=["page", "cut"])
def test_a_wrong_download_is_refused_and_forgotten(server, cifar, sent):
    server.files["/cifar"] = sent
    assert_refused(cifar(), hashlib.md5(sent).hexdigest(), "deleted", "run the same command again")
    assert names_in(cifar.folder) == []
    server.files["/cifar"] = ARCHIVE
    assert_done(cifar())
    assert_cifar_in(cifar.folder)


def test_a_bad_part_does_not_poison_the_runs_after(cifar):
    cifar.folder.mkdir()
    cifar.part.write_bytes(b"x" * 1000)
    assert_refused(cifar(), "md5", "deleted")
    assert names_in(cifar.folder) == []
    assert_done(cifar())
    assert_cifar_in(cifar.folder)


def test_an_absent_file_and_an_absent_server(server, run, cifar):
    del server.files["/cifar"]
    assert_refused(cifar(), "404", f"{server.url}/cifar")
    assert names_in(cifar.folder) == [] and len(server.requests) == 1
    url = "http://127.0.0.1:9/cifar"  # the discard port: nobody listens
    assert_refused(run("setup_cifar10.sh", CIFAR10_URL=url), url, "connect", "again to continue")


def member(name, kind=tarfile.REGTYPE, link=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


BATCH = "cifar-10-batches-py/data_batch_1"
BAD_ARCHIVES = {
    "parent": (cifar_archive(extra=[member("../evil")]), "'../evil'"),
    "parent inside": (cifar_archive(extra=[member("cifar-10-batches-py/../../evil")]), "evil'"),
    "absolute": (cifar_archive(extra=[member("/tmp/evil")]), "'/tmp/evil'"),
    "unexpected": (cifar_archive(extra=[member("cifar-10-batches-py/evil")]), "evil'"),
    "symlink": (cifar_archive(extra=[member(BATCH, tarfile.SYMTYPE, "/etc/passwd")]), BATCH),
    "hard link": (cifar_archive(extra=[member(BATCH, tarfile.LNKTYPE, "../evil")]), BATCH),
    "folder link": (
        cifar_archive({}, [member("cifar-10-batches-py", tarfile.SYMTYPE, "..")]),
        "'cifar-10-batches-py'",
    ),
    "incomplete": (cifar_archive({"data_batch_1": b"x"}), "data_batch_2 is missing"),
    "cut off": (ARCHIVE[:-1000], "cannot be unpacked"),
    "no gzip": (b"x" * 1000, "cannot be unpacked"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_a_bad_archive_is_not_unpacked(server, cifar, tmp_path, case):
    server.files["/cifar"], message = BAD_ARCHIVES[case]
    assert_refused(cifar(server.files["/cifar"]), message, "move ")
    assert names_in(cifar.folder) == ["cifar-10-python.tar.gz"]
    assert not list(tmp_path.rglob("evil"))


def test_what_a_killed_unpacking_left_is_replaced(cifar):
    left = cifar.folder / "cifar-10-batches-py.part"
    left.mkdir(parents=True)
    (left / "data_batch_9").write_bytes(b"x")
    assert_done(cifar())
    assert_cifar_in(cifar.folder)


def test_the_users_own_files_are_checked_and_left_alone(run, cifar):
    """With the published md5s too, which neither these batches nor this archive have."""
    batches = cifar.folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    (batches / "data_batch_1").write_bytes(b"x")
    assert_refused(cifar(), "data_batch_2 is missing or empty", "move ")
    assert_refused(run("setup_cifar10.sh", "a b"), "data_batch_1 does not have the published md5")
    assert names_in(batches) == ["data_batch_1"]

    shutil.rmtree(batches)
    (cifar.folder / "cifar-10-python.tar.gz").write_bytes(b"x")
    assert_refused(run("setup_cifar10.sh", "a b"), "not c58f30108f718f92721af3b95e74349a", "move ")
    assert names_in(cifar.folder) == ["cifar-10-python.tar.gz"]


# ---- small ImageNet ------------------------------------------------------------------------

SIZE = 32


def pngs(count):
    """{name: bytes} of count PNGs in the order of their numbers, and their pixels by name."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    files = {}
    for i, image in enumerate(pixels):
        data = io.BytesIO()
        Image.fromarray(image).save(data, "png")
        files[f"x/{i}.png"] = data.getvalue()
    return files, pixels[sorted(range(count), key=str)]  # by name: 0, 1, 10, 11, 2, ...


def tar_of(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return data.getvalue()


TRAIN, TRAIN_ARRAY = pngs(12)
VALID, VALID_ARRAY = pngs(11)


@pytest.fixture
def tars(tmp_path):
    """tars.write(name, bytes, count=): puts a tar in tars.folder and its line in tars.facts."""

    class Tars:
        folder, facts, lines = tmp_path / "tars", tmp_path / "facts", {}

        def write(self, name, data, count):
            (self.folder / name).write_bytes(data)
            self.lines[name] = [name, len(data), hashlib.sha256(data).hexdigest(), count]
            self.write_facts()

        def write_facts(self):
            lines = [" ".join(map(str, line)) for line in self.lines.values()]
            self.facts.write_text("\n".join(lines) + "\n")

    tars = Tars()
    tars.folder.mkdir()
    tars.write("train_32x32.tar", tar_of(TRAIN), 12)
    tars.write("valid_32x32.tar", tar_of(VALID), 11)
    return tars


def assert_imagenet_in(folder):
    assert np.array_equal(np.load(folder / "imagenet32-train.npy"), TRAIN_ARRAY)
    assert np.array_equal(np.load(folder / "imagenet32-valid.npy"), VALID_ARRAY)


def test_imagenet_without_tars_says_where_they_are(run, tmp_path):
    for args in (["imagenet32"], ["imagenet32", "bin"], ["imagenet64"]):
        status, stdout, stderr = run("setup_imagenet.sh", *args)
        size = args[0].removeprefix("imagenet")
        assert status == 2 and stdout == "" and stderr.count("\n") < 12
        assert f"error: no valid_{size}x{size}.tar in" in stderr and "Chrabaszcz" in stderr
    assert "96816a530ee002254d29bf7a61c0c158d3dedc3b" in stderr
    assert "train_64x64.tar, 12112588800 bytes, sha256 e2a2c1947a748d0d256e98e6d82800d85" in stderr
    assert_refused(run("setup_imagenet.sh"), "imagenet32 or imagenet64")
    assert_refused(run("setup_imagenet.sh", "imagenet128"), "'imagenet128'")
    assert names_in(tmp_path / "cwd") == []


def test_imagenet_from_a_folder(run, tars, tmp_path):
    cwd = tmp_path / "cwd"
    result = run("setup_imagenet.sh", "imagenet32", tars.folder, IMAGENET_FACTS=tars.facts)
    assert_done(result, f"those of {tars.facts}, not the published ones")
    assert names_in(cwd) == ["imagenet32-train.npy", "imagenet32-valid.npy"]
    assert_imagenet_in(cwd)

    before = [path.stat().st_mtime_ns for path in sorted(cwd.iterdir())]
    shutil.rmtree(tars.folder)  # no longer needed
    result = run("setup_imagenet.sh", "imagenet32", tars.folder, IMAGENET_FACTS=tars.facts)
    assert_done(result, "nothing to do")
    assert [path.stat().st_mtime_ns for path in sorted(cwd.iterdir())] == before


def test_imagenet_from_an_address(server, run, tars, tmp_path):
    cwd = tmp_path / "cwd"
    for path in tars.folder.iterdir():
        server.files[f"/small/{path.name}"] = path.read_bytes()
    server.drops = 1
    where = {"IMAGENET_FACTS": tars.facts, "IMAGENET_URL": f"{server.url}/small/"}
    good = server.files["/small/train_32x32.tar"]
    server.files["/small/train_32x32.tar"] = good[:-1] + b"x"
    assert_refused(run("setup_imagenet.sh", "imagenet32", **where), "sha256", "deleted")
    # Each file is done with before the next is begun.
    assert names_in(cwd) == ["imagenet32-valid.npy", "valid_32x32.tar"]

    server.files["/small/train_32x32.tar"] = good
    assert_done(run("setup_imagenet.sh", "imagenet32", **where))
    assert_imagenet_in(cwd)
    valid, train = "/small/valid_32x32.tar", "/small/train_32x32.tar"
    half = f"bytes={len(server.files[valid]) // 2}-"
    assert server.requests == [(valid, None), (valid, half), (train, None), (train, None)]
    assert_done(run("setup_imagenet.sh", "imagenet32", **where), "nothing to do")
    assert len(server.requests) == 4


@pytest.mark.parametrize("fact, message", [(1, "bytes where"), (2, "sha256"), (3, "11 images")])
def test_imagenet_checks_size_hash_and_count(run, tars, tmp_path, fact, message):
    line = tars.lines["valid_32x32.tar"]
    line[fact] = "0" * 64 if fact == 2 else line[fact] + 1
    tars.write_facts()
    result = run("setup_imagenet.sh", "imagenet32", tars.folder, IMAGENET_FACTS=tars.facts)
    assert_refused(result, "valid_32x32.tar", message)
    assert names_in(tmp_path / "cwd") == []
    assert names_in(tars.folder) == ["train_32x32.tar", "valid_32x32.tar"]


def test_imagenet_facts_are_needed_whole(run, tars):
    del tars.lines["train_32x32.tar"]
    tars.write_facts()
    facts = {"IMAGENET_FACTS": tars.facts}
    result = run("setup_imagenet.sh", "imagenet32", tars.folder, **facts)
    assert_refused(result, "no line 'train_32x32.tar BYTES SHA256 IMAGES'")
    tars.facts.unlink()
    assert_refused(run("setup_imagenet.sh", "imagenet32", **facts), "cannot be read")


def test_the_published_facts_hold_by_default(run, tars):
    result = run("setup_imagenet.sh", "imagenet32", tars.folder)
    assert_refused(result, "161474560 are expected", "box-filtered")


def test_the_other_downsampled_imagenet_is_recognised(run, tars):
    header = tarfile.TarInfo("x/0000000.png")
    header.size = len(VALID["x/0.png"])
    body = VALID["x/0.png"] + bytes(-header.size % 512)
    members = (header.replace(name=f"x/{i:07d}.png", deep=False) for i in range(50_000))
    data = b"".join(member.tobuf(tarfile.USTAR_FORMAT) + body for member in members)
    tars.write("valid_32x32.tar", data + bytes(1024), 49_999)
    result = run("setup_imagenet.sh", "imagenet32", tars.folder, IMAGENET_FACTS=tars.facts)
    assert_refused(result, "50000 images where 49999 are expected", "box-filtered")


def test_an_npy_file_of_something_else_is_not_touched(run, tars, tmp_path):
    other = tmp_path / "cwd" / "imagenet32-valid.npy"
    np.save(other, VALID_ARRAY.astype(np.int8))
    before = other.read_bytes()
    settings = {"IMAGENET_FACTS": tars.facts}
    result = run("setup_imagenet.sh", "imagenet32", tars.folder, **settings)
    assert_refused(result, "int8 (11, 32, 32, 3)", "uint8 (11, 32, 32, 3) is expected", "move ")
    assert other.read_bytes() == before
    other.write_bytes(before[:-1])
    assert_refused(run("setup_imagenet.sh", "imagenet32", tars.folder, **settings), "bytes where")


def test_a_killed_conversion_starts_again(start, run, tars, tmp_path):
    """Twenty thousand images: killed once the first megabyte of sixty is on the disk."""
    body = VALID["x/0.png"]
    info = tarfile.TarInfo("x/00000.png")
    info.size = len(body)
    body += bytes(-len(body) % 512)
    members = (info.replace(name=f"x/{i:05d}.png", deep=False) for i in range(20_000))
    data = b"".join(member.tobuf(tarfile.USTAR_FORMAT) + body for member in members)
    tars.write("valid_32x32.tar", data + bytes(1024), 20_000)
    args, facts = ("setup_imagenet.sh", "imagenet32", tars.folder), {"IMAGENET_FACTS": tars.facts}
    part = tmp_path / "cwd" / "imagenet32-valid.npy.part"
    kill_when(start(*args, **facts), lambda: size_of(part) > 0)
    assert names_in(tmp_path / "cwd") == [part.name] and size_of(part) < 20_000 * SIZE * SIZE * 3
    assert_done(run(*args, **facts))
    assert names_in(tmp_path / "cwd") == ["imagenet32-train.npy", "imagenet32-valid.npy"]
    array = np.load(tmp_path / "cwd" / "imagenet32-valid.npy")
    assert array.shape == (20_000, SIZE, SIZE, 3) and (array == VALID_ARRAY[0]).all()


@pytest.fixture
def box(tmp_path):
    """box.folder holds eleven tiny .npz files as Imagenet32's, box.facts their counts."""

    class Box:
        folder, facts = tmp_path / "npz", tmp_path / "facts"

        def write(self, name, images):
            planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
            np.savez(self.folder / name, data=planes, labels=np.arange(len(images)), mean=planes[0])

    box = Box()
    box.folder.mkdir()
    for i in range(10):
        box.write(f"train_data_batch_{i + 1}.npz", TRAIN_ARRAY[i : i + 1])
    box.write("val_data.npz", VALID_ARRAY)
    box.facts.write_text("train_box - - 10\nvalid_box - - 11\n")
    return box


def test_the_box_filtered_imagenet_has_names_of_its_own(run, box, tmp_path):
    command = {"IMAGENET_FACTS": box.facts}
    result = run("setup_imagenet.sh", "imagenet32_box", box.folder, **command)
    assert_done(result, "imagenet32_box-train.npy")
    cwd = tmp_path / "cwd"
    assert names_in(cwd) == ["imagenet32_box-train.npy", "imagenet32_box-valid.npy"]
    assert np.array_equal(np.load(cwd / "imagenet32_box-train.npy"), TRAIN_ARRAY[:10])
    assert np.array_equal(np.load(cwd / "imagenet32_box-valid.npy"), VALID_ARRAY)
    assert_done(run("setup_imagenet.sh", "imagenet32_box", **command), "nothing to do")


def test_the_box_filtered_imagenet_is_checked(run, box, tmp_path):
    def refused(name, *words, **command):
        assert_refused(run("setup_imagenet.sh", name, box.folder, **command), *words)

    refused("imagenet32_box", "11 images where 50000 are expected")
    refused("imagenet64_box", "32x32, not 64x64", IMAGENET_FACTS=box.facts)
    (box.folder / "train_data_batch_7.npz").unlink()
    refused("imagenet32_box", "no ", "train_data_batch_7.npz", IMAGENET_FACTS=box.facts)
    assert names_in(tmp_path / "cwd") == []


# ---- FFHQ at 256 ---------------------------------------------------------------------------


def ffhq_file(shape=(70_000, 256, 256, 3), descr="|u1", order=False):
    """The header of an .npy file of that shape, with a body much too short."""
    data = io.BytesIO()
    header = {"descr": descr, "fortran_order": order, "shape": shape}
    np.lib.format.write_array_header_1_0(data, header)
    return data.getvalue() + bytes(50_000)


@pytest.fixture
def ffhq256(server, run, start, tmp_path):
    server.files["/ffhq"] = ffhq_file()

    def ffhq256(how=run):
        url, size = f"{server.url}/ffhq", len(ffhq_file())
        return how("setup_ffhq256.sh", "new/folder", FFHQ256_URL=url, FFHQ256_BYTES=size)

    ffhq256.folder = tmp_path / "cwd" / "new" / "folder"
    ffhq256.start = lambda: ffhq256(how=start)
    return ffhq256


def test_ffhq256_is_fetched_once_and_continued(server, ffhq256):
    part = ffhq256.folder / "ffhq-256.npy.part"
    server.stall = True
    kill_when(ffhq256.start(), lambda: size_of(part) > len(ffhq_file()) // 3)
    assert names_in(ffhq256.folder) == [part.name]
    got = size_of(part)
    server.stall = False
    assert_done(ffhq256(), "is ready", "FFHQ256_BYTES is set")
    assert names_in(ffhq256.folder) == ["ffhq-256.npy"]
    assert (ffhq256.folder / "ffhq-256.npy").read_bytes() == ffhq_file()
    assert server.requests == [("/ffhq", None), ("/ffhq", f"bytes={got}-")]
    assert_done(ffhq256(), "nothing to do")
    assert len(server.requests) == 2


BAD_FFHQ = {
    "short": (ffhq_file()[:-1], "bytes where"),
    "count": (ffhq_file((70_001, 256, 256, 3)), "uint8 (70001, 256, 256, 3)"),
    "type": (ffhq_file(descr="<f4"), "float32"),
    "order": (ffhq_file(order=True), "Fortran"),
    "page": (b"<html>".ljust(len(ffhq_file())), "is not an .npy file"),
}


@pytest.mark.parametrize("case", BAD_FFHQ)
def test_ffhq256_checks_size_and_header(server, ffhq256, case):
    server.files["/ffhq"], message = BAD_FFHQ[case]
    assert_refused(ffhq256(), message, "deleted")
    assert names_in(ffhq256.folder) == []


def test_ffhq256_expects_the_published_size(server, run, tmp_path):
    (tmp_path / "cwd" / "ffhq-256.npy").write_bytes(ffhq_file())
    assert_refused(run("setup_ffhq256.sh"), "13762560128 are expected", "move ")
    assert (tmp_path / "cwd" / "ffhq-256.npy").read_bytes() == ffhq_file()


# ---- FFHQ at 1024 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """faces["official"] and faces["flat"]: folders of 70,000 one-byte files."""
    top = tmp_path_factory.mktemp("faces")
    seeds = [top / f"seed{k}" for k in range(4)]  # hard links to these; an inode takes 65,000
    for seed in seeds:
        seed.write_bytes(b"x")
    for layout in ("official", "flat"):
        (top / layout).mkdir()
        (top / layout / "LICENSE.txt").write_text("x")
        for i in range(70_000):
            folder = top / layout
            if layout == "official":
                folder /= f"{i // 1000 * 1000:05d}"
                if i % 1000 == 0:
                    folder.mkdir()
                    (folder / "LICENSE.txt").write_text("x")
            os.link(seeds[i % 4], folder / f"{i:05d}.png")
    yield {layout: top / layout for layout in ("official", "flat")}
    shutil.rmtree(top)


@pytest.mark.parametrize("layout", ["official", "flat"])
def test_ffhq1024_is_linked(run, faces, tmp_path, layout):
    cwd, name = tmp_path / "cwd", "ffhq_images1024x1024"
    (cwd / "images").symlink_to(faces[layout])  # a relative path: the link must be absolute
    assert_done(run("setup_ffhq1024.sh", "images"), f"link to {cwd / 'images'}")
    assert os.readlink(cwd / name) == str(cwd / "images")
    assert_done(run("setup_ffhq1024.sh", "images"), "nothing to do")
    assert_done(run("setup_ffhq1024.sh", name), "nothing to do")
    assert_done(run("setup_ffhq1024.sh", faces[layout]), "nothing to do")
    assert names_in(cwd) == [name, "images"]

    (cwd / name).unlink()
    (cwd / name).symlink_to(tmp_path / "gone")
    assert_refused(run("setup_ffhq1024.sh", "images"), f"{name} exists", "move it away")
    assert os.readlink(cwd / name) == str(tmp_path / "gone")


@pytest.mark.parametrize("layout", ["official", "flat"])
def test_ffhq1024_names_what_is_missing_or_empty(run, faces, tmp_path, layout):
    def path_of(i):
        folder = f"{i // 1000 * 1000:05d}/" if layout == "official" else ""
        return f"{folder}{i:05d}.png"

    missing, empty = [path_of(i) for i in [0, 69_999, *range(1_000, 1_010)]], path_of(777)
    kept = {name: (faces[layout] / name) for name in [*missing, empty]}
    for name in kept:
        os.rename(kept[name], tmp_path / Path(name).name)
    kept[empty].touch()
    try:
        result = run("setup_ffhq1024.sh", faces[layout])
    finally:
        for name in kept:
            os.replace(tmp_path / Path(name).name, kept[name])
    listed = ", ".join(sorted(missing)[:10])
    assert_refused(result, f"12 of 70000 files are missing ({listed}, ...)")
    assert_refused(result, f"1 of 70000 files are empty ({empty})")
    assert names_in(tmp_path / "cwd") == []


def test_ffhq1024_wants_a_folder(run):
    assert_refused(run("setup_ffhq1024.sh"), "one folder is needed")
    assert_refused(run("setup_ffhq1024.sh", "absent"), "no folder absent")
