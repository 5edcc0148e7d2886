"""One tiny model, a few examples and given tensors, known to the engine and to the oracle alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.oracles import Oracle
from tests.tiny_models import N_LAYERS, Tiny
from vit_mechinterp import HookedViT, Results, Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.engine.binding.bind import bind
from vit_mechinterp.engine.binding.tensors import resolve_refs
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.scheduling import drafting
from vit_mechinterp.engine.scheduling.cutting import schedule_for
from vit_mechinterp.engine.scheduling.footprint import footprint
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.errors import SpecError

TOLERANCE = 1e-5
"""Of the output's scale."""

BLOCK_SITES = (
    "resid_pre", "ln1", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z", "attn.result", "attn_out",
    "resid_mid", "ln2", "mlp.pre", "mlp.pre_linear", "mlp.post", "mlp_out", "resid_post",
)  # fmt: skip
HEAD_SITES = ("attn.q", "attn.k", "attn.v", "attn.z", "attn.scores", "attn.pattern", "attn.result")


class World:
    """A tiny model with ``n`` examples.

    Columns: images ``base`` and ``source``; per example ``here`` and ``there`` (three patches), ``kind`` (0 to 3), ``box`` and
    ``source_box`` (pixels, of varying size), ``label``. Tensors are found by name for any number of features d:
    ``direction.d``, ``rows.k.d``, ``flat.k.d``, ``kinds.d``, ``kinds.k.d``, ``basis.d``, ``bases.k.d``, ``gate``, ``gates.k``, ``point``, ``points``,
    ``mean.SITE``, ``pooled.SITE``.
    """

    def __init__(self, tiny: Tiny, n: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.tiny, self.n = tiny, n
        self.module: nn.Module = tiny.module(dtype)
        self.vit: HookedViT = vmi.wrap(self.module)
        draw = torch.Generator().manual_seed(seed)
        patches = tiny.grid[0] * tiny.grid[1]
        height, width = tiny.image_size
        x0, y0 = (torch.randint(0, size - 12, (n,), generator=draw) for size in (width, height))
        sides = torch.randint(2, 12, (2, n), generator=draw)
        self.columns: dict[str, Any] = {
            "base": tiny.images(n, seed + 1),
            "source": tiny.images(n, seed + 2),
            "here": torch.stack([torch.randperm(patches, generator=draw)[:3] for _ in range(n)]),
            "there": torch.stack([torch.randperm(patches, generator=draw)[:3] for _ in range(n)]),
            "kind": torch.randint(0, 4, (n,), generator=draw),
            "box": torch.stack([x0, y0, x0 + sides[0], y0 + sides[1]], dim=1),
            "source_box": torch.stack([x0 // 2, y0 // 2, x0 // 2 + sides[0], y0 // 2 + sides[1]], dim=1),
            "label": torch.arange(n) % 2,
        }
        self.tensors = _Tensors(self)
        self.oracle = Oracle(tiny, self.module, self.columns, self.tensors)

    @cached_property
    def sites(self) -> list[str]:
        """Every site of the model, in forward order."""
        blocks = [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in BLOCK_SITES]
        names = ["embed", *blocks, "ln_final", "pooled", "logits"]
        return [
            name
            for name in names
            if name.split(".", 2)[-1] not in self.tiny.missing and name not in self.tiny.missing
        ]

    def shape(self, site: str) -> tuple[int, ...]:
        """Shape of a site for one example, as the oracle sees it."""
        return tuple(self.oracle.clean("base")[1][site].shape[1:])

    def execute(self, documents: Iterable[Mapping[str, Any]], **options: Any) -> Results:
        """What the engine makes of documents; ``progress`` is off."""
        documents = list(documents)
        runs = [Run.model_validate(document) for document in documents]
        options = {"progress": False, "tensors": self.named(documents), **options}
        return vmi.execute(self.vit, runs, options.pop("data", self.columns), **options)

    def named(self, documents: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The tensors that documents name."""
        fields = ("vector", "basis", "gate", "vectors", "mean")
        edits = [edit for document in documents for edit in document.get("interventions", ())]
        return {name: self.tensors[name] for edit in edits for field in fields if (name := edit.get(field))}

    def schedule(
        self, documents: Iterable[Mapping[str, Any]], chunk: int, rows: int, *, stored: bool = False
    ) -> Schedule:
        """The schedule of an experiment in chunks of so many examples, with so many rows per forward."""
        documents = list(documents)
        runs = [Run.model_validate(document) for document in documents]
        columns = Data(self.columns, self.vit)
        bound = bind(self.vit, runs, columns)
        tensors = resolve_refs(bound, self.named(documents), self.vit)
        return replace(schedule_for(self.vit, bound, columns, rows, tensors=tensors, stored=stored), chunk=chunk)

    def memory(self, documents: Iterable[Mapping[str, Any]], chunk: int, rows: int, *, stored: bool = False) -> int:
        """A budget that cuts an experiment into chunks of so many examples, with so many rows per forward. (About so many,
        where rows go on from others: what they hold of them depends on the chunk.)"""
        held = max(
            (footprint(self.vit, self.schedule(documents, size, rows, stored=stored)) for size in (chunk, self.n)),
            key=lambda own: own.example,
        )
        return held.peak(chunk, rows) + held.example // 2

    def one_row(self, runs: Sequence[Run], tensors: Mapping[str, Tensor]) -> str:
        """The smallest budget that a preparation takes: its refusal of a smaller one names it."""
        with pytest.raises(SpecError, match=r"^memory=1 is too little: one row takes \d") as refused:
            prepare(self.vit, runs, self.columns, tensors, memory=1).__enter__()
        return str(refused.value).split(" takes ")[1].rstrip(".")

    @property
    def module_width(self) -> int:
        """Number of features of the residual stream."""
        return self.shape("embed")[-1]

    @property
    def scale(self) -> float:
        """The output's scale."""
        return float(self.oracle.clean("base")[0].abs().max())

    @torch.no_grad()
    def check(
        self,
        documents: Sequence[Mapping[str, Any]],
        results: Results,
        tolerance: float = TOLERANCE,
        effect: float | None = 1e-4,
    ) -> None:
        """Assert that outputs and captures (of whole sites) are the oracle's, and that every run changed every example's output.

        ``effect`` is the least change, as a share of the output's scale; None asks for no change.
        """
        self.oracle.documents = {document["name"]: document for document in documents}
        assert results.logits.dtype == torch.float32
        wrong, idle = [], []
        for document in documents:
            output, values = self.oracle.run(document)
            for site, captured in results.captures[document["name"]].items():
                assert captured.shape == values[site].shape
                size = float(values[site].abs().max())
                if not float((captured - values[site]).abs().max()) <= tolerance * max(size, 1):
                    wrong.append(f"{document['name']}: capture of {site}")
            if not document.get("output", True):
                assert document["name"] not in results.run_names
                continue
            clean = self.oracle.clean(document.get("base", "base"))[0]
            error = float((results[document["name"]] - output).abs().max()) / self.scale
            if not error <= tolerance:
                wrong.append(f"{document['name']}: {error:.2g}")
            change = float((output - clean).flatten(1).abs().amax(1).min()) / self.scale
            if (
                effect is not None
                and document.get("interventions")
                and not change > max(effect, 10 * tolerance)
            ):
                idle.append(f"{document['name']}: {change:.2g}")
        assert not wrong, f"not what the oracle says: {'; '.join(wrong)}"
        assert not idle, f"these runs changed nothing, so they show nothing: {'; '.join(idle)}"


class _Tensors(dict[str, Tensor]):
    """Given tensors, made when they are first asked for."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __missing__(self, name: str) -> Tensor:
        kind, *rest = name.split(".", 1)
        draw = torch.Generator().manual_seed(sum(map(ord, name)))
        if kind in ("mean", "pooled"):
            shape = self.world.shape(rest[0])
            if kind == "pooled" and len(shape) > 1:
                axis = 1 if rest[0].endswith(("scores", "pattern")) else 0
                shape = shape[:axis] + shape[axis + 1 :]
            value = torch.randn(shape, generator=draw)
        elif kind == "basis":
            d = int(rest[0])
            value = torch.linalg.qr(torch.randn(d, min(3, d), generator=draw)).Q
        elif kind == "bases":
            k, d = (int(n) for n in rest[0].split("."))
            value = torch.linalg.qr(torch.randn(k, d, min(3, d), generator=draw)).Q
        elif kind == "gates":
            value = torch.rand(int(rest[0]), 3, generator=draw)
        elif kind == "gate":
            value = torch.tensor([1.0, 0.5, 0.8])
        else:
            numbers = [int(n) for n in rest[0].split(".")]
            sizes = {
                "flat": [numbers[0] * numbers[-1]],
                "kinds": [4, *numbers],
                "kindsflat": [4, numbers[0] * numbers[-1]],
            }
            value = torch.randn(sizes.get(kind, numbers), generator=draw)
        self[name] = value
        return value


class Counted:
    """Counts, with hooks of its own, a module's forwards and the rows that really pass through every block.

    Hooks of other people keep the engine from leaving out what the output does not read. These are taken off while it finds
    out what that is.
    """

    def __init__(self, module: nn.Module) -> None:
        names = ("norm1", "layernorm_before", "layer_norm1")
        self.norms = [m for path, m in module.named_modules() if path.rsplit(".", 1)[-1] in names]
        self.rows = [0] * len(self.norms)
        self.module, self.launches = module, 0

    @property
    def total(self) -> int:
        """(row, block) pairs."""
        return sum(self.rows)

    def __enter__(self) -> Counted:
        def unnoticed(native: Any) -> Any:
            def tried(*args: Any) -> Any:
                self._remove()
                try:
                    return native(*args)
                finally:
                    self._install()

            return tried

        self._patch = pytest.MonkeyPatch()
        for name in ("output_tokens", "follows_from", "handed_on", "by_token", "adding_up"):
            self._patch.setattr(drafting, name, unnoticed(getattr(drafting, name)))
        self._install()
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.undo()
        self._remove()

    def _install(self) -> None:
        def counting(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                self.rows[layer] += len(output)

            return hook

        def launching(module: nn.Module, args: Any) -> None:
            self.launches += 1

        self.handles = [norm.register_forward_hook(counting(n)) for n, norm in enumerate(self.norms)]
        self.handles.append(self.module.register_forward_pre_hook(launching))

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@cache
def world_of(tiny: Tiny, n: int = 3) -> World:
    """A world shared by tests that do not change its model."""
    return World(tiny, n)
