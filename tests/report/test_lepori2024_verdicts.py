"""What the page of Lepori et al. says of every statement of the paper."""

from __future__ import annotations

import pandas as pd
import pytest

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.lepori2024.claims import Claim, agreement
from vit_mechinterp.report.lepori2024.published import best, published
from vit_mechinterp.report.lepori2024.verdicts import verdicts


def test_the_papers_other_models_are_held_against_their_logs() -> None:
    search = pd.DataFrame({
        "attribute": ["shape"] * 3, "control": ["none", "none", "wrong_object"], "split": ["test_iid"] * 3, "layer": [0, 3, 3],
        "accuracy": [0.5, 0.85, 0.99],
    })  # fmt: skip
    (claim,) = verdicts({"das_discrimination_dinov2": CircuitResult(name="das_discrimination_dinov2", table=search)})
    assert (claim.figure, claim.published, claim.here, claim.holds) == ("Fig. 16", "0.908 (logged)", "0.850 in layer 3", True)
    probe = pd.DataFrame({
        "pair": ["all", "all", "all", "sample"], "quantity": ["probe accuracy", "success", "success", "success"],
        "alpha": [float("nan"), 1.0, 2.0, 1.0], "layer": [5, 4, 4, 4], "value": [0.94, 0.6, 0.99, 0.99],
    })  # fmt: skip
    read, turned = verdicts({"probe_rmts_dino": CircuitResult(name="probe_rmts_dino", table=probe)})
    assert (read.published, read.holds) == ("0.949 (logged)", True)
    assert (turned.published, turned.here, turned.holds) == ("0.800 (logged)", "0.600 in layer 4", False)


def test_photographs_are_held_against_the_stimuli() -> None:
    rows = [
        (model, split, "all", accuracy)
        for model, iid, realistic in [("CLIP ViT-B/16", 0.98, 0.9), ("DINO ViT-B/16", 0.95, 0.6), ("MAE ViT-B/16", 0.9, 0.85)]
        for split, accuracy in [("test_iid", iid), ("realistic", realistic)]
    ]
    table = pd.DataFrame(rows, columns=["model", "split", "seed", "accuracy"]).assign(
        losses="none", task="discrimination", combinations="256-256-256", n_seeds=1
    )
    section = "accuracy_discrimination_256"
    found = verdicts({section: CircuitResult(name=section, table=table.assign(condition=table["model"]))})[-2:]
    assert [(claim.figure, claim.holds) for claim in found] == [("Table 2", True), ("Table 2", False)]
    assert found[1].here == "DINO ViT-B/16 0.600, MAE ViT-B/16 0.850"

    def stages(name: str, local: int, peaks: tuple[int, ...] = (0, 1, 2, 2)) -> CircuitResult:
        heads = pd.DataFrame({"layer": range(3), "head": 0, "heat": [0.3] * local + [0.9] * (3 - local)})
        for kind, layer in zip(("WO_direct", "WP", "BP", "BG"), peaks, strict=True):
            heads[kind] = [float(own == layer) for own in range(3)]
        return CircuitResult(name=name, table=heads)

    realistic, synthetic = "attention_realistic_discrimination", "attention_discrimination"
    for local, holds in ((1, True), (2, False)):
        claims = verdicts({realistic: stages(realistic, local), synthetic: stages(synthetic, 2)})
        assert [claim.holds for claim in claims if claim.claim == "on photographs fewer heads are local"] == [holds]
    for order, holds in (((0, 1, 2, 2), False), ((1, 0, 2, 2), True)):
        (claim,) = verdicts({"attention_rmts_dino": stages("attention_rmts_dino", 0, order)})
        assert claim.holds is holds


def test_points_without_a_correlation_are_said_to_have_none() -> None:
    nothing = float("nan")
    table = pd.DataFrame({
        "split": ["test_iid"] * 4, "pearson": nothing, "pearson_low": nothing, "pearson_high": nothing, "n_models": 4,
        "pearson_without": nothing,
    })  # fmt: skip
    (claim,) = verdicts({"points_rmts": CircuitResult(name="points_rmts", table=table)})
    assert claim.holds is None
    assert claim.figure == "Fig. 6 (RMTS)"
    assert claim.here == "no correlation over 4 models: one of the two does not vary"
    assert claim.published == "r = 0.95 over 5 models, from the authors' logs"


