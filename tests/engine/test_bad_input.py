"""What does not fit is refused before the first forward, with a message that says what, where and what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vit_mechinterp as vmi
from tests.engine.world import World
from tests.tiny_models import HF_CLIP, HF_DINOV2, TIMM_PLAIN, TIMM_POOLED, Tiny
from vit_mechinterp import Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.errors import (
    DataError,
    ExecutionError,
    SpecError,
    TensorFileError,
    UnsupportedModelError,
    UnsupportedSiteError,
    VitMechInterpError,
)
from vit_mechinterp.spec import Intervention, register_op

Document = dict[str, Any]
SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def guarded() -> dict[Tiny, World]:
    """Worlds whose models must not run."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the model ran before the error was raised")

    worlds = {tiny: World(tiny) for tiny in (TIMM_PLAIN, TIMM_POOLED, HF_CLIP, HF_DINOV2)}
    for world in worlds.values():
        world.vit.sites()
        world.scale  # noqa: B018 - the oracle runs the model
        world.module.register_forward_pre_hook(refuse)
        world.module.get_submodule(
            "blocks.0" if hasattr(world.module, "blocks") else ""
        ).register_forward_pre_hook(refuse)
    return worlds


def swap(site: str = SITE, **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", **fields}


def add(vector: str = "v", site: str = SITE, **fields: Any) -> Document:
    return {"op": "add_direction", "site": site, "vector": vector, **fields}


def inject(**fields: Any) -> Document:
    return {"op": "inject_subspace", "site": SITE, "basis": "b", "source": "source", **fields}


def mean(site: str = SITE, **fields: Any) -> Document:
    return {"op": "ablate", "site": site, "method": "mean", "mean": "m", **fields}


R = torch.linalg.qr(torch.randn(24, 3, generator=torch.Generator().manual_seed(0))).Q
COLUMNS: dict[str, Any] = {
    "base": TIMM_PLAIN.images(3, 1),
    "source": TIMM_PLAIN.images(3, 2),
    "patches": [[1], [2, 3], [4]],
    "outside": torch.tensor([1, 16, 2]),
    "negative": torch.tensor([1, 2, -1]),
    "twice": [[1, 2], [3, 3], [4, 5]],
    "empty": [[1], [], [2]],
    "floats": [0.5, 1.0, 2.0],
    "words": ["one", "two", "three"],
    "kind": torch.tensor([0, 4, 1]),
    "pairs": torch.tensor([[0, 1], [1, 2], [2, 3]]),
    "box": [(0, 0, 9, 9), (8, 8, 4, 16), (0, 0, 4, 4)],
    "box_outside": [(0, 0, 9, 9), (0, 0, 9, 9), (40, 40, 50, 50)],
    "small": TIMM_PLAIN.images(3)[:, :, :16],
    "mixed": [torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), PIL.Image.new("RGB", (40, 40))],
    "missing": [PIL.Image.new("RGB", (40, 40)), PIL.Image.new("RGB", (40, 40)), None],
    "last_small": [torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), torch.zeros(3, 32, 16)],
    "bytes": torch.zeros(3, 3, 32, 32, dtype=torch.uint8),
}

