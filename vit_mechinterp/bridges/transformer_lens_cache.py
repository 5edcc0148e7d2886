"""TransformerLens's `ActivationCache` on a ViT: what it cannot know of ViTs is said or refused."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, as_tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, get_act_name

from vit_mechinterp.errors import SpecError

__all__ = ["NotCachedError", "ViTCache"]


class NotCachedError(SpecError, KeyError):
    """The cache does not hold an activation; also a `KeyError`, as TransformerLens's own."""

    __str__ = Exception.__str__


class ViTCache(ActivationCache):  # type: ignore[misc]  # followed, its types would be half there
    """An `ActivationCache` whose class directions know which tokens a head reads."""

    def __getitem__(self, key: Any) -> Tensor:
        try:
            value: Tensor = super().__getitem__(key)
        except KeyError:
            if isinstance(key, tuple) and len(key) > 1 and key[1] is not None and key[1] < 0:
                key = (key[0], self.model.cfg.n_layers + key[1], *key[2:])
            name = get_act_name(*(key if isinstance(key, tuple) else (key,)))
            name = key if key in self.model.hook_dict else name
            if name in self.model.hook_dict:
                said = f"{name} is not in this cache: run_with_cache was told to leave it out."
                raise NotCachedError(said) from None
            raise NotCachedError(self.model.no_hook(name)) from None
        return value

    def decompose_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's.

        Raises:
            SpecError: the model adds something between the blocks in question, which is in no block's
                output, so the parts would not sum to the stream.
        """
        end = self.model.cfg.n_layers if layer is None or layer == -1 else layer
        gaps = [before for before in self.model.gaps if before <= end]
        if gaps:
            raise SpecError(
                f"{type(self.model.original_model).__name__} adds to the residual stream in front of block "
                f"{gaps[0]}, so the outputs of attention and MLPs do not sum to the stream behind it. "
                "accumulated_resid has the stream itself."
            )
        return super().decompose_resid(layer, *args, **kwargs)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch_and_pos d_model"],
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component *batch_and_pos"]:
        """As TransformerLens's; where a head reads several tokens, every token's part in the logit.

        Then the sum over components and tokens is the logit without its constants.
        """
        where = {"pos_slice": pos_slice, "batch_slice": batch_slice, "has_batch_dim": has_batch_dim}
        readout = self.model.linear_readout()
        if readout.token is not None:
            found: Tensor = super().logit_attrs(residual_stack, tokens, incorrect_tokens, **where)
            return found
        scaled = self.apply_ln_to_stack(residual_stack, layer=-1, **where)
        directions = self._directions(tokens, pos_slice)
        if incorrect_tokens is not None:
            directions = directions - self._directions(incorrect_tokens, pos_slice)
        each: Tensor = (scaled * directions).sum(dim=-1)
        return each

    def _directions(self, classes: Any, pos_slice: Any) -> Float[Tensor, "*batch token d_model"]:
        """Of one class, or of one class per example."""
        classes = as_tensor(classes, device=self.model.cfg.device)
        if classes.ndim > 1:
            raise SpecError("This head reads several tokens at once: name one class, or one per example.")
        directions = self.model.linear_readout().directions(classes)
        found: Tensor = Slice.unwrap(pos_slice).apply(directions, dim=-2)
        return found
