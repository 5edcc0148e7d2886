"""Documents say everything: a spec written out and read back is the same spec, and digests tell specs apart."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.spec.strategies import experiments, interventions, runs, sweeps
from vit_mechinterp.spec import Experiment, Interchange, Intervention, Run, Sweep
from vit_mechinterp.spec.digest import canonical_json, digest

few = settings(
    max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@few
@given(interventions())
def test_interventions_survive_json(intervention: Intervention) -> None:
    again = type(intervention).model_validate_json(intervention.model_dump_json())
    assert again == intervention
    assert again.digest == intervention.digest


@few
@given(st.one_of(runs, sweeps))
def test_runs_survive_json_with_and_without_defaults(run: Run | Sweep) -> None:
    for compact in (False, True):
        again = type(run).model_validate_json(run.model_dump_json(exclude_defaults=compact))
        assert again == run
        assert again.digest == run.digest


@few
@given(experiments)
def test_experiments_survive_yaml_and_json(tmp_path: Path, experiment: Experiment) -> None:
    experiment.to_yaml(tmp_path / "e.yaml")
    (tmp_path / "e.json").write_text(experiment.model_dump_json(), encoding="utf-8")
    for again in (Experiment.from_yaml(tmp_path / "e.yaml"), Experiment.from_json(tmp_path / "e.json")):
        # Field by field, because an experiment's own equality is that of its digest.
        assert again.runs == experiment.runs
        assert again.model_dump() == experiment.model_dump()
        assert again == experiment
        assert hash(again) == hash(experiment)


@few
@given(runs, runs)
def test_equal_runs_and_only_equal_runs_have_equal_digests(a: Run, b: Run) -> None:
    assert (a == b) == (a.digest == b.digest)
    assert a.model_copy(update={"name": a.name + "'"}).digest != a.digest


@few
@given(interventions(), interventions())
def test_equal_interventions_and_only_equal_ones_have_equal_digests(a: Intervention, b: Intervention) -> None:
    assert (a == b) == (a.digest == b.digest)


def test_spelling_does_not_enter_the_digest() -> None:
    long = Interchange(site="blocks.5.hook_resid_post", source="s", source_tokens=[3, "cls"], heads=None)
    short = Interchange(source="s", site="blocks.5.resid_post", source_tokens=(3, "cls"))
    assert long == short
    assert long.digest == short.digest


def test_the_digest_is_the_hash_of_sorted_json_with_defaults() -> None:
    import hashlib

    run = Run(name="clean")
    text = '{"base":"base","capture":[],"interventions":[],"name":"clean","output":true}'
    assert canonical_json(run.model_dump(mode="json")) == text
    assert run.digest == hashlib.sha256(text.encode()).hexdigest()


def test_one_number_has_one_spelling() -> None:
    assert digest({"a": 1.0}) == digest({"a": 1}) != digest({"a": 1.5})
    assert canonical_json([-0.0, 2.5e300]) == "[0," + str(int(2.5e300)) + "]"


def test_a_document_with_defaults_left_out_still_says_its_op() -> None:
    run = Run(name="r", interventions=[{"op": "ablate", "site": "blocks.0.attn.z"}])
    assert json.loads(run.model_dump_json(exclude_defaults=True)) == {
        "name": "r",
        "interventions": [{"op": "ablate", "site": "blocks.0.attn.z"}],
    }
