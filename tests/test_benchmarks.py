"""Every benchmark, with tiny numbers."""

import json
import subprocess
import sys

import bench
import compiled
import growth
import imageio.v3 as imageio
import pytest
import step
from runs import ROOT, environment

from errors import UserError


def test_bench(tmp_path, capsys):
    report = tmp_path / "report.json"
    bench.main(
        f"--presets digits --batches 2 --rounds 1 --device cpu --precision bf16 "
        f"--checkpoint_activations --profile --json {report}".split()
    )
    report = json.loads(report.read_text())
    assert [row["task"] for row in report["rows"]] == list(bench.TASKS)
    step = report["rows"][0]
    assert step["saved_ratio"] < 0.5 and step["speedup"] > 0 and step["own"]["calls"] > 0
    assert 0 < step["own"]["peak_share"] < 1
    assert step["time_of_without"] == step["own"]["seconds"] / step["without"]["seconds"]
    assert step["own"]["saved_mb_per_image"] < step["without"]["saved_mb_per_image"]
    *table, peaks = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(bench.TASKS) * (1 + 6) and "convolution" in "".join(table)
    assert peaks.startswith("matrix peak") and "fp32 " in peaks and "bf16 " in peaks


@pytest.mark.slow
def test_bench_of_compiled_blocks():
    options = "--presets digits --batches 2 --rounds 1 --device cpu --tasks evaluate --compile"
    [row] = bench.main(options.split())["rows"]
    assert row["time_of_without"] > 0


@pytest.mark.slow
def test_what_compiling_costs():
    [row] = compiled.main("digits --batch 2 --rounds 1 --device cpu".split())
    assert row["compile_train_s"] > row["again_train_s"] > 0 and row["train_s"] > 0


def test_growth(tmp_path):
    """Twice the pixels or blocks: about twice the bytes; a larger batch: as many an image."""
    picture, report = tmp_path / "growth.png", tmp_path / "growth.json"
    growth.main(
        f"--width 8 --rounds 1 --largest 32 --device cpu --out {picture} --json {report}".split()
    )
    rows = {(row["series"], row["value"]): row for row in json.loads(report.read_text())}
    small, large = rows["resolution", 16], rows["resolution", 32]
    assert large["saved_mb"] / small["saved_mb"] == pytest.approx(4, rel=0.1)
    assert rows["batch", 32]["saved_mb"] == pytest.approx(rows["batch", 1]["saved_mb"], rel=0.01)
    blocks = [rows["depth", k]["saved_mb"] for k in (2, 4, 8)]
    assert blocks[2] - blocks[1] == pytest.approx(2 * (blocks[1] - blocks[0]), rel=0.05)
    for row in rows.values():
        assert row["checkpointed_mb"] < row["saved_mb"] <= row["peak_mb"]
        assert row["train_ms"] > 0 and row["evaluate_ms"] > 0
    assert imageio.imread(picture).shape[1] > 1000


def test_step_benchmark(capsys):
    report = step.main("--preset photos32 --batch 2 --steps 1 --rounds 1".split())
    assert report["step_s"] > report["ema_ms"] / 1e3 > 0 and report["data_ms"] > 0
    assert report["parallel_efficiency"] > 0 and report["step_s_of_two_processes"] > 0
    assert "parallel_efficiency" in capsys.readouterr().out
    with pytest.raises(UserError, match="--preset digits: photos32 has 32 pixels"):
        step.main(["--preset", "digits"])


def test_memory_and_start_do_not_grow_with_the_file():
    """The figures of docs/data.md, with room for a loaded machine."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "loading.py", "memory"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["file_bytes"] > 15e9
    assert figures["resident_growth_mb"] < 300
    assert figures["first_batch_s"] < 10  # 2 on a quiet machine