# The run's one intervention (or the fields of a run), given tensors, the error, its text.
CASES: dict[str, tuple[Document, dict[str, Any], type[Exception], str]] = {
    "layer out of range": (swap("blocks.3.resid_post"), {}, SpecError,
        r"blocks\.3\.resid_post: layer 3 is out of range; VisionTransformer has 3 blocks, 0 to 2\."),
    "no gated mlp": (swap("blocks.1.mlp.pre_linear"), {}, UnsupportedSiteError,
        r"blocks\.1\.mlp\.pre_linear does not exist on VisionTransformer: the MLP of this block is not gated\."),
    "source site out of range": (swap(source_site="blocks.9.resid_post"), {}, SpecError, "layer 9 is out of range"),
    "head out of range": (swap("blocks.0.attn.z", heads=[0, 3]), {}, SpecError,
        r"run 'r', interchange at blocks\.0\.attn\.z: head 3 is out of range; blocks\.0\.attn\.z has 3 heads, 0 to 2\."),
    "head out of range of a pattern": (swap("blocks.0.attn.pattern", heads=[5]), {}, SpecError, "head 5 is out of range"),
    "patch off the grid": (swap(tokens=[3, 16]), {}, SpecError,
        r"run 'r', interchange at blocks\.1\.resid_post, tokens: patch 16 is not on the 4x4 grid \(patches 0 to 15\)\."),
    "key off the grid": (swap("blocks.1.attn.pattern", keys=[99]), {}, SpecError, "keys: patch 99 is not on the 4x4 grid"),
    "unknown token name": (swap(tokens="clas"), {}, SpecError,
        r"VisionTransformer has no tokens called 'clas'\. Close matches: cls\. Its tokens: all, cls, patches\."),
    "registers on a model without": (swap(tokens=["cls", "registers"]), {}, SpecError, "no tokens called 'registers'"),
    "missing token column": (swap(tokens={"column": "patch"}), {}, DataError,
        r"tokens: the data has no column 'patch'\. Close matches: patches\. Columns: base, source"),
    "missing box column": (swap(tokens={"box": "boxes"}), {}, DataError, r"no column 'boxes'\. Close matches: box"),
    "missing source column": (swap(source="sauce"), {}, DataError,
        r"run 'r', interchange at blocks\.1\.resid_post, source: the data has no column 'sauce'\. Close matches: source\."),
    "missing base column": ({"base": "bass", "interventions": []}, {}, DataError,
        r"run 'r', base: the data has no column 'bass'\. Close matches: base\."),
    "missing choose column": (add(choose={"column": "kinds"}), {"v": torch.zeros(5, 24)}, DataError,
        r"choose: the data has no column 'kinds'\. Close matches: kind\."),
    "unequal counts": (swap(tokens=[1, 2], source_tokens=[3]), {}, SpecError,
        "paired by position, but example 0 selects 2 base tokens and 1 source tokens"),
    "unequal counts in one example": (swap(tokens={"column": "patches"}, source_tokens=[3]), {}, SpecError,
        r"example 1 selects 2 base tokens and 1 source tokens\. Select equally many; .* the model's grid of 8 x 8 px"),
    "all against some": (swap(tokens="all", source_tokens=["cls"]), {}, SpecError, "selects 17 base tokens and 1 source"),
    "a target named twice": (swap(tokens=["patches", 3], source_tokens=["patches", "cls"]), {}, SpecError,
        "the selection names a base token twice, so its new value is ambiguous"),
    "a target twice in one example": (add(tokens={"column": "twice"}), {"v": torch.zeros(24)}, SpecError,
        "example 1 selects a base token twice"),
    "column off the grid": (swap(tokens={"column": "outside"}), {}, SpecError,
        r"column 'outside', example 1: patch 16 is not on the 4x4 grid"),
    "negative patch": (swap(tokens={"column": "negative"}), {}, SpecError, "example 2: patch -1 is not on"),
    "no patch selected": (swap(tokens={"column": "empty"}), {}, DataError, "column 'empty', example 1: no patch is selected"),
    "fractional patches": (swap(tokens={"column": "floats"}), {}, DataError,
        r"run 'r', interchange at blocks\.1\.resid_post, tokens: column 'floats', example 0: 0\.5 is not an integer or a list of them"),
    "words as patches": (swap(tokens={"column": "words"}), {}, DataError, "example 0: 'one' is not an integer"),
    "words as boxes": (swap(tokens={"box": "words"}), {}, DataError, "example 0: 'one' is no box"),
    "box upside down": (swap(tokens={"box": "box"}), {}, DataError,
        r"run 'r', interchange at blocks\.1\.resid_post, tokens: column 'box', example 1: \(8, 8, 4, 16\) is no box; a box is \(x0, y0, x1, y1\) in pixels, half-open"),
    "box outside": (swap(tokens={"box": "box_outside"}), {}, DataError, "tokens: column 'box_outside', example 2: The box .* touches no"),
    "images of another size": ({"base": "small", "interventions": []}, {}, DataError,
        r"Column 'small', example 0 is no image of this model: torch\.float32 of shape \(3, 16, 32\)\. It takes PIL"),
    "one image of another size": (swap(source="last_small"), {}, DataError, r"'last_small', example 2 is no .*\(3, 32, 16\)"),
    "images and tensors": ({"base": "mixed", "interventions": []}, {}, DataError, "'mixed' mixes PIL images and tensors"),
    "integer images": ({"base": "bytes", "interventions": []}, {}, DataError, r"torch\.uint8 of shape \(3, 32, 32\)"),
    "labels as images": (swap(source="kind"), {}, DataError, r"'kind', example 0 is no image .*torch\.int64 of shape \(\)"),
    "words as images": (swap(source="words"), {}, DataError, "'words', example 0 is no image of this model: 'one'"),
    "an array as a box": (swap(tokens={"box": "base"}), {}, DataError, r"'base', example 0: torch\.float32 of shape \(3, 32, 32\) is no box"),
    "a missing image": (swap(source="missing"), {}, DataError, "'missing', example 2 is no image of this model: None"),
    "words as a tensor": (add(), {"v": "abc"}, SpecError,
        r"run 'r', add_direction at blocks\.1\.resid_post: vector names the tensor 'v', and what was given is no tensor: 'abc'"),
    "a sparse tensor": (add(), {"v": torch.ones(24).to_sparse()}, SpecError, r"is laid out as sparse_coo\. Give its to_dense\(\)"),
    "unknown tensor": (add("vecor"), {"vector": torch.zeros(24)}, SpecError,
        r"vector names the tensor 'vecor', which was not given\. Close matches: vector\. Given: vector\."),
    "wrong direction": (add(), {"v": torch.zeros(23)}, SpecError,
        r"run 'r', add_direction at blocks\.1\.resid_post: vector has shape \(23,\); blocks\.1\.resid_post holds 24 features "
        r"and 17 tokens are selected, so \[24\], or \[k, 24\] or \[k \* 24\] for exactly k tokens, fits\."),
    "direction for other tokens": (add(tokens=[1, 2]), {"v": torch.zeros(3, 24)}, SpecError, "24 features and 2 tokens are"),
    "rows for ragged tokens": (add(tokens={"column": "patches"}), {"v": torch.zeros(2, 24)}, SpecError,
        "tokens that differ in number between examples are selected"),
    "direction of a head": (add(site="blocks.0.attn.q", heads=[1]), {"v": torch.zeros(24)}, SpecError, "q holds 8 features"),
    "too few to choose from": (add(choose={"column": "kind"}), {"v": torch.zeros(4, 24)}, SpecError,
        r"vector \(4, 24\) needs a leading axis of at least 5 for the column that chooses"),
    "chosen of another shape": (add(choose={"column": "kind"}), {"v": torch.zeros(5, 23)}, SpecError, "behind the leading axis"),
    "nothing to choose from": (add(choose={"column": "kind"}), {"v": torch.zeros(24)}, SpecError, "needs a leading axis"),
    "negative choice": (add(choose={"column": "negative"}), {"v": torch.zeros(3, 24)}, SpecError, "one non-negative integer"),
    "two choices": (add(choose={"column": "pairs"}), {"v": torch.zeros(3, 24)}, SpecError, "one non-negative integer"),
    "not a number": (add(), {"v": torch.full((24,), float("nan"))}, SpecError, "numbers: 24 of its 24 numbers are infinite"),
    "integers": (add(), {"v": torch.zeros(24, dtype=torch.int64)}, SpecError, "vector must hold finite floating-point numbers: it has torch.int64; give it"),
    "basis of another width": (inject(), {"b": torch.eye(23)[:, :3]}, SpecError,
        r"basis has shape \(23, 3\); blocks\.1\.resid_post holds 24 features, so \[24, r\] with r from 1 to 24 fits"),
    "flat basis": (inject(), {"b": torch.zeros(24)}, SpecError, r"basis has shape \(24,\)"),
    "basis too wide": (inject(), {"b": torch.zeros(24, 25)}, SpecError, r"basis has shape \(24, 25\)"),
    "empty basis": (inject(), {"b": torch.zeros(24, 0)}, SpecError, r"basis has shape \(24, 0\); .* \[24, r\] with r from 1 to 24 fits"),
    "oblique basis": (inject(), {"b": torch.ones(24, 2)}, SpecError,
        r"columns of basis are not orthonormal \(R\^T R differs from the identity by 24\)\. Take its QR decomposition first"),
    "gate too large": (inject(gate="g"), {"b": R, "g": torch.tensor([0, 1.5, 1])}, SpecError,
        r"gate must lie in 0\.\.1, got 0 to 1\.5\."),
    "basis of each of another number of tokens": (inject(tokens=[0, 1, 2], source_tokens=[3, 4, 5]), {"b": torch.zeros(2, 24, 3)},
        SpecError, r"basis has shape \(2, 24, 3\); .* holds 24 features, so \[24, r\] with r from 1 to 24 fits, or \[3, 24, r\] for a basis of each"),
    "basis of each of varying tokens": (inject(tokens={"column": "patches"}, source_tokens={"column": "patches"}),
        {"b": torch.zeros(1, 24, 3)}, SpecError, "a basis for each token takes equally many tokens in every example"),
    "basis of each token at heads": (inject(site="blocks.1.attn.q", tokens=[0, 1]), {"b": torch.zeros(2, 8, 3)}, SpecError,
        r"basis has shape \(2, 8, 3\); .* holds 8 features, so \[8, r\] with r from 1 to 8 fits\."),
    "one gate for a basis of each token": (inject(tokens=[0, 1], gate="g"), {"b": torch.stack([R, R]), "g": torch.ones(3)}, SpecError,
        r"gate has shape \(3,\); the basis has 3 columns for each of 2 tokens, so \[2, 3\] fits"),
    "one basis of each token that is not orthonormal": (inject(tokens=[0, 1]), {"b": torch.stack([R, 2 * R])}, SpecError,
        r"not orthonormal \(R\^T R differs from the identity by 3\)"),
    "gate of another rank": (inject(gate="g"), {"b": R, "g": torch.ones(2)}, SpecError, "gate has shape .*basis has 3 columns"),
    "point of another rank": (inject(source=None, vectors="v"), {"b": R, "v": torch.ones(4)}, SpecError,
        r"vectors has shape \(4,\); the basis has 3 columns and 17 tokens are selected, so \[3\]"),
    "mean of another shape": (mean(), {"m": torch.zeros(16, 24)}, SpecError,
        r"mean has shape \(16, 24\); \(17, 24\) fits here \(the site's shape for one example\)"),
    "pooled mean of another shape": (mean(pool_tokens=True), {"m": torch.zeros(17, 24)}, SpecError,
        r"\(24,\) fits here \(the site's shape for one example, without its token axis\)"),
    "source of another shape": (swap("blocks.1.mlp.post", source_site="embed"), {}, SpecError,
        r"embed holds \(17, 24\) per example, which cannot take the place of \(17, 96\)\."),
    "unknown run": (swap(source={"run": "sender"}), {}, SpecError, r"reads run 'sender', which is not part of the experiment"),
    "capture out of range": ({"interventions": [], "capture": ["blocks.7.ln1"]}, {}, SpecError, "layer 7 is out of range"),
    "capture of nothing": ({"interventions": [], "capture": ["blocks.*.resid_pots"]}, {}, SpecError,
        r"'blocks\.\*\.resid_pots' matches no site\. Close matches: blocks\.\*\.resid_post"),
    "captured heads": ({"interventions": [], "capture": [{"site": "blocks.*.attn.q", "heads": [3]}]}, {}, SpecError, "head 3 is"),
    "heads of a glob": ({"interventions": [], "capture": [{"site": "blocks.0.*", "heads": [0]}]}, {}, SpecError,
        "has no head axis, so heads cannot be selected there"),
    "captured tokens": ({"interventions": [], "capture": [{"site": "embed", "tokens": "register"}]}, {}, SpecError, "no tokens called"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_before_the_first_forward(guarded: dict[Tiny, World], case: str) -> None:
    document, tensors, error, text = CASES[case]
    fields = {"interventions": [document]} if "op" in document else document
    run = Run.model_validate({"name": "r", **fields})
    with pytest.raises(error, match=text) as raised:
        vmi.execute(guarded[TIMM_PLAIN].vit, [run], COLUMNS, tensors=tensors, progress=False)
    assert isinstance(raised.value, VitMechInterpError)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            swap("blocks.1.resid_pots"),
            r"Unknown site 'blocks\.1\.resid_pots'\. Close matches: blocks\.1\.resid_post",
        ),
        (swap("resid_post"), r"'resid_post' stands in a block: write 'blocks\.\{layer\}\.resid_post'"),
        (swap(heads=[0]), "has no head axis, so heads=.* cannot be selected there"),
        (swap("pooled", tokens=["cls"]), "has no token axis, so only tokens='all' fits there"),
        (swap(keys=[1]), "keys=.* has no meaning at 'blocks.1.resid_post'"),
        (swap("blocks.1.attn.q", source_site="embed"), "cannot be paired with"),
        (add(alpha=float("nan")), "finite number"),
        (swap(tokens=[]), "An empty list selects no token"),
        (swap(tokens=[-1]), "-1 is negative"),
    ],
)
def test_documents_that_are_malformed_without_a_model(edit: Document, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Run.model_validate({"name": "r", "interventions": [edit]})


@pytest.mark.parametrize(
    ("tiny", "edit", "error", "text"),
    [
        (TIMM_POOLED, swap(tokens="cls"), SpecError, r"no tokens called 'cls'\. .*Its tokens: all, patches\."),
        (TIMM_POOLED, swap("ln_final"), UnsupportedSiteError, "its last norm acts on the pooled vector; read pooled"),
        (HF_CLIP, swap("ln_final"), UnsupportedSiteError,
         "ln_final does not exist on CLIPVisionModelWithProjection: its last norm acts on CLS alone, after pooling"),
        (HF_DINOV2, swap("blocks.1.attn.z", heads=[2]), SpecError, "has 2 heads, 0 to 1"),
    ],
)  # fmt: skip
def test_what_a_model_lacks(
    guarded: dict[Tiny, World], tiny: Tiny, edit: Document, error: type[Exception], text: str
) -> None:
    world, run = guarded[tiny], Run.model_validate({"name": "r", "interventions": [edit]})
    with pytest.raises(error, match=text):
        vmi.execute(world.vit, [run], world.columns, progress=False)
    with pytest.raises(error, match=text):
        vmi.plan(world.vit, [run])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            {"base": torch.zeros(3, 3, 32, 32), "label": [0, 1]},
            r"Columns of unequal length: \{'base': 3, 'label': 2\}",
        ),
        ({}, "The data has no columns. Runs take images from one: 'base'"),
        ({"base": []}, "The data has no examples"),
        ({"base": 3}, "Not columns, but single values: base"),
        ({"base": [1], 5: [2]}, "Columns are called by strings, not 5"),
        ([1, 2, 3], r"Data is a datasets\.Dataset or a mapping of columns, not list"),
    ],
)
def test_bad_data(guarded: dict[Tiny, World], data: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        vmi.execute(guarded[TIMM_PLAIN].vit, [Run(name="r")], data, progress=False)


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([], "There is no run to execute"),
        (
            [Run(name="a"), Run(name="b"), Run(name="a")],
            "Two runs of the experiment are called 'a'; names must be unique",
        ),
        (["a"], "Runs are a Run, a Sweep, an Experiment or several of the first two, not str"),
        ({"name": "a"}, r"not dict\. Read a document with Run\.model_validate or Sweep\.model_validate\."),
        (vmi.Ablate(site="embed"), r"not Ablate\. Give the intervention a run: Run\(name=\.\.\., interventions=\[\.\.\.\]\)\."),
        (None, "Runs are a Run, a Sweep, an Experiment or several of the first two, not NoneType"),
        ("ab", "Runs are a Run, .*not str"),
    ],
)
def test_bad_runs(guarded: dict[Tiny, World], runs: Any, text: str) -> None:
    world = guarded[TIMM_PLAIN]
    for call in (lambda: vmi.execute(world.vit, runs, COLUMNS), lambda: vmi.plan(world.vit, runs)):
        with pytest.raises(SpecError, match=text):
            call()


