"""Runs as `IntervenableConfig`, and back, for what both can say.

Both can say: interchange, interchange in a subspace, addition of one direction, zeroing, each at whole tokens
of what enters or leaves a module. pyvene's configuration does not hold tokens and images: they are arguments
of its call, and stand beside it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyvene as pv
import torch
from torch import Tensor

from vit_mechinterp.bridges.boundaries import whole_port
from vit_mechinterp.bridges.pyvene import intervenable
from vit_mechinterp.bridges.pyvene_rotations import to_rotation, to_subspace
from vit_mechinterp.bridges.restoring import as_it_came
from vit_mechinterp.engine.binding.bind import bind
from vit_mechinterp.engine.binding.bound import Edit
from vit_mechinterp.engine.binding.tensors import check_tensors, resolve_refs
from vit_mechinterp.engine.binding.values import ColumnOrigin
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Ablate, AddDirection, InjectSubspace, Interchange, Intervention, Run

__all__ = ["PyveneRun", "from_config", "to_config"]


@dataclass(frozen=True)
class PyveneRun:
    """A run as pyvene says it: a configuration, and the arguments of one call on all examples.

    Args:
        config: an `IntervenableConfig`, of interventions as instances.
        base: the base images' column.
        sources: the source images' column of every representation, or None.
        unit_locations: positions on the token axis, as pyvene takes them.
    """

    config: Any
    base: str
    sources: tuple[str | None, ...]
    unit_locations: Mapping[str, Any]

    def __call__(self, vit: HookedViT, data: Any) -> Tensor:
        """The run's output on all examples, by pyvene; the model is left as it came."""
        columns = Data(data, vit)
        every = range(columns.n)
        with vit.lock, as_it_came(vit.module), torch.no_grad():
            model = intervenable(vit, self.config)
            model.interventions.to(vit.device)
            base, *sources = (
                None if name is None else {"images": columns.images(name, every)}
                for name in (self.base, *self.sources)
            )
            _, native = model(base, sources, dict(self.unit_locations))
        return vit.layout.outcome(native).float().cpu()


def to_config(vit: HookedViT, run: Run, data: Any, tensors: Mapping[str, Tensor] | None = None) -> PyveneRun:
    """A run as pyvene says it.

    Args:
        vit: the model that it is for.
        run: interventions that pyvene has words for; captures are left out.
        data: the examples whose tokens are selected.
        tensors: tensors that the run names.

    Raises:
        SpecError: pyvene cannot say it, and why.
    """
    columns = Data(data, vit)
    bound = bind(vit, [run], columns)
    resolved = resolve_refs(bound, tensors, vit)
    check_tensors(bound, resolved, vit, columns.n)
    representations, origins, there, here = [], [], [], []
    for edit in bound.runs[0].edits:
        port = whole_port(vit, edit.site, "pyvene")
        own = {field: resolved[ref].detach().cpu() for field, ref in edit.refs}
        representations.append(
            {"component": f"{port.path}.{port.side}", "unit": "pos", "intervention": _intervention(edit, own)}
        )
        origins.append(_origin(edit))
        here.append(_locations(vit, edit, edit.positions, columns.n))
        positions = edit.positions if edit.source is None else edit.source.positions
        there.append(_locations(vit, edit, positions, columns.n))
    config = pv.IntervenableConfig(representations)
    return PyveneRun(config, run.base, tuple(origins), {"sources->base": (there, here)})


def _intervention(edit: Edit, tensors: Mapping[str, Tensor]) -> Any:
    spec = edit.spec
    if spec.heads is not None or not edit.keys.is_all or getattr(spec, "choose", None) is not None:
        raise _unsaid(edit, "heads, keys and choices have no words in a configuration")
    if isinstance(spec, Interchange):
        return pv.VanillaIntervention()
    if isinstance(spec, AddDirection):
        direction = spec.alpha * tensors["vector"]
        if direction.ndim != 1:
            raise _unsaid(edit, "a direction per token has no word in a configuration")
        return pv.AdditionIntervention(source_representation=direction)
    if isinstance(spec, InjectSubspace) and spec.source is not None:
        if tensors["basis"].ndim != 2:
            raise _unsaid(edit, "a basis per token has no word in a configuration")
        if "gate" in tensors and edit.positions.most != 1:
            raise _unsaid(edit, "pyvene's masks take one token per example")
        return to_rotation(tensors["basis"], tensors.get("gate"))
    if isinstance(spec, Ablate) and spec.method == "zero":
        return pv.ZeroIntervention()
    raise _unsaid(edit, "its words are interchange, subspaces with a source, addition and zero")


