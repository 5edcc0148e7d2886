"""The checks in their order, each in its turn on one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.model.conformance.ends import ends_of_the_stream
from vit_mechinterp.model.conformance.forwards import (
    capture_only,
    captures_outlive_edits,
    fires_once,
    growth_and_skip,
    interchange_behind_the_blocks,
    interchange_of_images,
    native_output,
    port_or_reason,
    single_row,
    token_layout,
    write_back,
)
from vit_mechinterp.model.conformance.report import Record, Report
from vit_mechinterp.model.conformance.small import at_size, moderate
from vit_mechinterp.model.conformance.snapshot import differences, snapshot
from vit_mechinterp.model.conformance.subject import Subject, deviation
from vit_mechinterp.model.conformance.writes import interchange_with_itself, writes_and_identities
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["CHECKS", "check"]

CHECKS = {
    "a port or a reason": port_or_reason,
    "native output": native_output,
    "fires once, with its shape": fires_once,
    "prefix + grid + suffix": token_layout,
    "ends of the stream": ends_of_the_stream,
    "capture only": capture_only,
    "write back": write_back,
    "captures outlive edits": captures_outlive_edits,
    "interchange with itself": interchange_with_itself,
    "interchange of images": interchange_of_images,
    "writes and identities": writes_and_identities,
    "growth and skip": growth_and_skip,
    "single row": single_row,
}
"""In the order in which they run; the first ones decide which sites the later ones use."""

SLOW = ("interchange with itself", "interchange of images", "growth and skip", "single row")
"""Those that the fast subset leaves out: they find again, from whole forwards, what single blocks show."""
FAST = {name: part for name, part in CHECKS.items() if name not in SLOW} | {
    "interchange of images": interchange_behind_the_blocks
}
"""The fast subset."""


def check(
    vit: HookedViT,
    *,
    subset: Literal["all", "fast"] = "all",
    image_size: tuple[int, int] | None = None,
    n_images: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Run the checks on a model, on random images; the model is left as it was.

    All of them take about as long as a hundred forwards of two images.

    Args:
        vit: the model, on any device, in any floating-point dtype; tolerances follow its precision.
        subset: ``"fast"`` writes into the first, the middle and the last block alone, and joins no rows: what
            ``load(..., check=True)`` asks for.
        image_size: height and width in pixels of the images, for a model that takes several. By default the
            wrapper's own; where these have more than 256 patches, and the model takes smaller ones, those of
            12 x 16 patches or fewer. The report's title names the size.
        n_images: how many random images to use (at least 2; 1 where the model takes one per forward).
        seed: of the images and of what is written.
        progress: show a progress bar.

    Returns:
        All findings. A check that raises is a failed check, and the next one runs.

    Raises:
        SpecError: the model takes no images of ``image_size``.
    """
    record = Record()
    own = vit.layout.tokens.image_size
    vit = moderate(vit) if image_size is None else at_size(vit, image_size)
    dropping = vit.dropout()
    with record.under("eval mode"):
        text = f"{dropping} drops activations at random in train mode; call module.eval()" if dropping else ""
        record.add(dropping is None, detail=text)
    devices = [vit.device] if vit.device.type == "cuda" else []
    if dropping is None:
        with vit.lock, torch.no_grad(), torch.random.fork_rng(devices):
            n_images = 1 if vit.layout.family.one_image else max(n_images, 2)
            _run(vit, subset == "fast", n_images, seed, record, progress)
    title = f"{type(vit.module).__name__}, {vit.layout}" + (" (fast checks)" if subset == "fast" else "")
    if (size := vit.layout.tokens.image_size) != own:
        title += f", checked on images of {size[0]} x {size[1]} (its own are {own[0]} x {own[1]})"
    return Report(title, tuple(record.rows), vit.layout.absent)


def _run(vit: HookedViT, fast: bool, n_images: int, seed: int, record: Record, progress: bool) -> None:
    with record.under("first forward"):
        vit(vit.blank(1))  # transformers installs hooks of its own in a first forward
        before = snapshot(vit.module)
        subject = Subject(vit, n_images, seed)
    if record.rows[-1].check == "first forward":
        return
    parts = FAST if fast else CHECKS
    if fast:
        layers = subject.layers
        subject.layers = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    bar = tqdm(parts.items(), desc="check", unit="check", delay=2, leave=False, disable=not progress)
    for name, part in bar:
        with record.under(name):
            part(subject, record)
    with record.under("module unchanged"):
        _unchanged(subject, record, before)
    if fast:
        return
    with record.under("module unchanged after an exception"):
        _unchanged_after_exceptions(subject, record, before)


def _unchanged(subject: Subject, record: Record, before: Mapping[str, Any], site: str = "") -> None:
    places = differences(before, snapshot(subject.vit.module))
    if places:
        record.add(False, site, f"changed: {', '.join(places[:5])}" + (", ..." if len(places) > 5 else ""))
    else:
        record.near(deviation(subject.vit(subject.images), subject.native), 0, site, "the output")


class _OnPurposeError(Exception):
    pass


def _unchanged_after_exceptions(subject: Subject, record: Record, before: Mapping[str, Any]) -> None:
    """A hook that raises, at every kind of place where something is installed, beside others that do not."""

    def fail(value: Tensor) -> None:
        raise _OnPurposeError

    layer = subject.layout.n_layers // 2
    names = ("resid_pre", "attn.q", "attn.pattern", "attn.result", "resid_mid", "mlp.post")
    wanted = [f"blocks.{layer}.{name}" for name in names]
    beside = [site for site in subject.sites if site.startswith(f"blocks.{layer}.") or "." not in site]
    for name in [site for site in (*wanted, "pooled", "logits") if site in subject.sites]:
        raised = False
        try:
            with subject.vit.hooks({**dict.fromkeys(beside, torch.clone), name: fail}):
                subject.vit(subject.images)
        except _OnPurposeError:
            raised = True
        if raised:
            _unchanged(subject, record, before, name)
        else:
            record.add(False, name, "a hook that raised did not stop the forward")
