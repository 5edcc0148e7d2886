"""The main job: a causal analysis of the shipped model, from images to a page of pictures."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.page import Example, Page

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from vit_mechinterp.model.hooked import HookedViT

__all__ = ["FULL", "Report", "Sizes", "analyse", "main_job"]

MODEL, PLAIN = "vmi/discrimination-disentangled", "vmi/discrimination-plain"
COMPOSED = Path(__file__).parent.parent / "examples" / "composed.yaml"
TASK: Final[dict[str, Any]] = {"split": "test_iid", "canvas": 128}
ATTRIBUTES = ("shape", "color")
KINDS = {
    "none": "same",
    "both": "shape and colour differ",
    "shape": "shape differs",
    "color": "colour differs",
}


@dataclass(frozen=True)
class Sizes:
    """How many images the analyses see, and for how many epochs the alignment search trains (None: as it
    suits small models)."""

    behaviour: int = 1024
    attention: int = 256
    sweep: int = 384
    das_train: int = 512
    das_test: int = 256
    das_epochs: int | None = None


FULL = Sizes()


@dataclass(frozen=True)
class Report:
    """What the main job leaves: the page, the results in reading order, and their summaries as one table."""

    page: Path
    results: tuple[CircuitResult, ...]
    summary: pd.DataFrame

    def __str__(self) -> str:
        lines = []
        width = max(map(len, self.summary["quantity"]), default=0)
        for analysis, rows in self.summary.groupby("analysis", sort=False):
            lines.append(str(analysis))
            for name, value in zip(rows["quantity"], rows["value"], strict=True):
                lines.append(f"  {name:{width}}  {_shown(value):>14}")
        return "\n".join([*lines, "", f"The page: {self.page}"])


def main_job(out: str | Path, progress: bool = True) -> Path:
    """Run the whole analysis of the shipped model and return the path of the HTML page.

    The folder gets ``index.html``, ``summary.csv``, ``overview.png``, and a folder per analysis with its
    table (parquet and CSV), figures (PDF and PNG) and provenance (JSON).

    Args:
        out: a folder; made if need be.
        progress: show progress bars.
    """
    return analyse(out, progress=progress).page


def analyse(out: str | Path, *, progress: bool = True, sizes: Sizes = FULL) -> Report:
    """Run the main job and return its page with all its results; see `main_job`."""
    with _one_thread():
        return _analyse(Path(out), progress, sizes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give torch one thread: in so small a model, several wait for each other longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _analyse(out: Path, progress: bool, sizes: Sizes) -> Report:
    step = _steps(7, progress)
    step("loading the models")
    from tqdm.auto import tqdm

    from vit_mechinterp.model import load
    from vit_mechinterp.stimuli import discrimination

    models = {"disentangled": load(MODEL), "plain": load(PLAIN)}
    vit = models["disentangled"]
    images = discrimination(n=sizes.behaviour, **TASK, progress=progress)

    step("composed run")
    from vit_mechinterp.report.composed import composed_run

    composed = composed_run(COMPOSED, vit=vit, out=out / "composed", progress=progress)
    step("behaviour")
    results = [_behaviour(models, images, progress)]
    step("attention stages")
    results += _stages(models, images.select(range(min(sizes.attention, len(images)))), progress)
    step("interchange sweep")
    results.append(_sweep(vit, sizes, progress))
    step("distributed alignment search")
    results.append(_alignment(vit, sizes, progress))
    step("figures and page")
    for result in tqdm(results, desc="figures", delay=2.0, disable=not progress):
        result.save(out / result.name)
    page = Page(
        title="How a vision transformer compares two objects",
        introduction=_INTRODUCTION,
        facts=_facts(vit, results),
        examples=_examples(images),
        examples_note=_STIMULI,
        composed=composed,
        sections=results,
    )
    path = page.write(out / "index.html")
    _picture(page.examples, results).save(out / "overview.png", optimize=True)
    summary = _summary(results)
    summary.to_csv(out / "summary.csv", index=False)
    return Report(path, tuple(results), summary)


def _steps(count: int, progress: bool) -> Callable[[str], None]:
    """Return a function that announces the next step above the bars of what it runs."""
    from tqdm.auto import tqdm

    number = itertools.count(1)

    def step(name: str) -> None:
        if progress:
            tqdm.write(f"{next(number)}/{count} {name}", file=sys.stderr)

    return step


def _behaviour(models: dict[str, HookedViT], images: Any, progress: bool) -> CircuitResult:
    from vit_mechinterp.circuits.behaviour import behaviour

    return behaviour(models, images, kinds="different_kind", kind_names=KINDS, progress=progress)


def _stages(models: dict[str, HookedViT], images: Any, progress: bool) -> list[CircuitResult]:
    from vit_mechinterp.circuits.attention_stages import attention_stages

    trained, plain = (attention_stages(vit, images, progress=progress) for vit in models.values())
    plain = replace(
        plain,
        name="attention_stages_plain",
        title="Attention stages, plain model",
        description=(
            "The same measurement on the model that was trained without the auxiliary loss."
            + "\n\n"
            + plain.description.split("\n\n")[-1]
        ),
    )
    return [trained, plain]


def _sweep(vit: HookedViT, sizes: Sizes, progress: bool) -> CircuitResult:
    from vit_mechinterp.circuits.interchange_sweep import interchange_sweep
    from vit_mechinterp.stimuli import object_exchanges

    pairs = object_exchanges(n=sizes.sweep, **TASK, progress=progress)
    result = interchange_sweep(vit, pairs, progress=progress)
    about = (
        "Base and source images differ in one object (the edited one) and share everything else, so the "
        "counterfactual answer is the source image's own, and exchanging the other object should change "
        "nothing."
    )
    return replace(result, description=result.description.replace("\n\n", f"\n\n{about}\n\n", 1))


def _alignment(vit: HookedViT, sizes: Sizes, progress: bool) -> CircuitResult:
    from vit_mechinterp.circuits.das import TINY, das_by_attribute
    from vit_mechinterp.stimuli import counterfactuals

    data = {
        attribute: (
            counterfactuals(attribute, sizes.das_train, **{**TASK, "split": "train"}, progress=progress),
            counterfactuals(attribute, sizes.das_test, **TASK, progress=progress),
        )
        for attribute in ATTRIBUTES
    }
    settings: dict[str, Any] = dict(TINY)
    if sizes.das_epochs is not None:
        settings["epochs"] = sizes.das_epochs
    return das_by_attribute(vit, data, progress=progress, **settings)


def _examples(images: Any, each: int = 3) -> list[Example]:
    """Some images of every kind, with the cells of their objects."""
    examples = []
    kinds = list(images["different_kind"])
    for kind, words in KINDS.items():
        for index in [i for i, own in enumerate(kinds) if own == kind][:each]:
            row = images[index]
            examples.append(Example(row["base"], words, {"object 1": row["box_1"], "object 2": row["box_2"]}))
    return examples


def _picture(examples: Sequence[Example], results: Sequence[CircuitResult]) -> Image:
    """Put what was seen and the three main findings into one picture."""
    from vit_mechinterp.figures import contact_sheet
    from vit_mechinterp.report.overview import overview

    figures = {result.name: result.figures() for result in results}
    shown = [*examples[1::3], *examples[2::3]]
    sheet = contact_sheet(
        [example.image for example in shown],
        boxes=[example.boxes for example in shown],
        captions=[example.caption for example in shown],
    )
    return overview(
        {
            "The task: are the two objects the same?": sheet,
            "Where do the tokens of an object look?": figures["attention_stages"]["stages"],
            "Which tokens carry the decision?": figures["interchange_sweep"]["decision"],
            "Which layers hold shape and colour apart?": figures["das"]["das_by_layer"],
        }
    )


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 100 else str(value)


def _facts(vit: HookedViT, results: list[CircuitResult]) -> dict[str, float | int | str]:
    layout = vit.layout
    return {
        "blocks": layout.n_layers,
        "heads in each": layout.n_heads,
        "width": layout.d_model,
        "parameters": sum(parameter.numel() for parameter in vit.module.parameters()),
        **results[0].summary,
    }


def _summary(results: list[CircuitResult]) -> pd.DataFrame:
    import pandas as pd

    rows = [(result.title, name, value) for result in results for name, value in result.summary.items()]
    return pd.DataFrame(rows, columns=["analysis", "quantity", "value"]).astype({"value": object})


_INTRODUCTION = (
    "A small ViT, trained from scratch, says whether the two objects in an image are the same. How does "
    "it do it? This page asks with interventions: activations are exchanged, moved and cut into subspaces "
    "while the model runs, and its answers are counted.\n\nThe model was trained with an auxiliary loss "
    "that asks its tokens after the second block to hold shape and colour in linear subspaces apart from "
    "each other (the disentangled model). The plain model was trained in the same way without it. The "
    "analyses follow Lepori et al., Beyond the Doors of Perception (2024)."
)
_STIMULI = (
    "Two objects of 16 shapes and 16 colours, with noise as texture, at random places on the patch grid. "
    "The label is same or different; different objects differ in shape, in colour, or in both. Frames "
    "mark the objects' cells of two by two patches. None of the images on this page was used in training."
)
