"""Random numbers of a step: others on every rank, in every step."""

import subprocess
import sys

from runs import BIN, ROOT, TINY, environment, free_port


def test_ranks_draw_different_noise(tmp_path):
    """And other noise at every step: the seeds of all steps on both ranks differ."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train\n"
        "step = train.training_step\n"
        "def noted_step(*args):\n"
        "    with open(f'seeds-{train.world().rank}', 'a') as file:\n"
        "        print(torch.initial_seed(), file=file)\n"
        "    return step(*args)\n"
        "train.training_step = noted_step\n"
        "train.run_command(train.main)\n"
    )
    command = [BIN / "mpiexec", "-n", "2", sys.executable, driver, *TINY]
    done = subprocess.run(
        [*command, "--port", str(free_port())],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seeds = [(tmp_path / f"seeds-{rank}").read_text().split() for rank in range(2)]
    assert len(seeds[0]) == len(seeds[1]) == 1397 // 2 // 32
    assert len({*seeds[0], *seeds[1]}) == 2 * len(seeds[0])
