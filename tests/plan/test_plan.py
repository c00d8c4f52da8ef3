"""The planner: links and timelines against times worked out by hand, calibration against a known machine."""

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools/plan"))
import calibrate  # noqa: E402
import check  # noqa: E402
import loans  # noqa: E402
import machine as machines  # noqa: E402
import plots  # noqa: E402
import routing  # noqa: E402
from machine import Link, Machine, Model, Refused  # noqa: E402
from network import Fabric, take_turns  # noqa: E402
from timeline import Layout, Planner, chunks_of, layouts_of, memory_of  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
SEED = random.randrange(2**32)


@pytest.fixture
def generator():
    print("seed", SEED)
    return numpy.random.default_rng(SEED)


def cluster(**changes):
    values = {
        "name": "test",
        "gpus_per_node": 4,
        "flops": 1e12,
        "copy": 1e11,
        "memory": 80e9,
        "node": Link(1e9, 1e-6, 2e-6),
        "network": Link(1e8, 1e-5, 5e-6),
    }
    return Machine(**{**values, **changes})


def uniform(ranks, size):
    return numpy.full((ranks, ranks), float(size)) * (1 - numpy.eye(ranks))


# --- links ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_messages_within_a_node_keep_every_port_busy(ranks):
    done = Fabric(cluster(), ranks).all_to_all(uniform(ranks, 1e6), numpy.zeros(ranks))
    busy = (ranks - 1) * (1e6 / 1e9 + 2e-6)
    assert done == pytest.approx([busy + (1e-6 if ranks > 1 else 0)] * ranks)


def test_equal_messages_over_two_nodes_wait_for_the_network():
    done = Fabric(cluster(), 8).all_to_all(uniform(8, 1e6), numpy.zeros(8))
    # Four messages for the other node through each adapter; those within the node are long done.
    assert done == pytest.approx([4 * (1e6 / 1e8 + 5e-6) + 1e-5] * 8)


@pytest.mark.parametrize("sharers", [1, 2, 4])
def test_a_shared_adapter_carries_its_gpus_messages_one_after_another(sharers):
    done = Fabric(cluster(gpus_per_nic=sharers), 8).all_to_all(uniform(8, 1e6), numpy.zeros(8))
    assert done.max() == pytest.approx(sharers * 4 * (1e6 / 1e8 + 5e-6) + 1e-5)


def test_who_is_sent_most_waits_longest():
    sizes = numpy.zeros((4, 4))
    sizes[:, 2] = 1e6
    sizes[2, 2] = 0
    done = Fabric(cluster(), 4).all_to_all(sizes, numpy.zeros(4))
    assert done[2] == pytest.approx(3 * (1e6 / 1e9 + 2e-6) + 1e-6)
    assert done[0] == pytest.approx(1e6 / 1e9 + 2e-6)


def test_nothing_takes_no_time_and_a_late_sender_is_waited_for():
    ready = numpy.array([0.0, 3.0, 0.0, 0.0])
    assert (Fabric(cluster(), 4).all_to_all(numpy.zeros((4, 4)), ready) == ready).all()
    done = Fabric(cluster(), 4).all_to_all(uniform(4, 1e3), ready)
    assert (done >= 3.0).all()


