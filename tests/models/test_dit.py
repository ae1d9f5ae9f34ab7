"""DiT against the plain restatement in dit_eager.py, against diffusers, and against its own promises.

Over 400 lines by a hair: training and guidance have files of their own already.
"""

import copy

import pytest
import torch

from convdit.models import dit
from convdit.models.dit import DiT
from convdit.nn.dit_block import CONDITIONINGS, DiTBlock

from . import dit_eager


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomised(module, seed=0):
    """The module with every parameter drawn anew: what starts at zero would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return module


def small(**options):
    settings = {"input_size": (6, 10), "in_channels": 5, "hidden_size": 24, "depth": 3}
    settings |= {"num_heads": 3, "num_classes": 7}
    return randomised(DiT(**settings | options)).eval()


def inputs(model, n=3, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, model.in_channels, *model.input_size, generator=generator).to(dtype)
    t = torch.tensor([3, 999, 0, 500])[:n]
    return x, t, torch.tensor([1, 7, 0, 6])[:n]


def grads(output, wanted):
    return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), wanted)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_model_and_its_gradients_equal_the_plain_restatement(conditioning):
    model = small(conditioning=conditioning, mlp_ratio=2.5).double()
    x, t, y = inputs(model, dtype=torch.float64)
    x.requires_grad_()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    expected = dit_eager.model(state, x, t, y, 3, conditioning)
    output = model(x, t, y)
    assert output.shape == (3, 10, 6, 10)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    wanted = [x, *model.parameters()]
    for ours, theirs in zip(grads(output, wanted), grads(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("conditioning", "options"),
    [(name, {}) for name in CONDITIONINGS]
    + [("adaln_zero", {"input_size": 64, "in_channels": 4}), ("adaln_zero", {"num_classes": 0, "learn_sigma": False})],
)
@torch.no_grad()
def test_float32_is_within_1e_5_of_the_plain_restatement(conditioning, options):
    model = small(conditioning=conditioning, **options)
    x, t, y = inputs(model)
    y = y if model.num_classes else None
    exact = dit_eager.model(copy.deepcopy(model).double().state_dict(), x.double(), t, y, 3, conditioning)
    assert (model(x, t, y) - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_plain_half_precision(dtype):
    model = small(hidden_size=48)
    x, t, y = inputs(model)
    exact = dit_eager.model(copy.deepcopy(model).double().state_dict(), x.double(), t, y, 3)
    half = copy.deepcopy(model).to(dtype)
    output = half(x, t, y)
    assert output.dtype == dtype
    plain = dit_eager.model(half.state_dict(), x.to(dtype), t, y, 3)
    error, plain_error = (output - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * plain_error + torch.finfo(dtype).eps


def test_autocast_keeps_the_residual_stream_in_float32():
    model = small()
    x, t, y = inputs(model)
    streams = []
    model.blocks[1].register_forward_hook(lambda _, __, out: streams.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, t, y)
    assert streams[0].x.dtype == torch.float32
    assert streams[0].branch.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), model(x, t, y), rtol=0.05, atol=0.05)


def test_compiled_step_equals_eager_step():
    model = small(depth=2)
    x, t, y = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, expected = compiled(x, t, y), model(x, t, y)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    wanted = list(model.parameters())
    for ours, theirs in zip(grads(output, wanted), grads(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("constants", ["official", "diffusers"])
def test_equals_diffusers_with_the_constants_of_the_paper_or_with_its_own(constants):
    import diffusers

    ours = small(input_size=8, in_channels=4, constants=constants)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=7,
        **({"norm_eps": 1e-6} if constants == "official" else {}),
    )  # fmt: skip
    state = ours.state_dict()
    mapped = {}

    def give(target, source, rows=slice(None)):
        for kind in ("weight", "bias"):
            mapped[f"{target}.{kind}"] = state[f"{source}.{kind}"][rows]

    give("pos_embed.proj", "x_embedder.proj")
    give("proj_out_1", "final_layer.adaLN_modulation.1")
    give("proj_out_2", "final_layer.linear")
    for i in range(3):
        there, here = f"transformer_blocks.{i}.", f"blocks.{i}."
        give(there + "norm1.linear", here + "adaLN_modulation.1")
        give(there + "norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0")
        give(there + "norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2")
        table = there + "norm1.emb.class_embedder.embedding_table.weight"
        mapped[table] = state["y_embedder.embedding_table.weight"]
        for part, name in enumerate("qkv"):
            give(there + f"attn1.to_{name}", here + "attn.qkv", slice(24 * part, 24 * part + 24))
        give(there + "attn1.to_out.0", here + "attn.proj")
        give(there + "ff.net.0.proj", here + "mlp.fc1")
        give(there + "ff.net.2", here + "mlp.fc2")
    theirs.load_state_dict(mapped)
    theirs.eval()
    if constants == "official":
        for block in theirs.transformer_blocks:  # diffusers spaces the frequencies by half - 1
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = inputs(ours)
    # Before the first MLP a stream of little variance, where the eps of the LayerNorm counts.
    ours.pos_embed.zero_(), theirs.pos_embed.pos_embed.zero_()
    for part in (
        ours.x_embedder, ours.blocks[0].attn.proj,
        theirs.pos_embed.proj, theirs.transformer_blocks[0].attn1.to_out[0],
    ):  # fmt: skip
        for parameter in part.parameters():
            parameter.data.mul_(1e-3)
    with torch.no_grad():
        expected = theirs.double()(x.double(), t, y).sample
        assert (ours.double()(x.double(), t, y) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_parameter_names_are_those_of_the_public_implementation():
    names = {"pos_embed", "y_embedder.embedding_table.weight"}
    linears = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    linears += ["final_layer.adaLN_modulation.1"]
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
        linears += [f"blocks.{i}.{part}" for i in range(2)]
    names |= {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    assert set(small(depth=2).state_dict()) == names


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_untrained_output_is_exactly_zero(conditioning):
    model = DiT(8, 2, 4, 32, 2, 2, num_classes=5, conditioning=conditioning)
    x, t, y = inputs(model)
    assert model(x, t, y.clamp(max=4)).count_nonzero() == 0


def test_initial_values_are_those_of_the_public_implementation():
    torch.manual_seed(0)
    model = DiT(8, 2, 4, 64, 2, 4, num_classes=200)
    state = model.state_dict()
    for name, (fan_in, fan_out) in {
        "x_embedder.proj": (16, 64),
        "blocks.0.attn.qkv": (64, 192),
        "blocks.1.mlp.fc2": (256, 64),
    }.items():
        bound = (6 / (fan_in + fan_out)) ** 0.5
        weight = state[name + ".weight"]
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert state[name + ".bias"].count_nonzero() == 0
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        assert state[name + ".weight"].std() == pytest.approx(0.02, rel=0.05)
    for name in ("blocks.0.adaLN_modulation.1", "final_layer.adaLN_modulation.1", "final_layer.linear"):
        assert state[name + ".weight"].count_nonzero() == state[name + ".bias"].count_nonzero() == 0
    wide = DiT(8, 2, 4, 64, 1, 4, num_classes=200, label_init_std=0.3)
    assert wide.state_dict()["y_embedder.embedding_table.weight"].std() == pytest.approx(0.3, rel=0.05)


def test_position_table_is_fixed_and_column_comes_first():
    model = small(input_size=(6, 10))
    torch.testing.assert_close(model.pos_embed, dit_eager.position_table(24, 3, 5))
    assert "pos_embed" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads", "millions"),
    [("S", 12, 384, 6, 33), ("B", 12, 768, 12, 130), ("L", 24, 1024, 16, 458), ("XL", 28, 1152, 16, 675)],
)
def test_sizes_are_those_of_the_paper(name, depth, width, heads, millions):
    for patch in (2, 4, 8):
        with torch.device("meta"):
            model = dit.DiT_models[f"DiT-{name}/{patch}"]()
        assert (len(model.blocks), model.hidden_size, model.num_heads) == (depth, width, heads)
        assert model.patch_size == patch
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert count == pytest.approx(millions, abs=1.5)
        assert getattr(dit, f"DiT_{name}_{patch}") is dit.DiT_models[f"DiT-{name}/{patch}"]


def test_label_table_has_a_null_row_only_where_labels_are_dropped():
    assert small(class_dropout_prob=0.1).y_embedder.embedding_table.num_embeddings == 8
    model = small(class_dropout_prob=0)
    assert model.y_embedder.embedding_table.num_embeddings == 7
    x, t, _ = inputs(model)
    with pytest.raises(ValueError, match="null class"):
        model.forward_with_cfg(x, t, torch.zeros(3).long(), 2.0)


def test_labels_are_dropped_in_training_only():
    model = small(class_dropout_prob=1.0)
    x, t, y = inputs(model)
    null = torch.full_like(y, 7)
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, null))
    assert not torch.equal(model(x, t, y), model(x, t, null))
    half = small(class_dropout_prob=0.5).train().y_embedder
    rows = half(torch.zeros(4000).long())
    dropped = (rows == half.embedding_table.weight[7]).all(1).float().mean()
    assert dropped == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_unconditional_model_needs_no_label(conditioning):
    model = small(num_classes=0, conditioning=conditioning)
    x, t, y = inputs(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    expected = dit_eager.model(state, x, t, None, 3, conditioning)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="num_classes=0"):
        model(x, t, y)


def test_embeddings_take_the_place_of_labels():
    for conditioning in CONDITIONINGS:
        model = small(conditioning=conditioning)
        x, t, y = inputs(model)
        rows = model.y_embedder.embedding_table(y)
        assert torch.equal(model(x, t, rows), model(x, t, y))
    model = small(conditioning="cross_attention")
    assert torch.equal(model(x, t, rows[:, None]), model(x, t, y))


def text(model, n=3, length=4):
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])[:n, :length].bool()
    return torch.randn(n, length, model.context_dim, generator=torch.Generator().manual_seed(5)), mask


def text_model(**options):
    return small(conditioning="cross_attention", num_classes=0, context_dim=20, **options)


def test_text_of_any_width_conditions_by_cross_attention():
    model = text_model().double()
    x, t, _ = inputs(model, dtype=torch.float64)
    y, mask = text(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for keep in (mask, None):
        expected = dit_eager.model(state, x, t, y.double(), 3, "cross_attention", keep)
        torch.testing.assert_close(model(x, t, y.double(), keep), expected, rtol=1e-10, atol=1e-10)


def test_text_is_dropped_in_training_only_for_a_null_of_any_length():
    model = text_model(class_dropout_prob=1.0)
    x, t, _ = inputs(model)
    y, mask = text(model)
    plain, dropped = model(x, t, y, mask), model.train()(x, t, y, mask)
    assert not torch.allclose(plain, dropped, rtol=1e-2)
    torch.testing.assert_close(model(x, t, y[:, :1]), dropped, rtol=1e-4, atol=1e-5)
    sometimes = text_model(class_dropout_prob=0.5).train().y_embedder
    tokens, kept = sometimes(torch.zeros(4000, 2, 20))
    null = (tokens == sometimes.null).flatten(1).all(1)
    assert null.float().mean() == pytest.approx(0.5, abs=0.04)
    assert kept[null].tolist() == [[True, False]] * int(null.sum()) and kept[~null].all()
    assert not hasattr(text_model(class_dropout_prob=0).y_embedder, "null")


def test_wrong_text_is_named():
    model = text_model()
    x, t, y = inputs(model)
    for wrong in (None, torch.zeros(3, 20), torch.zeros(3, 4, 24), torch.zeros(3, 0, 20)):
        with pytest.raises(ValueError, match=r"y: expected embeddings of shape \(3, S, 20\), got"):
            model(x, t, wrong)
    with pytest.raises(TypeError, match="y: expected a floating dtype"):
        model(x, t, y)
    with pytest.raises(ValueError, match="context_dim: expected conditioning 'cross_attention' and num_classes 0"):
        small(conditioning="cross_attention", context_dim=20)


def test_masked_tokens_have_no_influence():
    model = small(conditioning="cross_attention")
    x, t, _ = inputs(model)
    tokens = torch.randn(3, 4, 24)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    changed = torch.where(mask[..., None], tokens, torch.randn(3, 4, 24))
    assert torch.equal(model(x, t, tokens, mask), model(x, t, changed, mask))
    short = model(x[1:2], t[1:2], tokens[1:2, :1])
    torch.testing.assert_close(model(x, t, tokens, mask)[1:2], short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_block_alone_equals_the_plain_restatement(conditioning):
    block = randomised(DiTBlock(24, 3, mlp_ratio=3.0, conditioning=conditioning)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    c, mask = torch.randn(2, 24, dtype=torch.float64), None
    if conditioning == "cross_attention":
        c = torch.randn(2, 4, 24, dtype=torch.float64)
        mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    arguments = () if conditioning == "in_context" else (c,) if mask is None else (c, mask)
    expected = dit_eager.block(dict(block.named_parameters()), "", x, c, 3, conditioning, mask)
    torch.testing.assert_close(block(x, *arguments), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 5, 6, 8)}, ValueError, r"x: expected shape \(N, 5, 6, 10\), got \(3, 5, 6, 8\)"),
        ({"x": torch.zeros(5, 6, 10)}, ValueError, "x: expected shape"),
        ({"x": torch.zeros(3, 5, 6, 10).long()}, TypeError, "x: expected a floating dtype, got torch.int64"),
        ({"t": torch.zeros(2)}, ValueError, r"t: expected shape \(N,\) = \(3,\), got \(2,\)"),
        ({"y": None}, ValueError, "y: expected labels .* got None"),
        ({"y": torch.tensor([0, 1])}, ValueError, r"y: expected labels of shape \(N,\) = \(3,\)"),
        ({"y": torch.tensor([0, 8, 1])}, ValueError, r"y: expected labels in 0..7, got \[0, 8, 1\]"),
        ({"y": torch.tensor([0, -1, 1])}, ValueError, "y: expected labels in 0..7"),
        ({"y": torch.tensor([True, True, False])}, TypeError, "y: expected int32 or int64 labels"),
        ({"y": torch.zeros(3, 23)}, ValueError, r"y: expected embeddings of shape \(3, 24\), got \(3, 23\)"),
        ({"y": torch.zeros(3, 2, 24)}, ValueError, "y: expected embeddings"),
        ({"y_mask": torch.ones(3, 2).bool()}, ValueError, "y_mask: expected None"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"t": 5}, TypeError, "t: expected a tensor, got int"),
        ({"y": [1, 2, 3]}, TypeError, "y: expected a tensor, got list"),
        ({"y_mask": True}, TypeError, "y_mask: expected a tensor, got bool"),
        ({"x": torch.zeros(3, 5, 6, 10, device="meta")}, ValueError, "x: expected the device of the parameters, cpu"),
        ({"t": torch.zeros(3, device="meta")}, ValueError, "t: expected the device of x, cpu, got meta"),
        ({"y": torch.zeros(3, dtype=torch.long, device="meta")}, ValueError, "y: expected the device of x, cpu"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    model = small()
    x, t, y = inputs(model)
    with pytest.raises(error, match=message):
        model(**{"x": x, "t": t, "y": y} | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 7}, "input_size: expected a multiple of patch_size 2, got 7"),
        ({"num_heads": 5}, "hidden_size: expected a multiple of num_heads 5, got 24"),
        ({"hidden_size": 6, "num_heads": 3}, "hidden_size: expected a multiple of 4"),
        ({"conditioning": "film"}, "conditioning: expected one of .*adaln_zero.*got 'film'"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob: expected a rate in \[0, 1\], got 1.5"),
        ({"constants": "timm"}, "constants: expected one of .*official.*diffusers.*got 'timm'"),
        ({"patch_size": 0}, "patch_size: .* got 0"),
        ({"num_heads": 0}, "num_heads: .* got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio: .* got 0"),
        ({"depth": -1}, "depth: .* got -1"),
        ({"num_classes": -1}, "num_classes: .* got -1"),
        ({"input_size": (4, 4, 4)}, "input_size: expected 2 whole numbers"),
    ],
)
def test_wrong_configuration_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_block_names_wrong_conditions():
    block = DiTBlock(24, 3)
    with pytest.raises(ValueError, match=r"c: expected shape \(2, 24\), got None"):
        block(torch.zeros(2, 5, 24))
    with pytest.raises(ValueError, match=r"modulation: expected shape \(2, 6, 24\)"):
        block(torch.zeros(2, 5, 24), modulation=torch.zeros(2, 4, 24))
    with pytest.raises(TypeError, match="c: expected a tensor, got int"):
        block(torch.zeros(2, 5, 24), 3)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        block([1.0])
    with pytest.raises(ValueError, match="mask: expected None for conditioning 'adaln_zero', got a mask"):
        block(torch.zeros(2, 5, 24), torch.zeros(2, 24), mask=torch.ones(2, 3).bool())
    cross = DiTBlock(24, 3, conditioning="cross_attention")
    with pytest.raises(ValueError, match=r"c: expected shape \(2, S, 24\)"):
        cross(torch.zeros(2, 5, 24), torch.zeros(2, 24))
    with pytest.raises(TypeError, match="mask: expected dtype torch.bool"):
        cross(torch.zeros(2, 5, 24), torch.zeros(2, 3, 24), mask=torch.ones(2, 3))
