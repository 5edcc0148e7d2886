"""Checks of what the names inside attention and MLP promise: which head is which, what multiplies what.

Every head's tensors belong together, the scores are bilinear in queries and keys, a gated MLP is linear in
its second branch, and a norm or an activation stands where the names say that one does. A row that splits the
heads in another order, shows queries before their rotation, or takes the two halves of a packed MLP for each
other passes every sum over the heads, and fails here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_mechinterp.model.conformance.blocks import Edited, edited_block
from vit_mechinterp.model.conformance.report import Record
from vit_mechinterp.model.conformance.subject import Subject, deviation, wide
from vit_mechinterp.spec import Site

HEADS = {
    "attn.q": "attn.scores",
    "attn.k": "attn.scores",
    "attn.v": "attn.z",
    "attn.scores": "attn.pattern",
    "attn.pattern": "attn.z",
    "attn.z": "attn.result",
}
"""Where the heads of one site are told from those of the next."""
MIXED = ("attn.q", "attn.k", "attn.pattern")
"""From these to the next, heads read each other in families that mix them (talking heads)."""
SAME = (
    ("resid_pre", "ln1"),
    ("ln1", "attn_out"),
    ("resid_mid", "ln2"),
    ("ln1", "mlp.pre"),
    ("ln2", "mlp.pre"),
    ("ln1", "mlp.pre_linear"),
    ("ln2", "mlp.pre_linear"),
    ("mlp.pre", "mlp.pre_linear"),
    ("ln2", "mlp.post"),
    ("mlp.pre", "mlp.post"),
    ("mlp.pre_linear", "mlp.post"),
    ("mlp.pre", "mlp_out"),
    ("mlp.post", "mlp_out"),
)
"""Pairs between which a norm, a linear layer, an activation or a product stands."""
NORMED = 1e-3
"""How far a norm behind the product, whose epsilon counts a little, may move what it is given doubled."""


def heads_stay_apart(subject: Subject, layer: int, sites: list[str], record: Record) -> None:
    """A write to one head moves that head of the next site, and no other."""
    shown = [site for site in (*HEADS, "attn.result") if site in sites]
    counts = {site: subject.values[f"blocks.{layer}.{site}"].shape[_axis(site)] for site in shown}
    chosen = {site: layer % count for site, count in counts.items()}

    def write(site: str, row: Tensor) -> Tensor:
        if site not in chosen:
            return row
        row = row.clone()
        head = row.select(_axis(site) - 1, chosen[site])
        spread = head[torch.isfinite(head)].float().std()
        head.copy_(head + spread.to(row.dtype) * subject.noise(head.shape))
        return row

    edited = edited_block(subject, layer, ["resid_pre", *shown], write)
    for site in shown:
        target = HEADS.get(site)
        if target is None or target not in shown:
            continue
        if subject.layout.family.mixing is not None and site in MIXED:
            record.leave_out(edited.name(site), "heads read each other here")
            continue
        if site == "attn.z" and not _projected(subject, edited):
            record.leave_out(edited.name(site), "a norm or a gate stands between z and the output projection")
            continue
        moved = _moved(edited, site, target)
        share = counts[target] // counts[site]
        wanted = list(range(chosen[site] * share, (chosen[site] + 1) * share))
        text = f"a write to head {chosen[site]} moved heads {moved} of {target}, and not {wanted}"
        record.add(moved == wanted, edited.name(site), "" if moved == wanted else text)


def _axis(site: str) -> int:
    return Site(0, site).axes.index("head")


def _moved(edited: Edited, site: str, target: str) -> list[int]:
    """Heads of ``target`` that a write at ``site`` moved by more than rounding does."""
    value, row = edited.values[target], edited.rows[site]

    def apart(other: int) -> Tensor:
        change = torch.where(value[other] == value[0], 0.0, wide(value[other]) - wide(value[0])).abs()
        return change.movedim(_axis(target) - 1, 0).flatten(1).amax(dim=1)

    # Masked keys stay masked; what is left of them is no number.
    moved, noise = apart(row).nan_to_num(), apart(-1).nan_to_num().max()
    least = max(float(noise), 1e-3 * float(moved.max()))
    return [head for head, change in enumerate(moved) if float(change) > least]


def _projected(subject: Subject, edited: Edited) -> bool:
    """Whether the heads' results are z through the output projection, with nothing in between."""
    weight, _, gain = subject.projection(edited.layer)
    z = wide(edited.values["attn.z"][:1])
    heads = weight[:, : z.shape[-2] * z.shape[-1]].reshape(-1, *z.shape[-2:])
    result = torch.einsum("bthd,mhd->bthm", z, heads) * gain
    return deviation(result, wide(edited.values["attn.result"][:1])) <= 4 * subject.unit


