"""Objects built of blocks, prisms, tubes and balls: tools, toys, a chair, a cactus."""

from __future__ import annotations

import numpy as np

from vit_mechinterp.stimuli.realistic.mesh import join, rotation
from vit_mechinterp.stimuli.realistic.parts import Part
from vit_mechinterp.stimuli.realistic.solids import (
    ball,
    block,
    circle,
    curve,
    extrude,
    lathe,
    star_outline,
    tube,
)
from vit_mechinterp.stimuli.realistic.surfaces import Surface

__all__ = ["bolt", "cactus", "chair", "die", "duck", "gear", "knot", "star"]


def bolt() -> list[Part]:
    """A steel bolt that stands on its hexagonal head."""
    turns, pitch = 11, 0.052
    angle = np.linspace(0, 2 * np.pi * turns, 28 * turns)
    radius = 0.146 * np.ones_like(angle)
    helix = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0.42 + pitch * angle / (2 * np.pi)], -1)
    head = extrude(circle(6, 0.32), 0.2, bevel=0.025)
    shank = lathe([(0.165, 0.18), (0.165, 0.4), (0.148, 0.42), (0.148, 0.98), (0.12, 1.01), (0.0, 1.01)], 48)
    steel = Surface("#c9ccd1", "metal", 0.18)
    return [Part(join([head, shank, tube(helix, 0.024, 10)]), steel)]


def gear() -> list[Part]:
    """A brass gear with twelve teeth, standing on its rim."""
    teeth, outline = 12, []
    for tooth in range(teeth):
        for part, radius in ((-0.30, 0.4), (-0.18, 0.5), (0.18, 0.5), (0.30, 0.4)):
            angle = 2 * np.pi * (tooth + 0.5 + part) / teeth - np.pi / 2
            outline.append((radius * np.cos(angle), radius * np.sin(angle)))
    outer = np.array(outline)
    directions = np.arctan2(outer[:, 1], outer[:, 0])
    hole = 0.15 * np.stack([np.cos(directions), np.sin(directions)], axis=-1)
    wheel = extrude(outer, 0.2, bevel=0.015, hole=hole)
    ring = circle(48)
    hub = extrude(0.24 * ring, 0.28, bevel=0.02, hole=0.15 * ring).moved((0, 0, -0.04))
    turn = rotation("x", 90)
    return [Part(join([wheel, hub]).moved((0, 0.1, 0.5), turn=turn), Surface("#c98b2b", "metal", 0.16), 30)]


def knot() -> list[Part]:
    """A purple trefoil knot."""
    t = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    path = np.stack(
        [np.sin(t) + 2 * np.sin(2 * t), np.cos(t) - 2 * np.cos(2 * t), -np.sin(3 * t)], axis=-1
    ) * np.array([0.155, 0.155, 0.2])
    standing = path @ rotation("x", 90).T
    return [Part(tube(standing, 0.105, 24, closed=True), Surface("#7a2a9c", roughness=0.1))]


def star() -> list[Part]:
    """A thick yellow star on two of its points."""
    solid = extrude(star_outline(5, 0.56, 0.25), 0.26, bevel=0.05)
    upright = solid.moved((0, 0.13, 0.453), turn=rotation("x", 90))
    return [Part(upright, Surface("#f2b90c", roughness=0.12), 25)]


def chair() -> list[Part]:
    """A wooden chair with a red cushion."""
    legs = [block(0.06, 0.06, 0.46).moved((x, y, 0)) for x in (-0.22, 0.22) for y in (-0.2, 0.2)]
    posts = [block(0.055, 0.045, 0.62).moved((x, 0.2, 0.46)) for x in (-0.22, 0.22)]
    rails = [block(0.46, 0.035, 0.09).moved((0, 0.2, z)) for z in (0.62, 0.78, 0.94)]
    stretchers = [block(0.035, 0.4, 0.04).moved((x, 0, 0.18)) for x in (-0.22, 0.22)]
    seat = block(0.54, 0.5, 0.05).moved((0, 0, 0.45))
    wood = Surface("#ffffff", roughness=0.2, pattern="oak", mapping="box", repeat=(2.0, 1.0))
    cushion = block(0.44, 0.38, 0.07, bevel=0.04).moved((0, -0.02, 0.495))
    return [
        Part(join([*legs, *posts, *rails, *stretchers, seat]), wood),
        Part(cushion, Surface("#a3233a", "matte")),
    ]


