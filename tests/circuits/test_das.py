"""Distributed alignment search against forwards made by hand with plain hooks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

import vit_mechinterp as vmi
from vit_mechinterp.circuits.alignment import GatedRotations, Training, temperature
from vit_mechinterp.circuits.das import TINY, das, das_by_attribute, interchange_run
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.engine import prepare
from vit_mechinterp.errors import DataError, SpecError

D, LAYERS, GRID, PATCH = 16, 3, 4, 8
EDITED, SOURCE, OTHER = {"box": "edited_box"}, {"box": "source_box"}, {"box": "source_other_box"}
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.05, "mask_learning_rate": 0.2, "progress": False}


@pytest.fixture(scope="module")
def vit() -> vmi.HookedViT:
    torch.manual_seed(0)
    module = timm.models.VisionTransformer(
        img_size=GRID * PATCH, patch_size=PATCH, embed_dim=D, depth=LAYERS, num_heads=2, num_classes=2
    ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
        for block in module.blocks:
            block.mlp.fc2.weight.mul_(0.3)
    return vmi.wrap(module)


def pairs(n: int, seed: int, vit: vmi.HookedViT, subspace: Tensor | None = None) -> dict[str, Any]:
    """Images with objects of 2 x 2 patches in random colours; labels are the answers after a swap at block 0."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, GRID - 1, (3, n, 2), generator=generator)
    boxes = torch.cat([corners, corners + 2], dim=-1) * PATCH
    data: dict[str, Any] = dict(zip(("edited_box", "source_box", "source_other_box"), boxes, strict=True))
    for name, objects in (("base", ["edited"]), ("source", ["source_other", "source"])):
        data[name] = 0.1 * torch.randn(n, 3, 32, 32, generator=generator)
        for box in (f"{each}_box" for each in objects):
            colors = 3 * torch.randn(n, 3, 1, 1, generator=generator)
            for image, color, (x0, y0, x1, y1) in zip(data[name], colors, data[box].tolist(), strict=True):
                image[:, y0:y1, x0:x1] += color
    with torch.no_grad():
        basis = torch.eye(D) if subspace is None else subspace
        data["counterfactual_label"] = by_hand(vit.module, data, 0, basis, torch.ones(*basis.shape[:-2], basis.shape[-1])).argmax(dim=-1)
    return data


def decisive(data: dict[str, Any], vit: vmi.HookedViT) -> dict[str, Any]:
    """Those pairs whose label is not the answer to the base image."""
    with torch.no_grad():
        keep = vit.module(data["base"]).argmax(dim=-1) != data["counterfactual_label"]
    return {name: column[keep] for name, column in data.items()}


def tokens_of(boxes: Tensor) -> Tensor:
    """Positions of the four tokens in each box, ``[example, 4]``; CLS is token 0."""
    x, y = boxes[:, 0] // PATCH, boxes[:, 1] // PATCH
    return torch.stack([1 + (y + down) * GRID + x + right for down in (0, 1) for right in (0, 1)], dim=1)


def by_hand(
    module: nn.Module,
    data: dict[str, Any],
    layer: int,
    rotation: Tensor,
    gate: Tensor,
    source_box: str = "source_box",
    order: tuple[int, ...] = (0, 1, 2, 3),
) -> Tensor:
    """Logits with the gated interchange, from the published formula and plain hooks."""
    block, row = module.blocks[layer], torch.arange(len(data["base"]))[:, None]
    here, there = tokens_of(data["edited_box"]), tokens_of(data[source_box])[:, list(order)]
    seen: list[Tensor] = []
    keep = block.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        module(data["source"])
    keep.remove()

    def gated(b: Tensor, s: Tensor, rotation: Tensor, gate: Tensor) -> Tensor:
        return b + ((1 - gate) * (b @ rotation) + gate * (s @ rotation) - b @ rotation) @ rotation.T

    def edit(m: nn.Module, a: Any, out: Tensor) -> Tensor:
        b, s = out[row, here], seen[0][row, there]
        if rotation.ndim == 3:  # one for each token
            own = [gated(b[:, k], s[:, k], rotation[k], gate[k]) for k in range(len(rotation))]
            return out.index_put((row, here), torch.stack(own, dim=1))
        return out.index_put((row, here), gated(b, s, rotation, gate))

    handle = block.register_forward_hook(edit)
    logits: Tensor = module(data["base"])
    handle.remove()
    return logits