def test_no_exchange_beats_its_busiest_port(generator):
    for ranks in (2, 4, 8, 16):
        described = cluster(gpus_per_nic=int(generator.choice([1, 2, 4])))
        sizes = generator.integers(0, 10**6, (ranks, ranks)) * (generator.random((ranks, ranks)) < 0.7)
        node, nic = numpy.arange(ranks) // 4, numpy.arange(ranks) // described.gpus_per_nic
        across = sizes * (node[:, None] != node[None, :])
        # Flat: through a rank's own adapter. Hierarchical: through any of its node's.
        for way, port, adapters in (("flat", nic, 1), ("hierarchical", node, 4 // described.gpus_per_nic)):
            loads = [max(across[port == i].sum(), across[:, port == i].sum()) for i in range(port.max() + 1)]
            floor = max(loads) / adapters / described.network.bandwidth
            assert Fabric(described, ranks).all_to_all(sizes, numpy.zeros(ranks), way).max() >= floor * (1 - 1e-9)


def test_two_hops_win_with_many_small_messages_and_lose_with_few_long_ones():
    described = cluster(network=Link(1e8, 1e-5, 5e-5), copy=1e9)
    fabric, ready = Fabric(described, 32), numpy.zeros(32)

    def ratio(size):
        sizes = uniform(32, size)
        return fabric.all_to_all(sizes, ready, "flat").max() / fabric.all_to_all(sizes, ready, "hierarchical").max()

    assert ratio(10) > 2
    assert ratio(1e6) < 1


def test_sums_of_gradients():
    fabric = Fabric(cluster(), 1)
    assert fabric.all_reduce(1e9, 1, 1) == 0
    within = fabric.all_reduce(1e9, 4, 4)
    assert within == pytest.approx(2 * (0.75 + 1e-6))
    # A quarter of it crosses on each of four adapters, twice, half of it each time.
    assert fabric.all_reduce(1e9, 8, 4) - within == pytest.approx(2 * (0.25e9 * 0.5 / 1e8 + 1.5e-5))


# --- routing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "ranks"), [(8, 4), (5, 4), (3, 4), (64, 8)])
def test_experts_lie_in_blocks_the_first_longer(experts, ranks):
    owner = routing.owners(experts, ranks)
    counts = numpy.bincount(owner, minlength=ranks)
    assert (numpy.diff(owner) >= 0).all() and counts.sum() == experts
    assert counts.tolist() == sorted(counts, reverse=True) and counts.max() - counts.min() <= 1


def test_traffic_adds_up(generator):
    chosen = routing.draw_tokens(routing.zipf(16, 0.0, generator), 4, generator)
    rows, assignments = routing.traffic(chosen, 16, 1000, 8, generator)
    assert assignments.sum() == pytest.approx(8 * 1000 * 4)
    assert (rows <= 1000).all() and (rows.sum(axis=1) <= 4 * 1000).all()
    # A token misses a rank's two experts of sixteen with probability (14·13·12·11) / (16·15·14·13).
    expected = 1000 * (1 - (14 * 13 * 12 * 11) / (16 * 15 * 14 * 13))
    assert rows.mean() == pytest.approx(expected, rel=0.03)


def test_everything_to_one_expert(generator):
    popularity = numpy.zeros(4)
    popularity[2] = 1.0
    chosen = routing.draw_tokens(popularity, 1, generator)
    rows, assignments = routing.traffic(chosen, 4, 100, 4, generator)
    assert rows[:, 2].tolist() == [100] * 4 and rows.sum() == 400
    assert assignments.tolist() == [0, 0, 400, 0]


def test_a_trace_is_a_run_s_last_load(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "load": [[1, 0]]}\n{"step": 2, "load": [[0.25, 0.75]]}\n{"step": 3}\n')
    assert routing.from_metrics(file, 2).tolist() == [[0.25, 0.75]]
    with pytest.raises(Refused, match="3 experts"):
        routing.from_metrics(file, 3)
    with pytest.raises(Refused):
        routing.from_metrics(tmp_path / "missing", 2)


# --- timelines -----------------------------------------------------------------------------------------

MODEL = Model(layers=4, hidden=512, expert_hidden=1024, experts=16, top_k=2, tokens=2048)


def planner(described, model=MODEL, skew=0.0):
    generator = numpy.random.default_rng(1)
    popularity = routing.zipf(model.experts, skew, generator)
    return Planner(described, model, [routing.draw_tokens(popularity, model.top_k, generator)])


def test_one_gpu_computes_all_the_time():
    described = cluster()
    found = planner(described).predict(Layout(1, 1))
    forward = 2 * 3 * 512 * 1024 * 4096 / 1e12 + 6 * 4096 * 1536 * 2 / 1e11
    dense = 2048 * (2 * (4 * 512**2 + 512 * 16) / 1e12 + 20 * 512 * 2 / 1e11)
    weights = 16 * 3 * 512 * 1024 * 2 / 1e11  # in each product forward and of dX, and thrice as gradients
    assert found.compute == pytest.approx(4 * (3 * (forward + dense) + 5 * weights), rel=1e-3)
    assert found.all_reduce == 0 and found.exchange == pytest.approx(0, abs=0.02 * found.compute)


def test_attention_and_the_output_layer_cost_what_they_compute():
    plain = planner(cluster()).predict(Layout(1, 1))
    model = dataclasses.replace(MODEL, sequence=1000, attention_hidden=640, vocabulary=5000)
    found = planner(cluster(), model).predict(Layout(1, 1))
    # Forward and twice that backward; two products of half the sequence; and wider rows to move.
    attention = 4 * 3 * 2048 * (2 * 2 * 500 * 640 / 1e12 + 7 * (640 - 512) * 2 / 1e11)
    assert found.compute - plain.compute == pytest.approx(attention + 3 * 2 * 2048 * 5000 * 512 / 1e12, rel=1e-6)
    wider = 4 * 2048 * 6 * (640 - 512) * 2  # heads and keys, three times each, of every layer
    assert found.memory - plain.memory == 2 * 5000 * 512 * 16 + wider


def test_recomputation_runs_forward_once_more_and_saves_memory():
    kept = planner(cluster()).predict(Layout(16, 16))
    again = planner(cluster(), dataclasses.replace(MODEL, recompute=True)).predict(Layout(16, 16))
    assert again.compute == pytest.approx(kept.compute * 4 / 3, rel=0.01)
    assert again.exchange == pytest.approx(kept.exchange * 6 / 4, rel=0.1)
    assert again.memory < kept.memory


def test_stages_of_a_rank_do_not_overlap_within_their_kind():
    found = planner(cluster(), skew=1.0).predict(Layout(16, 16, "hierarchical", 4))
    for kind in ("compute", "exchange"):
        events = [event for event in found.events if event.kind == kind]
        assert all((event.end - event.begin).max() < 0.5 * found.step for event in events)
        for before, after in itertools.pairwise(events):
            assert (after.begin >= before.end - 1e-12).all(), (before.name, after.name)
    assert found.step >= found.compute


def test_overlap_hides_communication():
    steps = [planner(cluster()).predict(Layout(16, 8, "flat", chunks)).step for chunks in (0, 1, 2)]
    assert steps == sorted(steps, reverse=True) and steps[2] < 0.98 * steps[1] < 0.96 * steps[0]


def test_overlap_of_one_expert_a_rank_exchanges_in_pairs():
    """Four nodes of a rank each: blocks of two, of which a rank's own comes first."""
    model = dataclasses.replace(MODEL, experts=4, top_k=1)
    described = cluster(gpus_per_node=1)
    events = planner(described, model).predict(Layout(4, 4, "flat", 2)).events
    forward = [event for event in events if event.name in ("dispatch", "experts", "combine")]
    assert [event.name for event in forward] == ["dispatch", "dispatch", "experts", "combine", "experts", "combine"]
    own, others = (event.end - event.begin for event in forward[:2])
    rows = 512 * 512 * 2 / 1e8  # a quarter of 2,048 tokens, from each of two ranks, one of which is this one
    assert own == pytest.approx(rows, rel=0.1) and 1.9 * rows < others.min() and others.max() < 3.2 * rows
    assert all(forward[2].begin < forward[1].end)  # while others' rows travel
    backward = [event.name for event in events if event.name.endswith("s backward")]
    assert backward == ["experts backward", "experts backward", "weights backward"]


@pytest.mark.parametrize(("ranks", "experts", "chunks"), itertools.product((1, 2, 3, 8), (1, 2, 3, 8), (0, 1, 2, 4, 8)))
def test_chunks_have_all_rows_once(ranks, experts, chunks):
    parts, turns = chunks_of(ranks, experts, chunks)
    assert sum(parts) == pytest.approx(numpy.ones((ranks, ranks)))
    assert len(parts) % turns == 0 and len(parts) <= max(chunks, 1)
    for part in parts:  # all send and receive as much, as far as blocks are equal
        if ranks % turns == 0:
            assert part.sum(axis=0) == pytest.approx(ranks / len(parts)) and part.sum(axis=1) == pytest.approx(ranks / len(parts))


def test_skew_makes_the_busiest_rank_slower():
    even, skewed = (planner(cluster(), skew=skew).predict(Layout(16, 16)) for skew in (0.0, 1.5))
    assert skewed.rank_imbalance > 1.5 * even.rank_imbalance
    assert skewed.step > even.step


def test_memory():
    layout = Layout(16, 4)
    dense, expert = 4 * 512**2, 3 * 512 * 1024
    states = 4 * (dense + 4 * expert) * 16
    saved = 4 * (3000 * 512 + 5000 * 2048 + 10 * 2048 * 512) * 2
    backward = 5000 * (512 + 2048 + 1024) * 2
    assert memory_of(MODEL, layout, 3000, 5000) == states + saved + backward
    few_keys = dataclasses.replace(MODEL, attention_hidden=1024, key_hidden=128)
    more = 4 * 2048 * (3 * (1024 - 512) + 3 * (128 - 512)) * 2
    assert memory_of(few_keys, layout, 3000, 5000) == states + saved + backward + more
    alone = memory_of(MODEL, Layout(4, 1), 2048, 4096)
    assert alone == 4 * (dense + 16 * expert) * 16 + 4 * (4096 * 2048 + 10 * 2048 * 512) * 2 + 4096 * (512 + 2048 + 1024) * 2


def test_memory_of_runs_that_were_measured():
    """train_lm on a GPU, with gradients and optimizer's states in fp32, or the latter in bf16."""
    run = json.loads((RESULTS / "gpu_training.json").read_text())["results"][0]
    tokens = run["batch_size"] * run["sequence_length"]
    heads, keys = (run[name] * run["head_size"] for name in ("heads", "kv_heads"))
    qwen = Model(
        layers=run["layers"], hidden=run["hidden"], expert_hidden=run["expert_hidden"], experts=run["experts"], top_k=run["top_k"],
        tokens=tokens, attention_hidden=heads, key_hidden=keys, vocabulary=run["vocabulary"], optimizer_bytes=14,
        dense_parameters_per_layer=run["hidden"] * (2 * heads + 2 * keys + run["experts"]),
    )  # fmt: skip
    assert memory_of(qwen, Layout(1, 1), tokens, tokens * run["top_k"]) == pytest.approx(run["peak_GiB"] * 2**30, rel=0.1)
    (peak,) = set(re.findall(r"([\d.]+) GiB", (RESULTS / "gpu_train_olmoe.txt").read_text()))
    published = json.loads((ROOT / "tools/plan/models/olmoe.json").read_text())
    olmoe = Model(**published | {"tokens": 4 * 4096, "optimizer_bytes": 10})  # a micro-batch
    assert memory_of(olmoe, Layout(1, 1), olmoe.tokens, olmoe.tokens * 8) == pytest.approx(float(peak) * 2**30, rel=0.1)


def test_layouts():
    found = list(layouts_of(cluster(), MODEL, 32, (1, 2)))
    assert {layout.expert_parallel for layout in found} == {1, 2, 4, 8, 16}
    assert {layout.all_to_all for layout in found if layout.expert_parallel <= 4} == {"flat"}
    assert len(found) == len(set(found)) == 1 + 2 * 2 + 2 * 2 * 2
    ordered = planner(cluster()).layouts(32)
    assert [p.step for p in ordered] == sorted(p.step for p in ordered)
    small = planner(cluster(memory=0.5e9)).layouts(32)
    fits = [p.memory <= 0.5e9 for p in small]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits


# --- weights that travel in the place of tokens -----------------------------------------------------------------


def lent_by_the_library(explained):
    """({expert: ranks}, assignments of the fullest rank) of MoELayer's explain()."""
    named = re.search(r"weights of experts travel, ([^;]*(?:; \d+ to rank[^;]*)*); the fullest", explained)
    parts = named[1].split("; ") if named else []
    lent = {int(part.split()[0]): set(map(int, re.findall(r"\d+", part.partition(" to rank")[2]))) for part in parts}
    return lent, int(re.search(r"the fullest rank computes (\d+)", explained)[1])


def test_what_is_lent_is_what_the_library_has_lent():
    """In the steps of which benchmarks/ranks/balance.py has kept what the layer said."""
    measured = json.loads((ROOT / "benchmarks/results/balance.json").read_text())
    ways = set()
    for setting in measured["settings"]:
        for key, records in setting["records"].items():
            record = {**records[-1], "counts": setting["counts"][key.split()[0]]}
            if record["balance"] == "off":
                continue
            rates = re.search(r"by ([\d.e+]+) GFLOP/s and ([\d.e+]+) GB/s", record["explain"])
            described = cluster(
                gpus_per_node=1, cores_per_node=1.0, flops=float(rates[1]) * 1e9, network=Link(float(rates[2]) * 1e9, 0.0)
            )
            counts = numpy.array(record["counts"])
            owner = routing.owners(record["experts"], record["ranks"])
            found = loans.choose(record["balance"], counts, owner, check.model_of(record), described)
            lent = {expert: borrowers for expert, borrowers in enumerate(found.borrowers) if borrowers}
            assert (lent, found.computed.max()) == lent_by_the_library(record["explain"]), record["explain"]
            ways |= {record["balance"]} if lent else set()
    assert {"shadow", "replicas", "auto"} <= ways


def one_takes_all(balance, ranks=4):
    model = dataclasses.replace(MODEL, experts=8, top_k=1, routed=False, bytes=4)
    chosen = numpy.full((routing.SAMPLES, 1), 5)
    return Planner(cluster(), model, [chosen]).predict(Layout(ranks, ranks, balance=balance)), model


def test_a_lent_expert_spares_its_rows_their_way_and_evens_the_ranks():
    (off, model), (shadow, _) = one_takes_all("off"), one_takes_all("shadow")
    assert off.rank_imbalance == pytest.approx(4) and shadow.rank_imbalance == pytest.approx(1, rel=0.01)
    took = {event.name: (event.end - event.begin).max() for event in shadow.events}
    assert not any(took[name] > 1e-4 for name in ("dispatch", "combine", "dispatch backward", "combine backward"))
    # A quarter of it goes from its owner to each other rank, and from each on to all borrowers.
    hop = 3 * (model.expert_parameters * 4 / 4 / 1e9 + 2e-6)
    weights = [event for event in shadow.events if event.name == "weights"]
    copies = 8 * model.expert_parameters * 4 / 1e11
    assert sum(event.end.max() - event.begin.max() for event in weights) == pytest.approx(2 * hop + copies, rel=0.1)
    assert shadow.step < off.step


@pytest.mark.parametrize("skew", [0.0, 1.0, 1.5])
def test_the_cheapest_is_no_dearer_than_any(skew, generator):
    model = dataclasses.replace(MODEL, top_k=1)
    chosen = [routing.draw_tokens(routing.zipf(16, skew, generator), 1, generator)]
    counts = routing.counts(chosen[0], 16, model.tokens, 8, generator)
    owner = routing.owners(16, 8)
    costs = loans.costs_of(model, 8, (1e12, 1e9))
    seconds = {
        balance: loans.choose(balance, counts, owner, model, cluster(gpus_per_node=8)).forecast(costs)
        for balance in ("off", "shadow", "replicas", "gather", "gather:2", "auto")
    }
    assert seconds["auto"] <= min(seconds["off"], 1 / 0.95 * min(seconds.values()))
    for balance in ("replicas", "gather:4", "auto"):
        lent = loans.choose(balance, counts, owner, model, cluster(gpus_per_node=8))
        assert lent.computed.sum() == counts.sum() and (lent.left >= 0).all()
        assert sum(lent.shares.values()) + lent.left.sum() == counts.sum()


# --- calibration and checks ----------------------------------------------------------------------------


def records_of(described, ranks, nodes, sizes, generator):
    """What benchmark_step would write on a machine that is exactly as described."""
    for tokens, hidden, inner, experts, top_k in sizes:
        load = generator.multinomial(tokens * ranks * top_k, numpy.full(experts, 1 / experts))
        owner = routing.owners(experts, ranks)
        links = generator.integers(tokens // 4, tokens, (ranks, ranks)) * (1 - numpy.eye(ranks, dtype=int))
        record = {
            "ranks": ranks,
            "nodes": [f"n{rank * nodes // ranks}" for rank in range(ranks)],
            "tokens_per_rank": tokens,
            "hidden": hidden,
            "expert_hidden": inner,
            "experts": experts,
            "top_k": top_k,
            "threads": 1,
            "link_bytes": ((links + links.T) * 2 * hidden * 4).tolist(),
            "assignments": numpy.bincount(owner, weights=load, minlength=ranks).tolist(),
            "expert_load": load.tolist(),
            "stage_ms_least": dict.fromkeys(("experts", "experts_backward", "plan", *calibrate.EXCHANGES), 0.0),
        }
        link = described.network if nodes > 1 else described.node
        costs = [described.stage, described.expert, 1 / described.flops, 1 / described.copy, link.message]
        costs += [1 / link.bandwidth, 1 / described.weights]
        stages = ["experts", "experts_backward", "plan", *calibrate.EXCHANGES]
        for name, (features, _) in zip(stages, calibrate.equations(record)):
            record["stage_ms_least"][name] = float(numpy.dot(features, costs)) * 1e3
        yield record


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 1), (4, 2)])
def test_calibration_finds_the_machine_it_was_measured_on(ranks, nodes, generator):
    known = cluster(
        gpus_per_node=ranks // nodes,
        gpus_per_nic=ranks // nodes,
        flops=3e10,
        copy=4e9,
        stage=2e-4,
        expert=3e-5,
        weights=6e9,
        node=Link(1.5e9, 0, 1e-4),
        network=Link(2e7, 0, 1e-4),
    )
    found = calibrate.fit(list(records_of(known, ranks, nodes, calibrate.SIZES, generator)), "found")
    described = machines.machine_from(found, "found")
    for name in ("flops", "copy", "stage", "expert", "weights", "gpus_per_node", "gpus_per_nic"):
        assert getattr(described, name) == pytest.approx(getattr(known, name), rel=1e-3), name
    link = "network" if nodes > 1 else "node"
    assert getattr(described, link).bandwidth == pytest.approx(getattr(known, link).bandwidth, rel=1e-3)
    assert getattr(described, link).message == pytest.approx(1e-4, rel=1e-3)


