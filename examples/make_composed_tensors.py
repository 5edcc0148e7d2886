"""Derive the tensors that composed.yaml names from the shipped model.

    python examples/make_composed_tensors.py

writes ``composed.safetensors`` beside this file:

* ``object_basis [d, 32]``: the 32 principal directions of the objects' tokens at the output of block 1
  (orthonormal columns), after the mean of every token position within an object is taken away;
* ``answer_direction [2, d]``: the direction of a linear probe for same and different on CLS at the output of
  block 4. Row 1 leads from the mean "different" image to the mean "same" one along that direction, row 0
  back.

Both come from images of the training split.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

import vit_mechinterp as vmi
from vit_mechinterp.stimuli import discrimination

MODEL = "vmi/discrimination-disentangled"
IMAGES = 1024
RANK = 32
OBJECT_SITE = "blocks.1.resid_post"
ANSWER_SITE = "blocks.4.resid_post"


def derive() -> dict[str, torch.Tensor]:
    """Run the model on training images and return both tensors."""
    vit = vmi.load(MODEL)
    data = discrimination("train", IMAGES, canvas=vit.layout.tokens.image_size[0])
    runs = [
        vmi.Run(name=f"object_{k}", capture=[vmi.Capture(site=OBJECT_SITE, tokens={"box": f"box_{k}"})])
        for k in (1, 2)
    ]
    runs.append(vmi.Run(name="answer", capture=[vmi.Capture(site=ANSWER_SITE, tokens="cls")]))
    captures = vmi.execute(vit, runs, data).captures
    objects = torch.cat([captures[f"object_{k}"][OBJECT_SITE] for k in (1, 2)])
    labels = torch.tensor([row["label"] for row in data.select_columns(["label"])])
    return {
        "object_basis": principal_directions(objects, RANK),
        "answer_direction": probe_direction(captures["answer"][ANSWER_SITE][:, 0], labels),
    }


def principal_directions(tokens: torch.Tensor, rank: int) -> torch.Tensor:
    """Principal directions ``[d, rank]`` of activations ``[object, token, d]``, centred per token
    position."""
    centred = (tokens - tokens.mean(dim=0)).flatten(0, 1).double()
    # Eigenvectors are orthonormal; their signs are fixed, so that the file is the same every time.
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors[:, -rank:].flip(1)
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    directions: torch.Tensor = (basis * largest.sign()).float().contiguous()
    return directions


def probe_direction(cls: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Direction ``[2, d]`` of a logistic probe on ``[example, d]``, as long as the class means are apart
    along it."""
    # Strong regularisation keeps the probe's direction close to the difference of the class means.
    probe = LogisticRegression(C=1e-3, max_iter=5000).fit(cls.double().numpy(), labels.numpy())
    weight = torch.from_numpy(probe.coef_[0])
    unit = weight / weight.norm()
    along = cls.double() @ unit
    gap = along[labels == 1].mean() - along[labels == 0].mean()
    return torch.stack([-gap * unit, gap * unit]).float()


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(__file__).with_name("composed.safetensors")
    tensors = derive()
    metadata = {"made_by": Path(__file__).name, "model": vmi.load(MODEL).fingerprint()}
    save_file(tensors, path, metadata=metadata)
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    print(f"{path}: {shapes}")