def runs(source_tokens: Any = SOURCE) -> dict[int, vmi.Run]:
    return {n: interchange_run(n, "resid_post", EDITED, source_tokens) for n in range(LAYERS)}


def starting(modules: GatedRotations) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in modules.tensors(modules.gates(1.0)).items()}


def test_the_temperature_falls_geometrically_from_1_to_a_200th() -> None:
    values = [temperature(e, 5) for e in range(5)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(1 / 200)
    assert values[2] == pytest.approx(200**-0.5)
    assert temperature(0, 1) == 1.0


def test_gates_start_half_open_and_end_binary() -> None:
    modules = GatedRotations([0, 2], D)
    assert torch.equal(modules.gates(1.0), torch.full((2, D), 0.5))
    with torch.no_grad():
        modules.mask[0, :3] = torch.tensor([1e-4, -1e-4, 2.0])
    assert modules.binary_gates()[0, :4].tolist() == [1.0, 0.0, 1.0, 0.0]
    torch.testing.assert_close(modules.binary_gates()[0, :3], modules.gates(1e-8)[0, :3])


def test_a_closed_gate_changes_nothing_and_an_open_one_swaps_the_tokens(vit: vmi.HookedViT) -> None:
    data = pairs(6, 1, vit)
    modules = GatedRotations(range(LAYERS), D)
    swap = [
        vmi.Run(
            name=f"swap_{n}",
            interventions=[vmi.Interchange(site=f"blocks.{n}.resid_post", tokens=EDITED, source="source", source_tokens=SOURCE)],
        )
        for n in range(LAYERS)
    ]
    clean = vit(data["base"])
    swapped = vmi.execute(vit, swap, data, progress=False).logits
    with prepare(vit, list(runs().values()), data, starting(modules)) as prepared:
        closed = prepared(range(6), modules.tensors(torch.zeros(LAYERS, D)))
        opened = prepared(range(6), modules.tensors(torch.ones(LAYERS, D)))
    assert (swapped[0] - clean).abs().max() > 0.05
    torch.testing.assert_close(closed, clean.expand(LAYERS, -1, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(opened, swapped, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n_tokens", [None, 4], ids=["tied", "untied"])
def test_the_trained_forward_is_the_published_formula_and_so_are_its_gradients(vit: vmi.HookedViT, n_tokens: int | None) -> None:
    data = pairs(5, 2, vit)
    order = (2, 0, 3, 1)
    modules = GatedRotations(range(LAYERS), D, seed=4, n_tokens=n_tokens)
    with torch.no_grad():
        modules.mask.normal_(generator=torch.Generator().manual_seed(0))
    parameters = list(modules.parameters())
    labels = data["counterfactual_label"]

    def gradients(logits: list[Tensor]) -> tuple[Tensor, ...]:
        loss = sum(functional.cross_entropy(x, labels) for x in logits) + 1e-3 * modules.gates(0.5).sum()
        return torch.autograd.grad(loss, parameters)

    tensors = modules.tensors(modules.gates(0.5))
    expected = [by_hand(vit.module, data, n, tensors[f"rotation_{n}"], tensors[f"gate_{n}"], order=order) for n in range(LAYERS)]
    unordered = by_hand(vit.module, data, 0, tensors["rotation_0"], tensors["gate_0"])
    wanted = gradients(expected)
    with prepare(vit, list(runs().values()), data, starting(modules)) as prepared:
        logits = prepared(range(5), modules.tensors(modules.gates(0.5)), order)
        found = gradients(list(logits))
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=2e-5)
    assert (expected[0] - unordered).abs().max() > 1e-3
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_an_example_of_fewer_tokens_is_paired_in_the_same_order_without_those_it_lacks(vit: vmi.HookedViT) -> None:
    data = pairs(2, 3, vit)
    data["edited"], data["there"] = [[0, 1, 2], [4, 5]], [[7, 8, 9], [10, 11]]
    data["reordered"] = [[9, 7, 8], [10, 11]]
    modules = GatedRotations([1], D)
    tensors = starting(modules)
    there, reordered = (interchange_run(1, "resid_post", {"column": "edited"}, {"column": c}) for c in ("there", "reordered"))
    wanted = vmi.execute(vit, reordered, data, tensors=tensors, progress=False).logits
    assert (wanted - vmi.execute(vit, there, data, tensors=tensors, progress=False).logits).abs().max() > 1e-3
    with prepare(vit, there, data, tensors) as prepared, torch.no_grad():
        assert prepared.most_source_tokens == 3
        torch.testing.assert_close(prepared([0, 1], tensors, [2, 0, 1]), wanted, rtol=0, atol=1e-5)
        with pytest.raises(SpecError, match="give each of 0 to 2 once"):
            prepared([0, 1], tensors, [0, 1])


def test_training_moves_rotations_and_gates_and_nothing_else(vit: vmi.HookedViT) -> None:
    before = {name: (p.clone(), p.requires_grad) for name, p in vit.module.named_parameters()}
    train, test = pairs(16, 4, vit), pairs(8, 5, vit)
    result = das(vit, train, test, **QUICK)
    first = GatedRotations(range(LAYERS), D)
    for layer in range(LAYERS):
        rotation = result.tensors[f"rotation_{layer}"]
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(D), rtol=0, atol=1e-5)
        assert set(result.tensors[f"gate_{layer}"].unique().tolist()) <= {0.0, 1.0}
    # No token but CLS is read behind the last block, so its rotation has no gradient.
    assert (result.tensors["rotation_0"] - first.rotation[0]).abs().max() > 0.05
    torch.testing.assert_close(result.tensors["rotation_2"], first.rotation[2].detach())
    for name, parameter in vit.module.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.module.modules())


def test_clean_images_pass_through_the_model_once_however_long_the_training(vit: vmi.HookedViT) -> None:
    train, test = pairs(16, 4, vit), pairs(8, 5, vit)
    images: list[int] = []
    vit.sites()
    count = vit.module.patch_embed.register_forward_pre_hook(lambda m, a: images.append(int(a[0].flatten(1).any(1).sum())))
    evaluations = []
    for epochs in (1, 3):
        images.clear()
        result = das(vit, train, test, **{**QUICK, "epochs": epochs})
        # Sources and bases of the training, then of the test; every wave begins on a blank image.
        assert sum(images) == 2 * 16 + 2 * 8
        assert result.provenance["training"]["steps"] == 2 * epochs
        evaluations.append(result.provenance["training"]["clean_evaluations"])
    count.remove()
    assert evaluations == [2 * 16 * LAYERS] * 2


def test_it_finds_the_subspace_that_carries_the_answer(vit: vmi.HookedViT) -> None:
    subspace = torch.linalg.qr(torch.randn(D, 8, generator=torch.Generator().manual_seed(7))).Q
    train, test = (decisive(pairs(1200, seed, vit, subspace), vit) for seed in (6, 7))
    settings = {**QUICK, "epochs": 12, "batch_size": 16, "layers": [0]}
    row = das(vit, train, test, **settings).table.iloc[0]
    wrong = das(vit, train, test, control="wrong_object", **settings).table.iloc[0]
    assert row["no_effect"] == 0
    assert row["accuracy"] > 0.85
    assert wrong["accuracy"] < row["accuracy"] - 0.2
    assert 1 <= row["rank"] < D


def test_the_measured_accuracy_is_that_of_forwards_made_by_hand(vit: vmi.HookedViT) -> None:
    train, test = pairs(24, 8, vit), pairs(24, 9, vit)
    for control, box in ((None, "source_box"), ("wrong_object", "source_other_box")):
        result = das(vit, train, test, control=control, **QUICK)
        labels = test["counterfactual_label"]
        for row in result.table.itertuples():
            tensors = [result.tensors[f"{name}_{row.layer}"] for name in ("rotation", "gate")]
            with torch.no_grad():
                logits = by_hand(vit.module, test, row.layer, *tensors, source_box=box)
            assert row.accuracy == (logits.argmax(dim=1) == labels).double().mean().item()
            assert row.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), abs=1e-4)
            assert row.rank == tensors[1].sum()
            assert (row.control, row.n) == (control or "none", 24)
        clean = (vit(test["base"]).argmax(dim=1) == labels).double().mean().item()
        assert set(result.table["no_effect"]) == {clean}


