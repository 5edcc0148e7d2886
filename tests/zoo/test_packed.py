"""Towers that pack images into one sequence: patches as their processors cut them, tokens row-major, windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.image_utils import SizeDict

import vit_mechinterp as vmi
from tests.zoo.packed_models import PACKED
from tests.zoo.transformers_models import build
from vit_mechinterp.errors import ExecutionError, SpecError, UnsupportedSiteError

pytestmark = pytest.mark.zoo

SIZES = {"min_pixels": 1, "max_pixels": 10**6}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2VisionTransformerPretrainedModel": ("Qwen2VLImageProcessor", SIZES),
    "Qwen2_5_VisionTransformerPretrainedModel": ("Qwen2VLImageProcessor", SIZES),
    "Qwen3VLVisionModel": ("Qwen2VLImageProcessor", SIZES),
    "Qwen3_5VisionModel": ("Qwen2VLImageProcessor", SIZES),
    "CohereCompassVisionModel": ("CohereCompassImageProcessor", SIZES),
    "Glm4vVisionModel": ("Glm4vImageProcessor", {}),
    "Glm5NextVisionModel": ("Glm5NextImageProcessor", {}),
    "GlmImageVisionModel": ("GlmImageImageProcessor", {"merge_size": 1, "temporal_patch_size": 1}),
    "Ernie4_5_VLMoeVisionTransformerPretrainedModel": (
        "Ernie4_5_VLMoeImageProcessor",
        {"temporal_patch_size": 1},
    ),
    "Kimi_K25VisionModel": ("Kimi_K25ImageProcessor", {}),
    "MuseGlimmerVisionModel": ("MuseGlimmerImageProcessor", {}),
    "PaddleOCRVisionModel": ("PaddleOCRVLImageProcessor", {}),
    "VideoLlama3VisionModel": ("VideoLlama3ImageProcessor", {}),
    "MiniMaxM3VLVisionModel": ("MiniMaxM3VLImageProcessor", {}),
    "Cosmos3EdgeVisionModel": ("Cosmos3EdgeImageProcessor", {}),
    "HunYuanVLVisionTransformer": ("HunYuanVLImageProcessor", {}),
    "Inkling2VisionModel": ("Inkling2ImageProcessor", {"size": {"height": 8, "width": 8}}),
}
WINDOWED = [
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen2_5OmniVisionEncoder",
    "Exaone4_5_VisionModel",
    "MuseGlimmerVisionModel",
]


def noise(vit: vmi.HookedViT, n: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(n, *vit.layout.tokens.input_shape, generator=torch.Generator().manual_seed(seed))


def native(vit: vmi.HookedViT, x: Tensor) -> Any:
    args, kwargs = vit.layout.family.inputs(vit.module, x)
    return vit.module(*args, **kwargs)


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_patches_are_what_the_tower_s_own_processor_cuts(name: str) -> None:
    vit = vmi.wrap(build(name))
    x = noise(vit, 2)
    kind, options = PROCESSORS[name]
    made = getattr(transformers, kind)(patch_size=4, **options)
    given = made(
        images=list(x), do_resize=False, do_rescale=False, do_normalize=False, do_pad=True, return_tensors="pt"
    )
    pixels, grid = given["pixel_values"], given.get("image_grid_thw", given.get("grid_thw"))
    ours, _ = vit.layout.family.inputs(vit.module, x)
    assert torch.equal(ours[0].reshape(pixels.shape), pixels)
    assert torch.equal(ours[1], torch.as_tensor(grid))
    output = vit.module(pixels.reshape(ours[0].shape), torch.as_tensor(grid), *ours[2:])
    assert torch.equal(vit(x).flatten(), output[vit.layout.output].flatten())


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_pictures_of_the_right_size_become_the_processor_s_own_patches(name: str) -> None:
    vit = vmi.wrap(build(name))
    height, width = vit.layout.tokens.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(pixels.numpy())
    kind, options = PROCESSORS[name]
    given = getattr(transformers, kind)(patch_size=4, **options)(
        images=[picture], do_resize=False, return_tensors="pt"
    )
    ours, _ = vit.layout.family.inputs(vit.module, vit.preprocess([picture]))
    assert torch.equal(ours[0].flatten(), given["pixel_values"].flatten())
    other = vit.preprocess([picture.resize((50, 30)), picture])
    assert other.shape == (2, 3, height, width)
    assert torch.equal(vit.preprocess([picture])[0], other[1])
    box = vit.preprocess.geometry.map_box((0, 0, 25, 30), (50, 30))
    assert box == (0, 0, width / 2, height)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Kosmos2_5VisionModel", "Kosmos2_5ImageProcessor"), ("Pix2StructVisionModel", "Pix2StructImageProcessor")],
)
@torch.no_grad()
def test_numbered_patches(name: str, kind: str) -> None:
    vit = vmi.wrap(build(name))
    x = noise(vit)
    size = SizeDict(height=4, width=4)
    made = getattr(transformers, kind)().extract_flattened_patches(x, max_patches=24, patch_size=size)
    patches = made[0] if isinstance(made, tuple) else made
    ours, _ = vit.layout.family.inputs(vit.module, x)
    torch.testing.assert_close(ours[0], patches, rtol=0, atol=1e-6)
    assert torch.equal(vit(x), vit.module(ours[0], torch.ones(1, 24)).last_hidden_state)


@torch.no_grad()
def test_patches_and_positions_of_gemma4() -> None:
    vit = vmi.wrap(build("Gemma4VisionModel"))
    x = noise(vit, 2).sigmoid()
    kind = transformers.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    given = kind(
        images=list(x), do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    ours, _ = vit.layout.family.inputs(vit.module, x)
    n = vit.layout.tokens.n_patches
    assert torch.equal(ours[0], given["pixel_values"][:, :n])
    assert torch.equal(ours[1], given["image_position_ids"][:, :n])
    assert torch.equal(vit(x).flatten(0, 1), vit.module(*ours).last_hidden_state)


@torch.no_grad()
def test_patches_of_molmo2() -> None:
    from transformers.models.molmo2 import image_processing_molmo2 as processing

    vit = vmi.wrap(build("Molmo2VisionModel"))
    x = noise(vit, 2)
    patches = processing.batch_pixels_to_patches(x.permute(0, 2, 3, 1), 4)
    ours, _ = vit.layout.family.inputs(vit.module, x)
    assert torch.equal(ours[0], patches)


def places_of_patches(vit: vmi.HookedViT, x: Tensor) -> list[int]:
    """Where every patch of an image, row-major, stands in the sequence that the first block is given."""
    seen: list[Tensor] = []
    block = vit.module.get_submodule(vit.layout.block_path(0))
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).clone()))
    places = []
    (rows, columns), (height, width) = vit.layout.tokens.grid, vit.layout.tokens.patch_size
    native(vit, x)
    for row in range(rows):
        for column in range(columns):
            other = x.clone()
            other[..., row * height : (row + 1) * height, column * width : (column + 1) * width] += 1
            native(vit, other)
            moved = (seen[-1] != seen[0]).any(dim=-1).nonzero()
            assert len(moved) == 1
            places.append(int(moved))
    hook.remove()
    return places


@contextmanager
def calls_of_attention() -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """What the model itself hands to the fused kernel: q and k, and the scale, call by call."""
    calls: list[tuple[Tensor, Tensor, float]] = []
    kernel = F.scaled_dot_product_attention

    def noting(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((query, key, kwargs["scale"]))
        return kernel(query, key, *args, **kwargs)

    F.scaled_dot_product_attention = noting
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = kernel


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_tokens_are_row_major_at_every_kind_of_site(name: str) -> None:
    vit = vmi.wrap(build(name))
    x = noise(vit)
    places = places_of_patches(vit, x)
    assert sorted(places) == [len(vit.layout.tokens.prefix) + i for i in range(vit.layout.tokens.n_patches)]
    posts: list[Tensor] = []
    hooks = [
        vit.module.get_submodule(vit.layout.block_path(layer)).register_forward_hook(
            lambda module, args, output: posts.append(output.flatten(0, -2))
        )
        for layer in range(3)
    ]
    with calls_of_attention() as calls:
        native(vit, x)
    for hook in hooks:
        hook.remove()
    sites = ("resid_post", "attn.q", "attn.pattern")
    captures = [vit.run(x, capture=[f"blocks.*.{site}"])[1] for site in sites]
    first = len(vit.layout.tokens.prefix)
    for layer in range(3):
        values = [
            cache[f"blocks.{layer}.{site}"][0] for cache, site in zip(captures, sites, strict=True)
        ]
        assert torch.equal(values[0][first:], posts[layer][places])
        chunks = list(_chunks_of_layer(calls, vit.layout.tokens.n_tokens, layer))
        queries = torch.cat([query[0] for query, _, _ in chunks], dim=1).transpose(0, 1)
        assert torch.equal(values[1][first:], queries[places])
        parts = [_softmax(*chunk) for chunk in chunks]
        heads = torch.stack([torch.block_diag(*(part[head] for part in parts)) for head in range(4)])
        wanted = heads[:, places][:, :, places]
        torch.testing.assert_close(values[2][:, first:, first:], wanted, rtol=0, atol=1e-6)


def _chunks_of_layer(
    calls: list[tuple[Tensor, Tensor, float]], n_tokens: int, layer: int
) -> Iterator[tuple[Tensor, Tensor, float]]:
    seen = 0
    for call in calls:
        if seen // n_tokens == layer:
            yield call
        seen += call[0].shape[2]


def _softmax(query: Tensor, key: Tensor, scale: float) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query @ key.transpose(-2, -1) * scale).softmax(dim=-1)[0]


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_patterns_are_zero_outside_windows(name: str) -> None:
    vit = vmi.wrap(build(name))
    _, cache = vit.run(noise(vit), capture=["blocks.*.attn.pattern", "blocks.0.attn.scores"])
    inside = cache["blocks.0.attn.pattern"][0, 0] > 0
    assert not inside.all()
    assert torch.equal(torch.isfinite(cache["blocks.0.attn.scores"][0, 0]), inside)
    assert (cache["blocks.1.attn.pattern"] > 0).all()
    # The windows are squares of the image: tokens of one corner see each other, whatever their order.
    side = 3 if name.startswith("Muse") else 4
    windows = torch.arange(4)[:, None] // side * 2 + torch.arange(6) // side
    assert torch.equal(inside, windows.flatten()[:, None] == windows.flatten())


@torch.no_grad()
def test_rows_join_inside_windows_too() -> None:
    vit = vmi.wrap(build("Qwen2_5_VisionTransformerPretrainedModel"))
    base, source = noise(vit, 3), noise(vit, 3, seed=1)
    sites = [f"blocks.{layer}.{site}" for layer in range(3) for site in ("resid_post", "attn.z", "mlp_out")]
    runs = [
        vmi.Run(name=s, interventions=[vmi.Interchange(site=s, tokens=[9], source="source")]) for s in sites
    ]
    plan = vmi.plan(vit, runs, data={"base": base, "source": source})
    assert plan.block_evaluations < plan.naive_block_evaluations
    results = vmi.execute(vit, runs, {"base": base, "source": source}, progress=False)
    _, other = vit.run(source, capture=sites)
    for site, outputs in zip(sites, results.logits, strict=True):

        def exchange(value: Tensor, site: str = site) -> Tensor:
            return value.index_copy(1, torch.tensor([9]), other[site][:, [9]])

        with vit.hooks({site: exchange}):
            wanted = vit(base)
        torch.testing.assert_close(outputs, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
        assert not torch.equal(wanted, vit(base))


def test_gradients_pass_through_the_order_of_tokens() -> None:
    vit = vmi.wrap(build("Qwen2_5_VisionTransformerPretrainedModel"))
    output, cache = vit.run(noise(vit, 2), capture=["blocks.0.attn.q", "blocks.1.resid_post"])
    output.square().sum().backward()
    for site in ("blocks.0.attn.q", "blocks.1.resid_post"):
        (found,) = torch.autograd.grad(vit.run(noise(vit, 2), capture=[site])[0].sum(), [vit.module.merger.ln_q.weight])
        assert found.abs().max() > 0
    value, (grown, kept) = cache["blocks.1.resid_post"], vit.run(noise(vit, 2), capture=["blocks.1.resid_post"])
    (gradient,) = torch.autograd.grad(grown.square().sum(), kept["blocks.1.resid_post"])
    assert gradient.shape == value.shape
    assert gradient.abs().sum(dim=-1).min() > 0


def test_images_of_other_sizes() -> None:
    module = build("Qwen3VLVisionModel")
    vit = vmi.wrap(module, image_size=(24, 32))
    assert vit.layout.tokens.grid == (6, 8)
    with torch.no_grad():
        assert vit(noise(vit)).shape == (1, 12, 40)
    with pytest.raises(SpecError, match=r"whole groups of 2 x 2 patches, in pixels multiples of 8 x 8, not 20 x 24"):
        vmi.wrap(module, image_size=(20, 24))


def test_towers_of_no_image_size_are_laid_out_for_448_pixels() -> None:
    config = transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
        depth=1, embed_dim=32, num_heads=2, hidden_size=40
    )
    module = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)
    assert vmi.wrap(module.eval()).layout.tokens.grid == (32, 32)


def test_eager_attention_is_refused() -> None:
    module = build("Qwen2VisionTransformerPretrainedModel")
    module.set_attn_implementation("eager")
    vit = vmi.wrap(module)
    with pytest.raises(ExecutionError, match="Use fused attention"):
        vit.run(noise(vit), capture=["blocks.0.attn.q"])
    vit.run(noise(vit), capture=["blocks.0.resid_post"])


def test_what_has_no_inside_says_why() -> None:
    vit = vmi.wrap(build("Dots3NoteVisionModel"))
    with pytest.raises(UnsupportedSiteError, match="its MLP is a Dots3NoteVisionMoE"):
        vit.run(noise(vit), capture=["blocks.1.mlp.post"])
    vit = vmi.wrap(build("MuseGlimmerVisionModel"))
    with pytest.raises(UnsupportedSiteError, match="out of their windows"):
        vit.run(noise(vit), capture=["ln_final"])


def test_older_towers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("Qwen2VisionTransformerPretrainedModel")
    monkeypatch.setattr("vit_mechinterp.adapters.transformers_packed.find_spec", lambda name: None)
    with pytest.raises(vmi.errors.UnsupportedModelError, match="with transformers 4 it is not covered"):
        vmi.wrap(module)


def test_a_tower_with_other_parts_is_no_tower_of_this_family() -> None:
    module = build("Qwen2VisionTransformerPretrainedModel")
    module.another = nn.Linear(2, 2)
    with pytest.raises(vmi.errors.UnsupportedModelError, match="also holds 'another'"):
        vmi.wrap(module)
