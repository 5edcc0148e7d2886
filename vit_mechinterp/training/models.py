"""The model of a training: made by its sizes or loaded by its string, with a two-way head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vit_mechinterp.errors import DataError, SpecError, UnsupportedModelError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.loading import load
from vit_mechinterp.model.registry import wrap
from vit_mechinterp.stimuli.render import NORMALIZATION, Normalization
from vit_mechinterp.training.config import ModelConfig, TrainingConfig
from vit_mechinterp.training.heads import LABELS, with_two_way_head

__all__ = ["build_model", "build_vit", "normalization_of", "require_grid", "sizes_of"]


def sizes_of(config: TrainingConfig, model: ModelConfig) -> dict[str, Any]:
    """Arguments of timm for a model that is given by its sizes."""
    sizes = model.model_dump(exclude={"architecture"})
    return {"img_size": config.canvas, "patch_size": config.patch, "num_classes": len(LABELS), **sizes}


def build_model(config: TrainingConfig) -> nn.Module:
    """Build the native module of `build_vit`."""
    return build_vit(config).module


def build_vit(config: TrainingConfig) -> HookedViT:
    """Build the model of a training.

    Weights that are not loaded (all of them, or the head's) are drawn from ``config.seed``; those of
    ``config.initial`` take the place of all. The global random state is left as it was.

    Raises:
        SpecError: the model cannot be loaded, its patches are not those of the stimuli, or
            ``config.initial`` is a model of other sizes.
        UnsupportedModelError: the model cannot be given a two-way head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(config.model, str):
            vit = _on_canvas(config.model, config)
            require_grid(vit, config)
            vit = with_two_way_head(vit)
            if config.fresh_positions:
                vit = _with_fresh_positions(vit, config)
        else:
            vit = wrap(_by_sizes(config, config.model))
            require_grid(vit, config)
    if config.initial is not None:
        weights = load(config.initial).module.state_dict()
        try:
            vit.module.load_state_dict(weights)
        except RuntimeError as error:
            raise SpecError(
                f"initial={config.initial!r} is a model of other sizes than the one to train ({error}). "
                "Give both the same sizes."
            ) from error
    return vit


def _by_sizes(config: TrainingConfig, model: ModelConfig) -> nn.Module:
    """Make a timm model of given sizes with random weights."""
    import timm

    name = model.architecture
    try:
        made: nn.Module = timm.create_model(name, pretrained=False, **sizes_of(config, model))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise SpecError(
            f"model.architecture={name!r}: timm cannot make it with these sizes ({error}). Name an entry "
            "point of timm's VisionTransformer, such as vit_tiny_patch16_224."
        ) from error
    return made


def _on_canvas(name: str, config: TrainingConfig) -> HookedViT:
    """Load a model for images of the canvas's size."""
    options: dict[str, Any] = dict(config.model_options)
    size = (config.canvas, config.canvas)
    vit = load(name, pretrained=config.pretrained, **options)
    if vit.layout.tokens.image_size == size:
        return vit
    if vit.layout.family.any_size(vit.module):
        return wrap(vit, image_size=size)
    match vit.layout.family.library:
        case "timm" if "img_size" not in options:  # positions of pretrained weights are interpolated once
            return load(name, pretrained=config.pretrained, **options, img_size=config.canvas)
        case "torchvision" if not config.pretrained:
            return load(name, pretrained=False, **options, image_size=config.canvas)
    return vit


def _with_fresh_positions(vit: HookedViT, config: TrainingConfig) -> HookedViT:
    """Give the model position embeddings for the canvas's tokens, drawn anew."""
    module: Any = vit.module
    tokens = vit.layout.tokens
    owners = [part for part in module.modules() if hasattr(part, "position_embeddings")]
    table = owners[0].position_embeddings if len(owners) == 1 else None
    if not isinstance(table, nn.Parameter) or not vit.layout.family.any_size(module):
        raise SpecError(
            f"fresh_positions is for models that interpolate a table of position embeddings, as DINOv2 of "
            f"transformers does; {type(module).__name__} does not. Leave it out."
        )
    count = tokens.n_tokens - tokens.prefix.count("registers")
    fresh = torch.empty(1, count, table.shape[-1], dtype=table.dtype)
    std = float(getattr(module.config, "initializer_range", 0.02))
    owners[0].position_embeddings = nn.Parameter(nn.init.trunc_normal_(fresh, std=std))
    module.config.image_size = config.canvas
    return wrap(module, image_size=config.canvas, source=vit.source)


def require_grid(vit: HookedViT, config: TrainingConfig) -> None:
    """Raise SpecError unless the model's patches are those of the stimuli."""
    tokens, side = vit.layout.tokens, config.canvas // config.patch
    name = config.model if isinstance(config.model, str) else config.model.architecture
    wanted = ((config.canvas,) * 2, (config.patch,) * 2, (side, side))
    if (tokens.image_size, tokens.patch_size, tokens.grid) != wanted:
        raise SpecError(
            f"{name} sees images of {' x '.join(map(str, tokens.image_size))} px as {tokens}; the "
            f"stimuli are {config.canvas} px wide with patches of {config.patch} px. Set canvas, patch and "
            "cell so that they fit the model."
        )


def normalization_of(vit: HookedViT) -> Normalization:
    """Return how the model's own preprocessing scales pixels; mean and deviation 0.5 where nothing says."""
    try:
        facts = vit.preprocess.config
    except (DataError, UnsupportedModelError):
        return NORMALIZATION
    if facts.get("do_normalize") is False:
        return Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    mean, std = (facts.get(f"image_{name}", facts.get(name)) for name in ("mean", "std"))
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        return NORMALIZATION
    first, second = ([float(value) for value in values] for values in (mean, std))
    return Normalization((first[0], first[1], first[2]), (second[0], second[1], second[2]))
