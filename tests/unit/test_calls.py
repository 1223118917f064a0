"""What ranks called, compared: the same error on all, whatever rank looks."""

from epmesh.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest
from epmesh_server.ranks.calls import describe, verdict


def test_equal_calls_agree_whatever_their_own_numbers() -> None:
    assert verdict({0: describe("all_gatherv", "dim=0", [3]), 8: describe("all_gatherv", "dim=0", [0])}) is None


def test_different_methods_are_listed_with_their_ranks() -> None:
    error = verdict({0: describe("dispatch", "x"), 1: describe("all_reduce", "y"), 8: describe("dispatch", "x")})
    assert isinstance(error, InvalidRequest)
    assert "dispatch on ranks 0, 8; all_reduce on rank 1" in str(error)


def test_different_arguments_are_listed_with_their_ranks() -> None:
    error = verdict({0: describe("all_reduce", "float32[2]"), 1: describe("all_reduce", "float32[3]")})
    assert isinstance(error, InvalidRequest)
    assert "all_reduce: ranks disagree: float32[2] on rank 0; float32[3] on rank 1" in str(error)


def test_the_lowest_refusing_rank_speaks_and_keeps_its_type() -> None:
    calls = {
        3: describe("dispatch", refusal=InvalidRequest("later")),
        2: describe("dispatch", refusal=ExpertUnavailable([5, 4])),
        1: describe("combine"),
    }
    error = verdict(calls)
    assert isinstance(error, ExpertUnavailable)
    assert error.experts == (4, 5)
    assert str(error).startswith("dispatch on rank 2: no living rank holds")


def test_a_refusal_keeps_its_fields() -> None:
    error = verdict({0: describe("dispatch", refusal=DeadlineExceeded(7, 9))})
    assert isinstance(error, DeadlineExceeded)
    assert (error.rank, error.sequence) == (7, 9)
