"""Circuits that only read lose nothing when they are stopped: what is found again has the bits of what was read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import vit_mechinterp as vmi
from tests.tiny_models import HF_CLIP, TIMM_PLAIN
from vit_mechinterp import circuits
from vit_mechinterp.circuits import kept_readings
from vit_mechinterp.circuits.dictionary import Dictionary
from vit_mechinterp.circuits.kept_readings import KeptReadings, in_batches
from vit_mechinterp.circuits.kept_tensors import KeptTensors
from vit_mechinterp.cli import main
from vit_mechinterp.commands.circuit_list import CIRCUITS
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model import HookedViT

N = 12
DATA: dict[str, Any] = {
    "base": TIMM_PLAIN.images(N, 1), "source": TIMM_PLAIN.images(N, 2),
    "label": [i % 2 for i in range(N)], "kind": [i % 3 for i in range(N)],
}  # fmt: skip


def dictionary(seed: int = 0) -> Dictionary:
    draw = torch.Generator().manual_seed(seed)
    encoder, decoder = torch.randn(24, 30, generator=draw), torch.randn(30, 24, generator=draw)
    return Dictionary(encoder, decoder, torch.zeros(30), torch.zeros(24))


Call = Callable[[Any, Path | None], Any]
CALLS: dict[str, Call] = {
    "attention": lambda vit, to: circuits.attention(vit, DATA, folder=to),
    "logit_attribution": lambda vit, to: circuits.logit_attribution(vit, DATA, answer="kind", against=3, folder=to),
    "logit_lens": lambda vit, to: circuits.logit_lens(vit, DATA, folder=to, batch_size=4),
    "probing": lambda vit, to: circuits.probing(vit, DATA, folds=2, controls=2, folder=to),
    "mean_directions": lambda vit, to: circuits.mean_directions(vit, DATA, folder=to),
    "representation_similarity": lambda vit, to: circuits.representation_similarity(vit, DATA, folder=to),
    "sparse_autoencoder": lambda vit, to: circuits.sparse_autoencoder(
        vit, DATA, dictionary(), site="blocks.1.resid_post", top=2, top_images=3, folder=to
    ),
    "attribution_patching": lambda vit, to: circuits.attribution_patching(
        vit, DATA, method="integrated", steps=3, sites=["resid_pre"], sample=4, folder=to
    ),
    "edge_attribution": lambda vit, to: circuits.edge_attribution(vit, DATA, sample=0, folder=to),
    "ablation_sweep": lambda vit, to: circuits.ablation_sweep(
        vit, DATA, parts=[], methods=["mean"], neurons={1: [2]}, batch_size=2, folder=to
    ),
}  # fmt: skip


class Watched:
    """A model that counts the images that it sees, and stops the circuit at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.vit, self.seen, self.stop_at = vmi.wrap(TIMM_PLAIN.module()), 0, stop_at
        self.vit.module.patch_embed.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if self.stop_at is not None and self.seen >= self.stop_at:
            raise KeyboardInterrupt
        self.seen += len(inputs[0])


