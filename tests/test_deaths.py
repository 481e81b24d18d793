"""A process that is lost is noticed by its sign of life, where no socket tells of it."""

import os
import signal
import time

import pytest
from faulty_train import Fault
from runs import SMALL, free_port, saved_step, start

import endings

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


def test_patience_begins_anew_with_the_first_step(monkeypatch):
    watch, now = object.__new__(endings._Watch), time.monotonic()
    watch.signs = {1: ("3", now - 50)}
    monkeypatch.setattr(endings, "_last_step", None)
    assert not watch.silent()  # a start may take as long
    monkeypatch.setattr(endings, "_last_step", now)
    monkeypatch.setattr(endings, "_began", now)
    assert not watch.silent()
    monkeypatch.setattr(endings, "_began", now - 6)
    assert watch.silent() == [1]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_lost_rank_is_noticed_where_no_socket_breaks(number, tmp_path):
    runs = start(2, [*RUN, "--timeout", "600"], tmp_path, AsOverNccl(number))
    try:
        while not saved_step(tmp_path / "test"):
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


def _lost_before_the_first_step():
    import endings
    import processes
    import train

    endings.START_S = 2

    def load_vaes(*_):
        if train.world().rank == 1:
            while not processes.store().check(["alive/1"]):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(1)

    train.load_vaes = load_vaes


def test_a_rank_that_is_lost_before_the_first_step_is_noticed_too(tmp_path):
    runs = start(2, [*RUN, "--timeout", "600"], tmp_path, _lost_before_the_first_step)
    status, text = runs[0].wait(60)
    assert status == 1 and "no sign of life from another process for 2 s" in text, text
    assert "rank 1 is gone or hangs in step none" in text


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
    port = free_port()
    runs = start(2, [*RUN, "--timeout", "600"], tmp_path, _fails_in_its_last_save, port)
    statuses = [run.wait() for run in runs]
    assert [status for status, _ in statuses] == [1, 1], statuses
    assert "rank 0: ValueError: a fault of the last save" in statuses[0][1]
    assert "rank 0 raised ValueError: a fault of the last save" in statuses[1][1]
    runs = start(2, RUN, tmp_path, port=port)  # at once, on the same port
    for run in runs:
        status, text = run.wait()
        assert status == 0, text
    assert "resuming from" in (tmp_path / "out0").read_text()


class Dies:
    """One rank has a fault in step 6, or rank 0 in its last save: see faulty_train.Fault.strike.

    The time of that is written into `file`.
    """

    def __init__(self, kind, rank, where, file):
        self.kind, self.rank, self.where, self.file = kind, rank, where, file

    def __call__(self):
        import train

        me = train.world().rank

        def strike_if(it_is_time):
            if it_is_time and me == self.rank:
                self.file.write_text(repr(time.time()))
                Fault(self.kind, self.rank, 6).strike(self.kind, None, None, None)

        step, save = train.training_step, train.save

        def faulty_step(*args, **options):
            strike_if(self.where == "step" and args[6] == 6)
            return step(*args, **options)

        def faulty_save(*args, last=False):
            strike_if(self.where == "save" and last)
            return save(*args, last=last)

        train.training_step, train.save = faulty_step, faulty_save


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("where, rank", [("step", 1), ("step", 0), ("save", 0)])
def test_the_times_of_deaths(where, rank, size, workers, tmp_path):
    """Of four kinds, side by side; then the same command, at once and on the same port."""
    argv = [*RUN, "--timeout", "6", "--num_workers", workers]
    cases = {}
    for kind in ("kill", "stop", "hang", "raise"):
        folder, port = tmp_path / kind, free_port()
        folder.mkdir()
        wrap = Dies(kind, rank, where, folder / "struck")
        cases[kind] = folder, port, start(size, argv, folder, wrap, port)
    ended, deadline = {}, time.monotonic() + 180
    while len(ended) < len(cases):
        assert time.monotonic() < deadline, ended
        for kind, (folder, _, runs) in cases.items():
            left = [run for r, run in enumerate(runs) if (kind, r) != ("stop", rank)]
            if kind not in ended and all(run.process.exitcode is not None for run in left):
                ended[kind] = time.time() - float((folder / "struck").read_text())
                runs[rank].kill()
                assert all(run.process.exitcode for run in runs)
        time.sleep(0.02)
    figures = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in sorted(ended.items()))
    print(f"{where}, rank {rank} of {size}, {workers} loader workers: {figures}")
    assert max(ended.values()) < 12 + ROOM_S
    again = {
        kind: start(size, argv, folder, None, port) for kind, (folder, port, _) in cases.items()
    }
    for kind, runs in again.items():
        for run in runs:
            status, text = run.wait()
            assert status == 0, (kind, text)
        assert "resuming from" in (cases[kind][0] / "out0").read_text()


@pytest.mark.slow
def test_a_job_that_is_suspended_goes_on(tmp_path):
    """As schedulers and laptops do it: all processes stop, and are continued much later."""
    runs = start(2, [*RUN, "--num_epochs", "100000", "--timeout", "20"], tmp_path)
    while not saved_step(tmp_path / "test"):
        time.sleep(0.02)
    for number, seconds in ((signal.SIGSTOP, 15), (signal.SIGCONT, 0)):
        for run in runs:
            os.kill(run.process.pid, number)
        time.sleep(seconds)  # the very thing: a time in which nothing runs
    saved = saved_step(tmp_path / "test")
    while saved_step(tmp_path / "test") < saved + 40:
        assert all(run.process.exitcode is None for run in runs), runs[0].output.read_text()[-999:]
        time.sleep(0.05)
    time.sleep(8)  # longer than a lost rank takes to be noticed
    runs[0].process.terminate()
    assert [run.wait()[0] for run in runs] == [143, 143]
