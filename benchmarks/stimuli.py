"""How fast are stimuli made? Images a second on one core: pixels, normalised tensors, and an encoded dataset.

    python benchmarks/stimuli.py [--images 2048]

Before anything is timed, the three ways are checked to give the same images.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from vit_mechinterp.stimuli import DiscriminationGenerator, discrimination
from vit_mechinterp.stimuli.chunks import CHUNK

SIZES = ((128, 16, 32), (224, 16, 32), (224, 14, 28))


def rate(make: Callable[[], object], images: int) -> float:
    """Images a second, the best of three."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        make()
        seconds.append(time.perf_counter() - began)
    return images / min(seconds)


def check(canvas: int, patch: int, cell: int) -> None:
    """Tensors, pixels and the dataset show the same images."""
    batch = DiscriminationGenerator("val", canvas=canvas, patch=patch, cell=cell).batch(0, 16)
    dataset = discrimination("val", 16, canvas=canvas, patch=patch, cell=cell)
    decoded = np.stack([np.asarray(image).transpose(2, 0, 1) for image in dataset["base"]])
    assert np.array_equal(decoded, batch.pixels)
    assert torch.equal(batch.images(), (torch.from_numpy(decoded) / 255 - 0.5) / 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048, help="images of each measurement")
    images = parser.parse_args().images // CHUNK * CHUNK
    few = images // 8
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, numpy {np.__version__}")
    print(f"{images} images, batches of {CHUNK}, one thread; images a second, best of three")
    print(f"{'canvas/patch/cell':>18} {'pixels':>9} {'tensors':>9} {'dataset':>9}")
    for canvas, patch, cell in SIZES:
        check(canvas, patch, cell)
        generator = DiscriminationGenerator("train", canvas=canvas, patch=patch, cell=cell)
        pixels = rate(lambda g=generator: [b.pixels.shape for b in g.batches(images, CHUNK)], images)
        tensors = rate(lambda g=generator: [b.images().shape for b in g.batches(images, CHUNK)], images)
        encoded = rate(
            lambda s=(canvas, patch, cell): discrimination("train", few, canvas=s[0], patch=s[1], cell=s[2]),
            few,
        )
        print(f"{f'{canvas}/{patch}/{cell}':>18} {pixels:>9.0f} {tensors:>9.0f} {encoded:>9.0f}")


if __name__ == "__main__":
    main()
