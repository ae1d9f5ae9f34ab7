"""The benchmarks: both sides of a row compute the same, its arithmetic is right, and the command reports it.

Over 400 lines: short tests of one harness, which share its stand-ins for the machine and the clock.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import (
    bars,
    bench_adaln,
    bench_attention,
    bench_convnext,
    bench_depthwise_conv,
    bench_dit,
    bench_dropin,
    bench_fcmae,
    bench_gpu,
    bench_grid,
    bench_grn,
    bench_linear,
    bench_memory,
    bench_scaling,
    bench_sparse_depthwise_conv,
    command,
    harness,
    record,
    report,
    suite,
)
from benchmarks.machine import Machine
from convdit import build_info
from convdit.cli import main
from convdit.sparse import SparseTensor2d

ROOT = Path(__file__).resolve().parent.parent
MACHINE = Machine(fma=100e9, matrix={"float32": 80e9, "bfloat16": 20e9}, copy={1000: 50e9, 10**9: 10e9})
SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
BOTH, GRADIENTS = ("forward", "backward"), ("forward", "input_grad", "weight_grad")


@pytest.fixture
def interpreted(monkeypatch):
    """Without a compiler: what a rival computes does not depend on it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def visible(function, sites):
    """The rows of the visible sites in the one dense map that function gives."""
    (dense,) = tensors(function())
    return SparseTensor2d.from_dense(dense, sites).features


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


def assert_same(work, tolerance=1e-5):
    """Ours and each rival give the same tensors, and none is all zero or empty."""
    ours = tensors(work.ours())
    assert work.rivals and ours
    for name, rival in work.rivals.items():
        theirs = tensors(rival())
        assert len(theirs) == len(ours), name
        for a, b in zip(ours, theirs, strict=True):
            largest = b.abs().max().item()
            assert largest > 0
            assert (a.float() - b.reshape(a.shape).float()).abs().max() <= tolerance * largest, name


