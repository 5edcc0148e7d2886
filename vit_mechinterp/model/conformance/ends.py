"""Checks of what is behind the blocks: whether the last of them is the last, and what its readout is called.

A row that lists the first of two stages of blocks, takes another norm for the last one, or calls the logits
pooled runs, and its blocks pass every check of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.model.conformance.report import Record
from vit_mechinterp.model.conformance.subject import Subject
from vit_mechinterp.model.layout import Port, lookup

__all__ = ["ends_of_the_stream"]

POOLED = ("pooled", "pooler_output")
"""What an output is called where it is the site ``pooled``."""


def ends_of_the_stream(subject: Subject, record: Record) -> None:
    """The blocks listed are all of them, the last norm reads the last one, and the output has its name."""
    last = f"blocks.{subject.layout.n_layers - 1}.resid_post"
    calls = _calls(subject)
    _no_other_blocks(subject, record, calls)
    if last in subject.sites:
        stream = subject.values[last]
        _nothing_goes_on(subject, record, calls, last, stream)
        _norm_reads_the_stream(subject, record, calls, last, stream)
    _output_has_its_name(subject, record)


class _Call:
    """What one module was given and gave, as far as these are tensors."""

    def __init__(self, given: object, made: object) -> None:
        self.given = given if isinstance(given, Tensor) else None
        made = made[0] if isinstance(made, tuple) and made else made
        self.made = made if isinstance(made, Tensor) else None


def _calls(subject: Subject) -> dict[str, list[_Call]]:
    """Calls of the modules outside the listed blocks in one forward, and of a block's norm that is declared
    to be the last one."""
    layout = subject.layout
    port = layout.ports.get("ln_final")
    own = port.path if isinstance(port, Port) else ""
    inside = f"{layout.blocks_path}."
    watched = {
        path: module
        for path, module in subject.vit.module.named_modules()
        if path and (path == own or not path.startswith(inside)) and not inside.startswith(f"{path}.")
    }
    found: dict[str, list[_Call]] = {}
    with _watching(watched, found):
        subject.vit(subject.images)
    return found


@contextmanager
def _watching(modules: dict[str, nn.Module], found: dict[str, list[_Call]]) -> Iterator[None]:
    def noting(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            found.setdefault(path, []).append(_Call(given, output))

        return note

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_hook(noting(path), with_kwargs=True).remove)
        yield


def _no_other_blocks(subject: Subject, record: Record, calls: dict[str, list[_Call]]) -> None:
    layout, module = subject.layout, subject.vit.module
    listed = [lookup(module, layout.block_path(layer)) for layer in range(layout.n_layers)]
    kinds = {type(block) for block in listed}
    others = [path for path in calls if type(lookup(module, path)) in kinds]
    shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
    text = (
        f"{len(others)} more {type(lookup(module, others[0])).__name__} run outside {layout.blocks_path}: "
        f"{shown}; the {layout.n_layers} listed blocks are not all, so the last resid_post is not the last "
        "residual stream, or the first resid_pre not the first"
        if others
        else ""
    )
    record.add(not others, "" if not others else f"blocks.{layout.n_layers - 1}.resid_post", text)


def _nothing_goes_on(
    subject: Subject, record: Record, calls: dict[str, list[_Call]], last: str, stream: Tensor
) -> None:
    """No module that is larger than a norm turns the last stream into another of the same shape."""
    ports = [port.path for port in subject.layout.readout.ports.values() if isinstance(port, Port)]
    for path, found in calls.items():
        if any(f"{port}.".startswith(f"{path}.") or f"{path}.".startswith(f"{port}.") for port in ports):
            continue
        matrices = [p for p in lookup(subject.vit.module, path).parameters() if p.ndim > 1]
        if len(matrices) < 2:
            continue
        for call in found:
            given, made = call.given, call.made
            if given is None or made is None or given.shape != made.shape:
                continue
            if given.shape[-1] == stream.shape[-1] and _same_values(given, stream):
                name = type(lookup(subject.vit.module, path)).__name__
                text = f"{path} ({name}) goes on with it: is it one more block, or a stage of blocks?"
                record.add(False, last, text)
                return
    record.add(True, last)


def _norm_reads_the_stream(
    subject: Subject, record: Record, calls: dict[str, list[_Call]], last: str, stream: Tensor
) -> None:
    port = subject.layout.ports.get("ln_final")
    if "ln_final" not in subject.sites or not isinstance(port, Port):
        return
    final = subject.values["ln_final"]
    same = final.shape == stream.shape and torch.equal(final, stream)
    text = f"it shows the values of {last}; if nothing is between them, declare it absent"
    record.add(not same, "ln_final", text if same else "")
    given = [call.given for call in calls.get(port.path, ()) if call.given is not None]
    if port.side == "output" and given:
        reads = any(_same_values(one, stream) for one in given)
        text = f"{port.path} reads something else than {last}: it is not the last norm, or more blocks follow"
        record.add(reads, "ln_final", "" if reads else text)


def _same_values(found: Tensor, stream: Tensor) -> bool:
    """Whether two tensors hold the same numbers; tokens may be laid out otherwise (packed, in windows)."""
    if found.numel() != stream.numel():
        return False
    if found.shape == stream.shape and torch.equal(found, stream):
        return True
    return torch.equal(found.flatten().sort().values, stream.flatten().sort().values)


def _output_has_its_name(subject: Subject, record: Record) -> None:
    """The site that the output is said to be has its values, and no other site has them."""
    output = subject.layout.output
    for site, names in (("logits", ("logits",)), ("pooled", POOLED)):
        if site not in subject.sites:
            continue
        value = subject.values[site]
        same = value.shape == subject.native.shape and torch.equal(value, subject.native)
        text = ""
        if output in names and not same:
            text = f"vit(x) gives {output}, and these are others"
            text += f": {_sizes(value)}, where vit(x) is {_sizes(subject.native)}"
        elif output not in names and site == "pooled" and same:
            text = f"it shows what vit(x) gives, which the row calls {output}"
        record.add(not text, site, text)


def _sizes(value: Tensor) -> str:
    return "x".join(map(str, value.shape))
