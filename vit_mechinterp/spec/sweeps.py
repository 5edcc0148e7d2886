"""Sweeps: many runs written as one, the product of some axes."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, StrictBool, model_validator
from pydantic_core import to_jsonable_python

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.spec.base import SpecModel, as_index
from vit_mechinterp.spec.ops import Intervention, Interventions
from vit_mechinterp.spec.runs import Captures, Run
from vit_mechinterp.spec.sites import Site

__all__ = ["Sweep"]

Axis: TypeAlias = Literal["all"] | list[JsonValue] | dict[str, JsonValue]


def _axes(value: Any) -> Any:
    """Bring the axes into their JSON form, so that a sweep equals its own document read back."""
    if not isinstance(value, Mapping):
        raise SpecError(
            f"'over' is a mapping from axis to values, such as {{'layer': 'all'}}; got {value!r}."
        )
    axes: dict[str, Any] = {}
    for axis, values in value.items():
        if values == "all" and axis == "layer":
            axes[axis] = "all"
        elif isinstance(values, Mapping):
            axes[axis] = {str(label): _plain(item) for label, item in values.items()}
        elif isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
            axes[axis] = [_plain(item) for item in values]
        else:
            hint = " or 'all'" if axis == "layer" else ""
            raise SpecError(
                f"Axis {axis!r} takes a list of values, a mapping from label to value{hint}; got {values!r}."
            )
        if not axes[axis]:
            raise SpecError(f"Axis {axis!r} is empty, so the sweep has no runs.")
    if not axes:
        raise SpecError("'over' names no axis; a single run is a Run.")
    return axes


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    return to_jsonable_python(value.item() if hasattr(value, "item") else value)


class Sweep(SpecModel):
    """The runs of a product of axes, each a changed copy of the same interventions.

    ``over`` maps an axis to its values, in order (the last axis varies fastest):

    * ``layer``: a list of layers, or ``"all"``; moves every intervention whose site stands in a block;
    * the name of a field (``tokens``, ``heads``, ``alpha``, ``site``, ...): a list, or ``{label: value}``;
      set on every intervention that has the field;
    * any other name: ``{label: {field: value, ...}}``; sets several fields at once (``layer`` counts as a
      field).

    ``name`` is a format string over the axes, filled with labels: the keys of a mapping, or the values of a
    list as text. The site that an intervention is written with only says what moves: its layer is replaced.
    """

    name: str = Field(default="layer{layer}", min_length=1)
    interventions: Interventions
    base: str = Field(default="base", min_length=1)
    capture: Captures = ()
    output: StrictBool = True
    over: Annotated[dict[str, Axis], BeforeValidator(_axes, json_schema_input_type=dict[str, Axis])]

    @model_validator(mode="after")
    def _every_run_is_valid(self) -> Self:
        if not self.interventions:
            raise SpecError(f"The sweep {self.name!r} has no interventions, so there is nothing to change.")
        used = self._name_fields()
        for axis in used:
            if axis not in self.over:
                raise SpecError(
                    f"The name {self.name!r} uses {{{axis}}}, which is no axis.{suggest(axis, self.over)} "
                    f"Axes: {', '.join(self.over)}."
                )
        unused = [axis for axis in self.over if axis not in used]
        if unused:
            wanted = self.name + "".join(f"-{{{axis}}}" for axis in unused)
            raise SpecError(
                f"The name {self.name!r} does not tell the values of {', '.join(unused)} apart: "
                f"write for example {wanted!r}."
            )
        self._product(n_layers=None)
        return self

    def runs(self, n_layers: int) -> list[Run]:
        """Return the runs for a model of ``n_layers`` blocks; SpecError if a layer lies beyond them."""
        return self._product(as_index(n_layers))

    def _product(self, n_layers: int | None) -> list[Run]:
        axes = [self._points(axis, values, n_layers) for axis, values in self.over.items()]
        runs: dict[str, Run] = {}
        for point in itertools.product(*axes):
            labels = {axis: label for axis, (label, _) in zip(self.over, point, strict=True)}
            name = self._named(labels)
            if name in runs:
                raise SpecError(
                    f"Two runs of the sweep would be called {name!r}; give the values distinct labels."
                )
            changes: dict[str, Any] = {}
            for _, fields in point:
                if twice := sorted(changes.keys() & fields.keys()):
                    raise SpecError(f"Run {name!r}: two axes of the sweep set {', '.join(twice)}.")
                changes.update(fields)
            runs[name] = Run(
                name=name,
                interventions=self._changed(changes, name),
                base=self.base,
                capture=self.capture,
                output=self.output,
            )
        return list(runs.values())

    def _points(self, axis: str, values: Any, n_layers: int | None) -> list[tuple[Any, dict[str, Any]]]:
        """Return (label, {field: value}) for every value of an axis."""
        if values == "all":
            values = range(1 if n_layers is None else n_layers)
        pairs = (
            list(values.items())
            if isinstance(values, Mapping)
            else [(_label(axis, item), item) for item in values]
        )
        own = axis in self._fields()
        points = [
            (label, {axis: item} if own else self._fields_at(axis, label, item)) for label, item in pairs
        ]
        for label, fields in points:
            if "layer" in fields:
                layer = as_index(fields["layer"])
                if n_layers is not None and layer >= n_layers:
                    raise SpecError(
                        f"Sweep {self.name!r}, {axis}={label}: the model has layers 0 to {n_layers - 1}."
                    )
        return points

    def _fields_at(self, axis: str, label: object, item: Any) -> dict[str, Any]:
        options = sorted(self._fields())
        if not isinstance(item, Mapping):
            raise SpecError(
                f"Axis {axis!r} is no field of these interventions, so each of its labels needs a mapping "
                f"{{field: value}}; got {item!r}.{suggest(axis, options)} Fields: {', '.join(options)}."
            )
        for field in item:
            if field not in options:
                raise SpecError(
                    f"over.{axis}.{label}: no intervention has a field {field!r}.{suggest(field, options)} "
                    f"Fields: {', '.join(options)}."
                )
        return dict(item)

    def _fields(self) -> set[str]:
        return {"layer"} | {field for entry in self.interventions for field in type(entry).model_fields} - {
            "op"
        }

    def _changed(self, changes: Mapping[str, Any], name: str) -> tuple[Intervention, ...]:
        moved = [self._changed_one(entry, changes) for entry in self.interventions]
        if "layer" in changes and not any(Site.parse(entry.site).is_block for entry in moved):
            raise SpecError(f"Run {name!r} sweeps over the layer, and no intervention stands in a block.")
        return tuple(moved)

    @staticmethod
    def _changed_one(entry: Intervention, changes: Mapping[str, Any]) -> Intervention:
        fields = {field: value for field, value in changes.items() if field in type(entry).model_fields}
        layer = changes.get("layer")
        in_block = Site.parse(fields.get("site", entry.site)).is_block
        return entry.at(layer=layer if in_block else None, **fields)

    def _name_fields(self) -> list[str]:
        try:
            return [field for _, field, _, _ in string.Formatter().parse(self.name) if field is not None]
        except ValueError as error:
            raise self._no_format(error) from None

    def _named(self, labels: Mapping[str, Any]) -> str:
        try:
            return self.name.format_map(labels)
        except ValueError as error:
            raise self._no_format(error) from None

    def _no_format(self, error: ValueError) -> SpecError:
        return SpecError(f"The name {self.name!r} is no format string ({error}). Write an axis as {{axis}}.")


def _label(axis: str, value: Any) -> Any:
    """Return what stands for a listed value in the name of its run."""
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, list) and value:
        return "+".join(str(_label(axis, item)) for item in value)
    if isinstance(value, dict) and len(value) == 1:
        return str(_label(axis, next(iter(value.values()))))
    raise SpecError(f"Axis {axis!r}: {value!r} needs a label, written {{label: value}}.")
