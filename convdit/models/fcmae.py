"""FCMAE: the fully convolutional masked autoencoder of ConvNeXt V2 (arXiv:2301.00808, section 3).

The encoder sees the visible patches only. Their features are packed into rows, and every layer of
the encoder works on rows: the same weights as the dense network, less to compute, and nothing
leaks into or out of a removed patch. `sparse=False` computes the same on zero-filled dense maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convdit._checks import check_device, check_tensor, check_whole, kind, whole_numbers
from convdit.nn.convnext_block import ConvNeXtBlock
from convdit.nn.layers import DepthwiseConv2d, check_scope, hide
from convdit.nn.resample import Stem, coarsen
from convdit.nn.stage import Stage, set_grad_checkpointing
from convdit.ops.linear import linear
from convdit.sparse import ActiveSites, SparseTensor2d, random_patch_mask, visible_patches

from .convnext import ConvNeXt, check_images, create, init_weights


class FCMAEOutput(NamedTuple):
    """What `FCMAE.forward` returns, and describes."""

    loss: Tensor
    pred: Tensor
    mask: Tensor


class FCMAE(nn.Module):
    """A ConvNeXt encoder over visible patches, and a small dense decoder that paints the others.

    Args:
        encoder: a name of `models.list()`, or a ConvNeXt, whose parameters are then shared; its
            final norm and head, if any, take no part.
        image_size: side of the images in pixels, or (height, width); used to check that
            `patch_size` and `mask_ratio` fit. `forward` takes other sizes that patches divide.
        patch_size: side of a patch in pixels; the stride of the encoder's last stage.
        mask_ratio: share of patches removed from each image.
        decoder_dim: channels of the decoder.
        decoder_depth: its blocks.
        norm_pix_loss: whether the target is normalised by each patch's mean and unbiased variance.
        grn_scope: of the encoder's GRN: "sample" as in the dense network, or "batch" as in the
            original sparse code.
        sparse: False computes on zero-filled dense maps; the results are the same.
        in_chans: image channels; None for those of a ConvNeXt, or 3 for an encoder given by name.
        depths, dims: override the variant's, for an encoder given by name.
        init: how weights are drawn. "fixed": with std 0.02 truncated, as the authors meant; the
            encoder's as `ConvNeXt` draws them, or as they are in one given as a model. "official":
            as their code does, see `_init_official`; also over the weights of a given encoder.
        options: of `ConvNeXt`, for an encoder given by name: drop_path_rate, stem_stride, ...

    Raises TypeError or ValueError for settings that make no model, or one that learns nothing: a
    `mask_ratio` that leaves no visible or no removed patch.
    """

    def __init__(
        self,
        encoder: str | ConvNeXt = "convnextv2_atto",
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 32,
        mask_ratio: float = 0.6,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        norm_pix_loss: bool = True,
        grn_scope: str = "sample",
        sparse: bool = True,
        in_chans: int | None = None,
        depths: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        init: str = "fixed",
        **options: Any,
    ):
        super().__init__()
        check_scope("grn_scope", grn_scope)
        if init not in ("official", "fixed"):
            raise ValueError(f'init: expected "official" or "fixed", got {init!r}')
        check_whole("patch_size", patch_size, 1)
        check_whole("decoder_dim", decoder_dim, 1)
        check_whole("decoder_depth", decoder_depth, 0)
        if isinstance(encoder, str):
            encoder = create(
                encoder,
                in_chans=3 if in_chans is None else in_chans,
                features_only=True,
                depths=depths,
                dims=dims,
                **options,
            )
        elif not isinstance(encoder, ConvNeXt):
            raise TypeError(f"encoder: expected a name of models.list() or a ConvNeXt, got {kind(encoder)}")
        elif depths is not None or dims is not None or options:
            raise ValueError("depths, dims, options: only for an encoder given by name")
        if in_chans not in (None, encoder.in_chans):
            raise ValueError(f"in_chans: expected {encoder.in_chans}, the channels of the encoder, got {in_chans}")
        self.encoder = encoder.encoder()
        self.encoder.set_grn_scope(grn_scope)
        if patch_size != encoder.stride:
            raise ValueError(
                f"patch_size: expected {encoder.stride}, the stride of the encoder's last stage, got {patch_size}"
            )
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.sparse = sparse
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._visible(self._grid("image_size", *whole_numbers("image_size", size, 1, count=2)))

        self.proj = nn.Conv2d(encoder.dims[-1], decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_dim, 1, 1))
        self.decoder = Stage(*(ConvNeXtBlock(decoder_dim) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_dim, patch_size**2 * encoder.in_chans, 1)
        for part in (self.proj, self.decoder, self.pred):
            init_weights(part)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if init == "official":
            _init_official(self)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> FCMAEOutput:
        """Remove patches, predict them, and compare.

        Args:
            images: (N, c, H, W), H and W multiples of the patch.
            mask: (N, H / patch, W / patch) bool as `random_patch_mask` gives it, True = removed;
                None draws one. In compiled code it must keep as many patches of every image as
                `mask_ratio` says.
            generator: for the mask drawn here.

        Returns:
            loss: () in float32 or float64, the mean over removed patches of the mean squared error.
            pred: (N, L, p * p * c) a row for each patch, row-major; values in order (py, px, c).
            mask: the mask used.

        Raises:
            TypeError: images that are not floating or, outside autocast, of another dtype than the
                parameters; a mask that is not bool.
            ValueError: other shapes or devices, no image, images that patches do not divide, a mask
                with no visible patch in some image, or with no removed patch at all.
        """
        mask, sites, removed = self._mask(images, mask, generator)
        hidden, pred = self._predict(images, mask, sites, removed)
        return FCMAEOutput(self._loss(images, hidden, removed), pred, mask)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images, (N, c, H, W), whose removed patches are the predicted ones.

        Where the target is normalised, the prediction is given the true patch's mean and deviation.
        Arguments as for `forward`.
        """
        mask, sites, removed = self._mask(images, mask, generator)
        _, pred = self._predict(images, mask, sites, removed)
        patches = self.patchify(images)
        if self.norm_pix_loss:
            mean, deviation = _patch_statistics(patches)
            pred = pred * deviation + mean
        mixed = torch.where(mask.flatten(1)[..., None], pred.to(patches.dtype), patches)
        return self.unpatchify(mixed, (mask.shape[1], mask.shape[2]))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass; see `convdit.nn.Stage`."""
        set_grad_checkpointing(self, enable)

    def patchify(self, images: Tensor) -> Tensor:
        """(N, c, H, W) to (N, L, p * p * c), values of a patch in order (py, px, c)."""
        check_tensor("images", images)
        if images.dim() != 4:
            raise ValueError(f"images: expected shape (N, c, H, W), got {tuple(images.shape)}")
        p, (height, width) = self.patch_size, self._grid("images", *images.shape[2:])
        patches = images.view(*images.shape[:2], height, p, width, p).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(images.shape[0], height * width, -1)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of `patchify`, for images of `grid` rows and columns of patches."""
        check_tensor("patches", patches)
        p, (height, width) = self.patch_size, whole_numbers("grid", grid, 1, count=2)
        if patches.dim() != 3 or patches.shape[1] != height * width or patches.shape[2] % p**2:
            raise ValueError(
                f"patches: expected shape (N, {height * width}, {p**2} * c) for a grid of {height}x{width}, "
                f"got {tuple(patches.shape)}"
            )
        n, c = patches.shape[0], patches.shape[2] // p**2
        images = patches.reshape(n, height, width, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return images.reshape(n, c, height * p, width * p)

    def _encode(self, images: Tensor, mask: Tensor, sites: ActiveSites) -> SparseTensor2d:
        """The encoder's last features, of the visible patches only: a row for each patch."""
        stem, *downsamples = self.encoder.downsample_layers
        first, *stages = self.encoder.stages
        if self.sparse:
            x = first(cast(Stem, stem).visible(images, sites))
            for downsample, stage in zip(downsamples, stages, strict=True):
                x = stage(downsample(x))
            return x
        visible = (~mask).repeat_interleave(sites.block, 1).repeat_interleave(sites.block, 2)
        x = first(hide(stem(images), visible), visible)
        for downsample, stage in zip(downsamples, stages, strict=True):
            x = downsample(x, visible)
            visible = coarsen(visible)
            x = stage(x, visible)
        return SparseTensor2d.from_dense(x, sites.blocks_as_sites())

    def _decode(self, x: SparseTensor2d) -> Tensor:
        x = x.replace(linear(x.features, self.proj.weight.flatten(1), self.proj.bias))
        return self.decoder(x.dense(self.mask_token.flatten()))

    def _predict(self, images: Tensor, mask: Tensor, sites: ActiveSites, removed: ActiveSites) -> tuple[Tensor, Tensor]:
        """The predictions of the R removed patches, (R, p * p * c), and of all, (N, L, p * p * c).

        Under float16 autocast all after the encoder is in float32: projection and prediction sum up
        the encoder's unnormed features and can leave float16's range, with official weights at once.
        """
        x = self._encode(images, mask, sites)
        if not _float16_autocast(images):
            return self._paint(self._decode(x), sites, removed)
        with torch.autocast(images.device.type, enabled=False):
            return self._paint(self._decode(x.replace(x.features.float())), sites, removed)

    def _paint(self, x: Tensor, sites: ActiveSites, removed: ActiveSites) -> tuple[Tensor, Tensor]:
        """The predictions of `_predict` from the decoder's map.

        The loss needs those of removed patches only. Computed apart, they spare its backward the
        products with the zero gradients of visible patches.
        """
        weight, parts = self.pred.weight.flatten(1), (removed, sites.blocks_as_sites())
        rows = (SparseTensor2d.from_dense(x, part).features for part in parts)
        hidden, shown = (linear(row, weight, self.pred.bias) for row in rows)
        n, height, width = x.shape[:3]
        image, row, column = torch.cat([part.blocks for part in parts]).long().unbind(1)
        order = ((image * height + row) * width + column).argsort()
        return hidden, torch.cat((hidden, shown))[order].view(n, height * width, -1)

    def _loss(self, images: Tensor, pred: Tensor, removed: ActiveSites) -> Tensor:
        (height, width), p = removed.grid, self.patch_size
        patches = images.view(*images.shape[:2], height, p, width, p).permute(0, 2, 4, 3, 5, 1)
        target = patches[removed.blocks.long().unbind(1)].flatten(1)
        # Half precision has too few digits for a mean over so many values.
        wide = torch.promote_types(pred.dtype, torch.float32)
        target = target.to(wide)
        if self.norm_pix_loss:
            mean, deviation = _patch_statistics(target)
            target = (target - mean) / deviation
        return F.mse_loss(pred.to(wide), target)

    def _mask(
        self, images: Tensor, mask: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, ActiveSites, ActiveSites]:
        """The mask, the sites of the stem's map that it leaves, and the patches that it removes."""
        check_images("images", images, self.encoder.in_chans, 1)
        grid, n = self._grid("images", *images.shape[2:]), images.shape[0]
        if n == 0:
            raise ValueError(f"images: expected at least one image, got shape {tuple(images.shape)}")
        kept = None
        if mask is None or torch.compiler.is_compiling():
            kept = self._visible(grid)
        if mask is None:
            # A mask may be drawn elsewhere than the images are: one seed serves every device.
            device = None if generator is not None else images.device
            mask = random_patch_mask(n, grid, self.mask_ratio, generator, device).to(images.device)
        else:
            _check_mask(mask, (n, *grid), images.device)
        block = self.patch_size // self.encoder.stem_stride
        removed = ActiveSites.from_patch_mask(~mask, 1, None if kept is None else grid[0] * grid[1] - kept)
        return mask, ActiveSites.from_patch_mask(mask, block, kept), removed

    def _visible(self, grid: tuple[int, int]) -> int:
        patches = grid[0] * grid[1]
        kept = visible_patches(patches, self.mask_ratio, "mask_ratio")
        if kept == patches:
            raise ValueError(f"mask_ratio: {self.mask_ratio} of {patches} patches removes none")
        return kept

    def _grid(self, name: str, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise ValueError(
                f"{name}: expected a height and a width that patches of {p}x{p} divide, got {height}x{width}"
            )
        return height // p, width // p


def _init_official(model: FCMAE) -> None:
    """Draw the weights as facebookresearch/ConvNeXt-V2 does in `FCMAE._init_weights`.

    Its calls leave out the std that they need: depthwise and pointwise layers of the encoder, stem,
    projection, prediction and the decoder's depthwise layers get std 1 truncated at 2; the
    downsampling convolutions get 0.02. The decoder's pointwise layers keep PyTorch's own draw.
    """
    for part in (model.encoder.downsample_layers[0], model.encoder.stages, model.proj, model.decoder, model.pred):
        for layer in part.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, DepthwiseConv2d)):
                nn.init.trunc_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    for layer in model.encoder.downsample_layers[1:].modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in model.decoder.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    nn.init.normal_(model.mask_token, std=0.02)


def _float16_autocast(x: Tensor) -> bool:
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return False
    return torch.get_autocast_dtype(device) == torch.float16


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation, 1e-6 inside the root, of the values of each patch."""
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def _check_mask(mask: Tensor, shape: tuple[int, int, int], device: torch.device) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, True = removed, got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask: expected shape {shape}, got {tuple(mask.shape)}")
    check_device("mask", mask, device, "the images")
    if torch.compiler.is_compiling():
        return  # from_patch_mask checks the count on the device
    if mask.flatten(1).all(1).any():
        raise ValueError("mask: expected a visible patch in every image, got none in some")
    if not mask.any():
        raise ValueError("mask: expected a removed patch, got none in the whole batch")