OPERATORS = {
    "depthwise_conv": [lambda w=w: bench_depthwise_conv.depthwise_conv(w, 9, 12, n=2) for w in GRADIENTS],
    "grn": [lambda w=w: bench_grn.gelu_grn(w, 5, 12, n=2) for w in BOTH],
    "adaln": [lambda w=w, o=o: bench_adaln.adaln(o, w, 2, 5, 12) for w in BOTH for o in bench_adaln.OPERATORS],
    "attention": [lambda w=w: bench_attention.attention(w, 2, 9, 24, 3) for w in BOTH],
    "convnext": [lambda: bench_convnext.block_forward(9, 8, n=2), lambda: bench_convnext.block_step(9, 8, n=2)],
    "linear": [lambda w=w: bench_linear.linear(w, 60, 24, 70) for w in BOTH],
    "dit": [lambda: bench_dit.forward(2, 9, 24, 3), lambda: bench_dit.step(2, 9, 24, 3)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_ours_and_every_rival_compute_the_same(name, interpreted):
    for build in OPERATORS[name]:
        assert_same(build())


def test_bfloat16_blocks_compute_the_same(interpreted):
    assert_same(bench_convnext.block_forward(9, 8, n=2, dtype=torch.bfloat16), 0.02)


@pytest.mark.parametrize("side", [7, 14])
@pytest.mark.parametrize("what", GRADIENTS)
def test_sparse_and_dense_convolutions_compute_the_same_at_visible_sites(what, side):
    for against in ("own dense", "PyTorch", "spconv"):
        if against == "spconv" and what != "forward":
            continue
        torch.manual_seed(0)
        work = bench_sparse_depthwise_conv.sparse_conv(what, against, side, 8, n=2)
        if against != "spconv" and what != "weight_grad":  # a dense map: its visible sites count
            torch.manual_seed(0)
            sites = bench_sparse_depthwise_conv.draw_sites(side, 2)
            assert len(sites) < 2 * side * side
            ((name, rival),) = work.rivals.items()
            work.rivals = {name: partial(visible, rival, sites)}
        assert_same(work)


def test_models_infer_and_train_alike(interpreted):
    options = {"n": 2, "side": 64, **SMALL}
    assert_same(bench_convnext.inference("convnextv2_atto", **options))
    for compiled in (False, True):
        assert_same(bench_dropin.inference("convnextv2_atto", compiled, num_classes=5, **options))
        assert_same(bench_dropin.diffusers_inference(compiled, side=8, heads=2, layers=1))
    # A second and a third loss depend on the gradients of every parameter.
    for work in (
        bench_convnext.training("convnextv2_atto", lr=1e-2, **options),
        bench_dropin.training("convnextv2_atto", lr=1e-2, num_classes=5, **options),
        bench_fcmae.training("convnextv2_atto", lr=1e-2, decoder_dim=16, **options),
    ):
        losses = []
        for _ in range(3):
            assert_same(work)
            losses.append(work.ours().item())
            for rival in work.rivals.values():
                rival()
        assert len(set(losses)) == 3


def test_encoder_blocks_have_the_gradients_of_the_dense_masked_ones(interpreted):
    assert_same(bench_fcmae.encoder_blocks("convnextv2_atto", n=2, side=96, visible=4, **SMALL))


@pytest.mark.parametrize("dtype", bench_grid.DTYPES)
@pytest.mark.parametrize("name", bench_grid.CASES)
def test_cells_of_the_grid_compute_the_same(name, dtype):
    for what in BOTH:
        work = bench_grid.cell(name, what, 2, 5, 7, 8, dtype)
        assert_same(work, 1e-5 if dtype == torch.float32 else 0.05)


def test_a_peak_of_memory_counts_every_gradient():
    dim = 512
    parameters = 18 * dim**2 * 4 / 2**20  # weights of the matrix products, in MB
    for who in ("ours", "DiT"):
        assert parameters <= bench_memory.peak("dit", who, {"b": 1, "t": 16, "d": dim, "heads": 8}) < 3 * parameters


def test_two_threads_compute_what_one_does_and_the_number_is_put_back():
    before = torch.get_num_threads()
    work = bench_scaling.two_threads(lambda: bench_depthwise_conv.depthwise_conv("forward", 9, 12, n=2))
    assert work.wall
    assert_same(work)
    assert torch.get_num_threads() == before
    assert bench_scaling.with_threads(2, torch.get_num_threads)() == 2


# ---- the list of rows ---------------------------------------------------------------------------------------------


def test_listing_rows_makes_no_tensor(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("a tensor was made")

    for name in ("randn", "rand", "zeros", "ones", "empty"):
        monkeypatch.setattr(torch, name, refuse)
    entries = suite.comparisons(suite.Selection())
    assert {e.bench for e in entries} | {"gpu"} == set(suite.names()) and len(entries) > 1000
    labels = [f"{e.bench} {e.label}" for e in entries]
    assert len(set(labels)) == len(labels)


def test_every_bar_belongs_to_a_row():
    found = [e.comparison for e in suite.comparisons(suite.Selection()) if e.bench not in ("grid", "scaling", "memory")]
    keys = {(c.operator, c.what, c.against, c.shape.split(";")[0]) for c in found if c.dtype == torch.float32}
    halves = {(f"{c.operator} bfloat16", c.what, c.against, c.shape) for c in found if c.dtype == torch.bfloat16}
    assert set(bars.BARS) <= keys | halves


def test_the_quick_selection_has_a_row_of_every_operator_and_is_small():
    few = suite.comparisons(suite.Selection(quick=True))
    assert len(few) < 60
    assert {e.bench for e in few} == set(suite.names()) - {"scaling", "memory", "gpu"}


def test_rows_for_a_gpu_are_there_with_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CONVDIT_GPU_CHECK", raising=False)
    assert list(bench_gpu.comparisons()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = list(bench_gpu.comparisons())
    assert {c.dtype for c in rows} == {torch.float32, torch.bfloat16}
    assert {c.operator.removesuffix(", GPU") for c in rows} >= {
        "sparse_depthwise_conv2d",
        "gelu_grn",
        *bench_adaln.OPERATORS,
    }


def test_attention_on_a_gpu_stands_beside_every_kernel_that_pytorch_has():
    work = bench_gpu.in_dtype(torch.bfloat16, lambda: bench_gpu.attention("forward", 1, 9, 32, 2))
    assert "flash_attention" in work.rivals and torch.get_default_dtype() == torch.float32
    assert work.ours().dtype == torch.bfloat16
    assert_same(work, 0.02)


def test_selection_by_name_and_text():
    found = suite.comparisons(suite.Selection(names=("depthwise_conv",), match="c=96, 56x56"))
    assert [e.comparison.what for e in found] == list(GRADIENTS)
    with pytest.raises(ValueError, match="expected some of adaln, .*sparse_depthwise_conv, got grm, zoo"):
        suite.comparisons(suite.Selection(names=("zoo", "grn", "grm")))


# ---- arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 3, 7, 14])
def test_real_taps_are_those_inside_the_map(side):
    inside = range(side)
    count = sum(
        y + dy in inside and x + dx in inside
        for y in inside
        for x in inside
        for dy in range(-3, 4)
        for dx in range(-3, 4)
    )
    assert bench_depthwise_conv.real_taps(side) == count


def test_the_ratio_is_the_median_of_the_runs_and_the_best_rival_counts():
    times = [
        [[1.0, 9.0, 2.0], [1.0, 9.0, 2.0]],
        [[1.0, 9.0, 3.0], [1.0, 9.0, 3.0], [1.0, 9.0, 99.0]],
        [[1.0, 9.0, 8.0]],
    ]
    medians, best, ratio = harness.summarise(times)
    assert (medians, best, ratio) == ([1.0, 9.0, 3.0], 2, 3.0)


def interleave(functions, seconds, limit=None):
    return harness.interleave(functions, [(3, seconds)], True, lambda _times: True, limit)


def test_interleaving_calls_every_function_in_each_of_three_runs():
    calls = []
    times = interleave([lambda: calls.append(0), lambda: calls.append(1)], 0.05)
    assert len(times) == 3 and all(len(turn) == 2 and min(turn) > 0 for run in times for turn in run)
    assert {0, 1} == set(calls)
    with pytest.raises(harness.TooLong, match="left out: one call takes"):
        interleave([lambda: sum(range(10**6))], 0.05, limit=1e-9)
    interleave([lambda: None, lambda: sum(range(10**6))], 0.05, limit=1e-3)  # a rival may take longer


def test_a_short_call_is_timed_in_the_state_that_it_left_itself(monkeypatch):
    calls, before = [], []

    def timed(function, _repeats, _wall):
        if calls:  # else to see how long it takes
            before.append((calls[-1], function))
        return 0.001

    monkeypatch.setattr(harness, "seconds_a_call", timed)
    first, second = (lambda: calls.append(first)), (lambda: calls.append(second))
    interleave([first, second], 0.01)
    assert len(before) > 2 and all(called is measured for called, measured in before)


def test_the_ceiling_is_what_binds():
    def of(dtype=torch.float32, **cost):
        return harness.ceiling(harness.Work(print, {}, **cost), MACHINE, dtype)

    assert of(vector=100e9) == ("fma", 1.0)
    assert of(matrix=80e9, vector=1e9) == ("sgemm", pytest.approx(1.01))
    assert of(matrix=80e9, dtype=torch.bfloat16) == ("sgemm", 1.0)  # float32's rate is the better one
    assert of(vector=1, bytes=500) == ("copy", pytest.approx(500 / 50e9))  # fits the cache
    assert of(vector=1, bytes=1e6) == ("copy", pytest.approx(1e6 / 10e9))


def test_a_row_has_the_ratio_of_its_bar(monkeypatch):
    monkeypatch.setattr(harness, "interleave", lambda *_: [[[0.002, 0.01, 0.008]]] * 3)
    work = harness.Work(print, {"eager": print, "compile": print}, vector=0.1e9)

    def row(against, shape="block 8, C=96"):
        names = ("sparse_depthwise_conv2d", "forward", shape, torch.float32)
        return harness.measure(harness.Comparison(*names, lambda: work, against), MACHINE, "tuned", 1)

    speedup, share, other = row("PyTorch"), row("own dense"), row("PyTorch", "block 3, C=5")
    assert (speedup.ratio, speedup.rival, speedup.met) == (pytest.approx(4), "compile", False)  # must is 5
    assert (share.ratio, share.met) == (pytest.approx(0.25), True)  # at most 0.30
    assert other.met is None and other.ratio == pytest.approx(4)
    assert (speedup.ceiling, speedup.fraction) == ("fma", pytest.approx(0.5))
    assert harness.Row.from_json(json.loads(json.dumps(share.as_json()))) == share


@pytest.mark.parametrize(
    "rival, turns, ratio",
    [
        ([2.0], 1, 2.0),  # met by far
        ([1.1, 1.0, 1.05], 3, 1.05),  # met in each run
        ([1.1, 0.9, 1.1, 0.9, 0.8, 1.2], 6, 0.9),  # one run was below: the long ones alone count
        ([0.5, 0.5, 0.5, 1.0, 1.0, 1.0], 6, 1.0),
    ],
)
def test_a_cell_is_measured_until_it_is_told_from_its_bar(monkeypatch, rival, turns, ratio):
    """Of calls so long that a run is one turn. Each set of tensors is called once before."""
    times, calls, built = {"ours": [1.0] * 6, "eager": list(rival)}, [], []
    monkeypatch.setattr(harness, "seconds_a_call", lambda f, _repeats, _wall: f())

    def build():
        warm = set()

        def call(name):
            calls.append(name)
            if name in warm:
                return times[name].pop(0)
            warm.add(name)
            return 1.0

        built.append(harness.Work(partial(call, "ours"), {"eager": partial(call, "eager")}))
        return built[-1]

    row = harness.measure(
        harness.Comparison("grn", "forward", "1", torch.float32, build, "eager", effort=0.1), MACHINE, "tuned", 0
    )
    assert row.ratio == ratio and row.met == (ratio >= 0.95)
    assert len(built) == (1 if turns < 6 else 4)
    assert calls.count("ours") == calls.count("eager") == turns + len(built)


def test_upper_bars_and_rows_without_one_are_told_apart_alike():
    clears, bar = harness.clears, partial(bars.Bar, at_most=True)
    one, three = [[[1.0, 4.0]]], [[[1.0, 4.0]], [[1.0, 4.0]], [[1.0, 3.0]]]
    assert clears(bar(0.33), one) and not clears(bar(0.32), one)
    assert clears(bar(0.34), three) and not clears(bar(0.33), three)
    assert clears(bars.Bar(3.0), three) and not clears(bars.Bar(3.1), three)
    assert clears(None, three) and not clears(None, one)


def test_long_calls_are_timed_once_a_run(monkeypatch):
    calls = []
    monkeypatch.setattr(harness, "seconds_a_call", lambda f, _repeats, _wall: f() or 2.0)
    times = interleave([lambda: calls.append(0), lambda: calls.append(1)], 0.05)
    assert times == [[[2.0, 2.0]]] * 3 and calls == [0, 0, 1, 1, 0, 1, 1, 0]


def test_a_quick_run_of_a_heavy_row_compiles_nothing_and_judges_nothing(monkeypatch):
    monkeypatch.setattr(harness, "interleave", lambda functions, *_: [[[1.0] * len(functions)]] * 3)
    row = suite.comparisons(suite.Selection(names=("dit",), match="forward S/2"))[0].comparison
    assert row.heavy
    work = harness.Work(print, {"DiT": print, "DiT, compile": print, "DiT, max-autotune": print})
    row = replace(row, build=lambda: work)
    assert list(harness.measure(row, MACHINE, "tuned", 1).rivals) == list(work.rivals)
    quick = harness.measure(row, MACHINE, "tuned", 1, quick=True)
    assert list(quick.rivals) == ["DiT"] and quick.met is None


def test_of_two_malloc_settings_the_worse_ratio_counts():
    bar = bars.Bar(1.0)
    default = harness.Row("op", "forward", "1", "float32", 1, "default", 1.0, "eager", {"eager": 2.0}, 2.0, "PyTorch")
    tuned = replace(default, malloc="tuned", ratio=1.5)
    label = command.describe_row(suite.Entry("x", harness.Comparison("op", "forward", "1", torch.float32, print)), 1)
    for limit, chosen in ((None, "tuned"), (bar, "tuned"), (replace(bar, at_most=True), "default")):
        rows = [{"row": replace(r, bar=limit).as_json()} for r in (default, tuned)]
        merged = command.merge(label, rows)
        assert merged["malloc"] == chosen and merged["ratios"] == {"default": 2.0, "tuned": 1.5}
    assert command.merge(label, [{"note": "no"}, rows[0]])["note"] == "no"


def test_bars_hold_from_below_or_above():
    assert bars.Bar(1.5).met(1.5) and not bars.Bar(1.5).met(1.49)
    assert bars.Bar(0.3, at_most=True).met(0.3) and not bars.Bar(0.3, at_most=True).met(0.31)
    find = bars.find_bar
    assert find("DiT block", "step", "PyTorch", "S/2; 8x256x384", torch.float32).must == 1.03
    assert find("DiT block", "step", "PyTorch", "S/2; 8x256x384", torch.bfloat16) is None


def test_the_multiply_add_probe_does_the_work_it_is_asked_for():
    tasks = torch.zeros(3)
    out = torch.ops.convdit.fma_probe(tasks, 10_000_000)
    # x -> 0.999 x + 0.001 tends to 1; twelve chains of a vector of 4, 8 or 16 floats each.
    assert out.shape == tasks.shape and (out == out[0]).all() and round(out[0].item() / 12) in (4, 8, 16)
    assert (torch.ops.convdit.fma_probe(tasks, 0) - out).abs().min() > 1
    with pytest.raises(RuntimeError, match="multiply_adds: expected at least 0, got -1"):
        torch.ops.convdit.fma_probe(tasks, -1)


# ---- the command --------------------------------------------------------------------------------------------------


def test_one_row_from_the_command_to_its_files(tmp_path, capfd):
    """Both malloc settings, each in a process of its own."""
    out = tmp_path / "results" / "r.json"
    arguments = ["bench", "depthwise_conv", "--match", "forward C=768", "--out", str(out)]
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert "depthwise_conv2d" in printed and "malloc default and tuned" in printed
    document = json.loads(out.read_text())
    assert {"date", "command", "machine", "versions", "rows"} <= set(document)
    assert document["machine"]["fma"] > 1e9 and document["machine"]["cpu"] and document["versions"]["torch"]
    (row,) = document["rows"]
    wanted = "operator pass shape dtype threads malloc ours_ms rival rival_ms ratio ceiling fraction".split()
    assert set(wanted) <= set(row)
    assert set(row["ratios"]) == {"default", "tuned"} and row["ratio"] == min(row["ratios"].values())
    assert row["bar"]["must"] == 1.9 and row["met"] == (row["ratio"] >= 1.9)
    assert Image.open(out.with_suffix(".png")).size[0] > 500
    page = out.with_suffix(".html").read_text()
    assert "depthwise_conv2d" in page and "data:image/png;base64" in page and "http" not in page


@pytest.fixture
def measuring(monkeypatch):
    """A function that sets what `measure(child, index)` is; children are stand-ins, in this process."""

    def use(measure, torch="2"):
        class Child:
            process = SimpleNamespace(poll=lambda: None)
            hello = {
                "machine": {"fma": 1e9, "matrix": {"float32": 1e9}, "copy": {"8": 1e9}},
                "about": {"cpu": "a", "gpu": None, "cores": 1},
                "versions": {"torch": torch, "convdit": {"cpu_level": "avx2"}},
            }

            def __init__(self, malloc):
                self.malloc = malloc

        Child.measure = measure
        monkeypatch.setattr(command, "children", lambda _given, settings: nullcontext([Child(m) for m in settings]))
        monkeypatch.setattr(command.signal, "signal", lambda *_: None)

    return use


def answer(ratio, malloc="default"):
    numbers = (1.0, "eager", {"eager": ratio}, ratio, "PyTorch")
    return {"row": harness.Row("op", "forward", "1", "float32", 1, malloc, *numbers).as_json()}


def test_rows_measured_before_a_process_died_are_kept(tmp_path, measuring):
    def measure(self, index):
        if index < 2:
            return answer(2.0, self.malloc)
        self.process = SimpleNamespace(poll=lambda: -9)
        raise RuntimeError("the measuring process ended with status -9")

    measuring(measure)
    out = tmp_path / "r.json"
    assert command.run(suite.Selection(names=("depthwise_conv",)), out, "bench") == 1
    rows = json.loads(out.read_text())["rows"]
    assert [r.get("ratio") for r in rows] == [2.0, 2.0, None] and "status -9" in rows[-1]["error"]
    assert out.with_suffix(".png").exists() and "status -9" in out.with_suffix(".html").read_text()


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, measuring, monkeypatch, capsys):
    """Without a file written at the end: what is kept as rows come is enough."""
    asked, out = [], tmp_path / "r.json"
    given = suite.Selection(names=("depthwise_conv",), match="forward")

    def measure(_self, index):
        asked.append(index)
        if len(asked) == 5:  # two settings of malloc: the third row
            raise KeyboardInterrupt
        return answer(2.0)

    measuring(measure)
    monkeypatch.setattr(record, "SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(record.Record, "finish", lambda _self: None)
        assert command.run(given, out, "bench") == 1
    assert "stopped after 2 of 5 rows" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["rows"]) == 2
    asked.clear()
    measuring(lambda _self, index: asked.append(index) or answer(3.0))
    assert command.run(given, out, "bench", resume=True) == 0
    assert asked == [2, 2, 3, 3, 4, 4] and [r["ratio"] for r in json.loads(out.read_text())["rows"]] == [2, 2, 3, 3, 3]


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others(tmp_path, measuring):
    out, names = tmp_path / "r.json", ("depthwise_conv",)
    measuring(lambda *_: answer(2.0))
    assert command.run(suite.Selection(names), out, "bench") == 0
    measuring(lambda *_: answer(5.0))
    assert command.run(suite.Selection(names, match="weight_grad"), out, "bench") == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len({record.key(r) for r in rows}) == 15 and all("date" in r for r in rows)
    assert {r["group"][1]: r["ratio"] for r in rows} == {"forward": 2.0, "input_grad": 2.0, "weight_grad": 5.0}
    measuring(lambda *_: answer(1.0), torch="3")
    with pytest.raises(ValueError, match="--out: expected .*'PyTorch': '3'.*, got .*'PyTorch': '2'"):
        command.run(suite.Selection(names), out, "bench")
    assert json.loads(out.read_text())["rows"] == rows


def test_a_quick_run_measures_every_row_under_the_setting_that_it_has(tmp_path, measuring):
    measuring(lambda self, _index: answer(2.0, self.malloc))
    out, given = tmp_path / "r.json", suite.Selection(quick=True)
    assert command.run(given, out, "bench") == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(suite.comparisons(given)) and {row["malloc"] for row in rows} == {"tuned"}


def test_the_grid_prints_a_line_for_each_group_as_it_ends(tmp_path, measuring, capsys):
    measuring(lambda _self, index: answer(0.5 if index % 32 == 3 else 2.0))
    command.run(suite.Selection(names=("grid",), match="forward"), None, "bench")
    lines = [t for t in capsys.readouterr().out.splitlines() if ": cells 32, left out 0, least 0.50, median 2.00" in t]
    assert len(lines) == 2 * len(bench_grid.CASES) and "depthwise_conv2d forward float32" in lines[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "names: expected some of adaln"),
        (["grn", "--match", "nothing like this"], "no row fits"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--resume"], "resume: expected --out"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_to_write_to_gets_a_name_of_processor_and_level():
    name = command.default_name()
    assert name.removesuffix(".json").endswith("-" + build_info()["cpu_level"])
    assert name.endswith(".json") and name == name.lower() and " " not in name


def test_failed_and_skipped_rows_are_told_apart(capsys):
    entry = suite.Entry("grn", harness.Comparison("grn", "forward", "1", torch.float32, print))
    label = command.describe_row(entry, 1)
    skipped, failed = (command.merge(label, [a]) for a in ({"note": "not on CUDA"}, {"error": "x\nValueError: y"}))
    assert "not measured: not on CUDA" in report.row_line(skipped)
    assert "FAILED: ValueError: y" in report.row_line(failed)


def test_the_installed_package_has_the_benchmarks(tmp_path):
    """As a wheel would hold them: built into a folder, away from the checkout."""
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    libraries = os.environ.get("CONVDIT_LIBRARY_DIR") or str(ROOT / "convdit")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "CONVDIT_LIBRARY_DIR": libraries}
    bench = [sys.executable, "-m", "convdit", "bench", "depthwise_conv", "--list"]
    done = subprocess.run(bench, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "depthwise_conv2d forward C=96, 56x56" in done.stdout
