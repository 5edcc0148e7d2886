"""Makes ``vit_mechinterp/catalogue.json`` and ``docs/supported_models.md`` from the live models.

``python -m tests.zoo.catalogue`` writes both: the facts (family, layout, sites) from every architecture in its full
size, made without memory, and the measurements from the conformance checks on the tiny ones of the tests.
``--facts`` measures nothing, ``--missing`` adds the models and measurements that the catalogue lacks, and ``--only TEXT``
measures the models whose name contains a text. What is not measured keeps the measurements that it has.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import open_clip
import timm
import torch
from open_clip.factory import get_model_config
from open_clip.model import _build_vision_tower
from torch import nn
from torchvision import models
from tqdm.auto import tqdm

import vit_mechinterp as vmi
from tests.zoo import test_open_clip, test_torchvision
from tests.zoo.shrink import module_of, names
from tests.zoo.supported import DOCUMENT, rendered
from tests.zoo.test_timm import tiny
from tests.zoo.transformers_models import BUILDERS
from tests.zoo.transformers_models import build as build_transformers
from vit_mechinterp.catalogue import FILE, Catalogue, Entry, Row, read, summarised
from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model import Report, families
from vit_mechinterp.model.conformance import check
from vit_mechinterp.model.layout import lookup

LIBRARIES = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision", "open_clip": "open_clip_torch"}


@dataclass(frozen=True)
class Subject:
    """One model: how to make it in the size that its library gives it, and tiny.

    ``full`` is made without memory, and is None where the default configuration is another model's. ``small``
    is None where the parts that matter are another library's, whose own models are measured.
    """

    library: str
    name: str
    full: Callable[[], nn.Module] | None
    small: Callable[[], nn.Module] | None
    module: str = ""


def subjects() -> Iterator[Subject]:
    """Every model that the tests cover."""
    for name in names():
        yield Subject("timm", name, _timm(name), lambda name=name: tiny(name).module, module_of(name))
    for name in sorted(BUILDERS):
        yield Subject("hf", name, _transformers(name), lambda name=name: build_transformers(name))
    for name in test_torchvision.BUILDERS:
        full = lambda name=name: models.get_model(name, weights=None)  # noqa: E731
        yield Subject("torchvision", name, full, lambda name=name: test_torchvision.tiny(name))
    for name in open_clip.list_models():
        config = get_model_config(name)
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        trunk = vision.get("timm_model_name", "")
        if trunk in names() or name in test_open_clip.OWN:
            yield Subject("open_clip", name, _open_clip(config["embed_dim"], vision), _tower(name))


def _open_clip(width: int, vision: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: _build_vision_tower(width, vision)


def _tower(name: str) -> Callable[[], nn.Module] | None:
    options = test_open_clip.OWN.get(name)
    return None if options is None else lambda: test_open_clip.tower(**dict(test_open_clip.kinds(options)))


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False)


def _transformers(name: str) -> Callable[[], nn.Module] | None:
    # A variant is a choice of the configuration, and these cannot be made from a default one.
    if " " in name or name.startswith(("TimmWrapper", "ViTMAE")):
        return None

    def make() -> nn.Module:
        module = BUILDERS[name]()
        return type(module)(type(module.config)())

    return make


def weightless(subject: Subject) -> vmi.HookedViT:
    """The wrapped model in its full size, without memory; else the tiny one."""
    if subject.full is None:
        assert subject.small is not None
        return vmi.wrap(subject.small())
    with torch.device("meta"):
        module = subject.full()
    return vmi.wrap(module.eval())


def facts(subject: Subject) -> Entry:
    """What is true of a model on every machine."""
    vit = weightless(subject)
    layout, module = vit.layout, vit.module
    family = layout.family.name
    return Entry(
        library=subject.library,
        name=subject.name,
        row=family,
        model=type(module).__name__,
        block=type(lookup(module, layout.block_path(0))).__name__,
        layout="" if subject.full is None else str(layout).removeprefix(f"{family}: "),
        missing=summarised(layout.absent, layout.n_layers),
        module=subject.module or type(module).__module__.split(".")[-2 if subject.library == "hf" else -1],
        checkpoint=_checkpoint(module) if subject.library == "hf" else "",
    )


def _checkpoint(module: nn.Module) -> str:
    """The checkpoint that transformers names for a configuration, of the model or of what holds it."""
    source = inspect.getsource(inspect.getmodule(type(module.config)))
    found = re.search(r'checkpoint="([^"]+)"', source)
    return found[1] if found else ""


def measured(report: Report) -> dict[str, float]:
    """The largest differences that a report found, to one digit."""
    groups = {
        "native": [row for row in report.rows if row.check == "native output"],
        "explicit": [
            row for row in report.rows if row.check == "write back" and row.site.endswith(("scores", "pattern"))
        ],
        "growth": [row for row in report.rows if row.check == "growth and skip"],
    }
    return {
        name: float(f"{max(found):.0e}")
        for name, rows in groups.items()
        if (found := [row.deviation for row in rows if row.deviation is not None])
    }


def rows(entries: list[Entry]) -> list[Row]:
    """The families that the entries belong to; they grow and skip where the checks of that were passed."""
    used = {entry.row for entry in entries}
    shown = {entry.row for entry in entries if "growth" in entry.measured}
    found = []
    for family in families():
        if family.name not in used:
            continue
        growth = skip = "yes" if family.name in shown else "not measured"
        if family.one_image is not None:
            growth = f"one image a forward: {family.one_image}"
        elif family.counts_rows and family.name in shown:
            growth = "yes, behind as many blank images as rows in the end"
        if family.name.startswith("open_clip.timm"):
            growth = skip = "as the family of timm inside"
        found.append(Row(family.name, growth, skip))
    return found


def versions() -> dict[str, str]:
    """The versions of the libraries."""
    return {library: metadata.version(name) for library, name in {**LIBRARIES, "torch": "torch"}.items()}


def measure(subject: Subject) -> dict[str, float]:
    """What the conformance checks find on the tiny model.

    Raises:
        UnsupportedModelError: it does not conform.
    """
    assert subject.small is not None
    report = check(vmi.wrap(subject.small()), progress=False)
    if not report.passed:
        raise UnsupportedModelError(f"{subject.library}/{subject.name} does not conform:\n{report}")
    return measured(report)


def write(entries: list[Entry], numbers: Mapping[tuple[str, str], Mapping[str, float]]) -> None:
    """Write the catalogue and the document."""
    filled = tuple(replace(entry, measured=numbers.get((entry.library, entry.name), {})) for entry in entries)
    made = Catalogue(versions(), tuple(rows(list(filled))), filled)
    made.write()
    DOCUMENT.write_text(rendered(made), encoding="utf-8")


def _shown(what: str, models: Iterable[Subject]) -> Iterable[Subject]:
    return tqdm(list(models), desc=what, mininterval=30)


def main() -> int:
    """Write both files; what was measured until then is kept when a model does not conform."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", action="store_true", help="measure nothing")
    parser.add_argument("--missing", action="store_true", help="add the models that it lacks, and what was not measured")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure names that contain a text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # models this small only lose by threads that wait for each other
    old = list(read().entries) if FILE.exists() else []
    numbers = {(entry.library, entry.name): entry.measured for entry in old}
    kept = {(entry.library, entry.name): entry for entry in old} if arguments.missing else {}
    entries = [kept.get((one.library, one.name)) or facts(one) for one in _shown("facts", subjects())]
    write(entries, numbers)
    chosen = [one for one in subjects() if one.small and arguments.only in f"{one.library}/{one.name}"]
    if arguments.missing:
        chosen = [one for one in chosen if not numbers.get((one.library, one.name))]
    code = 0
    for count, subject in enumerate(_shown("checks", [] if arguments.facts else chosen)):
        try:
            numbers[subject.library, subject.name] = measure(subject)
        except UnsupportedModelError as error:
            numbers.pop((subject.library, subject.name), None)
            sys.stderr.write(f"{error}\n")
            code = 1
        if count % 30 == 0:
            write(entries, numbers)
    write(entries, numbers)
    return code


if __name__ == "__main__":
    sys.exit(main())
