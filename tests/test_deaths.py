"""A process that is lost is noticed by its sign of life, where no socket tells of it."""

import os
import signal
import time

import pytest
from runs import SMALL, check_latest, free_port, start

RUN = [*SMALL, "--n_batch", "40", "--num_epochs", "1", "--iters_per_print", "1",
       "--iters_per_save", "4", "--resume"]  # fmt: skip
ROOM_S = 90  # that tests allow on a busy machine beyond what is promised on an idle one


class AsOverNccl:
    """Rank 0 waits in step 6 as in a collective that never ends; rank 1 is killed or stopped."""

    def __init__(self, number):
        self.number = number

    def __call__(self):
        import train

        original, me = train.training_step, train.world().rank

        def wrapped(H, x, target, vae, ema_vae, optimizer, iterate):
            if iterate == 6 and me == 1:
                os.kill(os.getpid(), self.number)
            while iterate == 6:
                time.sleep(1)
            return original(H, x, target, vae, ema_vae, optimizer, iterate)

        train.training_step = wrapped


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_lost_rank_is_noticed_where_no_socket_breaks(number, tmp_path):
    runs = start(2, [*RUN, "--timeout", "600"], tmp_path, AsOverNccl(number))
    try:
        while not check_latest(tmp_path / "test"):
            assert runs[0].process.exitcode is None
            time.sleep(0.02)
        lost = time.monotonic()
        status, text = runs[0].wait()
        noticed = time.monotonic() - lost
    finally:
        for run in runs:
            run.kill()
    print(f"{number.name}: all ended after {noticed:.1f} s")
    assert status == 1 and noticed < 12 + ROOM_S
    assert "no sign of life from another process" in text
    assert "rank 1 is gone or hangs in step" in text


def _fails_in_its_last_save():
    import train

    original = train.save

    def save(H, name, at, *args, last=False):
        if last and train.world().rank == 0:
            time.sleep(0.5)  # the others are at the end by then
            raise ValueError("a fault of the last save")
        return original(H, name, at, *args, last=last)

    train.save = save


def test_all_end_with_a_rank_that_fails_in_its_last_save(tmp_path):
    port = ["--port", str(free_port())]
    runs = start(2, [*RUN, *port, "--timeout", "600"], tmp_path, _fails_in_its_last_save)
    statuses = [run.wait() for run in runs]
    assert [status for status, _ in statuses] == [1, 1], statuses
    assert "rank 0: ValueError: a fault of the last save" in statuses[0][1]
    assert "rank 0 raised ValueError: a fault of the last save" in statuses[1][1]
    runs = start(2, [*RUN, *port], tmp_path)  # at once, on the same port
    for run in runs:
        status, text = run.wait()
        assert status == 0, text
    assert "resuming from" in (tmp_path / "out0").read_text()


@pytest.mark.slow
def test_a_job_that_is_suspended_goes_on(tmp_path):
    """As schedulers and laptops do it: all processes stop, and are continued much later."""
    runs = start(2, [*RUN, "--num_epochs", "100000", "--timeout", "20"], tmp_path)
    while not check_latest(tmp_path / "test"):
        assert all(run.process.exitcode is None for run in runs), runs[0].output.read_text()
        time.sleep(0.02)
    for number, seconds in ((signal.SIGSTOP, 15), (signal.SIGCONT, 0)):
        for run in runs:
            os.kill(run.process.pid, number)
        time.sleep(seconds)  # the very thing: a time in which nothing runs
    saved = check_latest(tmp_path / "test")
    while check_latest(tmp_path / "test") < saved + 40:
        assert all(run.process.exitcode is None for run in runs), runs[0].output.read_text()[-999:]
        time.sleep(0.05)
    time.sleep(8)  # longer than a lost rank takes to be noticed
    runs[0].process.terminate()
    assert [run.wait()[0] for run in runs] == [143, 143]
