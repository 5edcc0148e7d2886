"""Edits in one spelling: what does the same is written in one way, so that it is found to be equal.

All heads by number are no selection of heads, and all tokens by name none of tokens. Tensors of equal
contents have one name, and a gate of ones is none. Edits of other tokens or other heads at one site can be
made in any order: they stand in one that does not depend on how they were written, and those that could be
one are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, groupby

from torch import Tensor

from vit_mechinterp.engine.binding.alike import Kind, kind_of, tokens_of
from vit_mechinterp.engine.binding.bound import Bound, BoundRun, Edit
from vit_mechinterp.engine.binding.joins import output_before
from vit_mechinterp.engine.binding.ops import BUILT_IN, ablate, inject_subspace, interchange, operator_of
from vit_mechinterp.engine.binding.positions import ALL, Positions, are_disjoint, in_order_of
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.reduction.alone import Alone
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site, TensorRef

__all__ = ["Spelling"]


class Spelling:
    """Writes edits of one experiment in one way.

    Args:
        vit: the model.
        tensors: the given tensors, where they are known.
        alone: finds edits that do the same to each of their tokens.
        handed_on: blocks that are given the output of the one before, or of the embedding, as it is.
        imagined: whether there is no data, so that nobody knows which patches a column selects. Then edits
            are neither put in order nor made one.
    """

    def __init__(
        self,
        vit: HookedViT,
        tensors: Mapping[TensorRef, Tensor] | None,
        alone: Alone,
        handed_on: Callable[[], frozenset[int]],
        *,
        imagined: bool,
    ) -> None:
        self.vit, self.tensors, self.imagined = vit, tensors or {}, imagined
        self.alone, self.handed_on = alone, handed_on
        self._n_tokens = vit.layout.tokens.n_tokens
        self._every = Positions(shared=tuple(range(self._n_tokens)))
        self._names = _one_name_each(self.tensors)
        self._ones = {ref for ref, tensor in self.tensors.items() if bool((tensor == 1).all())}
        self._heads: dict[Site, int] = {}
        self._spelled: dict[int, BoundRun] = {}
        self._joined: dict[tuple[int, ...], tuple[Sequence[Positions], Positions]] = {}
        self._apart: dict[tuple[Positions, Positions], bool] = {}

    def of(self, bound: Bound) -> Bound:
        """The same runs, their edits in one spelling."""
        spelled = {run.name: self._run(run, bound.reads_of[run.name]) for run in bound.runs}
        self._spelled.update((id(run), run) for run in spelled.values())
        return bound.with_runs(spelled)

    def _run(self, run: BoundRun, reads: Iterable[Read]) -> BoundRun:
        if id(run) in self._spelled:
            return run
        edits = [self._edit(edit) for edit in self._by_one_name(run.edits, reads)]
        if not self.imagined and len({edit.site for edit in edits}) < len(edits):
            by_site = groupby(edits, key=lambda edit: edit.site)
            edits = [edit for _, own in by_site for edit in self._at_one_site(list(own), run.origin)]
        return run.with_edits(edits)

    def _by_one_name(self, edits: Sequence[Edit], reads: Iterable[Read]) -> Iterable[Edit]:
        """Edits of a block's input as ones of the output before, if both are edited and neither is read."""
        sites = {edit.site for edit in edits}
        names = {site: output_before(site) for site in sites if site.name == "resid_pre"}
        names = {site: output for site, output in names.items() if output in sites}
        for read in reads if names else ():
            names = {site: output for site, output in names.items() if read.site not in (site, output)}
        # Other operators may make something of where they are.
        strange = {edit.site for edit in edits if operator_of(edit.spec) not in BUILT_IN} if names else set()
        names = {site: own for site, own in names.items() if not {site, own} & strange}
        names = {site: output for site, output in names.items() if site.layer in self.handed_on()}
        return [_at_site(edit, names.get(edit.site, edit.site)) for edit in edits] if names else edits

    def _edit(self, edit: Edit) -> Edit:
        if edit.refs:
            edit = self._with_names(edit)
        if not edit.keys.is_all:
            edit = replace(edit, keys=self._of_all(self._in_order(edit.keys)))
        if operator_of(edit.spec) not in BUILT_IN or edit.carries is not None:
            return edit
        heads = edit.spec.heads
        if heads is not None and self._are_all(heads, edit):
            edit = edit.with_heads(None)
        elif heads is not None and list(heads) != sorted(heads):
            edit = edit.with_heads(tuple(sorted(heads)))
        if edit.positions.ascend or self.imagined or not self.alone.acts(edit):
            return self._without_names_of_all(edit)
        return self._without_names_of_all(self._with_tokens_of([edit]))

    def _without_names_of_all(self, edit: Edit) -> Edit:
        """All tokens by name or number are no selection of tokens, unless others are paired with them."""
        if edit.mean is not None and not edit.mean.positions.is_all:
            mean = replace(edit.mean, positions=self._of_all(self._in_order(edit.mean.positions)))
            edit = replace(edit, mean=mean)
        if not edit.site.has_tokens or not self._of_all(edit.positions).is_all:
            return edit
        source = ALL if edit.source is None else edit.source.positions
        is_paired = not self._of_all(source).is_all
        own = (self._every, source) if is_paired else (ALL, ALL)
        return edit if (edit.positions, source) == own else edit.with_positions(*own)

    def _of_all(self, positions: Positions) -> Positions:
        return ALL if positions.shared == self._every.shared else positions

    def _in_order(self, positions: Positions) -> Positions:
        """A selection whose order means nothing."""
        return positions if positions.ascend or self.imagined else self._together([positions], [positions])

    def _with_names(self, edit: Edit) -> Edit:
        without_gate = operator_of(edit.spec) is inject_subspace
        refs = tuple(
            (field, self._names.get(ref, ref))
            for field, ref in edit.refs
            if not (without_gate and field == "gate" and ref in self._ones)
        )
        return edit if refs == edit.refs else replace(edit, refs=refs)

    def _are_all(self, heads: Sequence[int], edit: Edit) -> bool:
        """Whether these are all heads there are, where an edit is made and where it reads."""
        sites = {edit.site, *(() if edit.source is None else (edit.source.site,))}
        return all(self.n_heads(site) == len(heads) for site in sites)

    def n_heads(self, site: Site) -> int:
        """Number of heads at a site that has heads."""
        if site not in self._heads:
            shape = self.vit.sites()[str(site)].shape
            self._heads[site] = shape[0] if site.is_attention_matrix else shape[1]
        return self._heads[site]

    def _at_one_site(self, edits: list[Edit], base: ColumnOrigin) -> list[Edit]:
        """Edits at one site, in the order in which they act."""
        edits = [own for n, own in enumerate(edits) if n == 0 or not _is_again(edits[n - 1], own)]
        if len(edits) == 1 or not all(map(self.alone.acts, edits)):
            return edits
        if not all(self._touch_others(*pair) for pair in combinations(edits, 2)):
            return edits
        if len({edit.spec.heads for edit in edits}) > 1:
            edits = [edit.with_heads((head,)) for edit in edits for head in self._heads_of(edit)]
        for _ in range(2 if len({edit.keys for edit in edits}) > 1 else 1):
            edits = self._made_one(edits, base, lambda e: (e.spec.heads, e.keys), self._with_tokens_of)
            edits = self._made_one(edits, base, lambda e: (*tokens_of(e), e.keys), _with_heads_of)
            edits = self._made_one(edits, base, lambda e: (*tokens_of(e), e.spec.heads), self._with_keys_of)
        return sorted(map(self._edit, edits), key=_place)

    def _heads_of(self, edit: Edit) -> Iterable[int]:
        return range(self.n_heads(edit.site)) if edit.spec.heads is None else edit.spec.heads

    def _touch_others(self, one: Edit, other: Edit) -> bool:
        """Whether two edits have no token in common, or no head, or no key."""
        heads, others = one.spec.heads, other.spec.heads
        if heads is not None and others is not None and not set(heads) & set(others):
            return True
        return self._are_apart(one.positions, other.positions) or self._are_apart(one.keys, other.keys)

    def _are_apart(self, one: Positions, other: Positions) -> bool:
        if (one, other) not in self._apart:
            self._apart[one, other] = are_disjoint(one, other)
        return self._apart[one, other]

    def _made_one(
        self,
        edits: Sequence[Edit],
        base: ColumnOrigin,
        equal: Callable[[Edit], object],
        together: Callable[[Sequence[Edit]], Edit],
    ) -> list[Edit]:
        """Edits that do the same, and are ``equal`` in what else they select, as one."""
        kinds: defaultdict[Kind, list[Edit]] = defaultdict(list)
        for edit in edits:
            kinds[(*kind_of(edit, base), equal(edit))].append(edit)
        return [own[0] if len(own) == 1 else _with_idle_of(own, together(own)) for own in kinds.values()]

    def _with_tokens_of(self, edits: Sequence[Edit]) -> Edit:
        edits = sorted(edits, key=_place) if len(edits) > 1 else edits
        targets = [edit.positions for edit in edits]
        reads = [edit.source.positions for edit in edits if edit.source is not None]
        sources = [self._every if read.is_all else read for read in reads]
        aligned = not sources or sources == targets
        there = self._together(targets, targets)
        return edits[0].with_positions(there, there if aligned else self._together(sources, targets))

    def _with_keys_of(self, edits: Sequence[Edit]) -> Edit:
        keys = [edit.keys for edit in edits]
        return replace(edits[0], keys=self._of_all(self._together(keys, keys)))

    def _together(self, several: Sequence[Positions], by: Sequence[Positions]) -> Positions:
        """Selections as one, in the order of others; one object for all runs that select the same."""
        key = tuple(map(id, (*several, *by)))
        if key not in self._joined:
            self._joined[key] = (*several, *by), in_order_of(several, by)
        return self._joined[key][1]