def scores_of_queries_and_keys(subject: Subject, edited: Edited, record: Record) -> None:
    """What a write to queries or keys adds to the scores is their product, times one number per head.

    A bias of the positions and a mask cancel in the difference.
    """
    if not edited.has("attn.q", "attn.k", "attn.scores"):
        return
    if subject.layout.family.mixing is not None:
        record.leave_out(edited.name("attn.scores"), "heads read each other here")
        return
    q, k, scores = (wide(edited.values[site]) for site in ("attn.q", "attn.k", "attn.scores"))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    for site in ("attn.q", "attn.k"):
        row = edited.rows[site]
        product = torch.einsum("qhd,khd->hqk", q[row], k[row]) - torch.einsum("qhd,khd->hqk", q[0], k[0])
        seen = torch.isfinite(scores[row]) & torch.isfinite(scores[0])
        product = product.where(seen, 0.0).double()
        found = (scores[row] - scores[0]).where(seen, 0.0).double()
        factor = (product * found).sum(dim=(1, 2)) / (product * product).sum(dim=(1, 2)).clamp(min=1e-30)
        apart = float((found - factor[:, None, None] * product).abs().max())
        scale = float(scores[row][seen].abs().max()) if bool(seen.any()) else 0.0
        share = apart / max(scale, 1e-30)
        record.near(share, 4 * subject.unit, edited.name(site), "the scores, from the product of q and k,")


def names_differ(subject: Subject, layer: int, sites: list[str], record: Record) -> None:
    """No two names stand for the same values where a norm, an activation or a product is between them."""
    pairs = [(f"blocks.{layer}.{a}", f"blocks.{layer}.{b}") for a, b in SAME if a in sites and b in sites]
    for before, after in pairs:
        first, second = subject.values[before], subject.values[after]
        same = first.shape == second.shape and torch.equal(first, second)
        text = f"it shows the values of {before}; one of them is not what it is called (if nothing "
        text += "is between them, declare one absent)"
        record.add(not same, after, text if same else "")


def gate_and_linear(subject: Subject, layer: int, sites: list[str], record: Record) -> None:
    """Of the two branches of a gated MLP, the one called linear is: twice of it is twice the product, and
    its opposite the opposite, which tells it from a gate that is rectified."""
    if not {"mlp.pre_linear", "mlp.post"} <= set(sites):
        return

    def write(site: str, row: Tensor) -> Tensor:
        return 2 * row if site == "mlp.pre_linear" else row

    edited = edited_block(subject, layer, ["resid_pre", "mlp.pre_linear", "mlp.post"], write)
    post = wide(edited.values["mlp.post"])
    row = edited.rows["mlp.pre_linear"]
    share = deviation(post[row], 2 * post[0])
    normed = deviation(post[row], post[0])  # behind the product a norm may take the factor away
    allowed = max(4 * subject.unit, NORMED) if normed < share else 4 * subject.unit
    text = "mlp.post, from twice what it was (or from what it was, if a norm follows),"
    record.near(min(share, normed), allowed, edited.name("mlp.pre_linear"), text)
    if share > 4 * subject.unit:
        return

    def opposite(site: str, row: Tensor) -> Tensor:
        return -row if site == "mlp.pre_linear" else row

    edited = edited_block(subject, layer, ["resid_pre", "mlp.pre_linear", "mlp.post"], opposite)
    post = wide(edited.values["mlp.post"])
    share = deviation(post[row], -post[0])
    text = "mlp.post, from its opposite where this is the opposite (a rectified gate is no linear branch),"
    record.near(share, 4 * subject.unit, edited.name("mlp.pre_linear"), text)


def post_is_made_of_pre(subject: Subject, layer: int, sites: list[str], record: Record) -> None:
    """Without a second branch every token's ``mlp.post`` is a function of its ``mlp.pre``: tokens exchanged
    there are exchanged behind the activation."""
    if not {"mlp.pre", "mlp.post"} <= set(sites) or "mlp.pre_linear" in sites:
        return

    def write(site: str, row: Tensor) -> Tensor:
        return row.roll(1, dims=0) if site == "mlp.pre" else row

    edited = edited_block(subject, layer, ["resid_pre", "mlp.pre", "mlp.post"], write)
    name = edited.name("mlp.pre")
    post = wide(edited.values["mlp.post"])
    share = deviation(post[edited.rows["mlp.pre"]], post[0].roll(1, dims=0))
    text = "with the tokens of mlp.pre exchanged, mlp.post differs"
    hint = "more than mlp.pre goes into it: declare the second branch of a gated MLP, mlp.pre_linear"
    record.near(share, 4 * subject.unit, name, text, hint)
    widths = [subject.values[f"blocks.{layer}.{site}"].shape[-1] for site in ("mlp.pre", "mlp.post")]
    if widths[0] != widths[1]:
        text = f"it has {widths[1]} features, and mlp.pre {widths[0]}: an activation keeps their number"
        if widths[0] == 2 * widths[1]:
            text += "; the halves of a packed MLP are mlp.pre and mlp.pre_linear (Port.part)"
        record.add(False, edited.name("mlp.post"), text)
