"""The bound of `make gpu-bound`: the slowest resource of a launch counts, and costs are a line in the batch."""

import pytest

from .bound import Cost, Gpu, Operator, cost_of, line, seconds

GPU = Gpu("a GPU", 10, 1e9, 1e12, 1000, 2, 100, 200)


def test_the_slowest_resource_binds():
    assert seconds(Cost(once=1e12), GPU) == (1.0, "memory")
    assert seconds(Cost(once=1e9, l2=4e12), GPU) == (4.0, "L2")
    assert seconds(Cost(fma=2e10, instructions=2e10, wavefronts=1e9), GPU) == (1.0, "fma")
    assert seconds(Cost(fma=1e10, instructions=8e10), GPU) == (2.0, "issue")
    assert seconds(Cost(tensor=3e12), GPU) == (3.0, "tensor")


def test_costs_are_a_line_in_the_batch():
    assert line(64, 2, Cost(once=70, fma=5), 4, Cost(once=90, fma=5)) == Cost(once=690, fma=5)


def test_a_launch_is_counted_by_warp_and_kind():
    launch = {"sites": [[1, 32, 4, 4, 0], [1, 32, 3, 1, 1]], "read": 128, "written": 64, "blocks": [32, 64]}
    blocks = [
        {"fma.rn.f32": 4, "mov.b32": 7, "ex2.approx.ftz.f32": 1},
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16": 1},
    ]
    assert cost_of(launch, {"blocks": blocks}) == Cost(
        once=192, l2=128, wavefronts=3, instructions=7, fma=4, special=1, tensor=2 * 16 * 8 * 16
    )


@pytest.mark.parametrize("bytes_, products, expected", [(1e12, 0, 2.0), (0, 3.2e11, 1.0), (5e11, 3.2e11, 1.0)])
def test_the_floor_is_traffic_or_arithmetic(bytes_, products, expected):
    operator = Operator("", 2, (1, 2), lambda n: None, (bytes_, 0), (products, 0))
    assert operator.floor(0, GPU) == pytest.approx(expected)
