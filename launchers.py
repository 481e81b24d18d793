"""Which of how many processes this is, on which device: what its launcher tells."""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import warnings
import zlib

import torch

from errors import UserError


class Launcher:
    """What a run must know of whoever started its processes. This one is nobody.

    Each launcher is a subclass, in LAUNCHERS: nothing else knows which there are.
    """

    pairs = ()  # its variables for a process's number and for how many there are: it sets both
    restart_count = None  # the variable in which it counts how often it started a job anew
    forsakes = False  # it dies of a signal and leaves its processes running
    joins = False  # its processes can tell each other where to meet, see from_rank_0

    def started(self, env):
        """Whether these are the variables of a process that it started."""
        return any(set(pair) <= env.keys() for pair in self.pairs)

    def world(self, env):
        """The World that its variables describe."""
        return World()

    def meeting_point(self, env):
        """(host, port) where its processes are to meet; None where it names none."""

    def host(self, env):
        """The host of rank 0, by a name that the others know."""
        return env.get("MASTER_ADDR") or "127.0.0.1"

    def serves_store(self, env):
        """Whether it keeps the processes' table, which then outlives them, at the meeting point."""
        return False

    def from_rank_0(self, value):
        """The value of rank 0, before the processes have met."""
        raise NotImplementedError

    def end_others(self, status):
        """Ends the run's other processes, where it has a way to."""

    def leave(self):
        """Tells it that this process ends, and all is well."""

    def __repr__(self):
        return type(self).__name__


ALONE = Launcher()


@dataclasses.dataclass(frozen=True)
class World:
    """Which of how many processes this is, and who started them.

    job is the launcher's name of the job, the same in all its processes and in no other job,
    where it gives one. own_gpus is how many GPUs it shows to each process alone, if it says so.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: Launcher = ALONE
    job: str | None = None
    own_gpus: int = 1


def _int_from(env, name, default=None):
    text = env.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        found, remedy = f"is {text!r}", "unset it"
        if text is None:
            found, remedy = "is not set", "unset what a launcher has left in this shell"
        raise UserError(
            f"environment variable {name} {found}: its launcher must set a whole number; "
            f"start through torchrun, mpiexec or srun, or {remedy}"
        ) from None


# ---- the launchers -------------------------------------------------------------------------


class Hands(Launcher):
    """Whatever else sets the variables that torch.distributed knows: a script, a cluster's own."""

    pairs = (("RANK", "WORLD_SIZE"),)

    def world(self, env):
        # One process a host is what sets no LOCAL_RANK.
        return self._world(env, _int_from(env, "LOCAL_RANK", 0))

    def _world(self, env, local_rank):
        rank, size = (_int_from(env, name) for name in self.pairs[0])
        return World(rank, size, local_rank, _int_from(env, "LOCAL_WORLD_SIZE", 1), self)

    def meeting_point(self, env):
        host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
        if not host or not (port or "").strip().isdecimal() or not 0 < int(port) < 1 << 16:
            raise UserError(
                f"the launcher's variables lead to no meeting point: MASTER_ADDR is {host!r}, "
                f"MASTER_PORT {port!r}; start through torchrun, or set a host and a port"
            )
        return host, int(port)


