"""From one string to a `HookedViT`: timm and HuggingFace names, local folders, shipped checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from vit_mechinterp.catalogue import catalogue
from vit_mechinterp.errors import (
    SpecError,
    TensorFileError,
    UnsupportedModelError,
    VitMechInterpError,
    suggest,
)
from vit_mechinterp.model import from_open_clip, from_timm, from_torchvision, from_transformers
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.origins import absolute, is_folder, library_of
from vit_mechinterp.model.registry import wrap

__all__ = ["checkpoints", "load"]

BUILDERS: Mapping[str, Callable[[str, bool, bool, Mapping[str, Any]], nn.Module]] = {
    "timm": from_timm.build,
    "hf": from_transformers.build,
    "torchvision": from_torchvision.build,
    "open_clip": from_open_clip.build,
}
"""By the word before a model string's first slash: makes a module from the rest of the string, whether to
load weights, whether pickles may be read, and options for the library."""

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def load(
    name: str,
    *,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    check: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> HookedViT:
    """Load a ViT by one string, in eval mode.

    Args:
        name: ``"timm/NAME"``; ``"hf/ORG/NAME"``; a folder in either library's format (``"hf/./my-vit"``
            written by ``save_pretrained``, ``"timm/./my-vit"`` with ``config.json`` and
            ``model.safetensors``, or ``"./my-vit"`` for whichever it is); ``"torchvision/vit_b_16"``;
            ``"open_clip/ViT-B-32/TAG"``, ``"open_clip/hf-hub:ORG/NAME"`` or ``"open_clip/./FOLDER"`` for a
            vision tower; or ``"vmi/NAME"`` for a checkpoint that ships with this package.
        pretrained: whether to load weights; without them the architecture is initialised at random.
        image_size: see `wrap`; where a model takes images of any size, what its own preprocessing makes is
            the default.
        check: run the fast conformance checks as well (``vit-mechinterp check`` runs all of them).
        allow_pickle: read weights that exist in no other format than pickles, which can run code when they
            are read. Without it they are refused, and safetensors alone are read.
        options: passed on to ``timm.create_model``, torchvision's builder or ``open_clip.create_model``
            (all with ``checkpoint_path="weights.safetensors"``), or ``from_pretrained`` (``revision="..."``).

    Raises:
        SpecError: the string has another form, names nothing that can be loaded, or weights in pickles.
        TensorFileError: the weights are truncated or damaged.
        UnsupportedModelError: no family describes the model.
    """
    name = library_of(name) if isinstance(name, str) else name
    library, _, rest = name.partition("/") if isinstance(name, str) else ("", "", "")
    if not rest or library not in (*BUILDERS, "vmi"):
        forms = " or ".join(f"'{known}/./FOLDER'" for known in ("hf", "timm"))
        here = isinstance(name, str) and name and Path(name).is_dir()
        near = f" There is a folder of that name: write './{name}'." if here else catalogue().near(str(name))
        raise SpecError(
            f"{name!r} is no model string.{near} Write 'timm/NAME', 'hf/ORG/NAME', a "
            f"folder as {forms}, or 'vmi/NAME' with one of "
            f"{', '.join(checkpoints()) or 'no shipped checkpoints'}."
        )
    if library == "vmi":
        if rest not in checkpoints():
            raise SpecError(
                f"This package ships no checkpoint {rest!r}.{suggest(rest, checkpoints())} "
                f"It ships: {', '.join(checkpoints())}."
            )
        library, rest = "timm", str(CHECKPOINTS / rest)
    if options.get("trust_remote_code"):
        raise SpecError(
            f"{name!r}: code from a model repository is never run (trust_remote_code). Load the module "
            "yourself, and wrap it."
        )
    if library == "torchvision" and isinstance(image_size, int):
        options["image_size"] = image_size  # a model is made for one size
    _, _, rest = absolute(f"{library}/{rest}").partition("/")
    try:
        module = BUILDERS[library](rest, pretrained, allow_pickle, options).eval()
    except UnsupportedModelError as error:
        # Of a folder the name says nothing.
        near = "" if is_folder(rest) else catalogue().near(rest)
        raise UnsupportedModelError(f"{error}{near and f' Of the supported models:{near}'}") from None
    except VitMechInterpError:
        raise
    except TypeError as error:
        if not options:
            raise
        raise SpecError(
            f"{name!r}: {library} does not take one of the options {', '.join(map(repr, options))} ({error})."
        ) from error
    except SafetensorError as error:
        raise TensorFileError(
            f"{name!r}: its weights are no readable safetensors file (truncated or damaged?): {error}."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        # Missing files, names unknown to the hub, no way to reach it, unknown tags, weights that do not fit.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SpecError(
            f"{name!r} could not be loaded: {reason}.{catalogue().near(name)} Check the name, or give a "
            "local folder as 'hf/./FOLDER' or 'timm/./FOLDER'; pretrained=False needs no weights."
        ) from error
    vit = wrap(module, image_size=image_size, source=name)
    if image_size is None and pretrained and vit.layout.family.any_size(module):
        made = vit.preprocess.geometry
        if made.unknown is None:
            width, height = made.input_size(vit.layout.tokens.image_size[::-1])
            vit = wrap(vit, image_size=(height, width))
    return wrap(vit, check=check)


def checkpoints() -> list[str]:
    """Names of the checkpoints that ship with this package."""
    return sorted(file.parent.name for file in CHECKPOINTS.glob("[!.]*/config.json"))
