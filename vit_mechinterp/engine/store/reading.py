"""Items of some slots, read from the fastest tier that has them.

Reading moves a block up if at least half of it is wanted, or if there is free room, so that single rows drawn
at random do not drive out what is used.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.store.copying import copy_items, pick
from vit_mechinterp.engine.store.keys import Entry
from vit_mechinterp.engine.store.memory import Block
from vit_mechinterp.engine.store.tiers import Tiers

__all__ = ["read_items"]


def read_items(tiers: Tiers, entry: Entry, slots: IntArray, out: Tensor) -> IntArray:
    """Write items of some slots into ``out [item, *shape]``; return the slots that are absent."""
    with tiers.lock:
        numbers = slots // entry.block
        order = np.argsort(numbers, kind="stable")
        counts = entry.counts(slots)
        begins = np.cumsum(counts) - counts
        absent: list[IntArray] = []
        for where in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            here, places = slots[where], where
            if entry.starts is not None:
                own = counts[where]
                places = np.arange(int(own.sum())) + np.repeat(begins[where] - np.cumsum(own) + own, own)
            number = int(numbers[where[0]])
            if not _copy_out(tiers, entry, number, here, out, places):
                absent.append(_copy_part(tiers, entry, number, here, out, places))
        return np.concatenate(absent) if absent else slots[:0]


def _copy_out(
    tiers: Tiers, entry: Entry, number: int, slots: IntArray, out: Tensor, places: IntArray
) -> bool:
    """Put the items of some slots of one block into places of ``out``, from the fastest tier that has
    all of them; False if none has."""
    name, own, device = (entry.key.name, number), entry.slots(number), out.device
    local = slots - own.start
    items = local if entry.starts is None else entry.items(slots) - entry.span(own).start
    many = 2 * len(set(slots.tolist())) >= len(own)
    gpu = tiers.gpu(device)
    if gpu is not None and gpu.has(name, local) and (block := gpu.get(name)) is not None:
        stream = torch.cuda.current_stream(device)
        block.wait_on(stream)
        copy_items(block.tensor, items, out, places)
        block.copies(stream)
        return True
    block = tiers.host.get(name) or tiers.outgoing.get(name)
    if block is None or not block.have[local].all():
        block = _load(tiers, entry, number, evict=many)
    if block is None:
        source = _elsewhere(tiers, entry, number, slots)
        if source is not None:
            copy_items(source, items, out, places)
        return source is not None
    block.settle()
    if gpu is not None and (higher := gpu.make(entry, number, evict=many)) is not None:
        stream = torch.cuda.current_stream(device)
        higher.tensor.copy_(block.tensor, non_blocking=True)
        higher.have[:] = block.have
        copy_items(higher.tensor, items, out, places)
        block.copies(stream)
        higher.copies(stream)
    elif device.type == "cuda":
        found = pick(block.tensor, items)
        pinned = found if found.is_pinned() else found.pin_memory()
        copy_items(pinned.to(device, non_blocking=True), np.arange(len(items)), out, places)
        block.copies(torch.cuda.current_stream(device))
    else:
        copy_items(block.tensor, items, out, places)
    return True


def _copy_part(
    tiers: Tiers, entry: Entry, number: int, slots: IntArray, out: Tensor, places: IntArray
) -> IntArray:
    """The same from blocks that are still filling up, as far as they go; return the slots that are absent."""
    own = entry.slots(number)
    for block in tiers.in_memory((entry.key.name, number)):
        have = block.have[slots - own.start]
        if have.any():
            block.settle()
            items, here = entry.items(slots[have]) - entry.span(own).start, entry.counts(slots)
            copy_items(block.tensor, items, out, places[np.repeat(have, here)])
            places, slots = places[np.repeat(~have, here)], slots[~have]
    return slots


def _load(tiers: Tiers, entry: Entry, number: int, *, evict: bool) -> Block | None:
    """Move a block from disk into the host's memory, every slot of it checked."""
    shard = None if tiers.disk is None else tiers.disk.open(entry, number)
    if shard is None or tiers.disk is None:
        return None
    name, own = (entry.key.name, number), np.arange(entry.slots(number).start, entry.slots(number).stop)
    # A part that is in memory is not given up for a file that turns out to be damaged.
    if tiers.host.peek(name) is not None and not tiers.disk.sound(shard, entry, number, own):
        return None
    block = tiers.host.make(entry, number, evict=evict)
    if block is None:
        return None
    if not tiers.disk.sound(shard, entry, number, own):
        tiers.host.drop(name)
        return None
    block.tensor.copy_(shard.values)
    block.have[:] = True
    block.saved = True
    return block


def _elsewhere(tiers: Tiers, entry: Entry, number: int, slots: IntArray) -> Tensor | None:
    """A block straight from the disk, or on a GPU where no host memory was given."""
    name, local = (entry.key.name, number), slots - entry.slots(number).start
    for tier in tiers.gpus.values():
        if tier.has(name, local) and (block := tier.get(name)) is not None:
            return block.tensor
    shard = None if tiers.disk is None else tiers.disk.open(entry, number)
    if shard is None or tiers.disk is None or not tiers.disk.sound(shard, entry, number, slots):
        return None
    return shard.values
