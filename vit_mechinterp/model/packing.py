"""Models that pack all images of a batch into one sequence, and tell every block where each image ends.

Towers of vision-language models take ``[image * token, channel]``, the patches of an image in groups that are
merged behind the blocks, and every block is given the ends of the stretches that attend to themselves
(``cu_seqlens``). A `Packing` turns such a sequence into ``[image, token, channel]`` with tokens row-major,
and back, so that sites mean what they mean elsewhere and rows can join a batch on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ENDS", "Packing", "Rows"]

ENDS = "cu_seqlens"
"""The argument of a block, and of its attention, that holds the ends of the stretches; it begins with 0."""


@dataclass(frozen=True)
class Packing:
    """How the tokens of one image lie in the sequence that holds all images of a batch.

    Args:
        places: for every token of an image, in the layout's order, its place among the image's own tokens in
            the sequence.
        outputs: how many rows of the output belong to one image.
        leading: whether the output has a leading axis of one.
    """

    places: tuple[int, ...]
    outputs: int
    leading: bool = False

    @property
    def n_tokens(self) -> int:
        """Number of tokens of one image."""
        return len(self.places)

    def unpack(self, sequence: Tensor) -> Tensor:
        """Turn ``[image * token, ...]`` into ``[image, token, ...]``, tokens in the layout's order."""
        rows = sequence.reshape(-1, self.n_tokens, *sequence.shape[1:])
        places = _index(self.places, sequence.device)
        return rows if places is None else rows[:, places]

    def pack(self, rows: Tensor) -> Tensor:
        """Turn ``[image, token, ...]`` back into ``[image * token, ...]``."""
        places = _index(_inverse(self.places), rows.device)
        return (rows if places is None else rows[:, places]).flatten(0, 1)

    def split(self, output: Tensor) -> Tensor:
        """The model's output by image, in the model's own order."""
        flat = output[0] if self.leading else output
        return flat.reshape(-1, self.outputs, *flat.shape[1:])

    def stretches(self, ends: Tensor) -> list[int]:
        """Where the stretches of one image end, from the ends of all images' stretches; begins with 0."""
        return [end for end in ends.tolist() if end <= self.n_tokens]

    def fit(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's pre-hook: gives it arguments for as many images as its input holds.

        All images of a batch have one size, so what holds for the first holds for all.
        """
        value: Tensor = args[0] if args else next(iter(kwargs.values()))
        ends: Tensor = kwargs[ENDS]
        given, n = int(ends[-1]), self.n_tokens
        n_images = value.shape[-2] // n
        if given == n * n_images:
            return None
        own = ends[: len(self.stretches(ends))]
        starts = n * torch.arange(n_images, device=ends.device, dtype=ends.dtype)

        def repeated(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(repeated(part) for part in value)
            if not isinstance(value, Tensor) or given not in value.shape:
                return value
            axis = value.shape.index(given)
            return torch.cat([value.narrow(axis, 0, n)] * n_images, dim=axis)

        fitting = {name: part if part is value else repeated(part) for name, part in kwargs.items()}
        fitting[ENDS] = torch.cat([own[:1], (own[1:] + starts[:, None]).flatten()])
        return args, fitting


@dataclass(frozen=True)
class Rows:
    """For modules whose blocks see images as rows, but whose output is one sequence again.

    Args:
        outputs: how many rows of the output belong to one image.
    """

    outputs: int

    def split(self, output: Tensor) -> Tensor:
        """The model's output by image."""
        return output.reshape(-1, self.outputs, *output.shape[1:])

    def fit(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's pre-hook: gives it positions and masks for as many images as its input holds."""
        value: Tensor = args[0] if args else next(iter(kwargs.values()))

        def fitting(part: Any) -> Any:
            if isinstance(part, (tuple, list)):
                return type(part)(fitting(one) for one in part)
            if not isinstance(part, Tensor) or part.ndim < 2 or len(part) in (1, len(value)):
                return part
            return part[:1].expand(len(value), *part.shape[1:])

        return args, {name: part if part is value else fitting(part) for name, part in kwargs.items()}


@lru_cache(maxsize=64)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The same as an index on a device; None where it would change nothing."""
    if places == tuple(range(len(places))):
        return None
    with torch.inference_mode(False):  # an index made in inference mode cannot be used under autograd
        return torch.tensor(places, device=device)


@lru_cache(maxsize=64)
def _inverse(places: tuple[int, ...]) -> tuple[int, ...]:
    found = [0] * len(places)
    for token, place in enumerate(places):
        found[place] = token
    return tuple(found)
