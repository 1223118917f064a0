"""How launches lay out arguments, as far as it needs no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from epmesh_server.kernels.launcher import _flat, _plain, _starts, count_parameters

PTX = """
.visible .entry take_rows(
	.param .u64 take_rows_param_0,
	.param .u32 take_rows_param_1,
	.param .u64 .ptr .global .align 1 take_rows_param_2
)
.reqntid 256
{
	.param .u64 not_its_own;
}
"""


def test_the_parameters_of_the_entry_are_counted() -> None:
    assert count_parameters(PTX) == 3


def test_what_has_no_entry_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no entry"):
        count_parameters(".version 8.0")


def test_tuples_are_laid_out_in_place() -> None:
    arguments = ((1, 2, 3), 4, (5,), 6)
    assert list(_flat(arguments)) == [1, 2, 3, 4, 5, 6]
    assert list(_starts(arguments)) == [0, 3, 4, 5]


@pytest.mark.parametrize("given", [1, 16, (1, 1 << 40), (16,)])
def test_nothing_can_be_concluded_from_what_the_compiler_sees(given: int | tuple[int, ...]) -> None:
    for name, wide in (("bases", True), ("offsets", False)):
        shown = _plain(name, given)
        each = shown if isinstance(given, tuple) else (shown,)
        assert isinstance(shown, tuple) == isinstance(given, tuple)
        assert all(value != 1 and value % 16 for value in each)
        if isinstance(given, tuple):
            assert all((value >= 1 << 31) == wide for value in each)
