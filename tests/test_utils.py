"""Ranks, means over them, tiles, downloads."""

import http.server
import io
import threading

import numpy as np
import pytest
import torch

from errors import UserError
from utils import (
    allreduce,
    get_cpu_stats_over_ranks,
    local_mpi_rank,
    maybe_download,
    mpi_rank,
    mpi_size,
    tile_images,
)


def test_reductions_in_one_process():
    t = torch.ones(2)
    assert allreduce(t, average=True).equal(t)
    assert (mpi_size(), mpi_rank(), local_mpi_rank()) == (1, 0, 0)
    stats = get_cpu_stats_over_ranks({"a": torch.tensor(2.0), "b": 3, "c": torch.tensor(True)})
    assert stats == {"a": 2.0, "b": 3.0, "c": 1.0} and all(type(v) is float for v in stats.values())


def test_tile_images():
    images = [np.full((2, 3, 3), i, np.uint8) for i in range(4)]
    tiled = tile_images(images, 2, 2)
    assert tiled.shape == (7, 9, 3) and tiled[1, 1, 0] == 0 and tiled[-2, -2, 0] == 3
    assert (tiled[0] == 255).all() and (tiled[3] == 255).all()
    with pytest.raises(ValueError):
        tile_images(images, 3, 2)


def test_an_address_is_fetched_once(tmp_path, monkeypatch):
    asked, saved = [], io.BytesIO()
    torch.save({"a": torch.zeros(2)}, saved)
    content = saved.getvalue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path != "/a/file.th":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 5 * (len(asked) == 1)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a/file.th"
        with pytest.raises(UserError, match="can't be fetched"):
            maybe_download(url)  # cut short
        assert not list(tmp_path.iterdir())
        assert maybe_download(url) == "file.th" and maybe_download(url) == "file.th"
        assert len(asked) == 2 and (tmp_path / "file.th").read_bytes() == content
        assert maybe_download(url, "other.th") == "other.th"
        with pytest.raises(UserError, match="404"):
            maybe_download(url + "x")
        server.shutdown()
    assert maybe_download("local.th") == "local.th"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "file.th", "file.th.address", "other.th", "other.th.address",
    ]  # fmt: skip
