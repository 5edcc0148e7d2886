"""Any supported ViT as a model of TransformerLens: `hooked` gives an object that its own tools work on.

Hook points carry TransformerLens's names and are passed on the native forward, so an edit at any of them
means what its name says, and nothing of the model is rewritten, converted or changed.

Names are those of a decoder, with notes. ``hook_embed`` is the input of block 0, positions included, so that
the pieces of `decompose_resid` add up. Queries and keys are seen as they enter the dot product, which is
``hook_rot_q`` and ``hook_rot_k``, and also ``hook_q`` and ``hook_k`` where they are projected and no more.
``ln*.hook_normalized`` is the native norm's output, weight and bias included, and ``hook_scale`` what it
divides by, which can be read only. Sweeps over positions need an ``index_df``: TransformerLens would take the
width of the images for the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities import Slice

from vit_mechinterp.bridges.readouts import Readout, final_norm, readout_of
from vit_mechinterp.bridges.transformer_lens_cache import ViTCache
from vit_mechinterp.bridges.transformer_lens_parts import (
    BLOCK_HOOKS,
    PER_HEAD,
    PLAIN_HOOKS,
    SCALES,
    AttentionPart,
    NormPart,
    is_rms,
    scale_of,
)
from vit_mechinterp.bridges.weights import AttentionWeights, gaps_of, module_at, output_weights, plain_layers
from vit_mechinterp.engine.binding.checks import refuse_train_mode
from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["TransformerLensViT", "hooked"]


def hooked(vit: HookedViT) -> TransformerLensViT:
    """A model that TransformerLens's tools take; see the module's notes.

    A few forwards of random images show what its head reads, and where queries are projected and no more.

    Raises:
        ExecutionError: the model is in train mode with dropout.
    """
    refuse_train_mode(vit)
    return TransformerLensViT(vit)


class TransformerLensViT(HookedRootModule):  # type: ignore[misc]  # followed, its types would be half there
    """A ViT with TransformerLens's hook points; made by `hooked`.

    Inputs are images ``[batch, 3, height, width]`` wherever TransformerLens says tokens, and classes where it
    says tokens of the vocabulary. Parameters are the native module's.
    """

    def __init__(self, vit: HookedViT) -> None:
        super().__init__()
        self._vit = vit
        self.gaps = gaps_of(vit)
        """Blocks in front of which the model adds something to the stream."""
        layout, sites = vit.layout, vit.sites()
        self.site_of: dict[str, str] = {}
        """Our name of every hook point that has one."""
        self._scale_of: dict[str, tuple[str, nn.Module]] = {}
        self.blocks = nn.ModuleList()
        if "embed" in sites:
            self.hook_embed = HookPoint()
            self.site_of["hook_embed"] = "embed"
        plain = plain_layers(vit)
        for layer in range(layout.n_layers):
            self.blocks.append(self._block(layer, plain=layer in plain))
        self.readout: Readout | str = readout_of(vit)
        final = final_norm(vit, self.readout)
        self.ln_final = NormPart(final, type(vit.module).__name__)
        if "ln_final" in sites:
            self.ln_final.hook_normalized = HookPoint()
            self.site_of["ln_final.hook_normalized"] = "ln_final"
        if final is not None:
            self.ln_final.hook_scale = HookPoint()
            self._scale_of["ln_final.hook_scale"] = (f"blocks.{layout.n_layers - 1}.resid_post", final)
        self.cfg = self._config(final)
        self.setup()
        super().train(False)
        try:
            if "blocks.0.attn.z" in sites:
                output_weights(vit, 0)
        except SpecError:  # what TransformerLens would compute from z is no result here, so results are kept
            self.cfg.use_attn_result = True

    def _block(self, layer: int, *, plain: bool) -> nn.Module:
        block, model = nn.Module(), type(self._vit.module).__name__
        block.attn = AttentionPart(self._vit, layer)
        block.mlp = nn.Module()
        block.ln1, block.ln2 = NormPart(None, model), NormPart(None, model)
        for hook, site in {**(PLAIN_HOOKS if plain else {}), **BLOCK_HOOKS}.items():
            name = f"blocks.{layer}.{site}"
            if name in self._vit.layout.absent:
                continue
            *path, last = hook.split(".")
            setattr(block.get_submodule(".".join(path)), last, HookPoint())
            self.site_of[f"blocks.{layer}.{hook}"] = name
        for hook, site in SCALES.items():
            norm, name = hook.split(".")[0], f"blocks.{layer}.{site}"
            native = module_at(self._vit, f"blocks.{layer}.{norm}")
            if native is not None and name not in self._vit.layout.absent:
                holder: Any = block.get_submodule(norm)
                holder.hook_scale = HookPoint()
                holder._native = [native]
                self._scale_of[f"blocks.{layer}.{hook}"] = (name, native)
        return block

    def _config(self, final: nn.Module | None) -> Any:
        layout, sites = self._vit.layout, self._vit.sites()
        norm = module_at(self._vit, "blocks.0.ln1") or final
        rms = is_rms(norm)
        d_mlp = sites.get("blocks.0.mlp.post")
        keys = sites.get("blocks.0.attn.k")
        n_keys = layout.n_heads if keys is None else keys.shape[1]
        config = TransformerLensConfig(
            d_model=layout.d_model,
            d_head=layout.d_head,
            n_layers=layout.n_layers,
            n_ctx=layout.tokens.n_tokens,
            n_heads=layout.n_heads,
            d_mlp=None if d_mlp is None else d_mlp.shape[-1],
            d_vocab=-1 if isinstance(self.readout, str) else self.readout.head.out_features,
            n_key_value_heads=None if n_keys == layout.n_heads else n_keys,
            gated_mlp="blocks.0.mlp.pre_linear" in sites,
            eps=float(getattr(norm, "eps", 1e-6) or 0),
            uses_rms_norm=rms,
            normalization_type="RMS" if rms else "LN",
            device=str(self._vit.device),
            dtype=self._vit.dtype,
        )
        config.model_name = self._vit.source or type(self._vit.module).__name__
        config.final_rms = is_rms(final)
        return config

    @property
    def original_model(self) -> nn.Module:
        """The native module; it is no submodule, so its parts are not renamed."""
        return self._vit.module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The native module's parameters."""
        return self._vit.module.named_parameters(*args, **kwargs)

    def train(self, mode: bool = True) -> TransformerLensViT:
        """Set the native module's mode too."""
        self._vit.module.train(mode)
        super().train(mode)
        return self

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], return_type: str | None = "logits"
    ) -> Float[Tensor, "batch *output"]:
        """The native output, with every hook point that has hooks passed on the way."""
        if return_type not in ("logits", None):
            raise SpecError(f"return_type={return_type!r}: a ViT gives its output alone ('logits').")
        visitors: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        for name, point in self.hook_dict.items():
            if not (point._forward_hooks or point._backward_hooks or point._backward_pre_hooks):
                continue
            if name in self._scale_of:
                site, norm = self._scale_of[name]
                visitors.setdefault(site, []).append(self._scale(point, name, norm))
            else:
                visitors.setdefault(self.site_of[name], []).insert(0, point)
        with self._vit.hooks({site: _one_after_another(own) for site, own in visitors.items()}):
            return self._vit(images)

    def _scale(self, point: HookPoint, name: str, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        final = self.readout if name.startswith("ln_final") and isinstance(self.readout, Readout) else None

        def show(stream: Tensor) -> Tensor:
            pooled = final is not None and final.behind  # then one scale serves all tokens
            scale = scale_of(norm, final.pooled(stream) if final is not None and pooled else stream)
            scale = scale.expand(*stream.shape[:-1], 1).clone()
            before = scale.clone()
            if not torch.equal(point(scale), before):
                raise SpecError(
                    f"{name} was edited, and it can be read only: the native norm computes its scale itself. "
                    f"Edit the norm's input ({name.replace('scale', 'normalized')} is its output)."
                )
            return stream

        return show

    def _enable_hook_with_name(self, name: str, hook: Callable[..., Any], dir: Any) -> None:
        if name not in self.hook_dict:
            raise SpecError(self.no_hook(name))
        super()._enable_hook_with_name(name, hook, dir)

    def no_hook(self, name: str) -> str:
        """Why there is no hook point of that name."""
        parts = name.split(".")
        if len(parts) > 2 and parts[0] == "blocks" and (site := BLOCK_HOOKS.get(".".join(parts[2:]))):
            reason = self._vit.layout.absent.get(f"blocks.{parts[1]}.{site}")
            if reason:
                return f"There is no hook point {name!r}: {reason}."
        if parts[-1] in ("hook_q", "hook_k"):
            rotated = ".".join([*parts[:-1], parts[-1].replace("hook_", "hook_rot_")])
            return f"There is no hook point {name!r}: write {rotated}, what enters the dot product."
        return f"There is no hook point {name!r}.{suggest(name, self.hook_dict)}"

    def run_with_cache(self, *args: Any, return_cache_object: bool = True, **kwargs: Any) -> Any:
        """Output and a TransformerLens `ActivationCache` (or a dict), as its own models give them.

        Per-head results are left out unless they are asked for by name or ``cfg.use_attn_result`` is set;
        `stack_head_results` computes them.
        """
        if kwargs.get("names_filter") is None and not self.cfg.use_attn_result:
            kwargs["names_filter"] = lambda name: not name.endswith("hook_result")
        tokens = Slice.unwrap(kwargs.pop("pos_slice", None))
        output, cache = super().run_with_cache(*args, **kwargs)
        for name, value in cache.items():  # here, since TransformerLens takes hook_rot_q's heads for tokens
            cache[name] = tokens.apply(value, dim=-3 if name.endswith(PER_HEAD) else -2)
        if not return_cache_object:
            return output, cache
        return output, ViTCache(cache, self, has_batch_dim=not kwargs.get("remove_batch_dim", False))

    def __getattr__(self, name: str) -> Any:
        if name in AttentionWeights.__dataclass_fields__:
            return torch.stack([getattr(block.attn, name) for block in self.blocks])
        return super().__getattr__(name)

    @property
    def W_U(self) -> Tensor:
        """The head's weight ``[d_model, class]`` (``[2 * d_model, class]`` where it reads two things)."""
        return self.linear_readout().head.weight.T

    @property
    def b_U(self) -> Tensor:
        """The head's bias ``[class]``."""
        head = self.linear_readout().head
        return torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*classes d_model"]:
        """What a unit of the stream, centred and divided by the last norm's scale, adds to a class's logit:
        the head's row times the norm's weight, at the token, or at each of the tokens, that the head reads.

        Raises:
            SpecError: the head is not linear behind a norm of one token or of tokens' mean, or tokens have
                different directions.
        """
        readout = self.linear_readout()
        if len(readout.shares) > 1:
            raise SpecError(
                "The head reads the first token and the patches' mean side by side, so a class has a "
                "direction for each: linear_readout().directions(classes) has them by token, and "
                "logit_attrs uses them."
            )
        classes = torch.as_tensor(tokens, device=readout.head.weight.device)
        return readout.directions(classes)[..., int(readout.shares[0].argmax()), :]

    def linear_readout(self) -> Readout:
        """The head and what it reads.

        Raises:
            SpecError: it is not linear behind a norm of one token or of tokens' mean.
        """
        if isinstance(self.readout, str):
            raise SpecError(
                f"Classes have no directions here: {self.readout}. Attribute with gradients or by patching "
                "instead."
            )
        return self.readout

    def to_single_token(self, token: Any) -> int:
        """A class by its number."""
        if isinstance(token, str):
            raise SpecError(f"{token!r}: a ViT's classes are numbers.")
        return int(token)

    def to_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
        """A ViT has no text."""
        raise SpecError("A ViT takes images, not text: pass vit.preprocess(images).")


def _one_after_another(visitors: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def visit(value: Tensor) -> Tensor:
        for visitor in visitors:
            value = visitor(value)
        return value

    return visit

