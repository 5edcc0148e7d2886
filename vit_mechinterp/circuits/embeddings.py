"""Embeddings as functions of the image, and products with their Jacobian, without ever holding the Jacobian.

An embedding f maps an image x to the activation at one site, at chosen tokens, as one vector. ``J(x)`` is its
derivative: `jvp` gives ``J u`` (forward mode), `vjp` gives ``J^T w`` (reverse mode), one image and one
direction per row, so many directions at one image are one batch. Norms are Euclidean, in units of the model's
input (after normalisation) and of the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_mechinterp.engine.binding.positions import resolve_tokens
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site
from vit_mechinterp.spec.tokens import TokenBox, TokenColumn, Tokens, parse_tokens

__all__ = ["Embedding", "default_site", "in_batches"]


def default_site(vit: HookedViT) -> str:
    """Return where the model's own embedding of an image is: ``pooled``, else ``ln_final``, else the last
    block's output.
    """
    names = vit.site_names()
    last = f"blocks.{vit.layout.n_layers - 1}.resid_post"
    return next(name for name in ("pooled", "ln_final", last) if name in names)


@dataclass(frozen=True)
class Embedding:
    """The activation at one site, at chosen tokens, as a function of the image.

    Attributes:
        vit: the model.
        site: a canonical site name.
        tokens: token names or patch indices, the same for every image; not for ``pooled`` and ``logits``.
        positions: the same on the token axis; None for the whole activation.
    """

    vit: HookedViT
    site: str
    tokens: Tokens = "all"
    positions: tuple[int, ...] | None = None

    @classmethod
    def of(cls, vit: HookedViT, site: str | None = None, tokens: Tokens = "all") -> Embedding:
        """Name an embedding; without a site that of `default_site`.

        Raises:
            SpecError: the model has no such site or tokens, or the tokens differ between images.
        """
        (name,) = vit.expand([site or default_site(vit)])
        chosen = parse_tokens(tokens)
        if isinstance(chosen, (TokenColumn, TokenBox)):
            raise SpecError(
                f"An embedding takes the same tokens in every image, not {chosen}: give names such as "
                f"{', '.join(vit.layout.tokens.names)}, or patch indices."
            )
        parsed = Site.parse(name)
        if chosen != "all" and (not parsed.has_tokens or parsed.is_attention_matrix):
            raise SpecError(f"{name} has no axis of tokens to choose from: leave out tokens={chosen!r}.")
        positions = resolve_tokens(chosen, vit, None, "base", f"embedding at {name}, tokens")
        return cls(vit, name, chosen, positions.shared)

    def __str__(self) -> str:
        return self.site if self.tokens == "all" else f"{self.site} at {self.tokens}"

    def __call__(self, x: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch feature"]:
        """Return the embeddings of images, in float32 and in the ambient grad mode."""
        return self.select(self.vit.run(x, capture=[self.site])[1][self.site])

    def select(self, activation: Float[Tensor, "batch *site"]) -> Float[Tensor, "batch feature"]:
        """Turn the activation at the site into the embedding."""
        if self.positions is not None:
            activation = activation[:, list(self.positions)]
        return activation.flatten(1).float()

    def jvp(
        self, x: Float[Tensor, "batch *image"], u: Float[Tensor, "batch *image"]
    ) -> tuple[Float[Tensor, "batch feature"], Float[Tensor, "batch feature"]]:
        """Return ``f(x)`` and ``J(x) u``, row by row."""
        with _differentiable_attention(), forward_ad.dual_level():
            moving = forward_ad.make_dual(x.contiguous(), u.to(x.dtype))  # type: ignore[no-untyped-call]
            value, tangent = forward_ad.unpack_dual(self(moving))  # type: ignore[no-untyped-call]
        # A site that the image does not reach has no tangent.
        return value.detach(), torch.zeros_like(value) if tangent is None else tangent.detach()

    def vjp(
        self, x: Float[Tensor, "batch *image"], w: Float[Tensor, "batch feature"]
    ) -> tuple[Float[Tensor, "batch feature"], Float[Tensor, "batch *image"]]:
        """Return ``f(x)`` and ``J(x)^T w``, row by row."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self(leaf)
            (gradient,) = torch.autograd.grad(value, leaf, grad_outputs=w.to(value.dtype))
        return value.detach(), gradient


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Fused attention has no forward-mode derivative; written out it has."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def in_batches(
    function: Callable[..., tuple[Tensor, ...]], *arguments: Tensor, batch_size: int
) -> tuple[Tensor, ...]:
    """Apply a function of rows to at most ``batch_size`` rows at a time, and join what it returns."""
    n = len(arguments[0])
    pieces = [
        function(*(argument[start : start + batch_size] for argument in arguments))
        for start in range(0, n, batch_size)
    ]
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