def test_a_native_model_and_a_path_for_a_store(guarded: dict[Tiny, World], tmp_path: Path) -> None:
    world = guarded[TIMM_PLAIN]
    runs = [Run(name="a")]
    native = pytest.raises(SpecError, match=r"not VisionTransformer\. Wrap it: vit_mechinterp\.wrap\(module\)")
    path = pytest.raises(SpecError, match=r"not a path\. Make one: vit_mechinterp\.ActivationStore\(")
    for call in (vmi.execute, vmi.plan):
        with native:
            call(world.module, runs, world.columns)  # type: ignore[operator]
        with path:
            call(world.vit, runs, world.columns, store=tmp_path)  # type: ignore[operator]
    with native, prepare(world.module, runs, world.columns, {}):  # type: ignore[arg-type]
        pass
    with path, prepare(world.vit, runs, world.columns, {}, store=tmp_path):  # type: ignore[arg-type]
        pass


def test_results_of_somebody_else_are_not_written_over(guarded: dict[Tiny, World], tmp_path: Path) -> None:
    world = guarded[TIMM_PLAIN]
    document = tmp_path / "results.json"
    document.write_text('{"accuracy": 0.9}')
    with pytest.raises(ExecutionError, match=r"results\.json is no document of an experiment"):
        vmi.execute(world.vit, [Run(name="a")], world.columns, out=tmp_path)
    assert document.read_text() == '{"accuracy": 0.9}'


