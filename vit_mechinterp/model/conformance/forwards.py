"""Checks that compare whole forwards: what changes nothing, what must change everything, rows that join."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vit_mechinterp.model.conformance.report import Record
from vit_mechinterp.model.conformance.subject import Subject, deviation, keeping, returning, wide
from vit_mechinterp.model.instrument import Visitor
from vit_mechinterp.model.layout import lookup
from vit_mechinterp.spec import Site


def port_or_reason(subject: Subject, record: Record) -> None:
    """Every name of the vocabulary can be used on the model, or the reason why not is given."""
    for name, reason in subject.layout.absent.items():
        record.add(bool(reason.strip()), name, "" if reason.strip() else "declared absent without a reason")
    for name in subject.sites:
        record.add(True, name)


def native_output(subject: Subject, record: Record) -> None:
    """The wrapped output is the native one, bit for bit."""
    args, kwargs = subject.layout.family.inputs(subject.vit.module, subject.images)
    native = subject.layout.outcome(subject.vit.module(*args, **kwargs))
    record.near(deviation(subject.native, native), 0, detail="the output")


def fires_once(subject: Subject, record: Record) -> None:
    """Every declared site fires once in a forward, with its shape; later checks leave out the others."""
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def noting(name: str) -> Visitor:
        def visitor(value: Tensor) -> None:
            shapes[name].append(tuple(value.shape))

        return visitor

    def forward(names: Sequence[str]) -> float:
        shapes.update({name: [] for name in names})
        subject.run({name: noting(name) for name in names}, verify=False)
        return 0.0

    errors = subject.culprits(subject.sites, forward, 0.0)
    good = []
    for name in subject.sites:
        wanted, found = _expected_shape(subject, Site.parse(name)), shapes[name]
        # Logits may be of every token: then they have more axes.
        size = found[0][: len(wanted)] if found and name == "logits" else next(iter(found), ())
        if len(found) == 1 and _fits(size, wanted):
            good.append(name)
            record.add(True, name)
        else:
            sizes = ", ".join("any" if size is None else str(size) for size in wanted)
            seen = f"fired {len(found)} times, with shapes {found[:3]}; expected once, with ({sizes})"
            record.add(False, name, errors[name][1] or seen)
    subject.sites = good


def _expected_shape(subject: Subject, site: Site) -> tuple[int | None, ...]:
    """The shape that follows from the layout; None where it leaves an axis open."""
    layout = subject.layout
    n_tokens = layout.tokens.n_tokens
    sizes: dict[str, int | None] = {
        "batch": len(subject.images),
        "token": n_tokens,
        "query": n_tokens,
        "key": n_tokens,
        "head": None if site.name in ("attn.k", "attn.v") else layout.n_heads,  # fewer if queries are grouped
        "d_head": layout.d_head,
        "d_model": layout.d_model if site.has_tokens else None,
    }
    return tuple(sizes.get(axis) for axis in site.axes)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, n) for w, n in zip(wanted, shape, strict=True))


def token_layout(subject: Subject, record: Record) -> None:
    """The tokens add up, prefix and suffix do not see the image, and patches stand where the grid says."""
    tokens = subject.layout.tokens
    n_rows, n_columns = tokens.grid[-2:]
    edges = [(row, column) for row in (0, n_rows - 1) for column in (0, n_columns - 1)]
    corners = list(dict.fromkeys([*edges, (n_rows // 2, n_columns // 2)]))
    images = torch.cat([subject.images[:1]] * (1 + len(corners)))
    height, width = tokens.patch_size
    for image, (row, column) in zip(images[1:], corners, strict=True):
        patch = image[..., row * height : (row + 1) * height, column * width : (column + 1) * width]
        patch.copy_(patch + 3 * subject.noise(patch.shape))
    kept: dict[str, Tensor] = {}
    embeds = []
    for batch in torch.split(images, 1 if subject.layout.family.one_image else len(images)):
        subject.run({"embed": keeping(kept, "embed")}, batch, stop=0, before=True)
        embeds.append(kept["embed"])
    embed = torch.cat(embeds)
    found = embed.shape[1]
    record.add(found == tokens.n_tokens, "embed", f"{found} tokens, and the layout is {tokens}")
    if found != tokens.n_tokens:
        return
    moved = (embed[1:] - embed[:1]).abs().amax(dim=-1).float()
    first = len(tokens.prefix)
    outside = torch.cat([moved[:, :first], moved[:, first + tokens.n_patches :]], dim=1)
    text = "tokens outside the grid depend on the image" if bool(outside.any()) else ""
    record.add(not text, "embed", text)
    for (row, column), change in zip(corners, moved, strict=True):
        inside = change[first : first + tokens.n_patches].reshape(tokens.grid)
        change = inside.reshape(-1, n_rows * n_columns).amax(dim=0)
        place = divmod(int(change.argmax()), n_columns)
        # Where several tokens move, a convolutional stem sees beyond its patch; a neighbour may move most.
        reach = int((change > 0).sum() > 1)
        text = f"patch ({row}, {column}) of the image is token {place} of the grid"
        right = max(abs(place[0] - row), abs(place[1] - column)) <= reach
        record.add(right, "embed", "" if right else text)


def _changes_nothing(subject: Subject, record: Record, visitor: Callable[[str], Visitor]) -> None:
    """No visit of this kind changes the output; explicit attention may, by rounding."""
    rounding = max(subject.unit * subject.layout.n_layers, subject.sensitivity)
    groups = (
        ([name for name in subject.sites if not subject.explicit(name)], 0.0),
        (list(filter(subject.explicit, subject.sites)), rounding),
    )
    for names, allowed in groups:

        def forward(chosen: Sequence[str]) -> float:
            return deviation(subject.output({name: visitor(name) for name in chosen}), subject.native)

        found = subject.culprits(names, forward, allowed)
        for name in names:
            if found[name][1]:
                record.add(False, name, found[name][1])
            else:
                record.near(found[name][0], allowed, name, "the output")


def capture_only(subject: Subject, record: Record) -> None:
    """Looking changes nothing."""
    kept: dict[str, Tensor] = {}
    _changes_nothing(subject, record, lambda name: keeping(kept, name))


def write_back(subject: Subject, record: Record) -> None:
    """Writing a copy of what is there changes nothing."""
    _changes_nothing(subject, record, lambda name: torch.clone)


def captures_outlive_edits(subject: Subject, record: Record) -> None:
    """What was read at a site stays as it was when somebody writes there in the same forward."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def reading(name: str) -> Visitor:
        def visitor(value: Tensor) -> None:
            kept[name] = value, value.clone()

        return visitor

    subject.run({name: reading(name) for name in subject.sites}, then=dict.fromkeys(subject.sites, _one_more))
    for name, (value, copy) in kept.items():
        record.near(deviation(value, copy), 0, name, "what was kept")


