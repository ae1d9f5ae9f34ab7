"""Converted weights give the foreign models' outputs, and load strictly into ours."""

import argparse

import pytest
import torch

from convdit import checkpoints, models
from convdit.diffusion import RectifiedFlow
from tests.models import dit_eager

DEPTHS, DIMS = (1, 1, 2, 1), (8, 12, 16, 24)


def randomise(model, seed=0):
    """Random values: fresh GRN, LayerScale and adaLN are zero or tiny and prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                spread = 0.3 if parameter.ndim == 1 or "grn" in name else 0.15
                noise = torch.randn(parameter.shape, generator=generator) * spread
                parameter.copy_(noise + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model.eval()


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-2
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny", "convnext_atto", "convnext_tiny"])
@torch.no_grad()
def test_timm_logits_and_the_way_back(images, name):
    import timm

    theirs = randomise(timm.create_model(name, num_classes=5, depths=DEPTHS, dims=DIMS))
    version = name.split("_")[0]
    ours = models.create(f"{version}_tiny", num_classes=5, depths=DEPTHS, dims=DIMS).eval()
    ours.load_state_dict(checkpoints.convert(theirs.state_dict(), "convdit"))
    assert_close(ours(images), theirs(images))
    randomise(ours, seed=2)
    back = checkpoints.convert(ours.state_dict(), "timm")
    if name.endswith("tiny"):  # of this width timm's own models have 1x1 convolutions
        back = {k: v.flatten(1) if ".mlp.fc" in k and v.ndim == 4 else v for k, v in back.items()}
    theirs.load_state_dict(back)
    assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(
    "name",
    ["convnextv2_atto", "convnextv2_tiny", "convnextv2_huge", "convnext_tiny", "convnext_xlarge", "convnext_xxlarge"],
)
def test_the_names_and_shapes_of_timms_full_size_models(name):
    import timm

    with torch.device("meta"):
        theirs = timm.create_model(name).state_dict()
        ours = models.create(name).state_dict()
    there = checkpoints.convert(ours, "timm")
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in theirs.items()}
    back = checkpoints.convert(theirs, "convdit")
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_transformers_logits_and_the_way_back(images, version, eps):
    import transformers

    kind = "ConvNextV2" if version == 2 else "ConvNext"
    # Their final LayerNorm has eps 1e-12 by default: the official eps in theirs or theirs in ours makes the two equal.
    config = getattr(transformers, f"{kind}Config")(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=5, layer_norm_eps=eps
    )
    theirs = randomise(getattr(transformers, f"{kind}ForImageClassification")(config))
    name = "convnextv2_tiny" if version == 2 else "convnext_tiny"
    ours = models.create(name, num_classes=5, depths=DEPTHS, dims=DIMS).eval()
    assert ours.norm.eps == 1e-6
    ours.norm.eps = eps
    ours.load_state_dict(checkpoints.convert(theirs.state_dict(), "convdit"))
    assert_close(ours(images), theirs(images).logits)
    randomise(ours, seed=2)
    theirs.load_state_dict(checkpoints.convert(ours.state_dict(), "transformers"))
    assert_close(ours(images), theirs(images).logits)


@torch.no_grad()
def test_transformers_backbone_and_the_way_back(images):
    import transformers

    config = transformers.ConvNextV2Config(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), out_features=["stage2", "stage4"]
    )
    theirs = randomise(transformers.ConvNextV2Backbone(config))
    options = {"features_only": True, "out_norms": True, "out_indices": (1, 3)}
    ours = models.create("convnextv2_tiny", depths=DEPTHS, dims=DIMS, **options).eval()
    ours.load_state_dict(checkpoints.convert(theirs.state_dict(), "convdit"))
    for map_, expected in zip(ours(images), theirs(images).feature_maps, strict=True):
        assert_close(map_, expected)
    back = checkpoints.convert(ours.state_dict(), "transformers")
    assert {key: value.shape for key, value in back.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@torch.no_grad()
def test_an_fcmae_goes_to_minkowski_and_its_encoder_into_a_dense_model(images):
    fcmae = models.FCMAE("convnextv2_atto", image_size=64, depths=DEPTHS, dims=DIMS, decoder_dim=16)
    randomise(fcmae)
    sparse = checkpoints.convert(fcmae.state_dict(), "fcmae_minkowski")
    again = models.FCMAE("convnextv2_atto", image_size=64, depths=DEPTHS, dims=DIMS, decoder_dim=16)
    again.load_state_dict(checkpoints.convert(sparse, "convdit"))
    assert all(map(torch.equal, again.state_dict().values(), fcmae.state_dict().values()))
    dense = models.create("convnextv2_atto", depths=DEPTHS, dims=DIMS, features_only=True).eval()
    encoder = checkpoints.sparse_to_dense(sparse, encoder_only=True)
    dense.load_state_dict(encoder)
    for ours, theirs in zip(
        dense.forward_intermediates(images),
        fcmae.encoder.forward_intermediates(images),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    classifier = models.create("convnextv2_atto", num_classes=5, depths=DEPTHS, dims=DIMS)
    left = classifier.load_encoder(encoder)
    assert set(left) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def dit(constants="official"):
    return models.DiT(
        input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4,
        num_classes=10, constants=constants,
    )  # fmt: skip


def diffusers_dit(diffusers, constants):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, **({"norm_eps": 1e-6} if constants == "official" else {}),
    )  # fmt: skip
    if constants == "diffusers":
        return model
    for block in model.transformer_blocks:
        # The one constant besides eps in which diffusers differs from the official DiT.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


@pytest.mark.filterwarnings("ignore:diffusers' DiT computes")
@pytest.mark.parametrize("constants", ["official", "diffusers"])
@torch.no_grad()
def test_diffusers_outputs_and_the_way_back(constants):
    import diffusers

    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 17, 999]), torch.tensor([0, 9, 10])
    theirs, ours = randomise(diffusers_dit(diffusers, constants)), dit(constants).eval()
    first = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    converted = checkpoints.convert(theirs.state_dict(), "convdit", input_size=8)
    ours.load_state_dict(converted)
    assert_close(ours(x, t, y), theirs(x, t, y).sample)
    randomise(ours, seed=2)
    theirs.load_state_dict(checkpoints.convert(ours.state_dict(), "diffusers"))
    assert_close(ours(x, t, y), theirs(x, t, y).sample)


@pytest.mark.filterwarnings("ignore:diffusers' DiT computes")
def test_a_state_without_a_position_table_loads_strictly():
    ours = randomise(dit())
    state = dict(checkpoints.convert(ours.state_dict(), "diffusers"))
    converted = checkpoints.convert(state, "convdit")
    assert "pos_embed" not in converted
    loaded = dit()
    with torch.no_grad():
        loaded.pos_embed.fill_(7.0)
    loaded.load_state_dict(converted)
    assert all(map(torch.equal, loaded.state_dict().values(), ours.state_dict().values()))


@pytest.mark.filterwarnings("ignore:diffusers' DiT computes")
def test_the_names_and_shapes_of_the_full_size_dit_of_diffusers():
    import diffusers

    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
            sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        ).state_dict()  # fmt: skip
        ours = models.DiT_XL_2().state_dict()
    del ours["pos_embed"]  # a check of its values comes before; there are none here
    there = checkpoints.convert(ours | {"pos_embed": models.DiT(32, 2, 4, 1152, 1, 16).pos_embed}, "diffusers")
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("kind", ["bare", "training", "sit"])
@torch.no_grad()
def test_a_file_of_dit_or_sit_gives_the_outputs_of_the_definition(kind, tmp_path):
    """Of both, every tensor random; the definition is written out in float64, in the official names."""
    official = randomise(dit(), seed=3).state_dict()
    saved = {"bare": official, "training": {"model": dit().state_dict(), "ema": official, "opt": {}}}
    saved["sit"] = {"model": official, "ema": official, "args": argparse.Namespace(path_type="Linear")}
    torch.save(saved[kind], tmp_path / "official.pt")
    loaded = checkpoints.load(tmp_path / "official.pt")
    assert checkpoints.detect(loaded) == ("sit" if kind == "sit" else "dit_official")
    ours = dit().eval()
    ours.load_state_dict(checkpoints.convert(loaded, "convdit"))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.0, 0.25, 0.7]) if kind == "sit" else torch.tensor([0, 17, 999])
    y = torch.tensor([0, 9, 10])
    exact = {name: value.double() for name, value in official.items()}
    expected = dit_eager.model(exact, x.double(), t, y, 4)
    assert_close(ours(x, t, y).double(), expected)
    if kind == "sit":
        assert_close(RectifiedFlow().velocity(ours, x, t, y=y).double(), expected[:, :4])


def test_a_dit_conditioned_on_text_is_checked_and_kept():
    text = dict(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=0, conditioning="cross_attention")
    ours = randomise(models.DiT(**text, context_dim=20))
    state = ours.state_dict()
    kept = checkpoints.convert(state, "convdit")
    assert kept.keys() == state.keys() and all(torch.equal(kept[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="missing keys: 'y_embedder.proj.bias'"):
        checkpoints.convert({k: v for k, v in state.items() if k != "y_embedder.proj.bias"}, "convdit")