def _one_name_each(tensors: Mapping[TensorRef, Tensor]) -> dict[TensorRef, TensorRef]:
    """For every reference, the first one to equal contents."""
    known: defaultdict[Kind, list[TensorRef]] = defaultdict(list)
    names: dict[TensorRef, TensorRef] = {}
    for ref, tensor in tensors.items():
        alike = known[tensor.shape, tensor.dtype, float(tensor.contiguous().sum())]
        names[ref] = next((other for other in alike if bool((tensors[other] == tensor).all())), ref)
        if names[ref] is ref:
            alike.append(ref)
    return names


def _place(edit: Edit) -> Kind:
    """Where an edit stands among others of one site that have no token, head or key in common with it."""
    chosen = (edit.positions.of(0), edit.spec.heads, edit.keys.of(0))
    return tuple(tuple(sorted(own or ())) for own in chosen)


def _is_again(before: Edit, edit: Edit) -> bool:
    """Whether an edit puts in what the one before has just put in."""
    return operator_of(edit.spec) in (interchange, ablate) and replace(before, where=edit.where) == edit


def _at_site(edit: Edit, site: Site) -> Edit:
    """A block's input by another name, for an edit and what it reads of the input of an image."""
    source = edit.source
    if site == edit.site:
        return edit
    if source is not None and source.site == edit.site and isinstance(source.origin, ColumnOrigin):
        source = replace(source, site=site)
    return replace(edit, site=site, source=source)


def _with_idle_of(edits: Sequence[Edit], together: Edit) -> Edit:
    """Edits as one, which is idle where all of them are."""
    idle = set(edits[0].idle).intersection(*(edit.idle for edit in edits))
    return replace(together, idle=tuple(sorted(idle)))


def _with_heads_of(edits: Sequence[Edit]) -> Edit:
    return edits[0].with_heads(tuple(sorted(head for edit in edits for head in edit.spec.heads or ())))