def test_costs_are_never_negative_and_outliers_count_little():
    features = numpy.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 4.0], [1.0, 5.0]])
    assert calibrate.nonnegative_fit(features, numpy.array([5.0, 4.0, 3.0, 2.0, 1.0]))[1] == 0
    assert calibrate.nonnegative_fit(features, features[:, 1]) == pytest.approx([0, 1], abs=1e-6)
    assert calibrate.nonnegative_fit(features, numpy.array([1.0, 2.0, 30.0, 4.0, 5.0]))[1] == pytest.approx(1, rel=0.1)


def test_ranks_that_share_cores_take_turns():
    alone, shared = (planner(cluster(cores_per_node=cores)).predict(Layout(4, 4)) for cores in (0.0, 2.0))
    assert shared.compute == pytest.approx(2 * alone.compute, rel=0.1)
    record = {"ranks": 4, "nodes": ["a", "a", "b", "b"]}
    assert calibrate.turns(record, [1, 2, 3, 4], 0) == 4
    assert calibrate.turns(record, [1, 2, 3, 4], 1.0) == 7
    assert calibrate.turns(record, 1.0, 2.0) == 1


def test_cores_are_shared_alike_as_long_as_there_are_more_ranks():
    assert take_turns(numpy.array([3.0, 1.0]), 2).tolist() == [3, 1]
    assert take_turns(numpy.array([1.0, 1.0, 1.0, 1.0]), 2).tolist() == [2, 2, 2, 2]
    # Four at half speed until three have done 1 of work; the fourth has 2 left, and a core to itself.
    assert take_turns(numpy.array([1.0, 3.0, 1.0, 1.0]), 2).tolist() == [2, 4, 2, 2]
    for cores in (1.0, 1.5, 3.0):
        work = numpy.random.default_rng(SEED).random(5)
        done = take_turns(work, cores)
        assert done.max() >= max(work.max(), work.sum() / cores) - 1e-12
        assert (numpy.argsort(done) == numpy.argsort(work)).all()


