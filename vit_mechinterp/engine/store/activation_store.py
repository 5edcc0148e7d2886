"""`ActivationStore`: activations kept from one experiment to the next, on GPUs, in memory and on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from vit_mechinterp.engine.binding.checks import (
    check_arguments,
    check_batch_size,
    check_folder,
    check_heads,
    check_progress,
    refuse_train_mode,
)
from vit_mechinterp.engine.binding.positions import Positions, resolve_tokens
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.forwards.exhaustion import make_room
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.inputs.images import image_numbers
from vit_mechinterp.engine.scheduling.sizes import in_words, parse_bytes
from vit_mechinterp.engine.store.batch import image_bytes, kept_bytes, rows_by_default
from vit_mechinterp.engine.store.holdings import Holdings
from vit_mechinterp.engine.store.source import Source
from vit_mechinterp.engine.store.tiers import Tiers
from vit_mechinterp.engine.store.view import StoredActivations
from vit_mechinterp.errors import ExecutionError, SpecError
from vit_mechinterp.model.heap import thrifty
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.out_of_memory import memory_may_run_out
from vit_mechinterp.spec import Capture, Site, Tokens

__all__ = ["ActivationStore"]

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ActivationStore:
    """Activations of clean forwards, by the digests of model, images, site, tokens and dtype.

    What is asked for a second time, by whichever experiment, is read and not computed, and an image that a
    column repeats is computed once. Blocks of examples lie in preallocated memory of the GPU, in
    (page-locked) memory of the host, and on disk as memory-mapped safetensors files; where a tier is full,
    the least recently used blocks leave it. Blocks on their way to the disk that the host's budget cannot
    hold fill up beside it. A checksum per example is compared when it is first read from a file, and again
    once the file has changed: what is damaged is dropped and computed again. Several processes may share one
    folder.

    Args:
        folder: folder of the disk tier; None keeps activations in memory only.
        gpu: most memory on every GPU, in bytes or as ``"2GiB"``; 0 leaves the tier out.
        host: most memory of the host.
        disk: most bytes of the files in ``folder``, those of other processes included; ``"50GiB"`` by
            default.

    Raises:
        SpecError: a budget is no amount of memory, or ``disk`` is given and ``folder`` is not.
        ExecutionError: ``folder`` cannot be made.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        gpu: int | str = "2GiB",
        host: int | str = "4GiB",
        disk: int | str | None = None,
    ) -> None:
        check_folder(folder, "folder")
        if folder is None and disk is not None:
            raise SpecError(
                f"disk={disk!r} bounds the files of a folder, and there is none. Name one, such as "
                "ActivationStore('activations', disk=...), or leave disk out."
            )
        self.folder = None if folder is None else Path(folder).expanduser().resolve()
        given = {"gpu": gpu, "host": host, "disk": "50GiB" if disk is None else disk}
        budgets = [parse_bytes(own, name) for name, own in given.items()]
        try:
            self.tiers = Tiers(self.folder, *budgets)
        except OSError as error:
            is_file = self.folder is not None and self.folder.is_file()
            why = "it is a file" if is_file else error.strerror or error
            raise ExecutionError(
                f"Activations cannot be kept in {self.folder}: {why}. Choose another folder."
            ) from None

    def capture(
        self,
        vit: HookedViT,
        data: Any,
        sites: str | Iterable[str],
        dtype: torch.dtype | None = None,
        *,
        column: str = "base",
        tokens: Tokens = "all",
        heads: int | Iterable[int] | None = None,
        batch_size: int | Literal["auto"] = "auto",
        progress: bool = True,
    ) -> StoredActivations:
        """Make sure that activations of every example are stored, and return them by site and example.

        Images stream: a batch of them, and those that wait for it, are part of the budget of the memory that
        they pass through the model in. A batch takes at most half of it, and so is of fewer images than
        asked for where these take more, but of one at least. What is left for blocks stays as small for as
        long as the store is open, so that a later batch finds its room.

        Args:
            vit: the model, in eval mode (or without dropout).
            data: a ``datasets.Dataset`` or a mapping of columns.
            sites: site names or globs.
            dtype: dtype to keep; the model's by default.
            column: the image column.
            tokens: the tokens to keep, as in a spec; boxes are drawn on ``column``.
            heads: the heads to keep, at sites with heads.
            batch_size: most images per forward; by default that of what is stored already, or the model's.
            progress: show a bar if it takes longer than two seconds.

        Returns:
            A view by site name, which gives ``[example, ...]`` of the examples that it is indexed by.

        Raises:
            SpecError: a site, token or head does not exist, or ``dtype`` holds no such numbers.
            DataError: a column is missing, or holds something else.
            ExecutionError: the model would drop activations at random, or one image does not fit.
        """
        check_arguments(vit)
        refuse_train_mode(vit)
        check_batch_size(batch_size)
        check_progress(progress)
        if dtype is not None and dtype not in _DTYPES:
            known = ", ".join(map(str, _DTYPES))
            raise SpecError(f"Activations are kept as {known}, or as the model's own (None); got {dtype!r}.")
        columns = Data(data, vit, progress=progress)
        columns.require(column, "capture")
        reads = _reads(vit, columns, sites, column, tokens, heads)
        with thrifty():
            columns.check_images(column)
            images = image_numbers(columns, [column], progress=progress)[column]
            asked = rows_by_default(vit) if batch_size == "auto" else batch_size
            asked = asked if vit.layout.family.one_image is None else 1
            holdings = Holdings(self.tiers, vit, columns, column, images, reads.values(), asked, dtype)
            self._fit_batch(holdings, adopt=batch_size == "auto")
            source = Source(holdings)
            _fill(source, progress)
            self.flush()
        self._warn_of_loss(holdings)
        return StoredActivations(source, reads)

    def flush(self) -> None:
        """Wait until every whole block is on disk, if there is a folder."""
        self.tiers.flush()

    def _fit_batch(self, holdings: Holdings, *, adopt: bool) -> None:
        """Choose the images per forward: of what is stored as a whole those that gave it, or else as many as
        the budgets have room for."""
        vit, image = holdings.vit, image_bytes(holdings.vit, holdings.reads, holdings.dtype)
        most = self.tiers.most_at_work(image, vit.device)
        if adopt:
            holdings.adopt_rows(max(holdings.rows, holdings.data.n))
        if holdings.rows > most and holdings.absent():
            holdings.use_rows(most)
            if adopt:
                holdings.adopt_rows(most)
        self._warn_of_little(image + kept_bytes(vit, holdings.reads, holdings.dtype), vit.device)
        self.tiers.leave_room(image * min(holdings.rows, most), vit.device)

    def _warn_of_little(self, least: int, device: torch.device) -> None:
        budget, name = self.tiers.budget_on(device), "gpu" if device.type == "cuda" else "host"
        if 0 < budget < least:
            logger.warning(
                "%s=%s is little: an image that passes through the model, and what is kept of it, take %s "
                "all the same. Give it more.",
                name,
                in_words(budget),
                in_words(least),
            )

    def _warn_of_loss(self, holdings: Holdings) -> None:
        lost = max((len(examples) for examples in holdings.absent().values()), default=0)
        if lost:
            needed = sum(entry.nbytes for read in holdings.reads if (entry := holdings.entry(read)))
            logger.warning(
                "The store's budgets hold less than the %s that were captured: %d of %d examples will be "
                "computed again when they are asked for. Give it more, or a folder.",
                in_words(needed),
                lost,
                holdings.data.n,
            )

    def usage(self) -> dict[str, int]:
        """Bytes held by tier: ``gpu``, ``host`` and ``disk``."""
        self.tiers.flush()
        return self.tiers.usage()

    def close(self) -> None:
        """Finish writing and give all memory back; files stay, and the store can be used again."""
        self.tiers.close()

    def clear(self) -> None:
        """Forget everything, files included.

        Raises:
            ExecutionError: a file cannot be removed.
        """
        self.tiers.close()
        try:
            self.tiers.forget()
        except OSError as error:
            raise ExecutionError(
                f"Activations in {self.folder} cannot be removed: {error.strerror or error}. What is left of "
                "them can still be read; make the folder writable to remove it."
            ) from None

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        held = ", ".join(f"{tier} {in_words(nbytes)}" for tier, nbytes in self.usage().items())
        return f"ActivationStore({self.folder or 'memory only'}: {held})"