class Torchrun(Hands):
    """torchrun, and what is built on it."""

    restart_count = "TORCHELASTIC_RESTART_COUNT"
    forsakes = True  # of signals other than TERM, INT, HUP and QUIT

    def started(self, env):
        return "TORCHELASTIC_RUN_ID" in env

    def world(self, env):
        return self._world(env, _int_from(env, "LOCAL_RANK"))

    def serves_store(self, env):
        return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class Slurm(Launcher):
    """srun."""

    pairs = (("SLURM_PROCID", "SLURM_NTASKS"),)
    restart_count = "SLURM_RESTART_COUNT"

    def started(self, env):
        """Whether srun started this process itself. A batch script on its own is no job step."""
        if "SLURM_PROCID" not in env or not {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"} & env.keys():
            return False
        # mpiexec within a job starts its proxies by srun: theirs are then SLURM's variables. srun
        # that speaks PMI itself gives both kinds, and they agree.
        theirs = env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS"))
        others = [(env.get(rank), env[size]) for rank, size in Mpi.pairs if size in env]
        return all(other == theirs for other in others)

    def world(self, env):
        total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        rank, size = _int_from(env, "SLURM_PROCID"), _int_from(env, total)
        # "2(x3),1": two tasks on each of three nodes, one on the fourth.
        per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        local_size = int(per_node[0]) if per_node else 1
        local_rank = _int_from(env, "SLURM_LOCALID", 0)
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", self.restart_count)
        job = "slurm " + ".".join(env.get(name, "0") for name in names)
        # "2", or "a100:2"; without it, all GPUs of the job are shown to each task.
        shown = re.findall(r"(\d+)(?:,|$)", env.get("SLURM_GPUS_PER_TASK", "1"))
        return World(
            rank,
            size,
            local_rank,
            local_size,
            self,
            job if "SLURM_JOB_ID" in env else None,
            sum(map(int, shown)),
        )

    def host(self, env):
        return first_host(env)


class Mpi(Launcher):
    """mpiexec, of any MPI, and LSF's jsrun: the MPI library of mpi4py says what is what."""

    # Open MPI, MVAPICH, jsrun, then MPICH with Intel MPI.
    pairs = (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
        ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    )
    joins = True

    def started(self, env):
        return "PMIX_RANK" in env or any(size in env for _, size in self.pairs)

    def world(self, env):
        sizes = [_int_from(env, size) for _, size in self.pairs if size in env]
        return _mpi_world(sizes[0] if sizes else None)  # PMIx tells no size

    def from_rank_0(self, value):
        return _mpi().COMM_WORLD.bcast(value, root=0)

    def end_others(self, status):
        _mpi().COMM_WORLD.Abort(status)

    def leave(self):
        _mpi().Finalize()


def _mpi():
    """mpi4py's MPI, imported only where an MPI launcher started the process."""
    from mpi4py import MPI

    return MPI


def _mpi_world(size):
    """That of the MPI library; size is what the launcher's variables say, or None (PMIx)."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of another MPI's variables, see below
            MPI = _mpi()
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpiexec, but mpi4py does not import ({error}): "
            f"install mpi4py and an MPI, or use torchrun"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size != size and (size or comm.size == 1):
        started = f"mpiexec started {size} processes" if size else "PMIX_RANK is set"
        raise UserError(
            f"{started}, but the MPI library of mpi4py sees {comm.size}: "
            f"use the mpiexec of that library, or torchrun"
        )
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return World(comm.rank, comm.size, local.rank, local.size, MPIEXEC)


TORCHRUN, HANDS, SLURM, MPIEXEC = Torchrun(), Hands(), Slurm(), Mpi()
# The first that started a process: torchrun may run within a step of srun, and sets RANK itself.
LAUNCHERS = (TORCHRUN, HANDS, SLURM, MPIEXEC)


# ---- which of them it was ------------------------------------------------------------------


def find_world(env):
    """The World that the launcher's environment variables describe.

    Raises:
        UserError: for variables that contradict each other or the MPI library in use, or are known
            by half.
    """
    launcher = next((one for one in LAUNCHERS if one.started(env)), None)
    if launcher is None:
        _refuse_halves(env)
        return World()
    world = launcher.world(env)
    if not (0 <= world.rank < world.size and world.local_rank >= 0):
        raise UserError(
            f"the launcher's variables say rank {world.rank} of {world.size}, local rank "
            f"{world.local_rank}: a rank lies from 0 to size - 1; start through the launcher"
        )
    return world


# Pairs of launchers that are not known here, of which one tells that there may be others.
FOREIGN = (
    ("LOCAL_RANK", "WORLD_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("PALS_RANKID", "PMI_SIZE"),
    ("ALPS_APP_PE", "PMI_SIZE"),
    ("MPI_RANKID", "MPI_NRANKS"),
    ("MVP_COMM_WORLD_RANK", "MVP_COMM_WORLD_SIZE"),
)


def _refuse_halves(env):
    """Raises UserError where a launcher's variables are there by half: n runs would train alone."""
    pairs = [pair for launcher in LAUNCHERS for pair in launcher.pairs]
    for names in dict.fromkeys([*pairs, *FOREIGN]):
        there = [name for name in names if name in env]
        # A batch script of SLURM has its task's number, but is no job step; one process is alone.
        alone = env.get(names[1]) == "1" or names[0] == "SLURM_PROCID" and "SLURM_JOB_ID" in env
        if not there or alone or there == ["SLURM_NTASKS"]:
            continue
        if len(there) == 1:
            [missing] = set(names) - set(there)
            raise UserError(
                f"{there[0]} is set to {env[there[0]]!r} without {missing}: a launcher sets both; "
                f"start through torchrun, mpiexec or srun, or unset it to train alone"
            )
        if names in FOREIGN:
            raise UserError(
                f"{names[0]} is set, of a launcher that is not known here: start through torchrun, "
                f"mpiexec or srun, or unset it to train alone"
            )


@functools.cache
def world():
    """This process's World, found once."""
    return find_world(os.environ)


def first_host(env):
    """The first host of the job: MASTER_ADDR, or the head of SLURM's list of nodes."""
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    if "[" in nodes and shutil.which("scontrol"):
        argv = ["scontrol", "show", "hostnames", nodes]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
            if names := done.stdout.split():
                return names[0]
    # "gpu-a[001-004,7]-ib,login": of every bracket the first number, up to a comma outside them.
    head = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[\s*([^\],-]*)[^\]]*\]", r"\1", head).strip()


def is_later_attempt(env):
    """Whether a launcher has started this job before: what lies in its folder is its own."""
    names = [launcher.restart_count for launcher in LAUNCHERS if launcher.restart_count]
    return any(env.get(name, "").strip("0 ").isdigit() for name in names)


def lone_warning(env):
    """A line where one process trains alone though SLURM was asked for several, else None."""
    tasks = env.get("SLURM_NTASKS", "1")
    if world().launcher is not ALONE or tasks == "1" or "SLURM_PROCID" not in env:
        return None
    return f"WARNING: the job has {tasks} tasks, but srun did not start this one: it trains alone"


def port_of_job(job, default):
    """The port that a job's processes meet on: a function of its name, so that two jobs differ.

    From 10000 to 29999, below those that systems give to outgoing connections.
    """
    return 10000 + zlib.crc32(job.encode()) % 20000 if job else default


def resolve_device(name):
    """The torch device name of this process: "cpu", "cuda:<local rank>" or the GPU that is named.

    Args:
        name: "auto" or None (CUDA where there is one), "cpu", "cuda" or "cuda:1", also as a
            torch.device.

    Raises:
        UserError: if CUDA is asked for and missing, or has fewer devices than local ranks.
    """
    name = str(name or "auto")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no CUDA device here; use --device cpu")
    if name.startswith("cuda:"):
        return name
    local_rank, devices = world().local_rank, torch.cuda.device_count()
    if devices in (1, world().own_gpus):  # the launcher shows each process its own
        local_rank = 0
    if local_rank >= devices:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this host has {devices}; start at "
            f"most {devices} processes on it, or use --device cpu"
        )
    return f"cuda:{local_rank}"
