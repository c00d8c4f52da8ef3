"""launch/slurm/scaling.sbatch on a real Slurm."""

import json

import pytest
from conftest import BUILD

STEP = BUILD / "benchmarks/benchmark_step"


@pytest.mark.skipif(not STEP.exists(), reason="benchmark_step is not built")
def test_an_array_over_rank_counts_leaves_one_report(cluster):
    output = cluster.base / "scaling"
    options = f"--output {output} --program {STEP} --experts 6 --top-k 2 --skew 0,1 --tokens 32 --hidden 16"
    options += " --expert-hidden 16 --rounds 2 --scaling weak"
    flags = ["--array=1,2,4", f"--output={output}-%a.log"]
    job = cluster.submit("scaling.sbatch", *options.split(), flags=flags)
    log = cluster.base / "scaling-4.log"
    cluster.wait_until(lambda: not cluster.slurm("squeue", "--noheader", "--job", job).strip(), 90, log)
    assert (output / "results.json").exists(), log.read_text()
    records = json.loads((output / "results.json").read_text())
    assert [(r["skew"], r["ranks"]) for r in records] == [(s, r) for s in (0, 1) for r in (1, 2, 4)]
    for record in records:
        hosts = ["n1", "n1", "n2", "n2"] if record["ranks"] == 4 else None
        assert hosts is None or sorted(record["nodes"]) == hosts
        assert len(set(record["nodes"])) == (2 if record["ranks"] == 4 else 1)
        assert record["provenance"]["job"]
    report = (output / "report.md").read_text()
    assert report.count("| weak |") == 6 and "weak_stages.png" in report
    assert (output / "weak.png").stat().st_size > 5000
