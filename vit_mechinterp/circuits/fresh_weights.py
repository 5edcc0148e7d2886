"""The same architecture with fresh weights: a control for what training, and not structure, brings about.

A copy of the module is initialised anew, part by part, by the initialisers that its own library gives it:
HuggingFace's ``_init_weights``, a timm model's ``init_weights``, and ``reset_parameters`` of torch's layers.
Parameters that a module holds itself (class tokens, position embeddings) and that no initialiser reaches are
drawn from a normal distribution of standard deviation 0.02, as ViTs initialise them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from vit_mechinterp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vit_mechinterp.model import HookedViT

__all__ = ["with_fresh_weights"]

_STD: Final = 0.02


def with_fresh_weights(vit: HookedViT, seed: int = 0) -> HookedViT:
    """Return a copy of the model with weights drawn anew; the model itself is not changed.

    Args:
        vit: the model.
        seed: of the draws. The random state of the caller is left as it was.

    Raises:
        UnsupportedModelError: a part has weights that no initialiser redraws; it is named.
    """
    from vit_mechinterp.model import HookedViT

    with vit.lock:
        module = copy.deepcopy(vit.module)
    device = vit.device
    module.to("cpu")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        _initialise(module, before)
    _check(module, before, type(vit.module).__name__)
    for parameter, old in zip(module.parameters(), vit.module.parameters(), strict=True):
        parameter.requires_grad_(old.requires_grad)
    source = f"{vit.source or type(vit.module).__name__}, fresh weights from seed {seed}"
    return HookedViT(module.to(device).eval(), vit.layout, source, vit.origin or "")


def _initialise(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Draw all weights anew: general initialisers first, then those that know the model better."""
    for part in module.modules():
        for name in ("reset_parameters", "_reset_parameters", "reset_running_stats"):
            if callable(reset := getattr(part, name, None)):
                reset()
                break
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and _kept(parameter, before[name]):
            parameter.normal_(std=_STD)
    whole = getattr(module, "init_weights", None)
    if hasattr(module, "_init_weights") and hasattr(module, "config"):
        # A mark says that a weight was loaded, and keeps the library from drawing it.
        marked: list[Any] = [*module.parameters(), *module.buffers(), *module.modules()]
        for one in marked:
            vars(one).pop("_is_hf_initialized", None)
        draw: Any = module._init_weights
        for part in module.modules():
            draw(part)
    elif callable(whole):
        whole()


def _kept(parameter: Tensor, before: Tensor) -> bool:
    """Whether a parameter was not drawn. One that is all of one value is taken for a fresh bias or scale."""
    return torch.equal(parameter, before) and bool((before != before.flatten()[0]).any())


def _check(module: nn.Module, before: dict[str, Tensor], name: str) -> None:
    kept = [key for key, parameter in module.named_parameters() if _kept(parameter, before[key])]
    if kept:
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        raise UnsupportedModelError(
            f"{name} cannot be given fresh weights: nothing initialises {', '.join(kept[:3])}{more}. Give "
            "the modules that hold them a reset_parameters(), or leave out the control 'random_weights'."
        )