def _one_more(value: Tensor) -> Tensor:
    return value + 1


def interchange_of_images(subject: Subject, record: Record) -> None:
    """The whole residual stream of other images gives the other images' output: nothing goes past it."""
    last = subject.layers[-1]
    stream = ("resid_pre", "resid_mid", "resid_post")
    sites = [f"blocks.{layer}.{name}" for layer in dict.fromkeys((0, last // 2, last)) for name in stream]
    _interchange(subject, record, ("embed", *sites, *READOUT))


def interchange_behind_the_blocks(subject: Subject, record: Record) -> None:
    """The same of the sites behind the blocks alone, which nothing else in the fast subset writes to."""
    _interchange(subject, record, READOUT)


READOUT = ("ln_final", "pooled", "logits")


def _interchange(subject: Subject, record: Record, names: Sequence[str]) -> None:
    other, values = subject.native.roll(1, dims=0), subject.values
    if subject.layout.family.one_image:
        another = subject.noise(subject.images.shape)
        kept: dict[str, Tensor] = {}
        other = subject.vit(another)
        subject.run({name: keeping(kept, name) for name in subject.sites}, another)
        values = kept
    apart = deviation(other, subject.native)
    for name in names:
        if name not in subject.sites:
            continue
        if apart == 0:
            record.add(False, name, "the output is the same for different images (is the head all zeros?)")
            continue
        output = subject.output({name: returning(values[name].roll(1, dims=0))})
        record.near(deviation(output, other), 10 * subject.unit, name, "the output")


def growth_and_skip(subject: Subject, record: Record) -> None:
    """Rows that join behind skipped blocks, and at every block of a growing batch, are as in forwards of
    their own."""
    _returns(subject, record)
    ends = [layer for layer in subject.layers if f"blocks.{layer}.resid_post" in subject.sites]
    starts = [layer for layer in subject.layers if f"blocks.{layer}.resid_pre" in subject.sites]
    if not starts or not ends:
        record.add(False, detail="no block has both its input and its output where they are declared")
        return
    rows = {site: _shifted(subject, subject.values[site]) for site in _stream(starts, ends)}
    if subject.layout.family.one_image:
        reason = f"rows do not join: {subject.layout.family.one_image}"
        for layer in starts:
            first = f"blocks.{layer}.resid_pre"
            whole = subject.output({first: returning(rows[first])})
            skipping = {first: returning(rows[first])}
            joined = subject.run(skipping, subject.vit.blank(1), skip=range(layer))
            assert joined is not None
            record.near(deviation(joined, whole), 10 * subject.unit, first, "a row that skipped, alone,")
        for layer in ends:
            record.leave_out(f"blocks.{layer}.resid_post", reason)
        return
    alone = {site: subject.output({site: returning(value)}) for site, value in rows.items()}
    for site, output in alone.items():
        if torch.equal(output, subject.native):
            text = "what was written did not change the output, so nothing is shown"
            record.add(False, site, text)
            return
    for start in dict.fromkeys((starts[0], starts[len(starts) // 2], starts[-1])):
        joins = [f"blocks.{start}.resid_pre", *(f"blocks.{at}.resid_post" for at in ends if at >= start)]
        visitors = {site: _appending(rows[site]) for site in joins[1:]}
        visitors[joins[0]] = returning(rows[joins[0]])
        n_rows = sum(len(rows[site]) for site in joins)
        together = subject.run(visitors, subject.vit.beginning(n_rows), skip=range(start))
        assert together is not None
        for site, found in zip(joins, torch.split(together, len(subject.images)), strict=True):
            share = deviation(found, alone[site])
            where = f"rows that join here behind {start} skipped blocks, from forwards of their own,"
            record.near(share, 10 * subject.unit, site, where)


def _returns(subject: Subject, record: Record) -> None:
    """A block that is skipped hands on what it would return: a tensor, or a tuple."""
    layout = subject.layout
    found: list[bool] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        found.append(isinstance(output, tuple))

    blocks = [lookup(subject.vit.module, layout.block_path(layer)) for layer in range(layout.n_layers)]
    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        subject.vit(subject.images)
    finally:
        for hook in hooks:
            hook.remove()
    kinds = ("tensors", "tuples")
    if (other := not layout.returns_tuple) in found:
        text = f"it returns {kinds[other]}, and {kinds[layout.returns_tuple]} are declared"
        record.add(False, f"blocks.{found.index(other)}", text)
    else:
        record.add(True)


def _stream(starts: Sequence[int], ends: Sequence[int]) -> list[str]:
    inputs = [f"blocks.{layer}.resid_pre" for layer in starts]
    return inputs + [f"blocks.{layer}.resid_post" for layer in ends]


def _appending(rows: Tensor) -> Visitor:
    return lambda value: torch.cat([value, rows])


def _shifted(subject: Subject, value: Tensor) -> Tensor:
    return value + subject.noise(value.shape) * value.float().std().to(value.dtype)


def single_row(subject: Subject, record: Record) -> None:
    """An image alone has the output that it has in a batch."""
    alone = subject.vit(subject.images[:1])
    scale = float(wide(subject.native).abs().max())
    record.near(deviation(alone, subject.native[:1], scale), 10 * subject.unit, detail="the output")
