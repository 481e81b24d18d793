"""benchmarks/gpu.py without a GPU: rows, their order, what goes wrong in them, their table."""

import json

import gpu
import pytest
import torch

import steps
from errors import UserError

FACTS = {"card": "a card", "torch": "2.0"}


def test_rows_are_written_one_by_one_and_continued(tmp_path, capsys):
    """Out of memory is a row, as any error is; a row cut short by a kill is measured again."""
    path, calls = tmp_path / "gpu.jsonl", []

    def job(name, error=None):
        def run():
            calls.append(name)
            if error:
                raise error
            return {"result": "ok", "detail": ""}

        return run

    jobs = {
        ("checks", "a"): job("a"),
        ("speed", "b / fp32"): job("b", torch.OutOfMemoryError("CUDA out of memory")),
        ("checks", "c"): job("c", ValueError("no")),
        ("checks", "d"): job("d"),
    }
    assert gpu.run_jobs(jobs, path, limit=-1, facts=FACTS) == 4 and not calls
    assert gpu.run_jobs(dict(list(jobs.items())[:3]), path, 100, FACTS) == 0
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert gpu.run_jobs(jobs, path, 100, FACTS) == 0
    assert calls == ["a", "b", "c", "c", "d"]
    assert gpu.run_jobs(jobs, path, 100, FACTS) == 0
    assert calls[5:] == ["c"]  # another row's error may have brought it
    rows = gpu.rows_of(path)
    assert [name for _, name in rows] == ["a", "b / fp32", "c", "d"]
    assert rows["speed", "b / fp32"]["error"] == "out of memory"
    assert rows["checks", "c"]["error"] == "ValueError: no"
    assert all(row["card"] == "a card" for row in rows.values())
    text = gpu.table(rows.values())
    assert text.startswith("a card, PyTorch 2.0\n") and "| b | fp32 | out of memory |" in text
    assert text.count("\n| ") == 2 + 4


def test_the_time_that_kernels_run_is_counted_once():
    assert gpu.busy_seconds([(3, 5), (0, 1), (0.5, 2), (4, 4.5), (4.6, 4.8), (7, 8)]) == 2 + 2 + 1
    assert gpu.busy_seconds([]) == 0


def test_a_row_beside_a_plain_rendition_that_did_not_fit():
    row = {"part": "speed", "name": "x / bf16", "n_batch": 4, "plain": "out of memory",
           "images_per_second": 10.0, "kernels": 1000, "busy": 0.5, "peak_mb": 5.0}  # fmt: skip
    line = gpu.describe(row)
    assert "| 4 | out of memory → 10.0 | - | out of memory → 1,000 |" in line
    row |= {"plain_images_per_second": 5.0, "plain_kernels": 10, "plain_busy": 0.1}
    assert "| 5.0 → 10.0 | 2.00x | 10 → 1,000 | 10% → 50% |" in gpu.describe(row)


# The others need a GPU's memory, streams or graphs.
ON_THE_CPU = ["fp32 as the CPU", "bf16 as the CPU", "checkpointed", "pictures", "files"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_checks_pass_where_they_can_be_tried(name, monkeypatch):
    row = gpu.run_check(name, "cpu")
    assert row["result"] == "ok", row


def test_a_preset_is_measured_and_a_check_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "CHECKS", {n: gpu.CHECKS[n] for n in ("files", "Apex")})
    monkeypatch.setattr(steps, "AS_ON_CUDA", True)
    out = tmp_path / "rows.jsonl"
    options = f"--device cpu --presets digits --modes bf16 --rounds 1 --out {out}"
    gpu.main(options.split())
    rows = gpu.rows_of(out)
    assert rows["checks", "files"]["result"] == "ok"
    assert rows["checks", "Apex"]["result"] == "not here"
    row = rows["speed", "digits / bf16"]
    assert row["images_per_second"] > 0 and row["plain_images_per_second"] > 0, row
    assert row["peak_mb"] > 0
    assert "3 of 3 rows" in capsys.readouterr().out
    assert "digits | bf16" in out.with_suffix(".md").read_text()
    assert json.loads(out.read_text().splitlines()[0])["card"] == "CPU"


def test_a_mistyped_mode_is_named():
    with pytest.raises(UserError, match="--modes: got 'fp64'; it must be one of fp32"):
        gpu.main(["--modes", "fp64", "--device", "cpu"])
