"""Visible sites of masked images, and feature maps that hold those sites only.

A masked autoencoder removes whole patches, so visible sites come in square blocks. `ActiveSites`
lists the blocks; each stage of an encoder halves the sites of a block and keeps the list, and with
it every table of neighbours built from it. An arbitrary mask is the case of blocks of one site.
Over 400 lines by the docstrings of the public interface.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convdit._checks import check_device, check_floating, check_rate, check_tensor, check_whole, kind, whole_numbers
from convdit.ops.sites import neighbors

__all__ = ["ActiveSites", "SparseTensor2d", "random_patch_mask"]


def random_patch_mask(
    n: int,
    grid: tuple[int, int],
    ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw masks of patches, one for each image, that all keep the same number of them.

    Args:
        n: images.
        grid: (rows, columns) of patches; L is their product.
        ratio: share of patches to remove; int(L * (1 - ratio)) are kept.
        generator: source of randomness; PyTorch's default when None.
        device: of the mask, the generator's if there is one; when None the generator's, else the CPU.

    Returns:
        (n, rows, columns) bool, True where a patch is removed.

    Raises:
        TypeError: sizes that are not whole numbers, a ratio that is not a number.
        ValueError: sizes below one, a ratio outside [0, 1), one that keeps no patch, or a device
            that is not the generator's.
    """
    rows, columns = whole_numbers("grid", grid, 1, count=2)
    check_whole("n", n, 0, "a number of images")
    kept = visible_patches(rows * columns, ratio)
    if generator is not None:
        device = _generator_device(generator, device)
    if generator is None:  # which torch.compile refuses as an argument, beside a batch of unknown size
        noise = torch.rand(n, rows * columns, device=device)
    else:
        noise = torch.rand(n, rows * columns, device=device, generator=generator)
    removed = torch.ones_like(noise, dtype=torch.bool)
    removed = removed.scatter(1, noise.argsort(1)[:, :kept], False)
    return removed.view(n, rows, columns)


def visible_patches(patches: int, ratio: float, name: str = "ratio") -> int:
    """How many of an image's patches a mask of this ratio keeps; ValueError if none."""
    check_rate(name, ratio, "a share of patches to remove in [0, 1)")
    kept = int(patches * (1 - ratio))
    if kept < 1:
        raise ValueError(f"{name}: {ratio} of {patches} patches leaves no visible patch")
    return kept


