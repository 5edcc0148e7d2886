"""Edits that do to a token what they would do if no other one were selected."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vit_mechinterp.engine.binding.bound import Edit
from vit_mechinterp.engine.binding.ops import ablate, add_direction, inject_subspace, interchange, operator_of
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TensorRef

__all__ = ["Alone"]


class Alone:
    """Finds edits that do the same to a token whichever others are selected with it.

    Args:
        vit: the model.
        tensors: the given tensors, where they are known.
    """

    def __init__(self, vit: HookedViT, tensors: Mapping[TensorRef, Tensor] | None) -> None:
        self.vit, self.tensors = vit, tensors or {}

    def acts(self, edit: Edit) -> bool:
        """Whether an edit does."""
        if edit.carries is not None or not edit.site.has_tokens:
            return False
        operator = operator_of(edit.spec)
        if operator in (interchange, ablate) or not edit.keys.is_all:
            return operator in (interchange, ablate)
        if any(ref not in self.tensors for _, ref in edit.refs):
            return False
        # Vectors and subspaces that are given token by token are paired with tokens by their order.
        shapes = {field: tuple(self.tensors[ref].shape) for field, ref in edit.refs}
        n_features = self.vit.sites()[str(edit.site)].shape[-1]
        chosen = 0 if edit.choice is None else 1
        if operator is add_direction:
            return shapes["vector"][chosen:] == (n_features,)
        if operator is inject_subspace and len(shapes["basis"]) == 2:
            return edit.source is not None or shapes["vectors"][chosen:] == shapes["basis"][1:]
        return False
