"""Batches without a data loader: gathers of sample ids from one array, augmented and normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

#: Smallest image side at which crops move by `PAD` pixels; below it they move by an eighth of the side.
PAD = 4


class Batch(NamedTuple):
    """Samples of one step.

    Attributes
    ----------
    x : Tensor
        Images float32 [B, C, H, W] with mean 0 and deviation 1, tokens int64 [B, L], vectors float32 [B, D].
    y : Tensor
        Labels, int64 [B]; -1 where there are none.
    ids : Tensor
        Sample ids, int64 [B].
    """

    x: Tensor
    y: Tensor
    ids: Tensor


class Samples(Protocol):
    """What batches are gathered from: `ArrayData`, or anything else that has samples by id."""

    def __len__(self) -> int: ...

    def gather(
        self, ids: np.ndarray | Tensor, *, device: str | torch.device = "cpu", channels_last: bool = False
    ) -> Batch:
        """Return the samples `ids` as a batch on `device`."""
        ...


class ArrayData:
    """Samples in one array, of which batches are gathered by id.

    Parameters
    ----------
    x : np.ndarray
        Images uint8 [N, H, W] or [N, H, W, C], integer tokens [N, L], float vectors [N, D]; may be
        memory-mapped and is never changed.
    y : np.ndarray or None
        Labels [N].
    kind : "image", "tokens" or "vector"
        What a sample is.
    mean, std : sequence of float
        Per channel on the 0..1 scale, with which images are normalised; empty leaves them on that scale.
    rows : np.ndarray or None
        Id i is row ``rows[i]`` of `x`; by default row i. Labels are already in the order of ids.
    private : int or None
        Ids below it are private samples, which may be augmented; the others never are. Default: all are.

    Examples
    --------
    >>> data = ArrayData(np.array([[[0, 255]], [[51, 102]]], dtype=np.uint8), None, kind="image")
    >>> batch = data.gather(np.array([1]))
    >>> batch.x.shape, round(batch.x.max().item(), 3), batch.y.tolist(), batch.ids.tolist()
    (torch.Size([1, 1, 1, 2]), 0.4, [-1], [1])
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray | None = None,
        *,
        kind: str = "image",
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        rows: np.ndarray | None = None,
        private: int | None = None,
    ) -> None:
        self.x, self.kind, self.mean, self.std, self.rows = x, kind, tuple(mean), tuple(std), rows
        self._labels = None if y is None else np.asarray(y, dtype=np.int64)
        count = len(x) if rows is None else len(rows)
        if self._labels is not None and len(self._labels) != count:
            raise ValueError(f"{count} samples, but {len(self._labels)} labels")
        self._count, self.private = count, count if private is None else private
        self._copies: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._affine: dict[tuple[torch.device, int, int], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_copies": {}, "_affine": {}}

    @property
    def labels(self) -> np.ndarray | None:
        """Labels by id, int64 [N], or None."""
        return self._labels

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample in a batch."""
        return max(1, (8 if self.kind == "tokens" else 4) * math.prod(self.x.shape[1:]))

    def take(self, ids: np.ndarray, *, labelled: bool = True) -> ArrayData:
        """Return a view of some samples, renumbered from 0, with or without their labels."""
        rows = np.asarray(ids) if self.rows is None else self.rows[ids]
        y = None if self._labels is None or not labelled else self._labels[ids]
        private = int(np.cumprod(np.asarray(ids) < self.private).sum())  # those before the first public one
        return ArrayData(self.x, y, kind=self.kind, mean=self.mean, std=self.std, rows=rows, private=private)

    def relabelled(self, y: np.ndarray) -> ArrayData:
        """Return a view of all samples with other labels [N]."""
        rows, private = self.rows, self.private
        return ArrayData(self.x, y, kind=self.kind, mean=self.mean, std=self.std, rows=rows, private=private)

    def gather(
        self,
        ids: np.ndarray | Tensor,
        *,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
        augment: str = "none",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Batch:
        """Return the samples `ids` as a batch.

        Parameters
        ----------
        ids : np.ndarray or Tensor
            Sample ids, [B].
        device : str or torch.device
            Where the batch is wanted. A GPU keeps its own copy of the samples (uint8 images), made at the
            first gather, and gathers from that.
        channels_last : bool
            Memory layout of image batches.
        augment : "none", "flip" or "crop-flip"
            Random changes to private images, see `augment_images`; numbers are drawn for the others too.
        generator : torch.Generator or sequence of them
            Random numbers of the augmentation; required with it. Of several, each has an equal part of the batch,
            and draws what it would draw for that part alone.

        Raises
        ------
        IndexError
            If an id is not in 0..N-1.
        ValueError
            If augmentation is asked for without a generator, or of samples that are no images.
        """
        where_to = torch.device(device)
        if where_to.type == "cpu":
            index = self._checked(ids)
            x = torch.from_numpy(self._rows(index))
            y = None if self._labels is None else torch.from_numpy(self._labels.take(index))
            where = torch.from_numpy(index.copy())
        else:
            where = self.ids_on(ids, where_to)
            samples, labels = self._copy(where_to)
            x, y = samples[where], None if labels is None else labels[where]
        if y is None:
            y = torch.full((len(where),), -1, dtype=torch.int64, device=where_to)
        if augment != "none" and self.kind != "image":
            raise ValueError(f"augment = {augment!r} is for images, these samples are {self.kind}")
        if self.kind == "tokens":
            return Batch(x.long(), y, where)
        if self.kind == "vector":
            return Batch(x.float(), y, where)
        if x.ndim == 3:
            x = x.unsqueeze(-1)
        if augment != "none":
            changed = augment_images(x, augment, generator)
            whole = self.private >= len(self)
            x = changed if whole else torch.where((where < self.private).view(-1, 1, 1, 1), changed, x)
        return Batch(self._normalise(x, channels_last), y, where)

    def ids_on(self, ids: np.ndarray | Tensor, device: torch.device) -> Tensor:
        """Return sample ids on a device, checked; those that are there already are taken as they are.

        So whoever knows many batches beforehand checks and sends them at once, and no gather waits for a GPU.
        """
        if isinstance(ids, Tensor) and ids.device.type == device.type != "cpu":
            return ids
        return torch.from_numpy(self._checked(ids).copy()).to(device, non_blocking=True)

    def _checked(self, ids: np.ndarray | Tensor) -> np.ndarray:
        index = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
        index = index.astype(np.int64, copy=False)
        # As unsigned numbers, negative ids are the largest of all.
        if index.size and index.view(np.uint64).max() >= self._count:
            raise IndexError(f"sample ids must be in 0..{self._count - 1}")
        return index

    def _rows(self, index: np.ndarray) -> np.ndarray:
        x = np.take(self.x, index if self.rows is None else self.rows[index], axis=0)
        return x.astype(np.int64) if self.kind == "tokens" else x  # torch does little with uint16

    def _copy(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return samples and labels on `device`, copied there once."""
        key = str(device)
        if key not in self._copies:
            x = np.array(self.x if self.rows is None else self.x[self.rows])
            if self.kind == "tokens":
                x = x.astype(np.int32)
            y = None if self._labels is None else torch.from_numpy(self._labels.copy()).to(device)
            self._copies[key] = torch.from_numpy(x).to(device), y
        return self._copies[key]

    def _normalise(self, x: Tensor, channels_last: bool) -> Tensor:
        """Turn uint8 [B, H, W, C] into normalised float32 [B, C, H, W]."""
        if x.shape[3] == 1:  # all the same for one channel, and this is the fastest
            scale, shift = self._grey
            x = x.float().mul_(scale).add_(shift)
            return x.permute(0, 3, 1, 2) if channels_last else x.view(len(x), 1, *x.shape[1:3])
        count, height, width, channels = x.shape
        if channels_last:
            # Rows of W * C values: as [.., C] alone, the innermost loop would be only C long, and slow.
            scale, shift = self._scale(x.device, channels, width)
            rows = x.to(torch.float32, memory_format=torch.contiguous_format).view(count, height, -1)
            return rows.mul_(scale).add_(shift).view(count, height, width, channels).permute(0, 3, 1, 2)
        scale, shift = self._scale(x.device, channels, 0)
        x = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return x.mul_(scale).add_(shift)

    def _scale(self, device: torch.device, channels: int, width: int) -> tuple[Tensor, Tensor]:
        """Return factors and summands for rows [width * channels], or with width 0 for maps [channels, 1, 1]."""
        key = (device, channels, width)
        if key not in self._affine:
            both = [t.expand(channels).to(device) for t in self._by_channel()]
            scale, shift = (t.repeat(width) if width else t[:, None, None] for t in both)
            self._affine[key] = scale, shift
        return self._affine[key]

    @cached_property
    def _grey(self) -> tuple[float, float]:
        scale, shift = self._by_channel()
        return scale.item(), shift.item()

    def _by_channel(self) -> tuple[Tensor, Tensor]:
        std = torch.tensor(self.std or (1.0,), dtype=torch.float64)
        mean = torch.tensor(self.mean or (0.0,), dtype=torch.float64)
        return (1 / (255 * std)).float(), (-mean / std).float()


def augment_images(
    x: Tensor,
    how: str,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    *,
    reflect: bool = False,
) -> Tensor:
    """Flip and shift each image of a batch at random.

    Parameters
    ----------
    x : Tensor
        Images [B, H, W, C], any dtype.
    how : "none", "flip" or "crop-flip"
        ``flip`` mirrors half of the images; ``crop-flip`` also crops them at a random place after padding by
        4 pixels (an eighth of the side where that is less than 4, rounded up).
    generator : torch.Generator or sequence of them
        Draws one flip and two offsets per image, on its own device; of several, each for an equal part of the batch.
    reflect : bool
        Pad with the mirrored image instead of zeros (black).

    Returns
    -------
    Tensor
        Images of the same shape and dtype.

    Raises
    ------
    ValueError
        If `how` is unknown or there is no generator.
    """
    if how == "none":
        return x
    if how not in ("flip", "crop-flip"):
        raise ValueError(f"unknown augmentation {how!r}; known: none, flip, crop-flip")
    if generator is None:
        raise ValueError("augmentation needs a generator")
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    count, height, width = x.shape[:3]
    share = (count // len(generators),)

    def draw(low: int, high: int) -> Tensor:
        drawn = [torch.randint(low, high + 1, share, generator=g, device=g.device) for g in generators]
        return torch.cat(drawn).to(x.device)

    flipped = draw(0, 1).bool()
    if how == "crop-flip":
        up, left = (min(PAD, -(-side // 8)) for side in (height, width))
        # All windows of the padded images as one view; indexing copies only the chosen ones.
        windows = _padded(x, up, left, reflect).unfold(1, height, 1).unfold(2, width, 1)
        chosen = windows[torch.arange(count, device=x.device), draw(0, 2 * up), draw(0, 2 * left)]
        x = chosen.permute(0, 2, 3, 1)
    return torch.where(flipped[:, None, None, None], x.flip(2), x)


def _padded(x: Tensor, up: int, left: int, reflect: bool) -> Tensor:
    """Return images [B, H, W, C] with `up` and `left` pixels more on either side."""
    height, width = x.shape[1:3]
    if reflect:
        rows, columns = (
            _mirror(torch.arange(-pad, side + pad, device=x.device), side)
            for pad, side in ((up, height), (left, width))
        )
        return x[:, rows][:, :, columns]
    padded = x.new_zeros(len(x), height + 2 * up, width + 2 * left, x.shape[3])
    padded[:, up : up + height, left : left + width] = x
    return padded


def _mirror(index: Tensor, side: int) -> Tensor:
    """Return indices outside 0..side-1 mirrored at the border pixels."""
    return (side - 1) - ((side - 1) - index.abs()).abs()


def epoch_order(
    ids: np.ndarray, batch_size: int, rng: np.random.Generator, drop_single: bool = False
) -> list[np.ndarray]:
    """Return shuffled batches that hold every id once.

    Parameters
    ----------
    ids : np.ndarray
        Sample ids.
    batch_size : int
        Samples per batch; the last may be smaller.
    rng : np.random.Generator
        Order of the samples.
    drop_single : bool
        Leave out a last batch of one sample, which batch normalisation cannot use.

    Examples
    --------
    >>> [len(b) for b in epoch_order(np.arange(7), 3, np.random.default_rng(0))]
    [3, 3, 1]
    >>> [len(b) for b in epoch_order(np.arange(7), 3, np.random.default_rng(0), drop_single=True)]
    [3, 3]
    """
    order = rng.permutation(ids)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if drop_single and batches and len(batches[-1]) == 1:
        batches.pop()
    return batches


def step_order(
    ids: np.ndarray, batch_size: int, steps: int, rng: np.random.Generator, drop_single: bool = False
) -> list[np.ndarray]:
    """Return exactly `steps` batches: passes as of `epoch_order`, each shuffled anew.

    Where there are fewer ids than `batch_size`, every batch holds all of them. Without a usable batch (no
    ids, or a single one with `drop_single`) the list is empty.

    Examples
    --------
    >>> [len(b) for b in step_order(np.arange(5), 4, 5, np.random.default_rng(0))]
    [4, 1, 4, 1, 4]
    """
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        more = epoch_order(ids, batch_size, rng, drop_single)
        if not more:
            return []
        batches += more
    return batches[:steps]
