"""Classifier-free guidance and the modulation cache of DiT."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convdit.models import DiT
from convdit.models.modulation_cache import table_bytes
from convdit.nn.dit_block import CONDITIONINGS

from .test_dit import inputs, small, text, text_model


def test_guidance_moves_from_null_through_conditional_on_the_chosen_channels():
    model = small()
    x, t, y = inputs(model)
    conditional, null = model(x, t, y), model(x, t, torch.full_like(y, 7))
    expected = conditional.clone()
    expected[:, :3] = null[:, :3] + 4 * (conditional - null)[:, :3]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 4.0), expected, **close)
    expected[:, :5] = null[:, :5] + 4 * (conditional - null)[:, :5]
    guided = model.forward_with_cfg(x, t, y, 4.0, channels="all")
    torch.testing.assert_close(guided, expected, **close)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 1.0), conditional, **close)


@pytest.mark.parametrize("channels", ["first3", "all"])
def test_public_form_of_guidance_holds_the_batch_twice(channels):
    model = small()
    x, t, y = inputs(model)
    plain = model.forward_with_cfg(x, t, y, 3.0, channels)
    twice_y = torch.cat([y, torch.full_like(y, 7)])
    twice_x = torch.cat([x, torch.full_like(x, float("nan"))])  # the second half is not read
    twice = model.forward_with_cfg(twice_x, torch.cat([t, t]), twice_y, 3.0, channels)
    guided = 5 if channels == "all" else 3
    assert torch.equal(twice[:3], plain)
    assert torch.equal(twice[3:, :guided], plain[:, :guided])
    null = model(x, t, twice_y[3:])
    torch.testing.assert_close(twice[3:, guided:], null[:, guided:], rtol=1e-4, atol=1e-5)


def test_first3_of_fewer_channels_leaves_the_variance_alone():
    model = small(in_channels=1)
    x, t, y = inputs(model)
    guided = model.forward_with_cfg(x, t, y, 3.0)
    torch.testing.assert_close(guided[:, 1:], model(x, t, y)[:, 1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided[:, :1], model(x, t, y)[:, :1])


def test_unknown_channels_are_named():
    model = small()
    with pytest.raises(ValueError, match='"first3" or "all", got \'first4\''):
        model.forward_with_cfg(*inputs(model), 2.0, channels="first4")


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_guidance_by_embeddings_equals_that_by_their_labels(conditioning):
    model = small(conditioning=conditioning)
    x, t, y = inputs(model)
    expected = model.forward_with_cfg(x, t, y, 3.0, "all")
    rows = model.y_embedder.embedding_table(y)
    assert torch.equal(model.forward_with_cfg(x, t, rows, 3.0, "all"), expected)
    if conditioning == "cross_attention":
        tokens = torch.stack([rows, torch.randn_like(rows)], 1)
        mask = torch.tensor([[True, False]] * 3)
        guided = model.forward_with_cfg(x, t, tokens, 3.0, "all", y_mask=mask)
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


def test_guidance_of_text_starts_from_the_null_that_training_drops_to():
    model = text_model(class_dropout_prob=1.0)
    x, t, _ = inputs(model)
    y, mask = text(model)
    conditional = model(x, t, y, mask)
    null = model.train()(x, t, y, mask)
    guided = model.eval().forward_with_cfg(x, t, y, 3.0, "all", y_mask=mask)
    expected = torch.cat([(null + 3 * (conditional - null))[:, :5], conditional[:, 5:]], 1)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance needs a null class"):
        text_model(class_dropout_prob=0).forward_with_cfg(x, t, y, 3.0)


def test_guidance_interval_guides_at_its_timesteps_alone_both_ends_included():
    model = small()
    x, _, y = inputs(model)
    for t, guided in [((3, 999, 500), (False, False, True)), ((100, 600, 601), (True, True, False))]:
        t = torch.tensor(t)
        inside = model.forward_with_cfg(x, t, y, 4.0, "all")
        out = model.forward_with_cfg(x, t, y, 4.0, "all", interval=(100, 600))
        expected = torch.where(torch.tensor(guided).view(3, 1, 1, 1), inside, model(x, t, y))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(inside, model(x, t, y), rtol=1e-2)


def test_forward_and_guidance_look_at_no_value():
    """On the meta device a look at a value raises; on a GPU it would wait for all work in flight."""
    with torch.device("meta"):
        model = DiT(8, 2, 4, 32, 1, 2, num_classes=5)
        x, t, y = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
        assert model(x, t, y).shape == (2, 8, 8, 8)
        assert model.forward_with_cfg(x, t, y, 2.0, interval=(0, 5), doubled=False).shape == (2, 8, 8, 8)
        assert model.forward_with_cfg(x, t, y, 2.0, doubled=True).shape == (2, 8, 8, 8)


def test_the_form_of_guidance_is_looked_up_once_for_each_tensor_of_labels():
    class Looks(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, op, types, arguments=(), options=None):
            self.seen += op is torch.ops.aten._local_scalar_dense.default
            return op(*arguments, **(options or {}))

    model = small()
    y = torch.tensor([1, 2])
    with Looks() as looks:
        assert [model._holds_batch_twice(y) for _ in range(3)] == [False] * 3
        assert looks.seen == 1
        y[1] = 7  # in place: the same tensor, another form
        assert model._holds_batch_twice(y) and looks.seen == 2
        assert not model._holds_batch_twice(torch.tensor([7, 1])) and looks.seen == 3
    with torch.inference_mode():  # no count of changes there: looks every time
        y = torch.tensor([1, 7])
        assert model._holds_batch_twice(y)
        y[1] = 2
        assert not model._holds_batch_twice(y)


def test_guidance_compiles_to_one_graph():
    model = small(depth=1)
    x, t, y = inputs(model)
    compiled = torch.compile(model.forward_with_cfg, fullgraph=True, backend="eager")
    options = {"cfg_scale": 3.0, "channels": "all", "interval": (2, 600), "doubled": False}
    torch.testing.assert_close(compiled(x, t, y, **options), model.forward_with_cfg(x, t, y, **options))


class Products(TorchDispatchMode):
    """Counts the matrix products whose result is so many columns wide."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows = columns, []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        out = op(*arguments, **(options or {}))
        if op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) and out.shape[-1] in self.columns:
            self.rows.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(("conditioning", "rows"), [("adaln_zero", 6), ("adaln", 4)])