def _origin(edit: Edit) -> str | None:
    if edit.source is None:
        return None
    if not isinstance(edit.source.origin, ColumnOrigin) or edit.source.origin.permutation is not None:
        raise _unsaid(edit, "sources are other images in a configuration, not other runs")
    if edit.source.site != edit.site:
        raise _unsaid(edit, "base and source are read at one place in a configuration")
    return edit.source.origin.column


def _locations(vit: HookedViT, edit: Edit, positions: Any, n: int) -> list[list[int]]:
    """Positions of every example; pyvene gathers them into one tensor."""
    if not edit.site.has_tokens:
        raise _unsaid(edit, "there is no token axis, and pyvene gathers along one")
    every = list(range(vit.layout.tokens.n_tokens))
    rows = [every if (own := positions.of(example)) is None else list(own) for example in range(n)]
    if len({len(row) for row in rows}) > 1:
        raise _unsaid(edit, "examples select different numbers of tokens, and pyvene takes equally many")
    return rows


def _unsaid(edit: Edit, why: str) -> SpecError:
    return SpecError(f"{edit.where}: pyvene cannot say this: {why}.")


def from_config(
    vit: HookedViT,
    config: Any,
    name: str = "pyvene",
    tokens: Any = "all",
    source: str = "source",
    source_tokens: Any = None,
) -> tuple[Run, dict[str, Tensor]]:
    """A configuration as a run of ours, and the tensors that it names (``basis_0``, ...).

    Args:
        vit: the model whose components it names.
        config: an `IntervenableConfig` of interventions given as instances, or as types without parameters.
        name: the run's name.
        tokens: the tokens of every representation, as our specs select them, or a list of one each.
        source: the column of source images.
        source_tokens: where the source's differ; one selector, or a list of one each.

    Raises:
        SpecError: a component is no site of the model, an intervention is none of ours, or the configuration
            selects other units than tokens, parts of a space, or runs its sources one after another.
    """
    if config.mode != "parallel":
        raise SpecError(f"mode={config.mode!r}: runs of a serial configuration read each other; name them.")
    places = _places(vit)
    specs: list[Intervention] = []
    tensors: dict[str, Tensor] = {}
    for n, representation in enumerate(config.representations):
        component = representation.component.replace("[", ".").replace("]", "")
        if component not in places:
            raise SpecError(
                f"{representation.component!r} is no site of {type(vit.module).__name__}."
                f"{suggest(component, places)} Components are a module's path with .input or .output."
            )
        if representation.unit != "pos" or representation.subspace_partition is not None:
            raise SpecError(
                f"{representation.component}: unit={representation.unit!r} and subspace_partition="
                f"{representation.subspace_partition!r} have no words in a run. The unit is 'pos'."
            )
        fields: dict[str, Any] = {"site": places[component], "tokens": _nth(tokens, n)}
        sourced = {**fields, "source": source, "source_tokens": _nth(source_tokens, n)}
        theirs = _instance(config, n)
        if isinstance(theirs, pv.VanillaIntervention):
            specs.append(Interchange.model_validate(sourced))
        elif isinstance(theirs, pv.ZeroIntervention):
            specs.append(Ablate.model_validate(fields))
        elif isinstance(theirs, pv.AdditionIntervention) and theirs.source_representation is not None:
            tensors[f"vector_{n}"] = theirs.source_representation.detach().float().cpu()
            specs.append(AddDirection.model_validate({**fields, "vector": f"vector_{n}"}))
        else:
            subspace = to_subspace(theirs)
            tensors |= {f"{field}_{n}": tensor for field, tensor in subspace.items()}
            specs.append(InjectSubspace.model_validate({**sourced, **{f: f"{f}_{n}" for f in subspace}}))
    return Run(name=name, interventions=tuple(specs)), tensors


def _instance(config: Any, n: int) -> Any:
    """The intervention of a representation; one without parameters may be given by its type."""
    one, types = config.representations[n], config.intervention_types
    if one.intervention is not None:
        return one.intervention
    kind = types[n] if isinstance(types, Sequence) else types
    if kind not in (pv.VanillaIntervention, pv.ZeroIntervention):
        raise SpecError(
            f"{one.component}: {kind.__name__} is given by its type alone, without what it was trained to. "
            "Pass the instance: {'component': ..., 'intervention': model.interventions[key]}."
        )
    return kind()


def _nth(value: Any, n: int) -> Any:
    return value[n] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _places(vit: HookedViT) -> dict[str, str]:
    """Sites by the component that pyvene would call them; the first site of a place is meant."""
    found: dict[str, str] = {}
    for name in vit.site_names():
        try:
            port = whole_port(vit, name, "pyvene")
        except SpecError:
            continue
        found.setdefault(f"{port.path}.{port.side}", name)
    return found
