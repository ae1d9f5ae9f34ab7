"""The CPU's kernels of packed_attention: blocks of keys, shares of threads, and what their arithmetic promises."""

from dataclasses import replace

import pytest
import torch

from convdit import ops, reference
from tests.ops import harness
from tests.ops.test_attention import packed_case, plain_attention

# Blocks of keys, none of them full, of heads that fill vectors, and do not, or are so wide that blocks are short.
SEVERAL_BLOCKS = [packed_case(1, t, 1, d) for t, d in [(257, 64), (600, 24), (530, 33), (300, 300)]]
LARGE_SCORES = [packed_case(1, t, 2, 16, scale=10.0) for t in (40, 600)]
LARGE_MEAN = packed_case(2, 40, 2, 16, offset=30.0)


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("case", SEVERAL_BLOCKS, ids=str)
def test_error_rule(case, dtype):
    harness.assert_error_rule(replace(case, reference=plain_attention), dtype)


def errors(case, op):
    """Of values and gradients in float32, which come second."""
    low = harness.inputs(case, torch.float32, requires_grad=True)
    exact = tuple(a.detach().double().requires_grad_() for a in low)
    got, right = (sum(harness.run(f, case, a), []) for f, a in ((op, low), (case.reference, exact)))
    return [(g - r).abs() for g, r in zip(got, right, strict=True)]


@pytest.mark.parametrize("case", LARGE_SCORES, ids=str)
def test_large_scores_are_no_worse_than_pytorch(case):
    # As a whole: row by row PyTorch is right by luck where a few large scores happen to be rounded well.
    for ours, plain in zip(errors(case, case.op), errors(case, plain_attention), strict=True):
        assert ours.max() <= 2 * plain.max()


def test_slopes_of_a_query_sum_to_zero():
    # Keys with a large mean multiply whatever rounding leaves of that sum.
    ours, plain = (errors(LARGE_MEAN, op)[1][..., :32].max() for op in (ops.packed_attention, plain_attention))
    assert 10 * ours < plain


@pytest.mark.parametrize("keys", [slice(0, 300), slice(300, 600), slice(3, 600)], ids=["first", "last", "nearly all"])
def test_keys_that_score_minus_infinity_count_for_nothing(keys):
    qkv = torch.randn(1, 600, 3, 2, 16)
    qkv[0, :, 0, 0] = 0
    qkv[0, 7, 0, 0, 0], qkv[0, keys, 1, 0] = -1e30, 1e30  # one query's scores
    out, expected = (f.packed_attention(qkv.flatten(2), 2) for f in (ops, reference))
    assert expected.isfinite().all()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [200, 1200])
def test_one_head_repeats_bitwise_for_any_number_of_threads(tokens, dtype):
    harness.assert_repeats_for_any_threads(packed_case(1, tokens, 1, 64), dtype)


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "not every", CONVDIT_PRODUCTS="convdit")


def test_bfloat16_by_our_kernels_on_every_processor():
    harness.assert_in_own_process(__file__, "bfloat16 and not every", CONVDIT_PRODUCTS="convdit")
