"""Runs carried out with plain PyTorch hooks on a HuggingFace ViT, one at a time: what every benchmark is
checked against. Nothing here is taken from the package.

A run is its own JSON document. Known are the sites and operations that the benchmarks use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Plain", "agree", "effective", "tell_apart"]

Touch = Callable[[Tensor], Tensor]


class Plain:
    """Documents of runs on one model and one set of columns.

    Args:
        module: a ``ViTForImageClassification``.
        data: columns of images and of patch indices.
        tensors: given tensors by name.
    """

    def __init__(
        self, module: Any, data: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self.module, self.data, self.tensors = module, data, dict(tensors or {})
        self._kept: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def run(self, document: Mapping[str, Any]) -> Tensor:
        """Logits ``[example, class]`` of one run."""
        edits = document["interventions"]
        sources = [(edit, self._source(edit)) for edit in edits]
        with ExitStack() as stack:
            for edit, source in sources:
                touch = self._edit(edit, source)
                stack.callback(_hook(self.module, edit["site"], touch).remove)
            logits: Tensor = self.module(self.data[document.get("base", "base")]).logits
        return logits.float().cpu()

    def clean(self, column: str) -> Tensor:
        """Logits of an image column without any edit."""
        return self.run({"base": column, "interventions": []})

    def _source(self, edit: Mapping[str, Any]) -> Tensor | None:
        column = edit.get("source")
        if column is None:
            return None
        key = (column, edit["site"])
        if key not in self._kept:

            def keep(value: Tensor) -> Tensor:
                self._kept[key] = value.clone()
                return value

            handle = _hook(self.module, edit["site"], keep)
            self.module(self.data[column])
            handle.remove()
        return self._kept[key]

    def _edit(self, edit: Mapping[str, Any], source: Tensor | None) -> Touch:
        heads = self.module.config.num_attention_heads

        def touch(value: Tensor) -> Tensor:
            by_head = edit["site"].endswith("attn.z")
            new = value.clone()
            view = new.unflatten(-1, (heads, -1)) if by_head else new
            other = source
            if source is not None and by_head:
                other = source.unflatten(-1, (heads, -1))
            chosen = edit.get("heads") or range(heads)
            for i in range(len(new)):
                there = self._tokens(edit.get("tokens", "all"), i, new.shape[1])
                here = self._tokens(edit.get("source_tokens") or edit.get("tokens", "all"), i, new.shape[1])
                for head in chosen if by_head else [None]:
                    at = (i, there) if head is None else (i, there, head)
                    frm = (i, here) if head is None else (i, here, head)
                    view[at] = self._new(edit, view[at], None if other is None else other[frm])
            return new

        return touch

    def _tokens(self, selector: Any, example: int, n_tokens: int) -> list[int]:
        if selector == "all":
            return list(range(n_tokens))
        if isinstance(selector, Mapping):
            return [1 + int(patch) for patch in self.data[selector["column"]][example]]
        return [0 if name == "cls" else 1 + name for name in _listed(selector)]

    def _new(self, edit: Mapping[str, Any], h: Tensor, source: Tensor | None) -> Tensor:
        """New values of some tokens, computed in float32."""
        x = h.float()
        if edit["op"] == "interchange" and source is not None:
            return source
        if edit["op"] == "ablate":
            return torch.zeros_like(h)
        if edit["op"] == "add_direction":
            return (x + edit.get("alpha", 1.0) * self._tensor(edit["vector"], x)).to(h.dtype)
        assert edit["op"] == "inject_subspace"
        assert source is not None
        basis, gate = self._tensor(edit["basis"], x), self._tensor(edit["gate"], x)
        return (x + ((source.float() - x) @ basis * gate) @ basis.T).to(h.dtype)

    def _tensor(self, ref: Any, like: Tensor) -> Tensor:
        name = ref if isinstance(ref, str) else ref["name"]
        return self.tensors[name].to(like)


def _listed(selector: Any) -> Sequence[Any]:
    return selector if isinstance(selector, (list, tuple)) else [selector]


def _hook(module: Any, site: str, touch: Touch) -> Any:
    """A hook that replaces the value of a site by what ``touch`` makes of it."""
    if site == "embed":
        return module.vit.embeddings.register_forward_hook(lambda m, a, output: touch(output))
    _, layer, name = site.split(".", 2)
    block = module.vit.layers[int(layer)]
    if name == "resid_post":
        return block.register_forward_hook(lambda m, a, output: touch(output))
    if name == "mlp_out":
        return block.mlp.register_forward_hook(lambda m, a, output: touch(output))
    before: Mapping[str, nn.Module] = {
        "resid_pre": block,
        "attn.z": block.attention.o_proj,
        "mlp.post": block.mlp.fc2,
    }
    return before[name].register_forward_pre_hook(lambda m, args: (touch(args[0]), *args[1:]))


def agree(name: str, found: Tensor, wanted: Tensor, share: float, scale: float | None = None) -> float:
    """Assert that two outputs agree within a share of a scale; the difference as such a share.

    Args:
        scale: the wanted output's largest value if left out.
    """
    scale = wanted.abs().max().item() if scale is None else scale
    difference = (found.float().cpu() - wanted).abs().max().item() / scale
    assert difference <= share, f"{name}: differs by {difference:.2g} of the output's scale"
    return difference


def effective(outputs: Iterable[Tensor], clean: Tensor, share: float) -> int:
    """How many outputs differ from the clean one by more than a share of its scale."""
    return sum(bool((o - clean).abs().max() > share * clean.abs().max()) for o in outputs)


def tell_apart(name: str, found: Tensor, wanted: Tensor, clean: Tensor) -> None:
    """Assert that rounding is far below what the interventions do, without which agreement would mean little.

    The mean error must be below a third of the mean effect; both are over all runs.
    """
    error = (found.float().cpu() - wanted).abs().mean().item()
    effect = (wanted - clean).abs().mean().item()
    assert error < effect / 3, f"{name}: a mean error of {error:.2g} beside a mean effect of {effect:.2g}"