def cactus() -> list[Part]:
    """A ribbed cactus with two arms in a clay pot."""
    pot = [(0.2, 0.0), (0.26, 0.3), (0.3, 0.3), (0.31, 0.38), (0.27, 0.385), (0.24, 0.35), (0.0, 0.34)]
    soil = [(0.24, 0.33), (0.26, 0.36), (0.0, 0.37)]
    stem = tube(curve([(0, 0, 0.3), (0, 0, 0.6), (0, 0, 0.95)], 10), 0.125, 48)
    top = ball(0.125, 48).moved((0, 0, 0.95), scale=(1, 1, 1.1))
    pieces = [stem, top]
    for side, low, high in ((1, 0.58, 0.92), (-1, 0.5, 0.78)):
        path = curve([(0.08 * side, 0, low), (0.22 * side, 0, low + 0.01), (0.27 * side, 0, low + 0.1),
                      (0.27 * side, 0, high)], 8)  # fmt: skip
        pieces += [tube(path, 0.065, 32), ball(0.065, 32).moved((0.27 * side, 0, high))]
    petals = [(0.045 * np.cos(angle), 0.045 * np.sin(angle)) for angle in np.arange(5) * 1.2566]
    flower = [ball(0.035, 16).moved((x, y, 1.09)) for x, y in petals]
    green = Surface("#ffffff", "matte", pattern="ribs", repeat=(9.0, 1.0))
    return [
        Part(join(pieces), green),
        Part(lathe(pot), Surface("#b5562d", "matte")),
        Part(lathe(soil), Surface("#3a2a1e", "matte")),
        Part(join(flower), Surface("#e8467c", roughness=0.3)),
    ]


def duck() -> list[Part]:
    """A yellow bath duck."""
    body = ball(1.0, 40).moved((0, 0, 0.27), scale=(0.46, 0.34, 0.27))
    tail = tube(curve([(-0.3, 0, 0.3), (-0.42, 0, 0.4), (-0.5, 0, 0.52)], 8), np.linspace(0.17, 0.02, 17), 28)
    head = ball(0.235, 40).moved((0.24, 0, 0.66))
    neck = tube(curve([(0.18, 0, 0.4), (0.22, 0, 0.5), (0.24, 0, 0.6)], 5), np.linspace(0.22, 0.17, 11), 28)
    wings = [ball(1.0, 28).moved((-0.06, 0.31 * s, 0.32), scale=(0.24, 0.08, 0.14)) for s in (1, -1)]
    beak = [
        ball(1.0, 24).moved((0.47, 0, 0.655), scale=(0.13, 0.12, 0.035)),
        ball(1.0, 24).moved((0.45, 0, 0.615), scale=(0.1, 0.09, 0.03)),
    ]
    eyes = [ball(0.038, 20).moved((0.425, 0.115 * s, 0.73)) for s in (1, -1)]
    return [
        Part(join([body, tail, head, neck, *wings]), Surface("#f7cf15", roughness=0.15)),
        Part(join(beak), Surface("#ea6a10", roughness=0.15)),
        Part(join(eyes), Surface("#0c0c0c", roughness=0.05)),
    ]


def die() -> list[Part]:
    """A white die with black pips; opposite faces add up to seven."""
    cube = block(0.74, 0.74, 0.74, bevel=0.09)
    grid = 0.2
    faces = {
        1: [(0, 0)],
        2: [(-1, -1), (1, 1)],
        3: [(-1, -1), (0, 0), (1, 1)],
        4: [(-1, -1), (-1, 1), (1, -1), (1, 1)],
        5: [(-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0)],
        6: [(-1, -1), (-1, 0), (-1, 1), (1, -1), (1, 0), (1, 1)],
    }
    turns = {
        1: np.eye(3), 6: rotation("x", 180), 2: rotation("x", 90), 5: rotation("x", -90),
        3: rotation("y", 90), 4: rotation("y", -90),
    }  # fmt: skip
    pips = []
    for face, places in faces.items():
        for x, y in places:
            pip = ball(1.0, 24).moved((grid * x, grid * y, 0.368), scale=(0.075, 0.075, 0.012))
            pips.append(pip.moved((0, 0, 0.37), turn=turns[face]))
    return [
        Part(cube, Surface("#f4f1ea", roughness=0.1)),
        Part(join(pips), Surface("#101010", roughness=0.2)),
    ]
