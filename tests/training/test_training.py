"""The training loop on a model of one head: what it writes, that it learns, and that resuming changes
nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from vit_mechinterp.errors import DataError, SpecError, TensorFileError
from vit_mechinterp.model.registry import wrap
from vit_mechinterp.stimuli import DiscriminationGenerator
from vit_mechinterp.training import (
    DisentanglementProbes,
    ModelConfig,
    TrainingConfig,
    evaluate,
    load_trained,
    objective,
    train,
)
from vit_mechinterp.training import loop as loop_module
from vit_mechinterp.training.models import build_model, build_vit

IMAGES = {"canvas": 32, "patch": 8, "cell": 8}


def tiny(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(embed_dim=16, depth=2, num_heads=2),
        "auxiliary_site": "blocks.0.resid_post",
        "steps": 20,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "validate_every": 8,
        "validation_images": 32,
        "test_images": 48,
        "log_every": 4,
        "device": "cpu",
        **IMAGES,
    }
    return TrainingConfig(**settings | changes)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "run"
    train(tiny(), folder, command="vit-mechinterp train", progress=False)
    return folder


def test_the_probes_learn(trained: Path) -> None:
    steps = [line for line in lines_of(trained) if "probe_color" in line]
    assert [line["step"] for line in steps] == [4, 8, 12, 16, 20]
    assert steps[-1]["probe_color"] < steps[0]["probe_color"] - 0.05
    assert all(line["gradient_norm"] > 0 for line in steps)
    rates = [line["learning_rate"] for line in steps]
    assert max(rates) <= 3e-3
    assert rates[-1] < 0.1 * max(rates)


def test_the_best_checkpoint_loads_with_timm_and_has_the_recorded_metrics(trained: Path) -> None:
    import timm

    document = json.loads((trained / "training.json").read_text())
    assert document["command"] == "vit-mechinterp train"
    assert TrainingConfig.model_validate(document["config"]) == tiny()
    assert set(document["versions"]) == {"python", "torch", "timm", "accelerate", "numpy"}
    validations = {line["step"]: line["validation"] for line in lines_of(trained) if "validation" in line}
    assert list(validations) == [8, 16, 20]
    best = document["progress"]["best_step"]
    assert validations[best] == document["progress"]["best"]
    assert validations[best]["accuracy"] == max(metrics["accuracy"] for metrics in validations.values())

    module = timm.create_model(f"local-dir:{trained}", pretrained=True)
    initial = build_model(tiny())
    assert any(not torch.equal(a, b) for a, b in zip(module.parameters(), initial.parameters(), strict=True))
    held_out = DiscriminationGenerator("val", **IMAGES)
    assert evaluate(module, held_out, 32) == validations[best]
    assert set(document["test"]) == {"test", "test_iid"}
    for split, metrics in document["test"].items():
        assert evaluate(module, DiscriminationGenerator(split, **IMAGES), 48) == metrics


def test_a_checkpoint_states_the_transform_of_its_images(trained: Path) -> None:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from vit_mechinterp.stimuli import discrimination

    module = timm.create_model(f"local-dir:{trained}", pretrained=True)
    transform = create_transform(**resolve_model_data_config(module))
    image = discrimination("val", 1, **IMAGES)[0]["base"]
    assert torch.equal(transform(image), DiscriminationGenerator("val", **IMAGES).batch(0, 1).images()[0])


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 14:
            raise KeyboardInterrupt
        return objective(*args, **kwargs)

    monkeypatch.setattr(loop_module, "objective", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path, progress=False)
    assert lines_of(tmp_path)[-1]["step"] == 12
    monkeypatch.undo()
    train(tiny(), tmp_path, resume=True, progress=False)
    assert lines_of(tmp_path) == lines_of(trained)
    for name in ("model.safetensors", "state/state.safetensors"):
        ours, whole = load_file(tmp_path / name), load_file(trained / name)
        assert ours.keys() == whole.keys()
        assert all(torch.equal(ours[key], whole[key]) for key in ours), name


def test_the_seed_decides_everything(trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    torch.rand(7)
    state = torch.get_rng_state()
    train(tiny(), tmp_path / "same", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert lines_of(tmp_path / "same") == lines_of(trained)
    train(tiny(seed=1, steps=4), tmp_path / "other", progress=False)
    assert lines_of(tmp_path / "other")[0]["task_loss"] != lines_of(trained)[0]["task_loss"]


def test_without_the_auxiliary_loss_there_are_no_probes(tmp_path: Path) -> None:
    odd = ModelConfig(embed_dim=15, depth=2, num_heads=3)  # a width that has no halves
    train(tiny(auxiliary_weight=0.0, steps=4, model=odd), tmp_path / "off", progress=False)
    assert not any(name.startswith("probe") for line in lines_of(tmp_path / "off") for name in line)
    kept = load_file(tmp_path / "off" / "state" / "state.safetensors")
    assert kept
    assert not any(name.startswith("probes/") for name in kept)
    with pytest.raises(SpecError, match="halves the embedding, whose width is 15"):
        train(tiny(model=odd), tmp_path / "on", progress=False)
    assert not (tmp_path / "on").exists()


def test_threads_are_restored(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train(tiny(steps=1, threads=before + 1), tmp_path, progress=False)
    assert torch.get_num_threads() == before


def test_the_objective_equals_one_with_a_plain_forward_hook() -> None:
    config = tiny()
    module = build_model(config)
    torch.manual_seed(0)
    probes = DisentanglementProbes(16)
    batch = DiscriminationGenerator("train", **IMAGES).batch(0, 8)
    kept: list[torch.Tensor] = []
    handle = module.blocks[0].register_forward_hook(lambda _module, _input, output: kept.append(output))
    logits = module(batch.images())
    handle.remove()
    tokens = torch.from_numpy(batch.tokens) + 1
    terms = probes(kept[0], tokens, torch.from_numpy(batch.shape), torch.from_numpy(batch.color))
    expected = functional.cross_entropy(logits, batch.labels()) + 2.0 * (terms.shape + terms.color)

    found = objective(wrap(module), probes, batch, tiny(auxiliary_weight=2.0))
    assert torch.equal(found.loss, expected)
    plain = objective(wrap(module), probes, batch, tiny(auxiliary_weight=0.0))
    assert float(plain.loss.detach()) == found.log["task_loss"] != float(expected.detach())
    parameters = list(module.parameters())[:3]
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.abs().sum() > 0


class Oracle(nn.Module):
    """Answers by the labels it was given, wrongly on every image whose objects differ in colour alone."""

    def __init__(self, generator: DiscriminationGenerator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.generator, self.seen = generator, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        batch = self.generator.batch(self.seen, len(x))
        self.seen += len(x)
        answers = torch.where(torch.from_numpy(batch.different_kind) == 3, 1 - batch.labels(), batch.labels())
        return self.scale * functional.one_hot(answers, 2).float()


def test_accuracy_by_kind() -> None:
    oracle = Oracle(DiscriminationGenerator("test", **IMAGES)).train()
    metrics = evaluate(oracle, DiscriminationGenerator("test", **IMAGES), 48, batch_size=20)
    assert oracle.training
    assert (
        metrics["accuracy_same"]
        == metrics["accuracy_different_both"]
        == metrics["accuracy_different_shape"]
        == 1
    )
    assert metrics["accuracy_different_color"] == 0
    assert metrics["accuracy"] == pytest.approx(1 - 8 / 48)
    right, wrong = torch.log1p(torch.exp(torch.tensor(-1.0))), torch.log1p(torch.exp(torch.tensor(1.0)))
    assert metrics["loss"] == pytest.approx(float((40 * right + 8 * wrong) / 48), rel=1e-6)


def test_a_training_is_not_overwritten(trained: Path) -> None:
    with pytest.raises(DataError, match=r"holds a training already. Resume it, or choose another folder"):
        train(tiny(), trained, progress=False)


def test_resuming_with_other_settings_is_refused(trained: Path) -> None:
    with pytest.raises(DataError, match=r"other settings \(steps: 20 -> 40; seed: 0 -> 2\)"):
        train(tiny(steps=40, seed=2), trained, resume=True, progress=False)


def test_a_record_that_lacks_later_settings_is_read_and_resumed(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "earlier")
    path = tmp_path / "earlier" / "training.json"
    document = json.loads(path.read_text())
    test = document.pop("test")
    for name in ("pretrained", "schedule", "train_images", "precision", "test_splits", "auxiliary_probe"):
        del document["config"][name]
    path.write_text(json.dumps(document))
    result = train(tiny(), tmp_path / "earlier", resume=True, progress=False)
    assert result.test == test


def test_resuming_from_nothing_or_from_a_damaged_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match=r"cannot resume: .*state.safetensors is missing or damaged"):
        train(tiny(), tmp_path / "empty", resume=True, progress=False)
    state = tmp_path / "damaged" / "state" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(TensorFileError, match=r"missing or damaged"):
        train(tiny(), tmp_path / "damaged", resume=True, progress=False)


@pytest.mark.parametrize("record", ['{"config": {"ste', "{}", "[]", '{"config": {"foo": 1}, "progress": {}}'])
def test_resuming_with_a_damaged_record_is_refused(record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "build_vit", lambda config: pytest.fail("a model was built"))
    (tmp_path / "training.json").write_text(record)
    with pytest.raises(DataError, match=r"holds no readable record of a training \(.*Give a folder that"):
        train(tiny(), tmp_path, resume=True, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file, and a training takes a folder"):
        train(tiny(), tmp_path / "file", progress=False)


def test_damaged_lines_of_a_log_are_dropped(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    whole = lines_of(tmp_path / "run")
    with (tmp_path / "run" / "log.jsonl").open("ab") as log:
        log.write(b'{"step": \xff\n\x00\n[1]\n{"step": 4')
    train(tiny(), tmp_path / "run", resume=True, progress=False)
    assert lines_of(tmp_path / "run") == whole


def test_an_unknown_site_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"layer 9 is out of range"):
        train(tiny(auxiliary_site="blocks.9.resid_post"), tmp_path, progress=False)


def test_frozen_probes_keep_their_weights_and_still_move_the_model(tmp_path: Path) -> None:
    states = {}
    for frozen in (False, True):
        config = tiny(steps=2, validate_every=2, freeze_probes=frozen)
        train(config, tmp_path / str(frozen), progress=False)
        states[frozen] = load_file(tmp_path / str(frozen) / "state" / "state.safetensors")
    drawn = loop_module._build_probes(build_vit(tiny()), tiny()).state_dict()
    for name, first in drawn.items():
        assert torch.equal(states[True][f"probes/{name}"], first)
        assert not torch.equal(states[False][f"probes/{name}"], first)
    train(tiny(steps=2, validate_every=2, auxiliary_weight=0.0), tmp_path / "off", progress=False)
    off = load_file(tmp_path / "off" / "state" / "state.safetensors")
    moved = [key for key, value in off.items() if key.startswith("model/") and not torch.equal(value, states[True][key])]
    assert "model/blocks.0.mlp.fc1.weight" in moved
    resumed = train(tiny(steps=2, validate_every=2, freeze_probes=True), tmp_path / "True", resume=True, progress=False)
    assert resumed.best_step == 2


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("blocks.0.attn.pattern", r"auxiliary_site='blocks\.0\.attn\.pattern' holds \[2, 17, 17\] for an image; the probes read"),
        ("blocks.0.attn.q", r"holds \[17, 2, 8\] for an image"),
        ("blocks.0.mlp.post", r"holds \[17, 64\] for an image; the probes read one embedding for each token, \[17, 16\]"),
        ("pooled", r"holds \[16\] for an image; .* set auxiliary_weight to 0"),
        ("blocks.*.resid_post", "names several sites"),
    ],
)
def test_a_site_without_an_embedding_per_token_is_refused_before_the_first_step(
    site: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        train(tiny(auxiliary_site=site), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    if site == "pooled":  # what no loss reads may be anything
        assert train(tiny(auxiliary_site=site, auxiliary_weight=0.0, steps=1), tmp_path / "off", progress=False).best_step == 1


def test_stimuli_and_models_that_cannot_be_made_are_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match="architecture='vit_nope': timm cannot make it with these sizes"):
        train(tiny(model=ModelConfig(architecture="vit_nope")), tmp_path, progress=False)
    with pytest.raises(SpecError, match="architecture='resnet18': timm cannot make it"):
        train(tiny(model=ModelConfig(architecture="resnet18")), tmp_path, progress=False)
    with pytest.raises(ValueError, match="num_heads=3 does not divide embed_dim=16"):
        ModelConfig(embed_dim=16, num_heads=3)
    monkeypatch.setattr(loop_module, "build_vit", lambda config: pytest.fail("a model was built"))
    with pytest.raises(SpecError, match="combinations='1-2-3' names no split"):
        train(tiny(combinations="1-2-3"), tmp_path, progress=False)
    with pytest.raises(SpecError, match="do not fit side by side"):
        train(tiny(cell=32), tmp_path, progress=False)


def test_accuracy_on_training_images_is_of_images_that_were_trained_on(tmp_path: Path) -> None:
    config = tiny(steps=2, validate_every=2, train_images=10, test_images=24, test_splits=("train", "test"))
    found = train(config, tmp_path / "run", progress=False).test
    best = load_trained(tmp_path / "run")
    assert found["train"] == evaluate(best, DiscriminationGenerator("train", **IMAGES), 10)
    assert found["train"] != evaluate(best, DiscriminationGenerator("train", **IMAGES), 24)
    assert found["test"] == evaluate(best, DiscriminationGenerator("test", **IMAGES), 24)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="learning_rat"):
        tiny(learning_rat=1.0)
