"""Every check fires on a kernel that does that one thing wrong, with its source line, block and thread; on no other."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from .executor import load

SOURCE = Path(__file__).parent / "checks.cu"


@pytest.fixture(scope="module")
def library():
    return load(SOURCE)


@pytest.fixture(autouse=True)
def one_order(library):
    library.set_orders("forward")
    library.c.simt_set_fuel(1000)
    library.clear()


def marked_line(what: str, kernel: str) -> int:
    """The line of the kernel that is marked `// bad: what`."""
    lines = SOURCE.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if f"void {kernel}(" in line)
    return next(i + 1 for i in range(begin, len(lines)) if f"// bad: {what}" in lines[i])


def floats(library, n=64):
    return library.array(np.arange(n, dtype=np.float32))


def unwritten(library, n=64):
    return library.array(((n,), np.float32))


MASK = ctypes.c_uint32
# kernel, grid, block, its arguments from the library, what is reported, (block, thread) of the first
BAD = [
    ("reads_behind_the_end", 4, 32, lambda k: (floats(k, 100), floats(k, 100), 100), "OUT OF BOUNDS", (3, 4)),
    ("writes_before_the_begin", 1, 32, lambda k: (floats(k),), "OUT OF BOUNDS", (0, 0)),
    ("reads_misaligned_vectors", 1, 8, lambda k: (floats(k), floats(k)), "MISALIGNED ACCESS", (0, 1)),
    ("reads_behind_shared", 1, 32, lambda k: (floats(k), 70), "SHARED MEMORY OUT OF BOUNDS", (0, 0)),
    ("reads_unwritten_global", 1, 32, lambda k: (unwritten(k), floats(k)), "UNINITIALISED READ", (0, 0)),
    ("reads_unwritten_shared", 1, 64, lambda k: (floats(k),), "UNINITIALISED READ", (0, 31)),
    ("exchanges_between_warps", 1, 64, lambda k: (floats(k), False), "RACE: read after an unordered write", (0, 32)),
    ("exchanges_behind_a_fence", 1, 64, lambda k: (floats(k),), "RACE: read after an unordered write", (0, 32)),
    ("exchanges_within_a_warp", 1, 32, lambda k: (floats(k), False), "RACE: read after an unordered write", (0, 1)),
    ("overwrites_what_is_read", 1, 64, lambda k: (floats(k), False), "RACE: write after an unordered read", (0, 32)),
    (
        "reads_together_then_one_writes",
        1,
        32,
        lambda k: (floats(k), False),
        "RACE: write after an unordered read",
        (0, 5),
    ),
    # __syncwarp orders the reads of the writer's own warp, not those of the other.
    (
        "reads_together_then_one_writes",
        1,
        64,
        lambda k: (floats(k), True),
        "RACE: write after an unordered read",
        (0, 5),
    ),
    ("all_write_one_place", 1, 32, lambda k: (floats(k), 0), "RACE: write after an unordered write", (0, 1)),
    (
        "half_a_warp_synchronises",
        1,
        32,
        lambda k: (floats(k), MASK(0xFFFF)),
        "RACE: read after an unordered write",
        (0, 16),
    ),
    ("blocks_add_to_one_place", 4, 1, lambda k: (floats(k), 0), "RACE BETWEEN BLOCKS: read after a write", (1, 0)),
    ("some_threads_skip_a_barrier", 1, 64, lambda k: (floats(k), 32), "THREADS OF A BLOCK WAIT", (0, 32)),
    ("some_lanes_miss_a_shuffle", 1, 32, lambda k: (floats(k), 31), "DEADLOCK", (0, 0)),
    ("shuffles_from_outside_the_mask", 1, 32, lambda k: (floats(k), MASK(0xFF), 8), "SHUFFLE FROM A LANE", (0, 0)),
    ("votes_without_being_in_the_mask", 1, 1, lambda k: (floats(k), MASK(0x2)), "LANE NOT IN ITS OWN MASK", (0, 0)),
    ("names_lanes_that_do_not_exist", 1, 16, lambda k: (floats(k), MASK(0xFFFFFFFF)), "MASK NAMES A LANE", (0, 0)),
    ("waits_at_a_barrier_of_a_part", 1, 64, lambda k: (floats(k), 32), "BARRIER OF A PART OF THE BLOCK", (0, 0)),
    ("copies_without_waiting", 1, 64, lambda k: (floats(k, 256), floats(k, 256), False, True), "READ BEFORE", (0, 0)),
    ("never_ends", 1, 1, lambda k: (floats(k), 0), "ENDLESS LOOP", (0, 0)),
    ("traps", 1, 32, lambda k: (floats(k), 31), "TRAP", (0, 31)),
]
GOOD = [
    ("reads_within_bounds", 4, 32, lambda k: (floats(k, 100), floats(k, 100), 100)),
    ("exchanges_between_warps", 1, 64, lambda k: (floats(k), True)),
    ("exchanges_within_a_warp", 1, 32, lambda k: (floats(k), True)),
    ("overwrites_what_is_read", 1, 64, lambda k: (floats(k), True)),
    ("reads_together_then_one_writes", 1, 32, lambda k: (floats(k), True)),
    ("all_write_one_place", 1, 32, lambda k: (floats(k), 1)),
    ("half_a_warp_synchronises", 1, 32, lambda k: (floats(k), MASK(0xFFFFFFFF))),
    ("blocks_add_to_one_place", 4, 1, lambda k: (floats(k), 1)),
    ("blocks_count", 4, 32, lambda k: (k.array(np.zeros(1, np.uint32)),)),
    ("some_threads_skip_a_barrier", 1, 64, lambda k: (floats(k), 64)),
    ("some_lanes_miss_a_shuffle", 1, 32, lambda k: (floats(k), 32)),
    ("shuffles_from_outside_the_mask", 1, 32, lambda k: (floats(k), MASK(0xFF), 7)),
    ("names_lanes_that_do_not_exist", 1, 16, lambda k: (floats(k), MASK(0xFFFF))),
    ("copies_without_waiting", 1, 64, lambda k: (floats(k, 256), floats(k, 256), True, True)),
    ("traps", 1, 32, lambda k: (floats(k), 32)),
]


@pytest.mark.parametrize("kernel, grid, block, arguments, what, where", BAD, ids=[f"{b[0]}-{b[2]}" for b in BAD])
def test_reports(library, kernel, grid, block, arguments, what, where):
    shared = 256 if kernel == "reads_behind_shared" else 0
    findings = library.launch(kernel, grid, block, *arguments(library), shared=shared)
    first = next((f for f in findings if f.what.startswith(what)), None)
    assert first, f"{what} was not reported, but {findings}"
    assert (first.file, first.kernel) == ("tests/simt/checks.cu", kernel)
    if what != "ENDLESS LOOP":  # known by its kernel alone
        assert first.line == marked_line(what, kernel)
    assert (first.block[0], first.thread[0]) == where


@pytest.mark.parametrize("kernel, grid, block, arguments", GOOD, ids=[g[0] for g in GOOD])
@pytest.mark.parametrize("order", ["forward", "reversed", "7"])
def test_reports_nothing_of_a_right_kernel(library, kernel, grid, block, arguments, order):
    library.set_orders(order)
    assert library.launch(kernel, grid, block, *arguments(library)) == []


def test_a_copy_needs_a_barrier_as_well_as_a_wait(library):
    x, y = floats(library, 256), floats(library, 256)
    findings = library.launch("copies_without_waiting", 1, 64, x, y, True, False)
    assert "RACE: read after an unordered write" in [f.what for f in findings]


def test_blocks_race_by_a_write_after_a_read(library):
    x = floats(library)
    (first, *_) = library.launch("a_block_overwrites_what_another_reads", 2, 1, x, x, 1)
    assert first.what == "RACE BETWEEN BLOCKS: write after a read"
    assert library.launch("a_block_overwrites_what_another_reads", 2, 1, x, floats(library), 1) == []


def test_a_result_that_depends_on_the_order_is_reported(library):
    library.set_orders("forward", "reversed")
    counter, y = library.array(np.zeros(1, np.uint32)), library.array(np.zeros(64, np.uint32))
    (finding,) = library.launch("depends_on_the_order", 1, 64, counter, y)
    assert finding.what == "RESULT DEPENDS ON THE ORDER OF THE THREADS" and "reversed" in finding.text


def test_every_order_starts_from_the_same_memory(library):
    library.set_orders("forward", "reversed", 3)
    y = floats(library)
    assert library.launch("blocks_add_to_one_place", 4, 1, y, 1) == []
    assert np.array_equal(y[:4], [1, 2, 3, 4])


def test_a_finding_in_an_inlined_function_names_its_caller(library):
    (finding, *_) = library.launch("calls_a_function", 1, 1, floats(library), floats(library))
    line, caller = (next(i + 1 for i, t in enumerate(SOURCE.read_text().splitlines()) if t.endswith(f"// bad: {w}"))
                    for w in ("inlined", "caller"))  # fmt: skip
    assert finding.line == line and f"(inlined at tests/simt/checks.cu:{caller})" in finding.text


def test_an_allowed_finding_is_counted_and_not_reported(library):
    before = library.allowed
    with pytest.raises(LookupError, match="has no line with 'no such code'"):
        library.allow("UNINITIALISED READ", "tests/simt/checks.cu", "no such code")
    library.allow("UNINITIALISED READ", "tests/simt/checks.cu", "y[threadIdx.x] = x[threadIdx.x];  // bad")
    assert library.launch("reads_unwritten_global", 1, 32, unwritten(library), floats(library)) == []
    assert library.allowed - before == 32
    assert library.launch("reads_unwritten_shared", 1, 64, floats(library)) != []


def test_released_memory_is_out_of_bounds(library):
    x = floats(library)
    library.c.simt_release(x.ctypes.data)
    (finding, *_) = library.launch("reads_unwritten_global", 1, 1, x, floats(library))
    assert finding.what == "OUT OF BOUNDS"


@pytest.mark.parametrize(
    "grid, block, shared", [((0,), (32,), 0), ((1,), (1025,), 0), ((1, 70000), (32,), 0), ((1,), (32,), 1 << 18)]
)
def test_a_launch_that_no_device_takes_is_reported(library, grid, block, shared):
    (finding,) = library.launch("traps", grid, block, floats(library), 32, shared=shared)
    assert finding.what == "LAUNCH THAT NO DEVICE TAKES"
