"""A short fuzz run: the operators hold, and one that is wrong is found, with the command that repeats it."""

import re

import pytest

from convdit import ops
from tests import fuzz


def test_every_operator_holds_for_five_seconds():
    held = fuzz.fuzz(seconds=5, seed=0)
    assert set(held) == {*fuzz.OPERATORS, "neighbors"}


def test_every_public_operator_is_drawn():
    assert {*fuzz.OPERATORS, "neighbors"} == set(ops.__all__)


def test_a_wrong_operator_is_found_and_the_case_can_be_repeated(monkeypatch):
    right = ops.gated_residual
    monkeypatch.setattr(ops, "gated_residual", lambda x, y, gate: right(x, y, gate * 1.01))
    with pytest.raises(AssertionError, match="gated_residual") as failure:
        fuzz.fuzz(seconds=30, seed=3)
    number = int(re.search(r"--seed 3 --case (\d+)", str(failure.value))[1])
    with pytest.raises(AssertionError, match="gated_residual"):
        fuzz.run_case(3, number)