def test_cached_modulation_gives_the_same_output_to_rounding_by_one_product(conditioning, rows):
    model = small(conditioning=conditioning, mlp_ratio=2.5)  # no other product is as wide as these
    x, t, y = inputs(model)
    expected, guided = model(x, t, y), model.forward_with_cfg(x, t, y, 2.0)
    width = model.hidden_size
    columns = {rows * width, 2 * width, (3 * rows + 2) * width}  # of a block, of the final layer, of all
    with Products(columns) as products, model.cache_modulation([0, 3, 500, 999], y, guidance=True):
        again, guided_again = model(x, t, y), model.forward_with_cfg(x, t, y, 2.0)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided_again, guided, rtol=1e-4, atol=1e-5)
    # Four timesteps with the three labels 0, 1, 7, of which 7 is the null label.
    assert products.rows == [(4 * 3, (3 * rows + 2) * width)]
    with Products(columns) as products:
        assert torch.equal(model(x, t, y), expected)
    assert len(products.rows) == 4, "the counter sees the products of the blocks, too"


def test_cache_states_its_memory():
    model = small(depth=2)
    with model.cache_modulation(range(10), torch.tensor([1, 4, 1]), guidance=True) as cache:
        assert cache.nbytes == 10 * 3 * (6 * 2 + 2) * 24 * 4 == table_bytes(model, 10, 3)
    assert table_bytes(small(conditioning="in_context"), 10, 3) == 0