@pytest.mark.parametrize("name", CALLS)
def test_what_was_read_before_a_circuit_was_stopped_is_not_read_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_readings, "_AT_ONCE", 4)
    monkeypatch.setattr(sys.modules["vit_mechinterp.circuits.sparse_autoencoder"], "_TOGETHER", 4)
    call, fresh = CALLS[name], Watched()
    wanted = call(fresh.vit, None)
    stopped = Watched(stop_at=fresh.seen * 2 // 3)
    with pytest.raises(KeyboardInterrupt):
        call(stopped.vit, tmp_path)
    resumed = Watched()
    found = call(resumed.vit, tmp_path)
    whole = Watched()
    again = call(whole.vit, tmp_path)
    always, work = whole.seen, fresh.seen - whole.seen  # blank images and the one that is shown, and the rest
    assert work >= N
    assert 0 < resumed.seen - always < work
    # Lost at most: the batch at work, of four images that are looked at a few times.
    assert resumed.seen - always <= fresh.seen - stopped.seen + 4 * 8
    for result in (found, again):
        pd.testing.assert_frame_equal(result.table, wanted.table, check_exact=True)
        assert {key: bool(torch.equal(t, wanted.tensors[key])) for key, t in result.tensors.items()} == dict.fromkeys(wanted.tensors, True)
        assert result.summary == wanted.summary


EDITS: dict[str, Call] = {
    "activation_patching": lambda vit, to: circuits.activation_patching(vit, DATA, sites=["resid_pre"], window=4, folder=to),
    "ablation_sweep": lambda vit, to: circuits.ablation_sweep(vit, DATA, parts=["heads"], folder=to),
    "cumulative_ablation": lambda vit, to: circuits.cumulative_ablation(vit, DATA, step=4, folder=to),
    "faithfulness": lambda vit, to: circuits.faithfulness(vit, DATA, [(0, 1), (2, 0)], folder=to),
    "path_patching": lambda vit, to: circuits.path_patching(vit, DATA, folder=to),
    "edge_patching": lambda vit, to: circuits.edge_patching(vit, DATA, senders=["embed"], folder=to),
    "steering": lambda vit, to: circuits.steering(vit, DATA, {"blocks.0.resid_post": torch.ones(24)}, folder=to),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_finished_circuit_of_edits_sees_no_image_again(name: str, tmp_path: Path) -> None:
    first, again = Watched(), Watched()
    wanted, found = EDITS[name](first.vit, tmp_path), EDITS[name](again.vit, tmp_path)
    assert first.seen > N
    assert again.seen <= 3, "blank images, and one to look for what else writes into the stream"
    pd.testing.assert_frame_equal(found.table, wanted.table, check_exact=True)


@pytest.mark.parametrize("name", sorted(CIRCUITS))
def test_every_everyday_circuit_takes_a_folder(name: str) -> None:
    # Those of papers train, search or go on from a result; they keep what they find in ways of their own.
    others = {"attention_stages", "attention_walkthrough", "das", "embedding_matching", "equivalence_walks"}
    others |= {"interchange_sweep", "local_lipschitz", "probe_intervention"}
    assert name in others or "folder" in CIRCUITS[name].options


def test_only_the_same_call_finds_what_was_kept(tmp_path: Path) -> None:
    def seen(vit: Any = None, data: Any = None, **options: Any) -> int:
        watched = Watched()
        if vit is not None:
            watched.vit.module.load_state_dict(vit)
        circuits.probing(watched.vit, data or DATA, folder=tmp_path, **{"folds": 2, "controls": 1, **options})
        return watched.seen

    first = seen()
    assert first >= N
    assert seen() == first - N
    assert seen(seed=1) == first - N, "the features are the same, and only the probes are fitted anew"
    assert seen(label="kind") == first - N
    assert seen(tokens="cls") == first
    assert seen(sites=["attn_out"]) == first
    assert seen(data={**DATA, "base": TIMM_PLAIN.images(N, 3)}) == first
    weights = {key: value * 1.01 for key, value in TIMM_PLAIN.module().state_dict().items()}
    assert seen(vit=weights) == first
    circuits.mean_directions((watched := Watched()).vit, DATA, folder=tmp_path)
    assert watched.seen == first - N, "circuits that read the same share it"


def test_dictionaries_and_classes_decide_what_is_found(tmp_path: Path) -> None:
    def tables(read: Callable[..., Any], *choices: Any) -> list[str]:
        vit = vmi.wrap(TIMM_PLAIN.module())
        return [read(vit, choice).table.to_json() for choice in choices]

    def lens(vit: Any, choice: Any) -> Any:
        return circuits.logit_attribution(vit, DATA, answer=choice, parts=["heads"], folder=tmp_path)

    kinds = {"kind": [(i + 1) % 3 for i in range(N)]}
    assert len(set(tables(lens, 0, 1, [0] * 11 + [1], "kind"))) == 4
    before = tables(lens, "kind")
    DATA_KINDS = DATA | kinds
    turned = circuits.logit_attribution(
        vmi.wrap(TIMM_PLAIN.module()), DATA_KINDS, answer="kind", parts=["heads"], folder=tmp_path
    ).table
    assert turned.to_json() not in before

    def features(vit: Any, seed: int) -> Any:
        site = "blocks.1.resid_post"
        return circuits.sparse_autoencoder(vit, DATA, dictionary(seed), site=site, features=[0, 1], folder=tmp_path)

    assert len(set(tables(features, 0, 1, 2))) == 3


def test_a_model_of_features_is_read_along_its_directions(tmp_path: Path) -> None:
    vit, images = vmi.wrap(HF_CLIP.module()), HF_CLIP.images(5)
    draw = torch.Generator().manual_seed(0)
    tables = [
        circuits.logit_attribution(vit, images, directions=directions, answer=0, parts=["heads"], folder=tmp_path).table
        for directions in (torch.randn(3, 6, generator=draw), torch.randn(3, 6, generator=draw))
    ]
    assert (tables[0]["contribution"] - tables[1]["contribution"]).abs().max() > 1e-3


def test_tensors_wait_for_half_a_minute_and_come_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    columns = Data(DATA, vit)
    shared = torch.arange(4.0)

    def read(examples: list[int]) -> dict[str, torch.Tensor]:
        calls.append(examples)
        return {"z.1": shared, "a": shared, "b": torch.tensor(examples)}

    def go() -> list[tuple[list[int], dict[str, torch.Tensor]]]:
        with KeptReadings(tmp_path, vit, columns, ["base"], reading="test") as kept:
            return list(in_batches(vit, N, read, kept))

    calls: list[list[int]] = []
    first = go()
    assert calls == [list(range(8)), list(range(8, 12))]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1, "half a minute had not passed"
    second = go()
    assert len(calls) == 2
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert list(one) == list(other) == ["z.1", "a", "b"]
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    monkeypatch.setattr(kept_readings, "_SECONDS", -1.0)
    with KeptReadings(tmp_path, vit, columns, ["base"], reading="each at once") as kept:
        for count, _ in enumerate(in_batches(vit, N, read, kept)):
            assert len(list(tmp_path.glob("*.safetensors"))) == 2 + count
    with KeptReadings(None, vit, columns, ["base"]) as kept:
        assert len(list(in_batches(vit, N, read, kept))) == 2
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"


def test_batches_are_smaller_where_activations_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, sizes = Watched(), []
    watched.vit.module.patch_embed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    wanted = circuits.attention(watched.vit, DATA, gradient=False).table
    assert max(sizes) == 8
    monkeypatch.setattr(kept_readings, "_ACTIVATIONS", 3 * 3 * (3 * 17 * 17) * 4 + 5)  # of three images
    sizes.clear()
    found = circuits.attention(watched.vit, DATA, gradient=False).table
    assert max(sizes) == 3
    pd.testing.assert_frame_equal(found, wanted, atol=1e-6)
    monkeypatch.setattr(kept_readings, "_ACTIVATIONS", 1)
    sizes.clear()
    circuits.mean_directions(watched.vit, DATA)
    assert max(sizes) == 1


def test_torn_files_and_full_disks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptTensors(tmp_path / "kept")
    kept.save({"a": {"x": torch.ones(2)}}, {"seed": 1})
    (tmp_path / "kept" / "torn.safetensors").write_bytes(b"torn")
    again = KeptTensors(tmp_path / "kept")
    assert "torn.safetensors holds nothing that is finished, and is left as it is" in caplog.text
    assert "a" in again
    assert "x" not in again
    assert again.record("a") == {"seed": 1}
    assert torch.equal(again.load("a")["x"], torch.ones(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(ExecutionError, match=r"What is finished cannot be kept in .*file"):
        KeptTensors(tmp_path / "file")
    for path in sorted((tmp_path / "kept").iterdir()):
        path.unlink()
    (tmp_path / "kept").rmdir()
    with pytest.raises(ExecutionError, match=r"cannot be written into .*kept: .* Choose another folder, or make room"):
        again.save({"b": {"x": torch.ones(2)}})


def test_a_killed_command_that_reads_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed without notice at the fourth batch, behind the image that is shown: the three before are not read again."""
    from datasets import Dataset
    from PIL import Image

    colours = [Image.new("RGB", (32, 32), (8 * i, 255 - 8 * i, 5 * (i % 7))) for i in range(30)]
    Dataset.from_dict({"image": colours}).save_to_disk(tmp_path / "data")
    words = ["circuit", "attention", "--model", "tests.tiny_models:TIMM_PLAIN.module", "--data", str(tmp_path / "data")]
    words += ["--quiet"]
    code = (
        "import os, sys\n"
        "from vit_mechinterp.circuits import kept_readings\n"
        "from vit_mechinterp.cli import main\n"
        "from vit_mechinterp.model import HookedViT\n"
        "kept_readings._SECONDS = -1.0\n"
        "run, batches = HookedViT.run, []\n"
        "def dies(*args, **kwargs):\n"
        "    batches.append(1)\n"
        "    if len(batches) == 5: os.kill(os.getpid(), 9)\n"
        "    return run(*args, **kwargs)\n"
        "HookedViT.run = dies\n"
        "main(sys.argv[1:])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, *words, "--out", str(tmp_path / "out")], check=False)
    assert killed.returncode == -9
    assert len(list((tmp_path / "out" / "finished").glob("*.safetensors"))) == 3
    assert not (tmp_path / "out" / "result.json").exists()
    batches: list[int] = []
    run = HookedViT.run

    def counted(vit: HookedViT, x: torch.Tensor, **options: Any) -> Any:
        batches.append(len(x))
        return run(vit, x, **options)

    monkeypatch.setattr(HookedViT, "run", counted)
    for out in ("out", "fresh"):
        assert main([*words, "--out", str(tmp_path / out)]) == 0
    assert batches == [1, 6, 1, 8, 8, 8, 6]
    tables = [pd.read_parquet(tmp_path / out / "table.parquet") for out in ("out", "fresh")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