def test_published_results_are_met():
    rows = list(check.published())
    ratios = {what: predicted / known for what, _, known, predicted in rows}
    off = {what: ratio for what, ratio in ratios.items() if abs(ratio - 1) > 0.2}
    known = {
        "DeepEP low-latency dispatch, 8 GPUs",  # on one node those kernels do not reach NVLink's rate
        "DeepEP EPv2 combine, 8 × 2 GPUs",
        "NeMo AutoModel, gpt-oss 120B, 64 GPUs, EP 64",
    }
    assert set(off) <= known, off
    assert all(abs(ratio - 1) < 0.3 for ratio in ratios.values()), ratios
    assert len(ratios) == 20


# --- the command ---------------------------------------------------------------------------------------


def plan(*arguments, expect=0):
    command = [sys.executable, ROOT / "tools/plan/plan.py", *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_a_step_with_its_timeline(tmp_path):
    output = plan("step", "--gpus", 64, "--expert-parallel", 16, "--all-to-all", "hierarchical", "--overlap", 2,
                  "--json", tmp_path / "step.json", "--plot", tmp_path / "timeline.png")  # fmt: skip
    summary = json.loads((tmp_path / "step.json").read_text())
    assert summary["data_parallel"] == 4 and summary["exposed_communication_s"] > 0
    assert f"{summary['step_s']:.4f}" in output
    assert (tmp_path / "timeline.png").stat().st_size > 5000


def test_json_in_the_place_of_text(tmp_path):
    step = json.loads(plan("step", "--gpus", 64, "--overlap", 1, "--json"))
    found = json.loads(plan("layouts", "--gpus", "8,64", "--json"))
    assert {one["gpus"] for one in found} == {8, 64} and any(one == step for one in found)
    rows = json.loads(plan("check", "--json"))
    assert len(rows) > 9 and all(row["published"] > 0 and row["predicted"] > 0 and row["unit"] for row in rows)


def test_scale_draws_where_it_hurts(tmp_path):
    model = tmp_path / "model.json"
    model.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(MODEL, tokens=512))))
    plan("scale", "--model", model, "--gpus", "8,16", "--output", tmp_path / "out")
    values = json.loads((tmp_path / "out/scale.json").read_text())
    assert [len(found) for found in values["best"].values()] == [2, 2, 2]
    shares = numpy.array(values["internet"]["compute_share"])
    assert (numpy.diff(shares, axis=1) >= -1e-9).all()  # more bandwidth never hurts
    for name in ("scale", "internet", "timeline"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--gpus", "12"], "whole nodes of 8"),
        (["step", "--gpus", "64", "--expert-parallel", "24"], "--expert-parallel 24"),
        (["step", "--gpus", "8", "--balance", "gather:3"], "--balance gather:3: expected"),
        (["step", "--gpus", "128", "--expert-parallel", "128"], "at most 64"),
        (["layouts", "--model", "missing.json"], "missing.json"),
        (["check", "--points", "missing"], "no records"),
        (["layouts", "--gpus", "eight"], "no list of numbers"),
    ],
)
def test_what_it_refuses(arguments, message):
    assert message in plan(*arguments, expect=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops": 0}, "flops must be above 0"),
        ({"flops": -1}, "flops is -1"),
        ({"gpu": 8}, "unknown gpu"),
        ({"copy": None}, "missing copy"),
        ({"node": 1}, "node must be an object"),
    ],
)
def test_descriptions_that_cannot_be(tmp_path, change, message):
    values = json.loads((ROOT / "tools/plan/machines/h100_infiniband.json").read_text())
    values.update(change)
    values = {name: value for name, value in values.items() if value is not None}
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(values))
    assert message in plan("layouts", "--machine", file, expect=2)