def test_the_control_is_trained_on_the_other_object(vit: vmi.HookedViT) -> None:
    train, test = pairs(16, 4, vit), pairs(8, 5, vit)
    control = das(vit, train, test, control="wrong_object", **QUICK)
    named = das(vit, train, test, source_tokens=OTHER, **QUICK)
    plain = das(vit, train, test, **QUICK)
    assert torch.equal(control.tensors["rotation_0"], named.tensors["rotation_0"])
    assert (control.tensors["rotation_0"] - plain.tensors["rotation_0"]).abs().max() > 1e-3


def test_a_seed_gives_the_same_bits_and_another_seed_other_ones(vit: vmi.HookedViT) -> None:
    train, test = pairs(16, 4, vit), pairs(8, 5, vit)
    first, again, other = (das(vit, train, test, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert first.table.equals(again.table)
    assert not torch.equal(first.tensors["rotation_0"], other.tensors["rotation_0"])


def test_a_layer_is_trained_as_if_it_were_alone(vit: vmi.HookedViT) -> None:
    train, test = pairs(16, 4, vit), pairs(8, 5, vit)
    # While all gates are half open the rotations have no gradient but rounding, which Adam scales up: small steps.
    settings = {**QUICK, "learning_rate": 1e-3}
    together, alone = das(vit, train, test, **settings), das(vit, train, test, layers=[1], **settings)
    grouped = das(vit, train, test, layers_at_once=2, **settings)
    assert list(alone.table["layer"]) == [1]
    assert list(alone.figures()) == ["das_by_layer"]
    for other in (alone.table.iloc[0], grouped.table.iloc[1]):
        for name in ("train_loss", "loss"):
            assert other[name] == pytest.approx(together.table[name][1], rel=2e-3)
    assert together.table["train_loss"][0] != pytest.approx(together.table["train_loss"][1], rel=2e-2)
    assert grouped.provenance["training"]["clean_evaluations"] > together.provenance["training"]["clean_evaluations"]


def test_token_columns_and_boxes_mean_the_same(vit: vmi.HookedViT) -> None:
    train, test = pairs(16, 4, vit), pairs(8, 5, vit)
    boxes = das(vit, train, test, **QUICK)
    for data in (train, test):
        for name in ("edited", "source"):
            data[f"{name}_tokens"] = tokens_of(data[f"{name}_box"]) - 1
    columns = {"tokens": {"column": "edited_tokens"}, "source_tokens": {"column": "source_tokens"}}
    assert torch.equal(das(vit, train, test, **columns, **QUICK).tensors["gate_0"], boxes.tensors["gate_0"])


def test_patch_indices_of_another_grid_are_refused_where_boxes_betray_them(vit: vmi.HookedViT) -> None:
    columns = {"tokens": {"column": "edited_tokens"}, "source_tokens": {"column": "source_tokens"}}
    sets = []
    for seed, name in ((4, "edited"), (5, "source")):
        data = pairs(4, seed, vit)
        for own in ("edited", "source"):
            data[f"{own}_tokens"] = tokens_of(data[f"{own}_box"]) - 1
        # The last item's indices are valid patches, but not those of its object.
        data[f"{name}_tokens"][3] = (data[f"{name}_tokens"][3] + 2) % GRID**2
        sets.append((name, data))
    for name, data in sets:
        said = rf"das, shape, column '{name}_tokens', example 3: patch \d+ of the model's 4x4 patches of 8x8 px lies outside"
        with pytest.raises(DataError, match=rf"{said} the object's box \('{name}_box'\), so the indices are those of another grid"):
            das(vit, data, data, attribute="shape", **columns, **QUICK)
        del data[f"{name}_box"]
        das(vit, data, data, **columns, **QUICK)  # nothing tells whose the indices are


def test_attributes_and_controls_come_together_in_one_result(vit: vmi.HookedViT, tmp_path: Any) -> None:
    data = {"shape": (pairs(8, 1, vit), pairs(8, 2, vit)), "color": (pairs(8, 3, vit), pairs(8, 4, vit))}
    result = das_by_attribute(vit, data, **QUICK)
    assert len(result.table) == 2 * 2 * LAYERS
    assert {"shape.rotation_0", "color.gate_2", "shape.wrong_object.gate_1"} <= set(result.tensors)
    alone = das(vit, *data["color"], attribute="color", control="wrong_object", **QUICK)
    rows = result.table[(result.table["attribute"] == "color") & (result.table["control"] == "wrong_object")]
    assert rows.reset_index(drop=True).equals(alone.table)
    assert torch.equal(result.tensors["color.wrong_object.rotation_1"], alone.tensors["rotation_1"])
    assert set(result.provenance["searches"]) == {
        "shape, none", "shape, wrong_object", "color, none", "color, wrong_object",
    }  # fmt: skip

    texts = {text.get_text() for text in result.figures()["das_by_layer"].axes[0].texts}
    assert {"shape", "shape, wrong object", "color", "color, wrong object", "chance"} <= texts
    shape, color = (result.table[result.table["attribute"] == name]["no_effect"].iloc[0] for name in data)
    assert ({"no effect"} if abs(shape - color) < 0.03 else {"shape, no effect", "color, no effect"}) <= texts

    loaded = CircuitResult.load(result.save(tmp_path))
    run = interchange_run(0, "resid_post", EDITED, SOURCE, prefix="shape.")
    logits = vmi.execute(vit, run, data["shape"][1], tensors=loaded.tensors, progress=False).logits[0]
    accuracy = (logits.argmax(dim=1) == data["shape"][1]["counterfactual_label"]).double().mean().item()
    assert accuracy == result.table.iloc[0]["accuracy"]
    assert (tmp_path / "das_by_layer.pdf").is_file()


def test_what_does_not_fit_is_said_before_the_first_forward(vit: vmi.HookedViT) -> None:
    data = pairs(4, 1, vit)
    with pytest.raises(SpecError, match=r"Unknown control 'wrong_objects'\. Close matches: wrong_object\."):
        das(vit, data, data, control="wrong_objects", **QUICK)
    with pytest.raises(SpecError, match="name at least one block, each once"):
        das(vit, data, data, layers=[1, 1], **QUICK)
    with pytest.raises(SpecError, match="layer 3 is out of range"):
        das(vit, data, data, layers=[3], **QUICK)
    with pytest.raises(SpecError, match=r"site='attn.pattern' holds one number per key"):
        das(vit, data, data, site="attn.pattern", **QUICK)
    with pytest.raises(SpecError, match="epochs=0: training takes at least 1"):
        das(vit, data, data, epochs=0)
    for name, value in (("learning_rate", math.nan), ("mask_learning_rate", math.inf), ("sparsity", -1.0)):
        with pytest.raises(SpecError, match=f"{name}={value}: it must be a finite number, 0 or more"):
            das(vit, data, data, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="at least one attribute"):
        das_by_attribute(vit, {})
    with pytest.raises(SpecError, match=r"'shape' needs two datasets, \(training pairs, held-out pairs\), not dict"):
        das_by_attribute(vit, {"shape": data})  # type: ignore[dict-item]
    with pytest.raises(SpecError, match="at least one entry of controls"):
        das_by_attribute(vit, {"shape": (data, data)}, controls=[])
    with pytest.raises(DataError, match="has no column 'flipped'"):
        das(vit, data, data, label="flipped", **QUICK)
    with pytest.raises(DataError, match=r"example 2: \[2\] is no class; the model has classes 0 to 1"):
        das(vit, data, {**data, "counterfactual_label": torch.tensor([0, 1, 2, 0])}, **QUICK)
    with pytest.raises(DataError, match="has no column 'source_box'"):
        das(vit, {k: v for k, v in data.items() if k != "source_box"}, data, **QUICK)
    shape = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": D}
    headless = ViTModel(ViTConfig(image_size=GRID * PATCH, patch_size=PATCH, **shape), add_pooling_layer=False).eval()
    with pytest.raises(SpecError, match=r"ViTModel gives .* of shape \(17, 16\) per example, not one score for each class"):
        das(vmi.wrap(headless), data, data, **QUICK)
    with pytest.raises(SpecError, match=r"seeds=\[1, 1\]: name at least one, each once"):
        das(vit, data, data, seeds=[1, 1], **QUICK)
    with pytest.raises(SpecError, match="rows_at_once=0: a forward holds at least 1 row"):
        das(vit, data, data, rows_at_once=0, **QUICK)
    with pytest.raises(TypeError, match=r"das_by_attribute takes no epoch\. It takes layers, site, "):
        das_by_attribute(vit, {"shape": (data, data)}, epoch=3)


def test_the_published_settings_are_the_defaults() -> None:
    training = Training()
    assert (training.epochs, training.batch_size) == (20, 64)
    assert (training.learning_rate, training.mask_learning_rate, training.sparsity) == (1e-3, 1e-2, 1e-3)
    assert Training(**TINY).sparsity == 1e-3
