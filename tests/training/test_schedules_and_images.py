"""Learning rates, finite sets of images, precision, shares of a step: what `train` can be told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.training.test_training import lines_of, tiny
from vit_mechinterp.errors import SpecError
from vit_mechinterp.training import train
from vit_mechinterp.training.images import TrainingImages, evaluation_images
from vit_mechinterp.training.schedules import Schedule


def rates(validations: dict[int, float] | None = None, **settings: Any) -> list[float]:
    """Learning rates of ten steps, with validations after some."""
    config = tiny(steps=10, learning_rate=1.0, **settings)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = Schedule(optimizer, config), []
    for step in range(10):
        found.append(schedule.rate)
        optimizer.step()
        schedule.after_step()
        if step in (validations or {}):
            schedule.after_validation((validations or {})[step])
    return found


def test_schedules_equal_their_formulas() -> None:
    assert rates(schedule="constant") == [1.0] * 10
    epochs = rates(schedule="exponential", gamma=0.5, train_images=30)  # three batches of 8 an epoch
    assert epochs == [0.5 ** (step // 3) for step in range(10)]
    flat = rates({1: 0.7, 3: 0.7, 5: 0.6, 7: 0.6}, schedule="plateau", patience=2)
    assert flat == pytest.approx([1.0] * 8 + [0.1] * 2)
    authors = rates({4: 0.5}, schedule="exponential_of_accuracy", gamma=0.81)
    assert authors == pytest.approx([1.0] * 5 + [0.9] * 5)
    assert max(rates()) == pytest.approx(1.0, rel=0.1)
    assert len({round(rate, 9) for rate in rates()}) == 10


@pytest.mark.parametrize("schedule", ["plateau", "exponential", "exponential_of_accuracy", "one_cycle"])
def test_a_schedule_goes_on_where_it_was(schedule: str) -> None:
    config = tiny(steps=8, schedule=schedule, patience=1, gamma=0.5, train_images=8)

    def run(schedule: Schedule, steps: range) -> list[float]:
        found = []
        for step in steps:
            found.append(schedule.rate)
            schedule.optimizer.step()
            schedule.after_step()
            schedule.after_validation(0.5 + 0.1 * (step == 2))
        return found

    def fresh() -> Schedule:
        return Schedule(torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-3), config)

    whole, first, second = fresh(), fresh(), fresh()
    expected = run(whole, range(8))
    run(first, range(5))
    second.restore(5, first.state())
    assert run(second, range(5, 8)) == pytest.approx(expected[5:])
    assert len(set(expected)) > 1


def test_a_finite_set_is_shuffled_every_epoch_and_shared_out_without_overlap() -> None:
    config = tiny(steps=9, train_images=30, batch_size=8, accumulate=2)
    every = TrainingImages(config)
    shares = [TrainingImages(config, rank=rank, processes=2) for rank in range(2)]
    known = {image.tobytes() for image in evaluation_images(config, "train").batch(0, 30).pixels}
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            parts = every[step]
            assert [len(part.label) for part in parts] == [4, 4]
            whole = [image.tobytes() for part in parts for image in part.pixels]
            split = [image.tobytes() for share in shares for part in share[step] for image in part.pixels]
            assert whole == split
            seen += whole
        assert len(set(seen)) == 24
        assert set(seen) < known
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_workers_and_parts_change_no_image(tmp_path: Path) -> None:
    config = tiny(steps=3, validate_every=3, log_every=1, workers=1)
    plain = tiny(steps=3, validate_every=3, log_every=1)
    train(config, tmp_path / "workers", progress=False)
    train(plain, tmp_path / "plain", progress=False)
    assert lines_of(tmp_path / "workers") == lines_of(tmp_path / "plain")
    train(tiny(steps=3, validate_every=3, log_every=1, accumulate=4), tmp_path / "parts", progress=False)
    for ours, whole in zip(lines_of(tmp_path / "parts"), lines_of(tmp_path / "plain"), strict=True):
        if "task_loss" in ours:
            assert ours["task_loss"] == pytest.approx(whole["task_loss"], rel=1e-4)
            assert ours["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-3)


def test_bfloat16_is_close_to_float32_and_weights_stay_float32(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stages = [{"attention": "within_object", "layers": [0]}]
    for precision in ("no", "bf16"):
        config = tiny(steps=4, log_every=1, precision=precision, pipeline=stages)
        train(config, tmp_path / precision, progress=False)
    exact, mixed = lines_of(tmp_path / "no")[0], lines_of(tmp_path / "bf16")[0]
    for name in ("task_loss", "probe_color", "pipeline_loss"):
        assert mixed[name] == pytest.approx(exact[name], rel=2e-2)
    assert mixed["pipeline_loss"] != exact["pipeline_loss"]
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_settings_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="accumulate=3 does not divide batch_size=8"):
        tiny(accumulate=3)
    with pytest.raises(ValidationError, match="train_images=4 is less than batch_size=8"):
        tiny(train_images=4)
    with pytest.raises(ValidationError, match="model_options are for a model given by its string"):
        tiny(model_options={"depth": 2})

    with pytest.raises(ValidationError, match="combinations='ood-shape' are objects that no training shows"):
        tiny(combinations="ood-shape")
    with pytest.raises(ValidationError, match="test_splits"):
        tiny(test_splits=())
    for name in ("learning_rate", "weight_decay", "auxiliary_weight", "pipeline_weight", "clip"):
        with pytest.raises(ValidationError, match=f"(?s){name}.*finite number"):
            tiny(**{name: math.inf})

    def refuses(**_: Any) -> None:
        raise ValueError("fp16 mixed precision requires a GPU")

    monkeypatch.setattr(accelerate, "Accelerator", refuses)
    with pytest.raises(SpecError, match=r"precision='fp16' cannot be had here: fp16 .* Use 'no', or 'bf16'"):
        train(tiny(precision="fp16"), tmp_path, progress=False)


def test_what_is_evaluated_at_the_end_can_be_chosen(tmp_path: Path) -> None:
    splits = ["train", "val", "ood-shape-color"]
    result = train(tiny(steps=2, test_splits=splits, test_images=8), tmp_path, progress=False)
    assert list(result.test) == splits
    assert all(math.isfinite(metrics["loss"]) for metrics in result.test.values())
