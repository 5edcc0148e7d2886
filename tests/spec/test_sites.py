"""Names of places: parsed, printed, ordered, expanded, and refused with a reason."""

from __future__ import annotations

import random

import pytest

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec import BLOCK_SITES, Site, expand, site_names


def test_names_and_sites_are_inverse() -> None:
    names = site_names(3)
    assert len(names) == 4 + 3 * len(BLOCK_SITES) == len(set(names))
    assert [str(Site.parse(name)) for name in names] == names


def test_sites_sort_in_forward_order() -> None:
    names = site_names(12)
    shuffled = random.Random(0).sample(names, len(names))
    assert [str(site) for site in sorted(map(Site.parse, shuffled))] == names
    assert Site.parse("blocks.2.resid_post") < Site.parse("blocks.10.resid_pre") <= Site.parse("blocks.10.resid_pre")
    assert names[0] == "embed"
    assert names[-3:] == ["ln_final", "pooled", "logits"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("blocks.3.hook_resid_pre", "blocks.3.resid_pre"),
        ("blocks.3.hook_resid_mid", "blocks.3.resid_mid"),
        ("blocks.3.hook_resid_post", "blocks.3.resid_post"),
        ("blocks.3.hook_attn_out", "blocks.3.attn_out"),
        ("blocks.3.hook_mlp_out", "blocks.3.mlp_out"),
        ("blocks.3.attn.hook_rot_q", "blocks.3.attn.q"),
        ("blocks.3.attn.hook_rot_k", "blocks.3.attn.k"),
        ("blocks.3.attn.hook_v", "blocks.3.attn.v"),
        ("blocks.3.attn.hook_attn_scores", "blocks.3.attn.scores"),
        ("blocks.3.attn.hook_pattern", "blocks.3.attn.pattern"),
        ("blocks.3.attn.hook_z", "blocks.3.attn.z"),
        ("blocks.3.attn.hook_result", "blocks.3.attn.result"),
        ("blocks.3.mlp.hook_pre", "blocks.3.mlp.pre"),
        ("blocks.3.mlp.hook_pre_linear", "blocks.3.mlp.pre_linear"),
        ("blocks.3.mlp.hook_post", "blocks.3.mlp.post"),
        ("blocks.03.resid_post", "blocks.3.resid_post"),
    ],
)
def test_transformer_lens_names_of_the_same_meaning_are_read(given: str, meant: str) -> None:
    assert str(Site.parse(given)) == meant


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("blocks.3.attn.hook_q", "before q/k norm and rotation. Write blocks.3.attn.q"),
        ("blocks.3.attn.hook_k", "before q/k norm and rotation. Write blocks.3.attn.k"),
        ("hook_embed", "before the position embeddings. Write 'embed'"),
        ("hook_pos_embed", "Write 'embed'"),
        ("blocks.3.ln1.hook_normalized", "Write 'blocks.3.ln1'"),
        ("blocks.3.ln2.hook_scale", "do not expose their scale"),
        ("ln_final.hook_normalized", "Write 'ln_final'"),
        ("blocks.3.hook_mlp_in", "Write blocks.3.ln2"),
        ("blocks.3.hook_q_input", "Write 'blocks.3.ln1'"),
    ],
)
def test_names_that_mean_something_else_are_refused_with_advice(given: str, advice: str) -> None:
    with pytest.raises(SpecError) as caught:
        Site.parse(given)
    assert "means something else in TransformerLens" in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("blocks.3.resid_pots", "Unknown site 'blocks.3.resid_pots'. Close matches: blocks.3.resid_post"),
        ("blocks.3.attn.hook_paterns", "Close matches: blocks.3.attn.pattern"),
        ("logit", "Close matches: logits"),
        ("resid_post", "stands in a block: write 'blocks.{layer}.resid_post'"),
        ("blocks.-1.resid_post", "'-1' is not a layer"),
        ("blocks.{layer}.resid_post", "'{layer}' is not a layer"),
        ("blocks.*.resid_post", "is a pattern, and one site is wanted"),
        (3, "A site is a name"),
    ],
)
def test_unknown_names_say_what_there_is(given: str, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        Site.parse(given)
    assert text in str(caught.value)


def test_unknown_names_list_all_sites() -> None:
    with pytest.raises(SpecError) as caught:
        Site.parse("nowhere")
    for name in BLOCK_SITES:
        assert name in str(caught.value)


def test_a_site_moves_to_another_block() -> None:
    assert Site.parse("blocks.3.attn.q").at(7) == Site(7, "attn.q")
    with pytest.raises(SpecError, match="stands in no block"):
        Site.parse("logits").at(1)
    with pytest.raises(SpecError, match="negative"):
        Site.parse("blocks.3.attn.q").at(-1)
    with pytest.raises(SpecError, match="Unknown site"):
        Site(None, "resid_poster")


def test_axes() -> None:
    assert Site(0, "attn.pattern").axes == ("batch", "head", "query", "key")
    assert Site(0, "attn.pattern").is_attention_matrix
    assert Site(0, "attn.result").has_heads
    assert not Site(0, "resid_post").has_heads
    assert Site(0, "resid_post").has_tokens
    assert not Site(None, "logits").has_tokens
    assert not Site(None, "embed").is_block


def test_patterns_expand_in_order() -> None:
    names = site_names(12)
    assert expand("blocks.*.resid_post", names) == [f"blocks.{layer}.resid_post" for layer in range(12)]
    assert expand("blocks.*.hook_resid_post", names) == expand("blocks.*.resid_post", names)
    assert expand("blocks.[0-2].attn.?", names[::-1])[0] == "blocks.2.attn.z"
    assert expand("*", names) == names
    assert expand("logits", names) == ["logits"]


def test_patterns_that_match_nothing_say_what_there_is() -> None:
    with pytest.raises(SpecError) as caught:
        expand("blocks.*.resid_pots", site_names(2))
    assert "matches no site. Close matches: blocks.*.resid_post" in str(caught.value)
    assert "Available (layers 0 to 1): embed, blocks.{layer}.resid_pre" in str(caught.value)
    with pytest.raises(SpecError, match=r"No site 'blocks.7.resid_post' here\. Close matches: "):
        expand("blocks.7.resid_post", site_names(2))
    with pytest.raises(SpecError, match="means something else"):
        expand("blocks.*.attn.hook_q", site_names(2))
