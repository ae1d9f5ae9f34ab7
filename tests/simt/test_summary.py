"""The last lines of `make simt` are the sums over its steps, and fail for what a step found or did not do."""

import pytest

from . import summary


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "FILE", tmp_path / "new" / "summary.jsonl")


def run_all(**last: int) -> int:
    summary.main(["--begin"])
    for step in summary.STEPS[:-1]:
        summary.add(step, launches=2)
        summary.add(step, launches=3)  # another process
    summary.add(summary.STEPS[-1], **({"launches": 1} | last))
    return summary.main([])


def test_the_sums_are_printed_last(capsys):
    assert run_all(mutants=9, caught=7, equivalent=2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [*summary.STEPS[0].split(), "5", "launches,", "0", "findings"]
    launches = 5 * (len(summary.STEPS) - 1) + 1
    assert lines[-1] == (f"in all: {launches} launches, 0 findings, 7 of 9 mutants caught, 2 equivalent, 0 survive")


@pytest.mark.parametrize("wrong", [{"findings": 1}, {"mutants": 3, "caught": 2}, {"launches": 0}], ids=str)
def test_what_is_wrong_fails(wrong, capsys):
    assert run_all(**wrong) == 1


def test_no_step_at_all_fails(capsys):
    summary.begin()
    assert summary.main([]) == 1
    assert capsys.readouterr().out.count("launched nothing") == len(summary.STEPS)


def test_a_step_that_runs_again_counts_once():
    summary.begin()
    summary.add("budget", launches=2)
    summary.add("mutants of sites", launches=4)
    summary.begin("budget")
    summary.add("budget", launches=3)
    launches = {step: counts["launches"] for step, counts in summary.steps().items()}
    assert launches == {"mutants of sites": 4, "budget": 3}