def test_published_numbers_are_those_of_the_logs() -> None:
    assert best(item="fig3", task="discrimination", kind="shape", quantity="interchange accuracy") == (0.936, "2")
    assert best(item="fig5", model="CLIP B/16", combinations=256, quantity="intervention success, alpha 1") == (0.983, "5")
    scratch = published(item="accuracy", model="scratch B/16", task="discrimination", combinations=256, kind="test_iid")
    assert scratch["value"].tolist() == [0.805]
    with pytest.raises(LookupError, match="No published number"):
        best(item="fig3", task="counting")


def test_verdicts_follow_the_numbers() -> None:
    def searched(by_layer: list[float], wrong: float) -> CircuitResult:
        rows = [("shape", "none", layer, value) for layer, value in enumerate(by_layer)]
        rows += [("shape", "wrong_object", layer, wrong) for layer in range(len(by_layer))]
        table = pd.DataFrame(rows, columns=["attribute", "control", "layer", "accuracy"])
        return CircuitResult(name="das_discrimination", table=table)

    good, bad = (
        verdicts({"das_discrimination": searched(*case)})
        for case in [([0.6, 0.9, 0.1], 0.5), ([0.6, 0.7, 0.9], 0.8)]
    )
    assert [claim.holds for claim in good] == [True, True]
    assert [claim.holds for claim in bad] == [False, False]
    assert good[0].here == "0.900 in layer 1; 0.100 in layer 2, the last"
    assert good[0].published == "0.936 in layer 2 (logged for CLIP B/16); 0.007 in the last"


def test_a_search_is_judged_on_the_objects_of_its_training() -> None:
    rows = [("shape", "none", split, layer, value) for split, values in (("test_iid", (0.9, 0.1)), ("test", (0.2, 0.2)))
            for layer, value in enumerate(values)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["attribute", "control", "split", "layer", "accuracy"])
    (claim,) = verdicts({"das_discrimination": CircuitResult(name="das_discrimination", table=table)})
    assert (claim.here, claim.holds) == ("0.900 in layer 0; 0.100 in layer 1, the last", True)


@pytest.mark.parametrize(
    ("task", "accuracies", "holds"),
    [
        ("discrimination", {"none": 0.8, "disentanglement": 0.9, "pipeline": 0.8, "both": 0.95}, [True, False, True]),
        ("rmts", {"none": 0.5, "disentanglement": 0.52, "pipeline": 0.5, "both": 0.9}, [True, True, True]),
        ("rmts", {"none": 0.5, "disentanglement": 0.9, "pipeline": 0.5, "both": 0.55}, [False, True, False]),
    ],
)
def test_either_loss_helps_discrimination_and_relations_take_both(
    task: str, accuracies: dict[str, float], holds: list[bool]
) -> None:
    table = pd.DataFrame({"losses": list(accuracies), "accuracy": list(accuracies.values())}).assign(
        condition=list(accuracies), model="ViT", task=task, combinations="256-256-256", split="test_iid", seed="all", n_seeds=1,
        pretraining="starts from a model",
    )  # fmt: skip
    claims = verdicts({f"accuracy_{task}": CircuitResult(name=f"accuracy_{task}", table=table)})[:3]
    assert [claim.holds for claim in claims] == holds
    assert all(claim.here.count("(starts from a model)") == 2 for claim in claims)
    said = claims[0].claim
    assert ("does not teach" in said) == (task == "rmts")
    assert claims[0].published.startswith("scratch B/")


@pytest.mark.parametrize(("local", "holds"), [(0, True), (2, True), (3, False), (7, False)])
def test_hardly_any_head_is_one_in_ten(local: int, holds: bool) -> None:
    name = "attention_discrimination_scratch"
    table = pd.DataFrame({"WO_direct": [0.9] * local + [0.1] * (24 - local)})
    (claim,) = verdicts({name: CircuitResult(name=name, table=table)})
    assert claim.holds is holds
    assert claim.here.startswith(f"{local} of 24 heads")


def test_what_does_not_agree_is_said_in_words() -> None:
    claims = [
        Claim("Fig. 3", "one", "0.9", "0.8 here", "above 0.7", True),
        Claim("Fig. 4", "two", "", "0.1 here", "above 0.7", False),
        Claim("Fig. 6", "three", "", "r = 0.1", "above 0", None),
    ]
    found = agreement(claims, "tiny", {"das_rmts": "no model"})
    assert found.summary == {"agrees": 1, "does not agree": 1, "cannot be told": 1}
    assert "What does not agree: Fig. 4: 0.1 here." in found.description
    assert "Not shown at this scale: das_rmts (no model)." in found.description
    assert found.table["verdict"].tolist() == ["agrees", "does not agree", "cannot be told"]