def test_a_slower_network_is_shared_by_the_node():
    slow = plots.slower(cluster(), 1e6, 0.1)
    assert slow.gpus_per_nic == 4 and slow.network == Link(1e6, 0.1, 5e-6)


# --- predicted beside measured (benchmarks/ranks/planner.py) -------------------------------------------------


@pytest.fixture
def steady(monkeypatch):
    """benchmarks/ranks/planner.py, with measurements and slowdowns that the test lists."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks/ranks")
    import planner as beside

    class Machine:
        records, slowdowns = [], []

        def slowdown(self):
            return self.slowdowns.pop(0)

    def measured(step, least):
        return {"step_ms": step, "step_ms_least": least, "stage_ms_least": {"experts": least, "plan": 1.0}}

    machine = Machine()
    monkeypatch.setattr(beside.calibrate, "measure", lambda *_: [measured(*machine.records.pop(0))])
    machine.run = lambda: beside.measure_idle(machine, "", 1, [(1, 1, 1, 1, 1)], 3, pause=0)[0]
    return machine


def test_an_idle_machine_is_measured_once(steady):
    steady.records, steady.slowdowns = [(10, 9)], [1.0, 1.02]
    record = steady.run()
    assert (record["attempts"], record["slowdown"]) == (1, 1.02)


@pytest.mark.parametrize("slowdowns", [[1.5, 1.0, 1.0, 1.0], [1.0, 1.5, 1.0, 1.0]])
def test_a_busy_machine_is_measured_again_and_the_least_counts(steady, slowdowns):
    steady.records, steady.slowdowns = [(10, 8), (11, 9)], slowdowns
    record = steady.run()
    assert (record["attempts"], record["slowdown"]) == (2, 1.0)
    # The record of the idle attempt, with the shortest times of both.
    assert (record["step_ms"], record["step_ms_least"], record["stage_ms_least"]["experts"]) == (11, 8, 8)


def test_uneven_steps_are_measured_again_but_not_for_ever(steady):
    steady.records, steady.slowdowns = [(20, 9)] * 9, [1.0] * 18
    assert steady.run()["attempts"] == 4 and len(steady.records) == 5
