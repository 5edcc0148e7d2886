"""The colours behind charts over layers: how local or global a model's attention is at each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vit_mechinterp.circuits.attention_kinds import layer_heat
from vit_mechinterp.errors import DataError

if TYPE_CHECKING:
    from vit_mechinterp.circuits.result import CircuitResult
    from vit_mechinterp.model import HookedViT

__all__ = ["BACKDROP", "backdrop_of"]

BACKDROP: Final = (
    " The background of each layer is the mean over heads of its global score: blue where attention is "
    "local, red where it is global."
)
"""What a caption says of the colours."""


def backdrop_of(stages: CircuitResult | None, vit: HookedViT) -> list[float] | None:
    """The global score of every layer, from a result of `attention_stages` on the same model.

    Raises:
        SpecError: it is the result of another circuit.
        DataError: it was measured on another model.
    """
    if stages is None:
        return None
    found = layer_heat(stages)
    if stages.provenance.get("model") != vit.fingerprint():
        raise DataError(
            "stages: the attention stages were measured on another model "
            f"({stages.provenance.get('model_source', 'of unknown source')}), not on "
            f"{vit.source or type(vit.module).__name__}. Give the stages of the model that is searched."
        )
    return found
