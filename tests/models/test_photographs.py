"""Real photographs at 224 pixels, those that scikit-image ships, through whole models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convdit import models


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """(3, 3, 224, 224), standardised."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    pictures = [Image.open(folder / f"{name}.png").convert("RGB") for name in ("astronaut", "chelsea", "coffee")]
    arrays = [np.asarray(p.resize((224, 224))) for p in pictures]
    x = torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def test_fcmae_sparse_equals_dense_masked_on_photographs(photographs):
    torch.manual_seed(0)
    model = models.FCMAE("convnextv2_atto")
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    mask = model(photographs).mask
    assert mask.shape == (3, 7, 7) and ((~mask).flatten(1).sum(1) == 19).all()
    results = {}
    for model.sparse in (True, False):
        model.zero_grad()
        out = model(photographs, mask)
        out.loss.backward()
        results[model.sparse] = out, {name: p.grad.clone() for name, p in model.named_parameters()}
    sparse, dense = results[True], results[False]
    assert sparse[0].pred.shape == (3, 49, 32 * 32 * 3)
    torch.testing.assert_close(sparse[0].loss, dense[0].loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(sparse[0].pred, dense[0].pred, rtol=1e-3, atol=1e-4)
    for name, gradient in sparse[1].items():
        scale = dense[1][name].abs().max().item()
        torch.testing.assert_close(gradient, dense[1][name], rtol=1e-3, atol=1e-3 * scale, msg=name)


def test_encoder_of_an_fcmae_gives_its_classifier_the_same_maps(photographs):
    fcmae = models.FCMAE("convnextv2_atto").eval()
    classifier = models.create("convnextv2_atto", num_classes=10).eval()
    classifier.load_encoder(fcmae.encoder.state_dict())
    with torch.no_grad():
        ours = fcmae.encoder.forward_intermediates(photographs)
        theirs = classifier.forward_intermediates(photographs)
    assert [tuple(m.shape[1:]) for m in ours] == [(40, 56, 56), (80, 28, 28), (160, 14, 14), (320, 7, 7)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