def test_tensors_that_are_no_mapping(guarded: dict[Tiny, World]) -> None:
    for tensors in ("abc", [torch.zeros(24)]):
        with pytest.raises(SpecError, match="tensors is a mapping from names to tensors, not "):
            vmi.execute(guarded[TIMM_PLAIN].vit, [Run(name="r")], COLUMNS, tensors=tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [0, -4, 2.5, "big", None, True])
def test_bad_batch_sizes(guarded: dict[Tiny, World], batch_size: Any) -> None:
    with pytest.raises(SpecError, match=r"batch_size is 'auto' or a positive integer, got"):
        vmi.execute(guarded[TIMM_PLAIN].vit, [Run(name="r")], COLUMNS, batch_size=batch_size)


def test_bad_tensor_files(guarded: dict[Tiny, World], tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"direction": torch.ones(24), "other": torch.ones(3)}, good)
    raw = good.read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(raw[:-10])
    (tmp_path / "header.safetensors").write_bytes(raw[:6])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "words.safetensors").write_text(json.dumps({"direction": [1.0] * 24}))
    damaged = "is no readable safetensors file (truncated or damaged?)"
    for file, key, sha256, text in [
        ("missing.safetensors", "direction", None, "There is no tensor file"),
        ("truncated.safetensors", "direction", None, damaged),
        ("header.safetensors", "direction", None, damaged),
        ("empty.safetensors", "direction", None, damaged),
        ("words.safetensors", "direction", None, damaged),
        ("good.safetensors", "directoin", None, "has no tensor 'directoin'. Close matches: direction. It holds: direction, other."),
        ("good.safetensors", "direction", "0" * 64, "is not the file that was meant: sha256 "),
    ]:  # fmt: skip
        vector = {"file": str(tmp_path / file), "key": key, "sha256": sha256}
        run = Run.model_validate({"name": "r", "interventions": [{**add(), "vector": vector}]})
        with pytest.raises(TensorFileError) as raised:
            vmi.execute(guarded[TIMM_PLAIN].vit, [run], COLUMNS, progress=False)
        assert text in str(raised.value), file
        assert file in str(raised.value)


