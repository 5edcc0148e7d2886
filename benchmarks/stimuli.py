"""How fast are stimuli made? Images a second on one core: pixels, normalised tensors, and an encoded dataset.

    python -m benchmarks.stimuli --examples 2048

Before anything is timed, the three ways are checked to give the same images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks import options
from benchmarks.measure import Spread, seconds
from benchmarks.report import Report, Row
from vit_mechinterp.stimuli import DiscriminationGenerator, discrimination
from vit_mechinterp.stimuli.chunks import CHUNK

PRESETS = {
    "full": {"examples": 2048, "repeats": 5},
    "small": {"examples": 512, "repeats": 3},
    "micro": {"examples": CHUNK, "repeats": 1},
}
SIZES = ((128, 16, 32), (224, 16, 32), (224, 14, 28))
"""Canvas, patch and cell."""

ENCODED = 8
"""An encoded dataset has so many times fewer images: each is compressed."""


def check(canvas: int, patch: int, cell: int) -> None:
    """Tensors, pixels and the dataset show the same images."""
    batch = DiscriminationGenerator("val", canvas=canvas, patch=patch, cell=cell).batch(0, 16)
    dataset = discrimination("val", 16, canvas=canvas, patch=patch, cell=cell)
    decoded = np.stack([np.asarray(image).transpose(2, 0, 1) for image in dataset["base"]])
    assert np.array_equal(decoded, batch.pixels), f"{canvas}/{patch}/{cell}: pixels differ from the dataset's"
    assert torch.equal(batch.images(), (torch.from_numpy(decoded) / 255 - 0.5) / 0.5), (
        f"{canvas}/{patch}/{cell}: tensors differ from the dataset's images"
    )


def ways(images: int, canvas: int, patch: int, cell: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Number of images and how they are made, by what is made."""
    generator = DiscriminationGenerator("train", canvas=canvas, patch=patch, cell=cell)
    few = images // ENCODED
    return {
        "pixels": (images, lambda: [batch.pixels.shape for batch in generator.batches(images, CHUNK)]),
        "tensors": (images, lambda: [batch.images().shape for batch in generator.batches(images, CHUNK)]),
        "a dataset": (few, lambda: discrimination("train", few, canvas=canvas, patch=patch, cell=cell)),
    }


def main(argv: list[str] | None = None) -> Report:
    """Measure all sizes."""
    parser = options.add(__doc__ or "")
    chosen = options.parse(parser, PRESETS, argv)
    if chosen.model is not None or chosen.torch_device.type != "cpu" or chosen.threads not in (None, 1):
        parser.error(
            "Stimuli are drawn on one core, without a model. Leave out --model, --device and --threads."
        )
    if chosen.examples % CHUNK or chosen.examples < CHUNK:
        parser.error(f"--examples must be a multiple of {CHUNK}, the size of a batch, not {chosen.examples}.")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = Report("stimuli", "Stimuli", chosen)
        for size in SIZES:
            check(*size)
            for name, (images, make) in ways(chosen.examples, *size).items():
                taken = [seconds(make, chosen.torch_device) for _ in range(chosen.repeats)]
                rate = Spread.of([images / t for t in taken])
                label = "canvas {}, patch {}, cell {}: {}".format(*size, name)
                report.rows.append(Row(label, rate, "images/s", seconds=Spread.of(taken).median))
        report.note(
            f"One thread, batches of {CHUNK}; a dataset has {chosen.examples // ENCODED} images, encoded as "
            "PNG. The three ways were compared first, on 16 images of each size, and gave the same."
        )
        report.finish()
    finally:
        torch.set_num_threads(before)
    return report


if __name__ == "__main__":
    main()