def test_cache_refuses_an_adapter_whose_weight_is_not_the_whole():
    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = small()
    model.blocks[1].adaLN_modulation[1] = Adapter(24, 6 * 24)
    with pytest.raises(TypeError, match="expected nn.Linear in adaLN_modulation, got Adapter"):
        with model.cache_modulation([1], torch.tensor([1])):
            pass


def test_cache_takes_timesteps_of_any_float_dtype_as_the_model_does():
    model = small()
    x, _, y = inputs(model)
    t = torch.tensor([0.1, 1 / 3, 7.7], dtype=torch.float64)
    expected = model(x, t, y)
    with model.cache_modulation(t, y):
        torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-5)


def test_uncached_timestep_or_label_raises_and_is_named():
    model = small()
    x, t, y = inputs(model)
    with model.cache_modulation(t, y):
        with pytest.raises(ValueError, match="timestep 501 is not in the modulation cache"):
            model(x, torch.tensor([3, 501, 0]), y)
        with pytest.raises(ValueError, match="label 5 is not in the modulation cache"):
            model(x, t, torch.tensor([1, 5, 7]))
        with pytest.raises(TypeError, match="labels"):
            model(x, t, torch.zeros(3, 24))
    with model.cache_modulation(t, y[:1]):
        with pytest.raises(ValueError, match="label 7 is not"):
            model.forward_with_cfg(x[:1], t[:1], y[:1], 2.0)
    model(x, torch.tensor([3, 501, 0]), y)


def test_cache_serves_embeddings_in_place_of_labels():
    model = small()
    x, t, y = inputs(model)
    rows = model.y_embedder.embedding_table(y).detach()
    expected, guided = model(x, t, rows), model.forward_with_cfg(x, t, rows, 2.0, "all")
    with model.cache_modulation(t, rows, guidance=True) as cache:
        torch.testing.assert_close(model(x, t, rows), expected, rtol=1e-4, atol=1e-5)
        again = model.forward_with_cfg(x, t, rows, 2.0, "all")
        torch.testing.assert_close(again, guided, rtol=1e-4, atol=1e-5)
        assert cache.table.shape == (3, 4, 6 * 3 + 2, 24)  # the null row once for the batch of three
        with pytest.raises(ValueError, match=r"y: expected the embeddings \(3, 24\) that the cache was made for"):
            model(x, t, rows + 1)
    with model.cache_modulation(t, rows), pytest.raises(ValueError, match="guidance: expected a cache made with"):
        model.forward_with_cfg(x, t, rows, 2.0)


def test_cache_is_left_behind_when_the_body_fails():
    model = small()
    x, t, y = inputs(model)
    with pytest.raises(RuntimeError, match="stop"), model.cache_modulation([5], y):
        raise RuntimeError("stop")
    model(x, t, y)


def test_cache_drops_no_label_in_training_mode():
    model = small(class_dropout_prob=1.0)
    x, t, y = inputs(model)
    expected = model(x, t, y)
    with model.train().cache_modulation(t, y):
        torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-5)


def test_cache_serves_an_unconditional_model():
    model = small(num_classes=0)
    x, t, _ = inputs(model)
    expected = model(x, t)
    with model.cache_modulation(t):
        torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"conditioning": "in_context"}, ([1], torch.tensor([1])), ValueError, "in_context"),
        ({}, ([], torch.tensor([1])), ValueError, "timesteps"),
        ({}, ([1], torch.zeros(2, 23)), ValueError, r"embeddings of shape \(2, 24\)"),
        ({}, ([1], torch.tensor([9])), ValueError, "y: expected labels in 0..7"),
        ({}, ([1], None), ValueError, "y: expected labels .* got None"),
        ({}, ([1], None, True), ValueError, "guidance=True"),
        ({"class_dropout_prob": 0.0}, ([1], torch.tensor([1]), True), ValueError, "null class"),
    ],
)
def test_wrong_cache_request_is_named(options, arguments, error, message):
    with pytest.raises(error, match=message), small(**options).cache_modulation(*arguments):
        raise AssertionError("must not be entered")