def test_an_operation_without_an_operator(guarded: dict[Tiny, World]) -> None:
    @register_op
    class Mirror(Intervention):
        op: str = "mirror"

    run = Run(name="r", interventions=[Mirror(site=SITE)])
    with pytest.raises(
        SpecError,
        match=r"no operator for Mirror \(op 'mirror'\)\. Known: Ablate, AddDirection, .*register_operator",
    ):
        vmi.execute(guarded[TIMM_PLAIN].vit, [run], COLUMNS)


@pytest.mark.parametrize(
    "module", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1)), nn.TransformerEncoderLayer(8, 2)]
)
def test_modules_that_no_family_describes(module: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        vmi.wrap(module)
    text = str(raised.value)
    assert (
        f"No known family of ViTs describes {type(module).__module__}.{type(module).__name__}. Probed:"
        in text
    )
    assert re.search(r"timm\.vit\b.*: no list of blocks at 'blocks'", text)
    assert re.search(r"transformers\.clip\b.*: no list of blocks at '", text)


def test_numpy_columns_and_tensors_are_taken() -> None:
    world = World(TIMM_PLAIN)
    run = Run.model_validate({"name": "r", "interventions": [add(tokens={"column": "here"})]})
    vector = torch.randn(24)
    as_numpy = {name: column.numpy() for name, column in world.columns.items()}
    expected = vmi.execute(world.vit, run, world.columns, tensors={"v": vector}, progress=False)
    found = vmi.execute(
        world.vit, run, as_numpy, tensors={"v": vector.double().numpy().astype(np.float32)}, progress=False
    )
    assert torch.equal(expected.logits, found.logits)
