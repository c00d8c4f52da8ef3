"""Jobs in which one rank dies, stalls, stays away or differs: how the others end.

ANABRANCH_FAULT_RANK names the built program, MPIEXEC the launcher (default: mpirun). With
--enable-recovery mpirun lets the survivors of a failure go on, so that they must end by themselves;
without, as users run it, it ends the job as soon as one rank has failed.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
import uuid

import pytest

RANKS = 4
CULPRIT = 2
DEADLINE = 2.0
# Start and end of processes on a busy machine.
MARGIN = 20.0
# How much longer than the deadline a survivor may take to end its call on a busy machine.
SURVIVOR_MARGIN = 3.0

PROGRAM = os.environ.get("ANABRANCH_FAULT_RANK", "build/release/tests/fault_rank")
MPIEXEC = os.environ.get("MPIEXEC", "mpirun")
MARKER = "ANABRANCH_FAULT_JOB"
# Several ranks on one GPU.
SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "8"}


def mpi_version():
    if not shutil.which(MPIEXEC):
        return ""
    return subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True).stdout


pytestmark = pytest.mark.skipif(
    not re.search(r"\((Open MPI|OpenRTE)\) 4\.", mpi_version()),  # mpirun's words, and mpiexec's
    reason="--enable-recovery is of Open MPI 4",
)


@dataclasses.dataclass
class Ending:
    """How one rank says it ended."""

    rank: int
    seconds: float
    peers: list
    what: str


@dataclasses.dataclass
class Outcome:
    returncode: int
    endings: dict
    statuses: dict
    output: str

    @property
    def survivors(self):
        return [ending for rank, ending in sorted(self.endings.items()) if rank != CULPRIT]


class Job:
    """The ranks of one mpirun, recognised by a variable in their environment."""

    def __init__(self, log, scenario, deadline, recovery, flags, communicator, culprit):
        self.log = log
        self.marker = f"{MARKER}={uuid.uuid4()}"
        environment = SHARED_GPU | dict(os.environ, OMP_NUM_THREADS="1")
        environment.update([self.marker.split("=")])
        environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        command = [PROGRAM, scenario, str(round(deadline * 1000)), communicator, str(culprit)]
        if recovery:
            note = 'echo "status rank=$OMPI_COMM_WORLD_RANK code=$?" >&2'
            command = ["bash", "-c", f'"$@"; {note}', "rank"] + command
            flags = ["--enable-recovery", *flags]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [MPIEXEC, "--oversubscribe", "--bind-to", "none", "-x", MARKER, *flags]
                + ["-np", str(RANKS), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pids(self, state=None):
        """Living processes of the job, or those in that state ("T": stopped)."""
        found = []
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
                current = (process / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.marker.encode() in variables and current != "Z" and state in (None, current):
                found.append(int(process.name))
        return found

    def ranks(self):
        """The processes of the ranks themselves."""
        name = pathlib.Path(PROGRAM).name
        return [
            pid
            for pid in self.pids()
            if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == name[:15]
        ]

    def endings(self):
        pattern = r"^ended rank=(\d+) seconds=(\S+) peers=(\S*) what=(.*)$"
        return {
            int(rank): Ending(
                int(rank), float(seconds), [int(peer) for peer in peers.split(",") if peer], what
            )
            for rank, seconds, peers, what in re.findall(pattern, self.log.read_text(), re.M)
        }

    def wait_until(self, condition, seconds):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s\n{self.log.read_text()}"
            time.sleep(0.02)

    def outcome(self, seconds):
        self.wait_until(lambda: self.process.poll() is not None, seconds)
        # mpirun reaps its children before it ends; what is left then is an orphan.
        assert self.pids() == [], self.log.read_text()
        output = self.log.read_text()
        statuses = dict(re.findall(r"^status rank=(\d+) code=(\d+)$", output, re.M))
        return Outcome(
            self.process.returncode,
            self.endings(),
            {int(rank): int(code) for rank, code in statuses.items()},
            output,
        )

    def end(self):
        for pid in [self.process.pid, *self.pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    jobs = []

    def start_job(
        scenario, deadline=DEADLINE, recovery=True, flags=(), communicator="mpi", culprit=CULPRIT
    ):
        log = tmp_path / f"{len(jobs)}.log"
        flags = list(flags)
        jobs.append(Job(log, scenario, deadline, recovery, flags, communicator, culprit))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.end()


def check_survivors(outcome, deadline=DEADLINE, says=f"rank {CULPRIT}", culprit=CULPRIT):
    """Every survivor ended by an exception, in time, and named the culprit."""
    survivors = [ending for rank, ending in sorted(outcome.endings.items()) if rank != culprit]
    expected = [rank for rank in range(RANKS) if rank != culprit]
    assert [ending.rank for ending in survivors] == expected, outcome.output
    for ending in survivors:
        assert says in ending.what, outcome.output
        assert ending.seconds < deadline + SURVIVOR_MARGIN, outcome.output
        assert outcome.statuses[ending.rank] == 1, outcome.output


def where_mpi_survives(start_job, attempts=3):
    """The outcome of a job in which Open MPI itself did not hang. Rarely, a survivor that was just
    sending to the dead peer connects to it anew and never comes back from MPI, which says so."""
    for attempt in range(attempts):
        job = start_job()
        try:
            return job.outcome(DEADLINE + MARGIN)
        except AssertionError:
            hung = "Open MPI failed to TCP connect to a peer" in job.log.read_text()
            if not hung or attempt + 1 == attempts:
                raise
            job.end()


@pytest.mark.parametrize("transport", ["vader", "tcp"])
def test_killed_in_the_middle_of_a_collective(start, transport):
    outcome = where_mpi_survives(
        lambda: start("killed", flags=["--mca", "btl", f"self,{transport}"])
    )
    check_survivors(outcome)
    assert outcome.statuses[CULPRIT] == 128 + signal.SIGKILL
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output


STEPS = ["killed_in_a_training_step", "killed_in_a_step_in_chunks", "killed_while_gradients_are_summed"]


WEIGHTS = ["killed_while_weights_travel", "killed_while_weights_travel_beside"]


@pytest.mark.parametrize("scenario", [*STEPS, "killed_in_a_step_in_pairs", *WEIGHTS, "killed_in_rounds_of_slices"])
def test_killed_in_a_training_step(start, scenario):
    outcome = start(scenario).outcome(DEADLINE + MARGIN)
    check_survivors(outcome)
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output


def test_stalled_and_woken_too_late(start):
    job = start("stalled")
    job.wait_until(lambda: set(job.endings()) >= {0, 1, 3}, DEADLINE + MARGIN)
    stopped = job.pids(state="T")
    assert len(stopped) == 1
    os.kill(stopped[0], signal.SIGCONT)
    outcome = job.outcome(DEADLINE + MARGIN)
    check_survivors(outcome)
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output
    # It learns what the others think of it, and does not wait for them.
    assert f"rank {CULPRIT} (dead or stalled)" in outcome.endings[CULPRIT].what
    assert outcome.statuses[CULPRIT] == 1


def test_arrives_too_late(start):
    outcome = start("late").outcome(2 * DEADLINE + MARGIN)
    check_survivors(outcome, says=f"rank {CULPRIT} (dead or stalled)")
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output
    assert f"rank {CULPRIT} (dead or stalled)" in outcome.endings[CULPRIT].what


def test_never_makes_a_communicator(start):
    outcome = start("absent").outcome(4 * DEADLINE + MARGIN)
    check_survivors(outcome, says="make_mpi_communicator waited 2.0 s")


def test_leaves_without_an_error(start):
    outcome = start("leaves").outcome(DEADLINE + MARGIN)
    check_survivors(outcome, says=f"rank {CULPRIT} has come to the end of its program")
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output
    assert outcome.statuses[CULPRIT] == 0


def test_group_destroyed_on_one_rank_only(start):
    outcome = start("destroyed").outcome(2 * DEADLINE + MARGIN)
    check_survivors(outcome)
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output
    assert outcome.endings[CULPRIT].what == "nothing"


def test_a_child_that_ends_by_itself_takes_nothing_along(start):
    outcome = start("forks").outcome(MARGIN)
    assert outcome.returncode == 0, outcome.output
    assert {ending.what for ending in outcome.endings.values()} == {"nothing"}
    assert sorted(outcome.endings) == list(range(RANKS))


COLLECTIVES = ["all_gather", "all_reduce", "all_to_all_v", "barrier", "broadcast", "split"]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_first_collective_beside_a_dead_rank(start, collective):
    outcome = where_mpi_survives(lambda: start(f"first_{collective}"))
    check_survivors(outcome)
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output


def test_ends_by_an_exception(start):
    deadline = 60.0  # which nobody has to wait for
    outcome = start("throws", deadline=deadline).outcome(MARGIN)
    check_survivors(outcome, deadline=0, says=f"rank {CULPRIT} has exited with status 1")
    assert outcome.endings[CULPRIT].what == "no more data"


def test_out_of_memory_inside_backward(start):
    outcome = start("out_of_memory", deadline=60.0).outcome(MARGIN)
    check_survivors(outcome, deadline=10, says=f"rank {CULPRIT} has exited with status 1")
    assert "bad_alloc" in outcome.endings[CULPRIT].what


def test_blame_travels_along_a_chain_of_waiting_ranks(start):
    deadline = 4.0
    outcome = start("chain", deadline=deadline).outcome(deadline + MARGIN)
    check_survivors(outcome, deadline=deadline, says=f"rank {CULPRIT} (dead or stalled)")


def test_other_options(start):
    outcome = start("other_options", deadline=60.0).outcome(MARGIN)
    check_survivors(outcome, deadline=0, says="rank 2 has top_k = 3 where rank 0 has 2")
    assert "rank 2 has top_k = 3" in outcome.endings[CULPRIT].what


def test_other_calls(start):
    outcome = start("other_calls").outcome(DEADLINE + MARGIN)
    check_survivors(outcome, says="the ranks do not make the same calls")


def test_other_shapes(start):
    outcome = start("other_shapes", deadline=60.0).outcome(MARGIN)
    check_survivors(outcome, deadline=0, says="the ranks' arguments do not fit")


def test_long_computations_are_no_reason_for_alarm(start):
    outcome = start("slow_together").outcome(2 * DEADLINE + MARGIN)
    assert outcome.returncode == 0, outcome.output
    assert sorted(outcome.statuses.items()) == [(rank, 0) for rank in range(RANKS)]


def stop_all_for(job, seconds):
    """As a batch system stops a whole job, or a machine sleeps."""
    job.wait_until(lambda: job.log.read_text().count("exchanging") == RANKS, MARGIN + NCCL_MARGIN)
    ranks = job.ranks()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in ranks:
            os.kill(pid, number)
        time.sleep(seconds if number == signal.SIGSTOP else 0)


def test_ranks_that_are_all_stopped_go_on(start):
    job = start("exchange_for_a_while", deadline=1.0)
    stop_all_for(job, 2.5)
    outcome = job.outcome(5 * MARGIN)  # it computes for as long as a loaded machine takes
    assert outcome.returncode == 0, outcome.output
    assert sorted(outcome.statuses.items()) == [(rank, 0) for rank in range(RANKS)]


@pytest.mark.parametrize("scenario", ["killed", "stalled", "leaves"])
def test_plain_mpirun_ends_the_job_within_the_deadline(start, scenario):
    outcome = start(scenario, recovery=False).outcome(DEADLINE + MARGIN)
    assert outcome.returncode != 0, outcome.output
    if scenario != "killed":  # where mpirun is faster than the deadline
        assert outcome.survivors and f"rank {CULPRIT}" in outcome.survivors[0].what


@pytest.mark.parametrize("scenario", ["throws", "other_options"])
def test_plain_mpirun_ends_the_job_at_once_after_an_exception(start, scenario):
    outcome = start(scenario, deadline=60.0, recovery=False).outcome(MARGIN)
    assert outcome.returncode == 1, outcome.output


def nccl_obstacle():
    """Why ranks cannot be tied by NCCL here; empty if they can."""
    info = pathlib.Path(PROGRAM).parent.parent / "examples" / "info"
    text = subprocess.run([info], capture_output=True, text=True).stdout if info.exists() else ""
    gpus = re.search(r"^GPUs: (\d+)", text, re.M)
    if not gpus or "NCCL 2" not in text:
        return "no GPU, or a build without NCCL"
    if int(gpus[1]) < RANKS and "several ranks on one GPU" not in text:
        return f"{RANKS} ranks on {gpus[1]} GPUs need NCCL 2.30.3"
    return ""


NCCL_OBSTACLE = nccl_obstacle()
needs_nccl = pytest.mark.skipif(bool(NCCL_OBSTACLE), reason=NCCL_OBSTACLE)
on_both_ways = pytest.mark.parametrize("communicator", ["nccl", "peer_memory"])
# The first collective of ranks that share a GPU takes long.
NCCL_DEADLINE = 6.0
NCCL_MARGIN = 60.0


@needs_nccl
@on_both_ways
@pytest.mark.parametrize("scenario", ["killed", *STEPS])
@pytest.mark.parametrize("culprit", [0, CULPRIT])
def test_nccl_killed(start, scenario, culprit, communicator):
    job = start(scenario, NCCL_DEADLINE, communicator=communicator, culprit=culprit)
    outcome = job.outcome(NCCL_DEADLINE + NCCL_MARGIN)
    check_survivors(outcome, NCCL_DEADLINE, says=f"rank {culprit}", culprit=culprit)
    for ending in outcome.endings.values():
        assert ending.peers == [culprit], outcome.output


@needs_nccl
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_nccl_first_collective_beside_a_dead_rank(start, collective):
    outcome = start(f"first_{collective}", NCCL_DEADLINE, communicator="nccl").outcome(
        NCCL_DEADLINE + NCCL_MARGIN
    )
    check_survivors(outcome, NCCL_DEADLINE)
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output


@needs_nccl
@on_both_ways
def test_nccl_group_destroyed_on_one_rank_only(start, communicator):
    outcome = start("destroyed", NCCL_DEADLINE, communicator=communicator).outcome(
        3 * NCCL_DEADLINE + NCCL_MARGIN
    )
    check_survivors(outcome, NCCL_DEADLINE)


@needs_nccl
@on_both_ways
def test_nccl_stalled_and_woken_too_late(start, communicator):
    culprit = CULPRIT
    job = start("stalled", NCCL_DEADLINE, communicator=communicator)
    survivors = set(range(RANKS)) - {culprit}
    job.wait_until(lambda: set(job.endings()) >= survivors, NCCL_DEADLINE + NCCL_MARGIN)
    (stopped,) = job.pids(state="T")
    os.kill(stopped, signal.SIGCONT)
    outcome = job.outcome(NCCL_DEADLINE + NCCL_MARGIN)
    check_survivors(outcome, NCCL_DEADLINE, says=f"rank {culprit}", culprit=culprit)
    assert all(outcome.endings[rank].peers == [culprit] for rank in survivors), outcome.output
    assert outcome.statuses[culprit] == 1


@needs_nccl
@on_both_ways
def test_nccl_ranks_that_are_all_stopped_go_on(start, communicator):
    job = start("exchange_for_a_while", NCCL_DEADLINE, communicator=communicator)
    stop_all_for(job, 2 * NCCL_DEADLINE)
    outcome = job.outcome(NCCL_DEADLINE + NCCL_MARGIN)
    assert outcome.returncode == 0, outcome.output


@needs_nccl
@pytest.mark.parametrize("scenario", ["late", "absent_from_nccl"])
def test_nccl_rank_that_comes_too_late(start, scenario):
    outcome = start(scenario, NCCL_DEADLINE, communicator="nccl").outcome(
        3 * NCCL_DEADLINE + NCCL_MARGIN
    )
    check_survivors(outcome, 2 * NCCL_DEADLINE)
    assert all(ending.peers == [CULPRIT] for ending in outcome.survivors), outcome.output


@needs_nccl
def test_nccl_ends_by_an_exception(start):
    outcome = start("throws", NCCL_DEADLINE, communicator="nccl").outcome(
        NCCL_DEADLINE + NCCL_MARGIN
    )
    check_survivors(outcome, NCCL_DEADLINE)
    assert outcome.endings[CULPRIT].what == "no more data"


@needs_nccl
def test_nccl_long_computations_are_no_reason_for_alarm(start):
    outcome = start("slow_together", NCCL_DEADLINE, communicator="nccl").outcome(
        2 * NCCL_DEADLINE + NCCL_MARGIN
    )
    assert outcome.returncode == 0, outcome.output
