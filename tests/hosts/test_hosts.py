"""mpirun over several hosts: the code crosses a network, also a slow one."""

import json
import re
import time

import pytest
from conftest import BUILD, ENVIRONMENT, ROOT
from metrics_fields import without_the_machine

TESTS = BUILD / "tests"
TRAIN = BUILD / "examples/train_lm"
ALL_TO_ALL = BUILD / "benchmarks/benchmark_all_to_all"


def needs(program):
    return pytest.mark.skipif(not program.exists(), reason=f"{program.name} is not built")


@needs(BUILD / "tools/anabranch-bind")
def test_ranks_find_themselves_on_their_hosts(hosts):
    output = hosts.mpirun(3, 2, BUILD / "tools/anabranch-bind", "--show").stdout
    ranks = sorted((json.loads(line) for line in re.findall(r"\{.*\}", output)), key=lambda rank: rank["rank"])
    assert [(r["rank"], r["local_rank"], r["local_size"], r["node"]) for r in ranks] == [
        (i, i % 2, 2, f"n{i // 2 + 1}") for i in range(6)
    ]


@needs(TESTS / "exchange_test")
@pytest.mark.parametrize(
    ("suite", "count", "ranks"),
    [("exchange_test", 2, 2), ("exchange_test", 3, 1), ("hierarchical_test", 2, 2), ("hierarchical_test", 4, 1)],
)
def test_suites_pass_across_the_network(hosts, suite, count, ranks):
    before = [hosts.bytes_sent(name) for name in hosts.names[:count]]
    output = hosts.mpirun(count, ranks, TESTS / suite, timeout=300).stdout
    assert re.search(r"PASSED", output) and not re.search(r"FAILED", output), output
    after = [hosts.bytes_sent(name) for name in hosts.names[:count]]
    # Rows, not only the launcher's words (some 10 kB a host).
    assert all(end - begin > 100_000 for begin, end in zip(before, after)), (before, after)


def train(hosts, count, ranks, name, *options, **run_options):
    output = hosts.base / name
    model = "--hidden 16 --expert-hidden 24 --layers 2 --heads 2 --experts 5 --batch-size 8 --sequence-length 24"
    rest = "--log-interval 1 --validation-sequences 4 --sample-length 8 --deadline 30 --progress lines"
    words = [*model.split(), *rest.split(), "--data", ROOT / "docs/architecture.md", "--output", output, *options]
    return hosts.mpirun(count, ranks, TRAIN, *words, **run_options), output


def curve(output):
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return list(map(without_the_machine, steps))


@needs(TRAIN)
def test_training_over_hosts_is_training_on_one(hosts):
    _, spread = train(hosts, 2, 2, "spread", "--steps", 8)
    _, together = train(hosts, 1, 4, "together", "--steps", 8)
    assert len(curve(spread)) == 8
    assert curve(spread) == curve(together)
    for way in ("hierarchical", "auto"):
        _, other = train(hosts, 2, 2, way, "--steps", 8, "--all-to-all", way)
        assert curve(other) == curve(together)


@needs(TRAIN)
def test_a_killed_rank_on_another_host_ends_the_job_and_is_named(hosts):
    output = hosts.base / "killed"
    log = hosts.base / "killed.log"
    command = hosts.command(2, 2, TRAIN, "--data", ROOT / "docs/architecture.md", "--output", output)
    words = ["--steps", "100000", "--hidden", "16", "--log-interval", "1", "--deadline", "20", "--progress", "lines"]
    with open(log, "wb") as stream:
        job = hosts.start("n1", [*command, *words], env=ENVIRONMENT, stdout=stream, stderr=stream)
    for _ in range(600):
        if "step 3/" in log.read_text():
            break
        time.sleep(0.1)
    hosts.run("n2", ["bash", "-c", "exec pkill -KILL --oldest --ns $$ --nslist net train_lm"])
    assert job.wait(timeout=60) != 0
    text = log.read_text()
    # mpirun's words, or those of a rank that has lost it: ranks 2 and 3 are on n2.
    named = r"process rank [23] with PID \d+ on node n2 exited on signal 9|rank [013]: error: .*rank [23]\b"
    assert re.search(named, text), text
    left = hosts.run("head", ["pgrep", "--full", f"[-]-output {output}"], check=False).stdout
    assert left == ""


@needs(ALL_TO_ALL)
def test_a_shaped_link_is_as_slow_as_it_says(hosts):
    megabits, kilobytes, ranks = 100, 256, 2
    for name in ("n3", "n4"):
        hosts.shape(name, megabits)
    slots = "n3:2,n4:2"
    flags = f"--mca plm_rsh_agent {hosts.remote_shell()} --mca btl_tcp_if_include eth0"
    record = hosts.base / "all_to_all.json"
    program = [ALL_TO_ALL, "--bytes", kilobytes * 1024, "--rounds", 3, "--json", record]
    script = [ROOT / "launch/mpirun.sh", "-n", 2 * ranks, "--hosts", slots, "--mpirun-flags", flags]
    hosts.run("n3", [*script, *program], env=ENVIRONMENT)
    result = json.loads(record.read_text())
    assert (result["ranks"], result["nodes"]) == (4, 2)
    # Four pairs a direction, each of at least half the mean, over one link; less what the bucket holds.
    floor_ms = (ranks**2 * kilobytes * 1024 / 2 - 64_000) * 8 / (megabits * 1000)
    for way in ("flat_ms", "hierarchical_ms"):
        assert result["results"][0][way] > floor_ms, result
