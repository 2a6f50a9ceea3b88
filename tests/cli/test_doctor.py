"""What `doctor` advises."""

from typing import Any

import pytest

from mpillama.cli.doctor import advice

OVERSUBSCRIBE = "`mpirun --map-by :OVERSUBSCRIBE`"


def report(*cores: list[int], mpi: str = "MPICH 5", of_host: int = 4, oversubscribed: bool = False) -> dict[str, Any]:
    """Of ranks with these cores on one host."""
    ranks = [
        {
            "rank": rank, "host": "n1", "cores": own, "cores_of_host": of_host, "threads": len(own), "isa": "avx2",
            "isas": ["avx2"], "isas_not_built": [], "oversubscribed": oversubscribed,
        }
        for rank, own in enumerate(cores)
    ]  # fmt: skip
    return {"mpi": mpi, "ranks": len(ranks), "launched": {"processes": len(ranks)}, "per_rank": ranks}


@pytest.mark.parametrize(
    ("mpi", "ranks", "told"),
    [("Open MPI v5.0", 3, False), ("Open MPI v5.0", 4, True), ("Open MPI v5.0", 5, False), ("MPICH 5", 4, False)],
)
def test_how_open_mpi_starts_more_ranks_is_told_where_it_would_refuse(mpi: str, ranks: int, told: bool) -> None:
    """Whoever has more ranks than cores knows it."""
    found = advice(report(*[[0, 1, 2, 3]] * ranks, mpi=mpi))
    assert any(OVERSUBSCRIBE in sentence for sentence in found) is told


def test_threads_that_share_cores_though_the_host_has_more() -> None:
    (sentence,) = advice(report([0], [0], oversubscribed=True))
    assert "where ranks may use only 0 of 4" in sentence
    assert "mpirun -bind-to core:THREADS" in sentence
    (sentence,) = advice(report([0], [0], of_host=1, oversubscribed=True))
    assert sentence == "More threads than cores on a host: start fewer ranks or give fewer --threads."
