"""The script that breaks kernels breaks every barrier, wait, bound and mask of device code, and nothing else."""

from . import mutants
from .budget import occupancy, short, worse

SOURCE = """// a < b in a comment
int host(int n) { return n < 3 ? 1 : 2; }
template <int N>
__device__ __forceinline__ int add(int x) {
  constexpr int many = N < 4 ? 1 : 2;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (x >= i) x += i;  // x <= i
#pragma unroll 1
  for (int i = 0; i < x; ++i) x += __shfl_xor_sync(0xffffffffu, x, 1);
  return static_cast<int>(x) + many;
}
__global__ void kernel(int* y, int n) {
  __syncthreads();
  wait_copies<0>();
  if (n > 4) __syncwarp();
}
"""


def test_each_place_gets_one_switch():
    text, found = mutants.mutate(SOURCE, "a.cu", 100)
    assert {m.function for m in found} == {"add", "kernel"}
    assert [(m.number, m.line, m.change) for m in found] == [
        (100, 8, "bound lowered by one"),
        (101, 10, "bound raised by one"),
        (102, 10, "last lane left out of the mask"),
        (103, 14, "barrier left out"),
        (104, 15, "wait left out"),
        (105, 16, "barrier left out"),
        (106, 16, "bound lowered by one"),
    ]
    lines = text.split("\n")
    assert lines[7] == "    if (x >= -simt_is(100) + i) x += i;  // x <= i"
    assert lines[9].endswith("i < simt_is(101) + x; ++i) x += __shfl_xor_sync((0xffffffffu >> simt_is(102)), x, 1);")
    assert lines[13] == "  if (!simt_is(103)) __syncthreads();"
    assert lines[14] == "  if (!simt_is(104)) wait_copies<0>();"
    assert lines[15] == "  if (n > -simt_is(106) + 4) if (!simt_is(105)) __syncwarp();"
    assert [lines[i] for i in range(7)] == SOURCE.split("\n")[:7]


def test_places_of_one_line_are_told_apart():
    _, found = mutants.mutate("__device__ bool inside(int a, int b) {\n  return a < 3 && b < 4;\n}", "a.cu", 1)
    assert [(m.change, m.nth) for m in found] == [("bound raised by one", 0), ("bound raised by one", 1)]


def test_equal_lines_are_told_apart_by_function_and_order_and_not_by_number():
    loop = "  for (int i = 0; i < n; ++i) f(i);\n"
    one, two = "__device__ void one(int n) {\n", "__global__ void __launch_bounds__(4) two(int n) {\n"
    text = f"{one}{loop}{loop}}}\n{two}{loop}}}\n"
    _, found = mutants.mutate(text, "a.cu", 1)
    assert [(m.function, m.nth) for m in found] == [("one", 0), ("one", 1), ("two", 0)]
    _, moved = mutants.mutate("\n\n" + text, "a.cu", 1)
    assert [m.key() for m in moved] == [m.key() for m in found] and moved[0].line != found[0].line


def test_every_equivalent_mutant_is_one_of_the_kernels_mutants_and_has_a_reason():
    rows = mutants.equivalents()
    there = {m.key() for m in mutants.every()}
    assert [r for r in rows if mutants.key_of(r) not in there] == [], "stale: no kernel has these mutants any more"
    assert len({mutants.key_of(r) for r in rows}) == len(rows)
    rooms = {p.parent.name for p in (mutants.build.ROOT / "csrc").glob("*/cuda.cu")}
    assert all(r["reason"] and set(r.get("rooms", rooms)) <= rooms for r in rows)


def test_the_budget_reports_what_became_worse():
    before = {"a": {"sectors": 1.0, "spills": 0, "occupancy": 0.5}, "gone": {}}
    now = {"a": {"sectors": 1.1, "spills": 8, "occupancy": 0.25}, "new": {}}
    assert worse(now, before) == [
        "a: occupancy 0.25, was 0.5",
        "a: sectors 1.1, was 1.0",
        "a: spills 8, was 0",
        "gone: no such launch any more",
        "new: not in the budget",
    ]
    assert worse(before, before) == []


def test_occupancy_is_limited_by_each_resource():
    assert occupancy(32, 0, 256) == 1.0
    assert occupancy(64, 0, 256) == 0.5
    assert occupancy(32, 80 * 1024, 256) == 0.25
    assert occupancy(32, 0, 32) == 0.5


def test_short_names_keep_template_arguments():
    name = "void convdit::cuda::(anonymous namespace)::rows<float, convdit::bf16>(convdit::Adaln, bool)"
    assert short(name) == "rows<float, bf16>"
