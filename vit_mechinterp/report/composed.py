"""A composed run for the page: an experiment's document, its plan, and what it does to a few images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.engine import plan as make_plan
from vit_mechinterp.errors import DataError, SpecError, listed
from vit_mechinterp.experiment import load_data, load_model, run_experiment
from vit_mechinterp.portable import save_portable
from vit_mechinterp.report.page import ComposedRun, Example
from vit_mechinterp.spec import Experiment

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from PIL.Image import Image

    from vit_mechinterp.engine import Results
    from vit_mechinterp.model.hooked import HookedViT

__all__ = ["composed_run"]

_GAP = 8
"""Pixels between the two images of a pair."""


def composed_run(
    path: str | Path,
    *,
    vit: HookedViT | None = None,
    out: str | Path | None = None,
    clean: str = "clean",
    composed: str = "composed",
    progress: bool = True,
) -> ComposedRun:
    """Run an experiment on pairs of images, and show its document, its plan and its effect.

    The effect on an example is the change of (counterfactual label's logit minus label's logit).

    Args:
        path: the experiment's YAML document; its data have ``base``, ``source`` (PIL images), ``label``,
            ``counterfactual_label``, ``edited_box`` and ``source_box``.
        vit: the model, in place of the one that the document names.
        out: a folder for the results, as for `run_experiment`.
        clean: name of the run without an intervention.
        composed: name of the run with all of them.
        progress: show bars if it takes longer than two seconds.

    Raises:
        SpecError, DataError, TensorFileError: the document, its data or its tensors do not fit.
    """
    from vit_mechinterp.figures import examples_by_run

    experiment = Experiment.from_yaml(path)
    if experiment.readout is not None:
        raise SpecError(
            f"{path}: a composed run is shown by the logits of all classes, and the experiment's readout "
            f"keeps {listed(experiment.readout.names)} alone. Leave readout out of the document."
        )
    vit = load_model(experiment) if vit is None else vit
    data = load_data(experiment, progress=progress)
    for column in ("source", "label", "counterfactual_label", "edited_box", "source_box"):
        if column not in data.column_names:
            raise DataError(
                f"{path}: a composed run is shown on pairs of images, and the data lack {column!r}."
            )
    results = run_experiment(path, out, vit=vit, data=data, progress=progress)
    if out is not None:  # the data are the document's own, and stay in it
        save_portable(experiment, Path(out), vit=vit)
    names = data.features["label"].names
    labels = {name: np.array(data[name][:]) for name in ("label", "counterfactual_label")}
    advantage = _advantage(results, labels)
    answers = results.logits.argmax(dim=-1).numpy()
    table = _table(results.run_names, advantage, answers == labels["counterfactual_label"], clean)
    before, after = (answers[results.run_names.index(run)] for run in (clean, composed))
    figure = examples_by_run(
        advantage,
        results.run_names,
        label="logit of the source's answer − the base's",
        ends=("base's answer", "source's answer"),
    )
    return ComposedRun(
        yaml=Path(path).read_text(encoding="utf-8"),
        plan=str(make_plan(vit, experiment, data)),
        table=table,
        description=_DESCRIPTION + "\n\n" + _findings(table, clean, composed),
        examples=[
            _pair(row, f"{names[a]} → {names[b]} {'✓' if b == row['counterfactual_label'] else '✗'}")
            for row, a, b in zip(data, before, after, strict=True)
        ],
        examples_note=(
            "Each pair: the base on the left, the source on the right. Below it the model's answer to the "
            "base, without an intervention → with all three; ✓ where it becomes the source's answer, as "
            "it should."
        ),
        figures={
            f"One dot per image: how far the answer lies on the side of the source (orange) or of the base "
            f"(blue), for each run; bars are means over the {len(data)} images.": figure
        },
    )


def _advantage(results: Results, labels: dict[str, Any]) -> Float[np.ndarray, "run example"]:
    """Return the counterfactual label's logit minus the label's."""
    logits = results.logits.double().numpy()
    examples = np.arange(logits.shape[1])
    advantage: Float[np.ndarray, "run example"] = (
        logits[:, examples, labels["counterfactual_label"]] - logits[:, examples, labels["label"]]
    )
    return advantage


def _table(
    runs: tuple[str, ...], advantage: Float[np.ndarray, "run example"], reached: Any, clean: str
) -> pd.DataFrame:
    import pandas as pd

    means = advantage.mean(axis=1)
    table = {
        "run": list(runs),
        "counterfactual answers": [f"{int(own.sum())} of {len(own)}" for own in reached],
        "mean logit difference": means,
        "change": means - means[runs.index(clean)],
    }
    return pd.DataFrame(table | {f"image {i + 1}": own for i, own in enumerate(advantage.T)})


def _findings(table: pd.DataFrame, clean: str, composed: str) -> str:
    by_run = table.set_index("run")
    alone = by_run.drop(index=[clean, composed])
    parts = ", ".join(f"{name} {change:+.1f}" for name, change in alone["change"].items()).replace("-", "−")
    sign = f"{by_run['change'][composed]:+.1f}".replace("-", "−")
    return (
        f"Mean change of the logit difference, each intervention alone: {parts}; all of them in one forward: "
        f"{sign} (their sum would be {alone['change'].sum():+.1f}). The counterfactual answer is given for "
        f"{by_run['counterfactual answers'][clean]} images without an intervention and for "
        f"{by_run['counterfactual answers'][composed]} with all three."
    )


def _pair(row: dict[str, Any], caption: str) -> Example:
    """Put base and source side by side, with the edited object framed in both."""
    from PIL import Image

    base, source = row["base"], row["source"]
    both: Image.Image = Image.new(
        "RGB", (base.width + _GAP + source.width, max(base.height, source.height)), "#dfe3e8"
    )
    both.paste(base, (0, 0))
    both.paste(source, (base.width + _GAP, 0))
    x0, y0, x1, y1 = row["source_box"]
    shift = base.width + _GAP
    boxes = {"edited object": row["edited_box"], "source object": (x0 + shift, y0, x1 + shift, y1)}
    return Example(both, caption, boxes)


_DESCRIPTION = (
    "A probe's direction, a subspace and an attention head, changed in one forward. The document below is "
    "the whole experiment; the plan says what it will cost before anything runs: clean forwards run once, "
    "and every run starts at the block of its own first intervention."
)
