"""Rank discovery: the C++ library's, with the same results (tests/rank_discovery/rank_discovery_test.cpp)."""

import os

import anabranch
import pytest

LAUNCHERS = {
    "nothing": ({}, (0, 1, 0, 1, "")),
    "torchrun": (
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
        (3, 8, 1, 2, "torchrun"),
    ),
    "Open MPI": (
        {
            "OMPI_COMM_WORLD_RANK": "5",
            "OMPI_COMM_WORLD_SIZE": "6",
            "OMPI_COMM_WORLD_LOCAL_RANK": "2",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
        },
        (5, 6, 2, 3, "Open MPI"),
    ),
}


@pytest.fixture
def environment(monkeypatch):
    """Without what a launcher may have left."""
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "PMIX_", "SLURM_", "TORCHELASTIC_", "LOCAL_", "MPI_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers(name, environment):
    variables, expected = LAUNCHERS[name]
    for variable, value in variables.items():
        environment.setenv(variable, value)
    info = anabranch.discover_rank()
    assert (info.rank, info.size, info.local_rank, info.local_size, info.launcher) == expected
    assert info.node == os.uname().nodename


def test_launchers_that_contradict_each_other(environment):
    for variables, _ in LAUNCHERS.values():
        for variable, value in variables.items():
            environment.setenv(variable, value)
    with pytest.raises(ValueError) as raised:
        anabranch.discover_rank()
    assert "RANK=3" in str(raised.value) and "OMPI_COMM_WORLD_RANK=5" in str(raised.value)
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_RANK"):
        anabranch.as_group()


def test_variables_that_are_no_rank(environment):
    environment.setenv("OMPI_COMM_WORLD_RANK", "first")
    environment.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="first"):
        anabranch.discover_rank()
