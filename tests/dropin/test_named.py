"""`convdit accelerate MODEL ...`."""

from pathlib import Path

import pytest

from convdit.cli import main

OFFICIAL = Path(__file__).with_name("official.py")
FAMILIES = {
    "timm/convnextv2_atto": (12, "ConvNeXtBlock"),
    "transformers/convnextv2": (18, "ConvNextV2Layer"),
    "diffusers/DiTTransformer2DModel": (28, "BasicTransformerBlock"),
    f"{OFFICIAL}:ConvNeXtV2": (16, "Block"),
    f"{OFFICIAL}:DiT": (13, "DiTBlock"),
}


def test_the_command_prints_the_report_on_the_five_families(capsys):
    assert main(["accelerate", *FAMILIES]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (count, layer) in FAMILIES.items():
        (start,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}: ")]
        assert f": {count} layers swapped" in lines[start]
        swapped = [line for line in lines[start + 1 : start + 3] if line.startswith("  swapped")]
        assert any(f" {layer} (" in line for line in swapped)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnextv2_atto", "expected timm/NAME, transformers/TYPE"),
        ("timm/banana", "a model of timm, got 'banana'"),
        ("diffusers/Banana", "a class of diffusers, got 'Banana'"),
        (f"{OFFICIAL}:Banana", "got 'Banana'"),
        (f"{OFFICIAL}:modulate.__name__.upper", "expected a function or class"),
    ],
)
def test_a_name_that_is_not_known_is_named(capsys, name, message):
    assert main(["accelerate", name]) == 1
    assert message in capsys.readouterr().err
