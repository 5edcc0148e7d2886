"""Names of places in a vision transformer: parse, print, order, list and match them.

The words are TransformerLens's. Every name is either global (``embed``, ``ln_final``, ``pooled``, ``logits``)
or stands in a block (``blocks.3.attn.pattern``). ``hook_`` names are accepted on input where the meaning is
the same, and are printed without the prefix; where the meaning differs, the error says how.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.spec.base import as_index

__all__ = ["BLOCK_SITES", "GLOBAL_SITES", "Site", "expand", "is_glob", "site_names"]

GLOBAL_SITES = ("embed", "ln_final", "pooled", "logits")
"""Sites outside the blocks, in forward order: the first comes before all blocks, the others after them."""

BLOCK_SITES = (
    "resid_pre",
    "ln1",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.scores",
    "attn.pattern",
    "attn.z",
    "attn.result",
    "attn_out",
    "resid_mid",
    "ln2",
    "mlp.pre",
    "mlp.pre_linear",
    "mlp.post",
    "mlp_out",
    "resid_post",
)
"""Sites of one block, in forward order."""

_AXES = {
    "attn.q": ("batch", "token", "head", "d_head"),
    "attn.k": ("batch", "token", "head", "d_head"),
    "attn.v": ("batch", "token", "head", "d_head"),
    "attn.z": ("batch", "token", "head", "d_head"),
    "attn.scores": ("batch", "head", "query", "key"),
    "attn.pattern": ("batch", "head", "query", "key"),
    "attn.result": ("batch", "token", "head", "d_model"),
    "mlp.pre": ("batch", "token", "d_mlp"),
    "mlp.pre_linear": ("batch", "token", "d_mlp"),
    "mlp.post": ("batch", "token", "d_mlp"),
    "pooled": ("batch", "d_model"),
    "logits": ("batch", "class"),
}

_SAME_MEANING = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_rot_q": "attn.q",
    "attn.hook_rot_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern",
    "attn.hook_z": "attn.z",
    "attn.hook_result": "attn.result",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_pre_linear": "mlp.pre_linear",
    "mlp.hook_post": "mlp.post",
}

_NORMALIZED = (
    "it is the output with or without the norm's weight and bias, depending on whether they were folded "
    "away. Write {site!r}: the output of the native norm"
)
_SCALE = "the native norms do not expose their scale. Capture the norm's input instead ({site!r})"
_SPLIT_INPUT = "native attention reads one normalised input for q, k and v. Write {site!r}: that input"
_EMBED = "Write 'embed': the input of block 0, positions included"
_OTHER_MEANING = {
    "attn.hook_q": "it comes before q/k norm and rotation. Write {prefix}attn.q: what enters the dot product",
    "attn.hook_k": "it comes before q/k norm and rotation. Write {prefix}attn.k: what enters the dot product",
    "ln1.hook_normalized": _NORMALIZED.format(site="{prefix}ln1"),
    "ln2.hook_normalized": _NORMALIZED.format(site="{prefix}ln2"),
    "ln_final.hook_normalized": _NORMALIZED.format(site="ln_final"),
    "ln1.hook_scale": _SCALE.format(site="{prefix}resid_pre"),
    "ln2.hook_scale": _SCALE.format(site="{prefix}resid_mid"),
    "ln_final.hook_scale": _SCALE.format(site="the last block's resid_post"),
    "hook_attn_in": _SPLIT_INPUT.format(site="{prefix}ln1"),
    "hook_q_input": _SPLIT_INPUT.format(site="{prefix}ln1"),
    "hook_k_input": _SPLIT_INPUT.format(site="{prefix}ln1"),
    "hook_v_input": _SPLIT_INPUT.format(site="{prefix}ln1"),
    "hook_mlp_in": "it is a copy of the residual stream, for the MLP alone. Write {prefix}ln2: what it reads",
    "hook_embed": f"it comes before the position embeddings. {_EMBED}",
    "hook_pos_embed": f"the position embeddings are no activation. {_EMBED}",
}

_BLOCK = re.compile(r"blocks\.([^.]+)\.(.+)")


@functools.total_ordering
@dataclass(frozen=True, slots=True)
class Site:
    """One place in a model: a name, and the layer it stands in (None for the global sites).

    ``str(site)`` is the canonical name, ``Site.parse(text)`` its inverse; sites compare in forward order.
    """

    layer: int | None
    name: str

    def __post_init__(self) -> None:
        if self.layer is not None:
            object.__setattr__(self, "layer", as_index(self.layer))
        if self.name not in (GLOBAL_SITES if self.layer is None else BLOCK_SITES):
            raise _unknown(self.name if self.layer is None else f"blocks.{self.layer}.{self.name}")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read a canonical name, or a TransformerLens name of the same meaning; anything else is a
        SpecError."""
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise SpecError(f"A site is a name such as 'blocks.3.resid_post', got {text!r}.")
        if is_glob(text):
            raise SpecError(
                f"{text!r} is a pattern, and one site is wanted here. Patterns are for captures; to act at "
                "several layers, write a Sweep over 'layer', or one intervention per site."
            )
        name = _canonical(text)
        if name in GLOBAL_SITES:
            return cls(None, name)
        match = _BLOCK.fullmatch(name)
        if match is None or not match[1].isdecimal() or match[2] not in BLOCK_SITES:
            raise _unknown(text)
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return self.name if self.layer is None else f"blocks.{self.layer}.{self.name}"

    def __lt__(self, other: Site) -> bool:
        return self.order < other.order

    @property
    def order(self) -> tuple[int, int, int]:
        """A key that sorts sites in forward order."""
        if self.layer is not None:
            return (1, self.layer, BLOCK_SITES.index(self.name))
        place = GLOBAL_SITES.index(self.name)
        return (0 if place == 0 else 2, 0, place)

    @property
    def is_block(self) -> bool:
        """Whether the site stands in a block, and so has a layer."""
        return self.layer is not None

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the tensor's axes, such as ``("batch", "token", "d_model")``."""
        return _AXES.get(self.name, ("batch", "token", "d_model"))

    @property
    def is_attention_matrix(self) -> bool:
        """Whether the tensor is ``[batch, head, query, key]`` (scores and pattern)."""
        return "query" in self.axes

    @property
    def has_heads(self) -> bool:
        """Whether the tensor has a head axis."""
        return "head" in self.axes

    @property
    def has_tokens(self) -> bool:
        """Whether tokens can be selected (everywhere except ``pooled`` and ``logits``)."""
        return len(self.axes) > 2

    def at(self, layer: int) -> Site:
        """Return the same place in another block; a SpecError for a site that stands in none."""
        if self.layer is None:
            raise SpecError(f"{self.name!r} stands in no block, so it has no layer to replace.")
        return Site(as_index(layer), self.name)