def _reads(
    vit: HookedViT,
    data: Data,
    sites: str | Iterable[str],
    column: str,
    tokens: Tokens,
    heads: int | Iterable[int] | None,
) -> dict[str, Read]:
    if not isinstance(sites, Iterable):
        raise SpecError(
            f"sites is a site name, a glob such as 'blocks.*.resid_post' or several, not "
            f"{type(sites).__name__}."
        )
    reads: dict[str, Read] = {}
    for name in vit.expand([sites] if isinstance(sites, str) else sites):
        site = Site.parse(name)
        where = f"capture of {name}"
        chosen = Capture.model_validate({"site": name, "tokens": tokens, "heads": heads}).heads
        check_heads(vit, site, chosen, where)
        own = Positions()
        if site.has_tokens:
            own = resolve_tokens(tokens, vit, data, column, f"{where}, tokens")
        reads[name] = Read(ColumnOrigin(column), site, own, chosen)
    if not reads:
        raise SpecError("There is no site to capture. Name some, such as 'blocks.*.resid_post'.")
    return reads


def _fill(source: Source, progress: bool) -> None:
    """Fill the store; where memory runs out, begin again with half as many images per forward."""
    filled, holdings = False, source.holdings
    bar = tqdm(desc="activations", unit="block", unit_scale=True, delay=2.0, disable=not progress)
    with bar, source.counting(bar.update):
        while not filled:
            batches = ((holdings.column, batch) for batch in holdings.missing_batches())
            with memory_may_run_out(), source.data.ahead(batches, source.tiers.waiting):
                source.fill()
                filled = True
            if not filled:
                holdings.use_rows(make_room(min(holdings.rows, len(holdings.by_image))))