class ActiveSites:
    """The visible sites of a batch of maps. Build one with `from_patch_mask` or `from_mask`.

    Attributes:
        blocks: (P, 3) int32: image, row, column of each visible block in the grid, sorted.
        block: b, sites along a block's side; 1 for an arbitrary mask.
        grid: rows and columns of blocks a map.
        spatial_shape: rows and columns of sites a map, b times the grid.
        batch_size: maps, N.
        per_image: sites that every map has, None where that was not said to be the same number.

    The M = P * b * b sites are ordered block by block: site (i, j) of block p is row
    p * b * b + i * b + j. M = 0 is allowed. Tables are built when first asked for and kept.
    """

    def __init__(
        self,
        blocks: Tensor,
        batch_size: int,
        grid: tuple[int, int],
        block: int = 1,
        blocks_per_image: int | None = None,
    ):
        self.blocks = blocks
        self.block = block
        self.grid = grid
        self.spatial_shape = (grid[0] * block, grid[1] * block)
        self.batch_size = batch_size
        self._blocks_per_image = blocks_per_image
        self._tables: dict[object, Tensor] = {}
        self._block_tables: dict[object, Tensor] = {}  # shared with finer and coarser stages

    @classmethod
    def from_patch_mask(cls, mask: Tensor, block: int, visible_per_image: int | None = None) -> ActiveSites:
        """The sites of the patches that a mask leaves.

        Args:
            mask: (N, rows, columns) bool, True where a patch is removed.
            block: sites along a patch's side: the maps are (N, rows * block, columns * block).
            visible_per_image: how many patches every image keeps, if they all keep the same
                number. Shapes are then static, and a CUDA device is not waited for.

        Raises:
            TypeError: mask is not bool, block or count not a whole number.
            ValueError: a mask that is not of three dimensions, a block below one, or an image
                with another number of visible patches than `visible_per_image`. Where looking
                would cost a wait (CUDA, compiled code) that last is a RuntimeError of the device.
        """
        _check_mask("mask", mask)
        check_whole("block", block, 1, "sites along a patch's side")
        n, rows, columns = mask.shape
        if visible_per_image is None:
            return cls(_where(~mask), n, (rows, columns), block)
        _check_visible_per_image(mask, visible_per_image)
        # A stable sort brings the visible patches to the front in their own order.
        order = mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)[:, :visible_per_image]
        image = torch.arange(n, device=mask.device)[:, None].expand_as(order)
        blocks = torch.stack((image, order // max(columns, 1), order % max(columns, 1)), -1)
        return cls(blocks.flatten(0, 1).int().contiguous(), n, (rows, columns), block, visible_per_image)

    @classmethod
    def from_mask(cls, visible: Tensor) -> ActiveSites:
        """The sites where `visible`, (N, H, W) bool, is True."""
        _check_mask("visible", visible)
        n, height, width = visible.shape
        return cls(_where(visible), n, (height, width))

    def __len__(self) -> int:
        return self.blocks.shape[0] * self.block * self.block

    def __repr__(self) -> str:
        return (
            f"ActiveSites({len(self)} sites in blocks of {self.block}x{self.block}, "
            f"batch_size={self.batch_size}, spatial_shape={self.spatial_shape})"
        )

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def per_image(self) -> int | None:
        blocks = self._blocks_per_image
        return None if blocks is None else blocks * self.block * self.block

    @property
    def indices(self) -> Tensor:
        """(M, 3) int32: image, row, column of each site."""
        return self._keep(self._tables, "indices", self._make_indices)

    @property
    def offsets(self) -> Tensor:
        """(N + 1,) int64: the first row of each image's sites, then M."""
        return self._keep(self._tables, "offsets", self._make_offsets)

    def block_neighbors(self, radius: int) -> Tensor:
        """(P, (2 radius + 1)^2) int32: rows in `blocks` of the blocks around each, -1 if absent.

        Row-major over (dy, dx) from (-radius, -radius).
        """
        if radius in self._block_tables:  # each call of an operator asks
            return self._block_tables[radius]
        check_whole("radius", radius, 0)
        height, width = self.grid
        return self._keep(
            self._block_tables,
            radius,
            lambda: neighbors(self.blocks, self.batch_size, height, width, radius),
        )

    def site_neighbors(self, radius: int) -> Tensor:
        """(M, (2 radius + 1)^2) int32: as `block_neighbors`, for single sites."""
        check_whole("radius", radius, 0)
        if self.block == 1:
            return self.block_neighbors(radius)
        height, width = self.spatial_shape
        return self._keep(
            self._tables,
            radius,
            lambda: neighbors(self.indices, self.batch_size, height, width, radius),
        )

    def downsample(self, factor: int = 2) -> ActiveSites:
        """The sites of the map `factor` times smaller, sizes rounded up.

        Blocks that divide keep their places and shrink. Otherwise a coarse site is visible where
        any of its fine sites is.
        """
        check_whole("factor", factor, 1)
        if self.block % factor == 0:
            coarse = self._with(self.blocks, self.block // factor)
            coarse._block_tables = self._block_tables
            return coarse
        height, width = (-(-size // factor) for size in self.spatial_shape)
        image, row, column = self.indices.long().unbind(1)
        visible = self.blocks.new_zeros(self.batch_size, height, width, dtype=torch.bool)
        visible[image, row // factor, column // factor] = True
        return ActiveSites.from_mask(visible)

    def row_map(self) -> Tensor:
        """(N, H, W) int32: the row of each site, -1 where absent."""
        return self._keep(self._tables, "row_map", self._make_row_map)

    def to(self, device: torch.device | str) -> ActiveSites:
        """These sites on another device; self where they are there already."""
        if self.device == torch.device(device):
            return self
        moved = self._with(self.blocks.to(device), self.block)
        moved._tables = {key: table.to(device) for key, table in self._tables.items()}
        moved._block_tables = {key: table.to(device) for key, table in self._block_tables.items()}
        return moved

    def blocks_as_sites(self) -> ActiveSites:
        """The blocks as single sites of the grid: the visible patches."""
        return self._with(self.blocks, 1)

    def _with(self, blocks: Tensor, block: int) -> ActiveSites:
        return ActiveSites(blocks, self.batch_size, self.grid, block, self._blocks_per_image)

    def _keep(self, tables: dict[object, Tensor], key: object, make: Callable[[], Tensor]) -> Tensor:
        if key in tables:
            return tables[key]
        table = make()
        if type(table) is type(self.blocks):  # else these sites are real and the table is of a trace, by torch.export
            tables[key] = table
        return table

    def _make_indices(self) -> Tensor:
        b = self.block
        if b == 1:
            return self.blocks
        step = torch.arange(b, dtype=torch.int32, device=self.device)
        shape = (self.blocks.shape[0], b, b)
        image, row, column = (part[:, None, None] for part in self.blocks.unbind(1))
        row, column = row * b + step[:, None], column * b + step
        sites = torch.stack((image.expand(shape), row.expand(shape), column.expand(shape)), -1)
        return sites.flatten(0, 2).contiguous()

    def _make_offsets(self) -> Tensor:
        images = torch.arange(self.batch_size + 1, dtype=torch.int32, device=self.device)
        first = torch.searchsorted(self.blocks[:, 0].contiguous(), images)
        return first * (self.block * self.block)

    def _make_row_map(self) -> Tensor:
        rows = torch.arange(len(self), dtype=torch.int32, device=self.device)
        empty = rows.new_full((self.batch_size, *self.spatial_shape), -1)
        return empty.index_put(self.indices.long().unbind(1), rows)


class SparseTensor2d:
    """Features of the visible sites of a batch of maps.

    Args:
        features: (M, C), floating, in the order of `sites`.
        sites: the M sites, on the same device.

    Raises:
        TypeError: features that are not a floating tensor, sites that are not ActiveSites.
        ValueError: features of another rank, length or device.
    """

    def __init__(self, features: Tensor, sites: ActiveSites):
        check_floating("features", features)
        _check_sites(sites)
        if features.dim() != 2:
            raise ValueError(f"features: expected shape (M, C), got {tuple(features.shape)}")
        if features.shape[0] != len(sites):
            raise ValueError(f"features: expected {len(sites)} rows, one a visible site, got {features.shape[0]}")
        check_device("features", features, sites.device, "the sites")
        self.features = features
        self.sites = sites

    def __repr__(self) -> str:
        return f"SparseTensor2d(channels={self.features.shape[1]}, {self.sites!r})"

    def replace(self, features: Tensor) -> SparseTensor2d:
        """Other features on the same sites."""
        return SparseTensor2d(features, self.sites)

    def dense(self, fill: float | Tensor = 0) -> Tensor:
        """The (N, H, W, C) map; absent sites hold `fill`, a number or a (C,) tensor."""
        sites, channels = self.sites, self.features.shape[1]
        b, (height, width) = sites.block, sites.grid
        shape = (sites.batch_size, height, width, b, b, channels)
        if isinstance(fill, Tensor):
            if fill.shape != (channels,):
                raise ValueError(f"fill: expected shape ({channels},), got {tuple(fill.shape)}")
            empty = fill.to(self.features.dtype).expand(shape)
        else:
            empty = self.features.new_full(shape, fill)
        values = self.features.reshape(sites.blocks.shape[0], b, b, channels)
        blocks = empty.index_put(sites.blocks.long().unbind(1), values)
        return blocks.permute(0, 1, 3, 2, 4, 5).reshape(sites.batch_size, *sites.spatial_shape, channels)

    @classmethod
    def from_dense(cls, x: Tensor, sites: ActiveSites) -> SparseTensor2d:
        """Read the sites of x, (N, H, W, C) of the sites' N, H and W."""
        check_tensor("x", x)
        _check_sites(sites)
        expected = (sites.batch_size, *sites.spatial_shape)
        if x.dim() != 4 or tuple(x.shape[:3]) != expected:
            raise ValueError(f"x: expected shape {(*expected, 'C')} to match the sites, got {tuple(x.shape)}")
        check_device("x", x, sites.device, "the sites")
        n, (height, width), b = sites.batch_size, sites.grid, sites.block
        blocks = x.view(n, height, b, width, b, x.shape[3]).permute(0, 1, 3, 2, 4, 5)
        image, row, column = sites.blocks.long().unbind(1)
        return cls(blocks[image, row, column].flatten(0, 2), sites)

    def to_spconv(self) -> Any:
        """The same features as a `spconv.pytorch.SparseConvTensor`."""
        spconv = _import_spconv()
        # spconv reads memory in order whatever the strides say.
        return spconv.SparseConvTensor(
            self.features.contiguous(),
            self.sites.indices.contiguous(),
            list(self.sites.spatial_shape),
            self.sites.batch_size,
        )

    @classmethod
    def from_spconv(cls, tensor: Any) -> SparseTensor2d:
        """From a `spconv.pytorch.SparseConvTensor` of two spatial dimensions.

        Rows are put into the order of `ActiveSites`.

        Raises:
            TypeError: tensor is not one.
            ValueError: other than two dimensions, a site outside the map, or the same site twice.
        """
        if not all(hasattr(tensor, part) for part in ("features", "indices", "spatial_shape", "batch_size")):
            raise TypeError(f"tensor: expected a spconv.pytorch.SparseConvTensor, got {kind(tensor)}")
        if len(tensor.spatial_shape) != 2:
            raise ValueError(f"tensor: expected two spatial dimensions, got {len(tensor.spatial_shape)}")
        n, height, width = tensor.batch_size, *(int(size) for size in tensor.spatial_shape)
        indices = tensor.indices.long()
        limit = indices.new_tensor((n, height, width))
        if ((indices < 0) | (indices >= limit)).any():
            raise ValueError(f"tensor: has a site outside {n} maps of {height}x{width}")
        image, row, column = indices.unbind(1)
        place, order = ((image * height + row) * width + column).sort()
        if (place[1:] == place[:-1]).any():
            raise ValueError("tensor: has the same site twice")
        blocks = indices[order].int().contiguous()
        return cls(tensor.features[order], ActiveSites(blocks, n, (height, width)))


def _import_spconv() -> Any:
    try:
        import spconv.pytorch as spconv
    except ImportError as error:
        raise ImportError("to_spconv needs the package spconv: pip install 'convdit[spconv]'") from error
    return spconv


def _where(visible: Tensor) -> Tensor:
    # nonzero may return a transposed layout; kernels read rows.
    return visible.nonzero().int().contiguous()


def _generator_device(generator: torch.Generator, device: torch.device | str | None) -> torch.device:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {kind(generator)}")
    own = generator.device
    wanted = own if device is None else torch.device(device)
    if wanted.type != own.type or (wanted.index != own.index and None not in (wanted.index, own.index)):
        raise ValueError(f"device: expected the device of the generator, {own}, got {device}")
    return own


def _check_sites(sites: ActiveSites) -> None:
    if not isinstance(sites, ActiveSites):
        raise TypeError(f"sites: expected ActiveSites, got {kind(sites)}")


def _check_mask(name: str, mask: Tensor) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {mask.dtype}")
    if mask.dim() != 3:
        raise ValueError(f"{name}: expected shape (N, rows, columns), got {tuple(mask.shape)}")


def _check_visible_per_image(mask: Tensor, expected: int) -> None:
    patches = mask.shape[1] * mask.shape[2]
    check_whole("visible_per_image", expected, 0)
    if expected > patches:
        raise ValueError(f"visible_per_image: expected 0 to {patches}, got {expected}")
    counts = (~mask).flatten(1).sum(1)
    if torch.compiler.is_compiling() or mask.is_cuda or mask.is_meta:
        message = f"visible_per_image: an image of mask keeps another number than {expected}"
        torch._assert_async((counts == expected).all(), message)
    elif (counts != expected).any():
        raise ValueError(
            f"visible_per_image: expected {expected} visible patches in every image, got {counts.tolist()}"
        )
