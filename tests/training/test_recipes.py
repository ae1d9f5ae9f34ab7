"""Recipes hold the published numbers, and what is typed goes over them."""

import pytest

from convdit import models
from convdit.training.options import FinetuneOptions, PretrainOptions
from convdit.training.recipes import RECIPES, filled

# Copied by hand from the tables of the two papers: base rate for 256 pictures, batch, epochs, warm-up epochs, decay of
# weights, decay by layer, drop path, label smoothing, mixup, CutMix, decay of the moving average
PUBLISHED = {
    "convnextv2_atto_finetune": (2e-4, 1024, 600, 0, 0.3, 0.9, 0.1, 0.2, 0.0, 0.0, 0.9999),
    "convnextv2_femto_finetune": (2e-4, 1024, 600, 0, 0.05, 0.9, 0.0, 0.2, 0.3, 0.3, 0.9999),
    "convnextv2_pico_finetune": (2e-4, 1024, 600, 0, 0.3, 0.9, 0.0, 0.2, 0.3, 0.3, 0.9999),
    "convnextv2_nano_finetune": (2e-4, 1024, 600, 0, 0.3, 0.9, 0.1, 0.2, 0.5, 0.5, 0.9999),
    "convnextv2_tiny_finetune": (8e-4, 1024, 300, 40, 0.05, 0.9, 0.2, 0.1, 0.8, 1.0, 0.9999),
    "convnextv2_base_finetune": (6.25e-4, 1024, 100, 20, 0.05, 0.6, 0.1, 0.1, 0.8, 1.0, 0.9999),
    "convnextv2_large_finetune": (6.25e-4, 1024, 100, 20, 0.05, 0.6, 0.2, 0.1, 0.8, 1.0, 0.9999),
    "convnextv2_huge_finetune": (1.25e-4, 1024, 50, 10, 0.05, 0.75, 0.3, 0.1, 0.8, 1.0, 0.9999),
    "convnextv2_nano_22k": (2.5e-4, 4096, 90, 5, 0.05, 0.9, 0.0, 0.1, 0.8, 1.0, 0.0),
    "convnextv2_base_22k": (2.5e-4, 4096, 90, 5, 0.05, 0.8, 0.1, 0.1, 0.8, 1.0, 0.0),
    "convnextv2_tiny_22k_1k": (2.5e-5, 512, 90, 0, 1e-8, 0.9, 0.1, 0.1, 0.0, 0.0, 0.9999),
    "convnextv2_huge_22k_1k": (2.5e-5, 512, 30, 0, 1e-8, 0.85, 0.5, 0.1, 0.0, 0.0, 0.0),
    "convnext_tiny_supervised": (2.5e-4, 4096, 300, 20, 0.05, 1.0, 0.1, 0.1, 0.8, 1.0, 0.9999),
    "convnext_large_supervised": (2.5e-4, 4096, 300, 20, 0.05, 1.0, 0.5, 0.1, 0.8, 1.0, 0.9999),
}
NAMES = "base_lr batch_size epochs warmup_epochs weight_decay layer_decay drop_path label_smoothing mixup cutmix ema"


@pytest.mark.parametrize("name", PUBLISHED)
def test_fine_tuning_recipe_has_the_published_numbers(name):
    options = filled(FinetuneOptions, {}, name)
    assert tuple(getattr(options, key) for key in NAMES.split()) == PUBLISHED[name]
    assert (options.beta2, options.min_lr, options.randaug) == (0.999, 1e-6, "rand-m9-mstd0.5-inc1")
    assert options.head_init_scale == (1.0 if name.endswith("supervised") else 0.001)
    grouped = any(size in name for size in ("base", "large", "huge")) and "v2" in name
    assert options.layer_decay_type == ("group" if grouped else "single")


def test_pre_training_recipe_has_the_published_numbers():
    options = filled(PretrainOptions, {}, "convnextv2_base_pretrain")
    assert (options.base_lr, options.batch_size, options.epochs, options.warmup_epochs) == (1.5e-4, 4096, 1600, 40)
    assert (options.weight_decay, options.beta2, options.mask_ratio, options.min_lr) == (0.05, 0.95, 0.6, 0.0)
    assert (options.augment, options.crop_scale, options.decoder_dim) == ("resized_crop", 0.2, 512)
    assert options.resolved(1_281_167).lr == pytest.approx(2.4e-3)


def test_every_recipe_makes_options_that_can_run():
    assert len(RECIPES) == 30
    for name, (kind, values) in RECIPES.items():
        options = filled(kind, {}, name)
        options.check()
        assert values["model"] in models.list() and name.startswith(values["model"])
        assert options.resolved(1_281_167).steps > 7000


def test_what_is_typed_goes_over_the_recipe_and_over_a_run_s_own():
    name = "convnextv2_atto_finetune"
    options = filled(FinetuneOptions, {"steps": 7, "lr": 1e-3, "warmup": 2}, name)
    assert (options.epochs, options.base_lr, options.warmup_epochs) == (None, None, None)
    assert options.resolved(100).steps == 7 and options.resolved(100).lr == 1e-3 and options.mixup == 0.0
    kept = filled(FinetuneOptions, {"mixup": 0.2}, None, {"steps": 9, "mixup": 0.7, "gone": 1})
    assert (kept.steps, kept.mixup) == (9, 0.2)


def test_bad_recipes_are_named():
    with pytest.raises(ValueError, match="steps, epochs: give one of the two, got 5 and 2.0"):
        filled(FinetuneOptions, {"steps": 5, "epochs": 2.0})
    with pytest.raises(ValueError, match="recipe: expected one of .*convnextv2_atto_finetune.*; got 'resnet'"):
        filled(FinetuneOptions, {}, "resnet")
    with pytest.raises(ValueError, match="got 'convnextv2_atto_pretrain'"):
        filled(FinetuneOptions, {}, "convnextv2_atto_pretrain")