def is_glob(text: str) -> bool:
    """Return whether ``text`` holds a wildcard (``*``, ``?`` or ``[``)."""
    return any(character in text for character in "*?[")


def site_names(n_layers: int) -> list[str]:
    """Return every canonical name for ``n_layers`` blocks, in forward order (a model may have fewer of
    them)."""
    blocks = [f"blocks.{layer}.{name}" for layer in range(n_layers) for name in BLOCK_SITES]
    return [GLOBAL_SITES[0], *blocks, *GLOBAL_SITES[1:]]


def expand(pattern: str, available: Sequence[str]) -> list[str]:
    """Return the names in ``available`` that ``pattern`` matches, in their order there.

    ``pattern`` is one name or a shell pattern over canonical names (``blocks.*.resid_post``,
    ``blocks.[0-3].attn.*``). Raises SpecError with close matches if nothing matches.
    """
    if not is_glob(pattern):
        name = str(Site.parse(pattern))
        if name in available:
            return [name]
        raise SpecError(f"No site {name!r} here.{suggest(name, available)} {_listing(available)}")
    wanted = _canonical(pattern)
    found = [name for name in available if fnmatch.fnmatchcase(name, wanted)]
    if found:
        return found
    shapes = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in available))
    raise SpecError(
        f"The pattern {pattern!r} matches no site.{suggest(pattern, shapes)} {_listing(available)}"
    )


def _canonical(text: str) -> str:
    """Translate a TransformerLens name (its layer may be a wildcard); refuse those that mean something
    else."""
    match = _BLOCK.fullmatch(text)
    prefix, rest = (f"blocks.{match[1]}.", match[2]) if match else ("", text)
    if "hook_" not in rest:
        return text
    if rest in _OTHER_MEANING:
        why = _OTHER_MEANING[rest].format(prefix=prefix)
        raise SpecError(f"{text!r} means something else in TransformerLens: {why}.")
    return prefix + _SAME_MEANING[rest] if match and rest in _SAME_MEANING else text


def _unknown(text: str) -> SpecError:
    match = _BLOCK.fullmatch(text)
    if match and not match[1].isdecimal():
        return SpecError(f"{text!r}: {match[1]!r} is not a layer; layers are written 0, 1, 2, ...")
    prefix = f"blocks.{match[1]}." if match else "blocks.{layer}."
    bare = (match[2] if match else text).replace("hook_", "")
    options = {**{name: prefix + name for name in BLOCK_SITES}, **{name: name for name in GLOBAL_SITES}}
    if not match and bare in BLOCK_SITES:
        return SpecError(
            f"{text!r} stands in a block: write 'blocks.{{layer}}.{bare}' with the layer's number."
        )
    near = difflib.get_close_matches(bare, list(options), n=3, cutoff=0.6)
    close = f" Close matches: {', '.join(options[name] for name in near)}." if near else ""
    blocks, outside = ", ".join(BLOCK_SITES), ", ".join(GLOBAL_SITES)
    return SpecError(
        f"Unknown site {text!r}.{close} Sites: {outside}, and in every block (blocks.0. ...) {blocks}."
    )


def _listing(available: Sequence[str]) -> str:
    shapes = dict.fromkeys(re.sub(r"\.\d+\.", ".{layer}.", name) for name in available)
    layers = [
        int(match[1]) for name in available if (match := _BLOCK.fullmatch(name)) and match[1].isdecimal()
    ]
    extent = f" (layers 0 to {max(layers)})" if layers else ""
    return f"Available{extent}: {', '.join(shapes) or 'none'}."
