"""What interventions mean, written a second time: slowly, by hand, one run at a time.

`by_hand` is the whole forward of a tiny model written out, so a site is a line of it and not a hook. `Oracle` carries out
the *document* of a run on it, one example, token and head after another. Nothing here is taken from the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.tiny_models import Tiny

Touch = Callable[[str, Tensor], Tensor]
MATRICES = ("attn.scores", "attn.pattern")


def by_hand(module: nn.Module, images: Tensor, touch: Touch) -> Tensor:
    """The forward of a tiny model; ``touch(site, value)`` is called at every site, in order, and returns the value to
    go on with."""
    forward = {
        "VisionTransformer": _timm,
        "ViTForImageClassification": _vit,
        "CLIPVisionModelWithProjection": _clip,
    }
    return forward.get(type(module).__name__, _dinov2)(module, images, touch)


def _timm(module: Any, images: Tensor, touch: Touch) -> Tensor:
    x = touch("embed", module._pos_embed(module.patch_embed(images)))
    for layer, block in enumerate(module.blocks):
        attn, mlp = block.attn, block.mlp

        def qkv(h: Tensor, attn: Any = attn) -> Sequence[Tensor]:
            q, k, v = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
            return attn.q_norm(q), attn.k_norm(k), v

        scales = [getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2)]
        first, act = [mlp.fc1], mlp.act
        if type(mlp).__name__ == "GluMlp":
            first = [
                lambda h, m=mlp, i=i: m.fc1(h).chunk(2, -1)[i] for i in (0, 1)
            ]  # SiLU acts on the first half
        x = _block(layer, x, touch, block.norm1, qkv, attn.proj, scales, block.norm2, first, act, mlp.fc2)
    if not isinstance(module.norm, nn.Identity):
        x = touch("ln_final", module.norm(x))
    pooled = x[:, 0] if module.global_pool == "token" else module.fc_norm(x.mean(1))
    return touch("logits", module.head(touch("pooled", pooled)))


def _transformers(blocks: Any, x: Tensor, touch: Touch, names: Sequence[str], out: str) -> Tensor:
    x = touch("embed", x)
    for layer, block in enumerate(blocks):
        attention, mlp = getattr(block, names[1]), block.mlp
        n_heads = getattr(attention, "num_heads", None) or attention.num_attention_heads

        def qkv(h: Tensor, a: Any = attention, n: int = n_heads) -> Sequence[Tensor]:
            return [projection(h).unflatten(-1, (n, -1)) for projection in (a.q_proj, a.k_proj, a.v_proj)]

        scales = [getattr(getattr(block, f"layer_scale{i}", None), "lambda1", None) for i in (1, 2)]
        gated = hasattr(mlp, "gate_proj")
        first = [mlp.gate_proj, mlp.up_proj] if gated else [mlp.fc1]
        act, last = (nn.functional.silu, mlp.down_proj) if gated else (mlp.activation_fn, mlp.fc2)
        norms = getattr(block, names[0]), getattr(block, names[2])
        x = _block(
            layer, x, touch, norms[0], qkv, getattr(attention, out), scales, norms[1], first, act, last
        )
    return x


def _vit(module: Any, images: Tensor, touch: Touch) -> Tensor:
    names = ("layernorm_before", "attention", "layernorm_after")
    x = _transformers(module.vit.layers, module.vit.embeddings(images), touch, names, "o_proj")
    x = touch("ln_final", module.vit.layernorm(x))
    return touch("logits", module.classifier(touch("pooled", x[:, 0])))


def _dinov2(module: Any, images: Tensor, touch: Touch) -> Tensor:
    base = module.dinov2_with_registers
    x = _transformers(
        base.encoder.layer, base.embeddings(images), touch, ("norm1", "attention", "norm2"), "o_proj"
    )
    x = touch("ln_final", base.layernorm(x))
    pooled = torch.cat([x[:, 0], x[:, 1 + module.config.num_register_tokens :].mean(1)], dim=1)
    return touch("logits", module.classifier(touch("pooled", pooled)))


def _clip(module: Any, images: Tensor, touch: Touch) -> Tensor:
    tower = module.vision_model
    x = tower.pre_layrnorm(tower.embeddings(images))
    x = _transformers(tower.encoder.layers, x, touch, ("layer_norm1", "self_attn", "layer_norm2"), "out_proj")
    return touch("logits", module.visual_projection(touch("pooled", tower.post_layernorm(x[:, 0]))))


def _block(
    layer: int, x: Tensor, touch: Touch, ln1: Any, qkv: Any, out: nn.Linear, scales: Sequence[Any], ln2: Any,
    first: Sequence[Any], act: Any, last: Any,
) -> Tensor:  # fmt: skip
    at = f"blocks.{layer}."
    x = touch(at + "resid_pre", x)
    q, k, v = qkv(touch(at + "ln1", ln1(x)))
    q, k, v = touch(at + "attn.q", q), touch(at + "attn.k", k), touch(at + "attn.v", v)
    scores = touch(at + "attn.scores", torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
    pattern = touch(at + "attn.pattern", scores.softmax(-1))
    z = touch(at + "attn.z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
    d = z.shape[-1]
    heads = [z[:, :, n] @ out.weight[:, n * d : (n + 1) * d].T for n in range(z.shape[2])]
    scale = 1 if scales[0] is None else scales[0]
    result = touch(at + "attn.result", torch.stack(heads, dim=2) * scale)
    x = touch(at + "resid_mid", x + touch(at + "attn_out", result.sum(2) + out.bias * scale))
    h = touch(at + "ln2", ln2(x))
    post = act(touch(at + "mlp.pre", first[0](h)))
    if len(first) == 2:
        post = post * touch(at + "mlp.pre_linear", first[1](h))
    increment = last(touch(at + "mlp.post", post)) * (1 if scales[1] is None else scales[1])
    return touch(at + "resid_post", x + touch(at + "mlp_out", increment))


class Oracle:
    """Documents of runs, carried out on one tiny model and one set of columns.

    Args:
        tiny: what is true of the model.
        module: the model.
        columns: images ``[n, 3, height, width]``, patch indices, boxes in the model's pixels, choices.
        tensors: given tensors by name.
    """

    def __init__(
        self, tiny: Tiny, module: nn.Module, columns: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        self.tiny, self.module, self.columns, self.tensors = tiny, module, columns, tensors
        self.documents: dict[str, Mapping[str, Any]] = {}
        self._clean: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}

    @torch.no_grad()
    def clean(self, column: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and value at every site of the clean forward of an image column."""
        if column not in self._clean:
            self._clean[column] = self._forward(column, lambda site, value: value)
        return self._clean[column]

    @torch.no_grad()
    def run(self, document: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Output of a run, and its values after the edits at every site; ``self.documents`` holds runs to be read."""
        base = document.get("base", "base")
        edits = document.get("interventions", ())

        def touch(site: str, value: Tensor) -> Tensor:
            for edit in edits:
                if edit["site"] == site:
                    value = self._edited(edit, value, base)
            return value

        return self._forward(base, touch)

    def _forward(self, column: str, touch: Touch) -> tuple[Tensor, dict[str, Tensor]]:
        values: dict[str, Tensor] = {}

        def keep(site: str, value: Tensor) -> Tensor:
            values[site] = touch(site, value)
            return values[site]

        dtype = next(self.module.parameters()).dtype
        return by_hand(self.module, self.columns[column].to(dtype), keep), values

    def positions(self, selector: Any, example: int) -> list[int]:
        """Places on the token axis that a selector means for one example."""
        tiny, first = self.tiny, len(self.tiny.prefix)
        if selector == "all":
            return list(range(tiny.n_tokens))
        if isinstance(selector, Mapping) and "column" in selector:
            return [first + int(patch) for patch in self.columns[selector["column"]][example]]
        if isinstance(selector, Mapping):
            x0, y0, x1, y1 = self.columns[selector["box"]][example]
            touched = []
            for row in range(tiny.grid[0]):
                for column in range(tiny.grid[1]):
                    left, top = column * tiny.patch, row * tiny.patch
                    if x0 < left + tiny.patch and x1 > left and y0 < top + tiny.patch and y1 > top:
                        touched.append(first + row * tiny.grid[1] + column)
            return touched
        found: list[int] = []
        for item in [selector] if isinstance(selector, (str, int)) else selector:
            if item == "patches":
                found += range(first, tiny.n_tokens)
            elif isinstance(item, str):
                found += [n for n, name in enumerate(tiny.prefix) if name == item]
            else:
                found.append(first + item)
        return found

    def _edited(self, edit: Mapping[str, Any], value: Tensor, base: str) -> Tensor:
        site = edit["site"].split(".", 2)[-1] if edit["site"].startswith("blocks") else edit["site"]
        has_tokens = site not in ("pooled", "logits")
        has_heads = site in ("attn.q", "attn.k", "attn.v", "attn.z", "attn.result", *MATRICES)
        by_token = (lambda h: h.transpose(1, 2)) if site in MATRICES else (lambda h: h)
        new = by_token(value.clone())  # [example, token, (head,) features]
        source = self._source(edit, base)
        for i in range(len(value)):
            targets = self.positions(edit.get("tokens", "all"), i) if has_tokens else [None]
            places = (
                self.positions(edit.get("source_tokens", edit.get("tokens", "all")), i)
                if has_tokens
                else [None]
            )
            for k, token in enumerate(targets):
                for head in edit.get("heads", range(new.shape[2])) if has_heads else [None]:
                    index = tuple(n for n in (i, token, head) if n is not None)
                    other = None
                    if source is not None:
                        there = tuple(n for n in (self._partner(edit, i), places[k], head) if n is not None)
                        other = by_token(source)[there]
                    mean = self._mean(edit, by_token, base, targets, token, head)
                    changed = self._cell(edit, new[index], other, mean, i, k)
                    if "keys" in edit:
                        keys = self.positions(edit["keys"], i)
                        new[(*index, keys)] = changed[keys]
                    else:
                        new[index] = changed
        return by_token(new)

    def _source(self, edit: Mapping[str, Any], base: str) -> Tensor | None:
        """The whole source activation, of every example."""
        site = edit.get("source_site", edit["site"])
        if edit["op"] == "ablate":
            return self.clean(base)[1][site] if edit.get("method") == "resample" else None
        source = edit.get("source")
        if isinstance(source, Mapping):
            return self.run(self.documents[source["run"]])[1][site]
        return None if source is None else self.clean(source)[1][site]

    def _partner(self, edit: Mapping[str, Any], example: int) -> int:
        """The example that a source value comes from: its own, or a permuted one for resample ablation."""
        if edit["op"] != "ablate":
            return example
        return int(np.random.default_rng(edit.get("seed", 0)).permutation(len(self.columns["base"]))[example])

    def _mean(
        self,
        edit: Mapping[str, Any],
        by_token: Any,
        base: str,
        targets: Any,
        token: int | None,
        head: int | None,
    ) -> Tensor | None:
        if edit.get("method") != "mean":
            return None
        place = (slice(None),) if head is None else (head, slice(None))
        if "mean" in edit:
            given = self.tensors[edit["mean"]]
            if edit.get("pool_tokens") or token is None:
                return given[place]
            return by_token(given[None])[0][(token, *place)]
        clean = by_token(self.clean(base)[1][edit["site"]])
        if token is None:
            return clean.mean(0)
        if not edit.get("pool_tokens"):
            return clean[(slice(None), token, *place)].mean(0)
        selected = [
            clean[(i, t, *place)]
            for i in range(len(clean))
            for t in self.positions(edit.get("tokens", "all"), i)
        ]
        return torch.stack(selected).mean(0)

    def _cell(
        self,
        edit: Mapping[str, Any],
        h: Tensor,
        source: Tensor | None,
        mean: Tensor | None,
        example: int,
        k: int,
    ) -> Tensor:
        """One token's (one head's) new value; it is the k-th of its example's selection."""
        match edit["op"]:
            case "interchange":
                assert source is not None
                return source
            case "add_direction":
                return h + edit.get("alpha", 1.0) * self._row(edit, "vector", len(h), example, k)
            case "inject_subspace":
                basis = self.tensors[edit["basis"]].to(h.dtype)
                basis = basis[k] if basis.ndim == 3 else basis
                gate = self.tensors[edit["gate"]].to(h.dtype) if "gate" in edit else torch.ones_like(basis[0])
                gate = gate[k] if gate.ndim == 2 else gate
                wanted = (
                    source @ basis
                    if source is not None
                    else self._row(edit, "vectors", basis.shape[1], example, k)
                )
                for n in range(basis.shape[1]):  # orthonormal columns can be written one after another
                    h = h + gate[n] * (wanted[n] - h @ basis[:, n]) * basis[:, n]
                return h
            case "ablate" if edit.get("method", "zero") == "zero":
                return torch.zeros_like(h)
            case "ablate":
                value = mean if source is None else source
                assert value is not None
                return value
        raise AssertionError(edit["op"])

    def _row(self, edit: Mapping[str, Any], field: str, d: int, example: int, k: int) -> Tensor:
        rows = self.tensors[edit[field]]
        if "choose" in edit:
            rows = rows[int(self.columns[edit["choose"]["column"]][example])]
        if rows.ndim == 2:
            return rows[k]
        return rows if len(rows) == d else rows[k * d : (k + 1) * d]
