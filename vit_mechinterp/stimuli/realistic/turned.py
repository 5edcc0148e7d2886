"""Objects turned on a lathe, with what is stuck to them: tableware, a lamp, a chess piece, a rocket."""

from __future__ import annotations

import numpy as np

from vit_mechinterp.stimuli.realistic.mesh import join, rotation
from vit_mechinterp.stimuli.realistic.parts import Part
from vit_mechinterp.stimuli.realistic.solids import ball, block, closed_lathe, curve, extrude, lathe, tube
from vit_mechinterp.stimuli.realistic.surfaces import Surface

__all__ = ["bottle", "bowl", "chess_king", "lamp", "mug", "rocket", "teapot", "vase"]


def mug() -> list[Part]:
    """A red mug with a handle, white inside."""
    outside = [(0.34, 0.0), (0.37, 0.02), (0.38, 0.06), (0.38, 0.84), (0.375, 0.86), (0.36, 0.868)]
    inside = [(0.345, 0.86), (0.34, 0.84), (0.34, 0.12), (0.31, 0.08), (0.0, 0.075)]
    handle = curve([(0.35, 0, 0.70), (0.50, 0, 0.74), (0.62, 0, 0.62), (0.62, 0, 0.40), (0.50, 0, 0.26),
                    (0.35, 0, 0.24)], 7)  # fmt: skip
    red = Surface("#c4161c", roughness=0.06)
    return [
        Part(join([lathe([*outside, *inside]), tube(handle, 0.055)]), red),
        Part(lathe([(0.325, 0.09), (0.3415, 0.13), (0.3415, 0.80), (0.336, 0.80), (0.336, 0.13),
                    (0.31, 0.092), (0.0, 0.09)]), Surface("#f1ece2", roughness=0.06)),
    ]  # fmt: skip


def vase() -> list[Part]:
    """A white vase with a blue pattern."""
    outside = curve([(0.2, 0.0), (0.24, 0.03), (0.38, 0.3), (0.4, 0.48), (0.28, 0.72), (0.15, 0.86),
                     (0.15, 0.95), (0.23, 1.06)], 8)  # fmt: skip
    inside = [(0.21, 1.065), (0.12, 0.95), (0.12, 0.86), (0.25, 0.72), (0.3, 0.4), (0.0, 0.1)]
    painted = Surface("#ffffff", roughness=0.05, pattern="porcelain", repeat=(3.0, 1.0))
    return [Part(lathe(np.concatenate([outside, inside])), painted)]


def teapot() -> list[Part]:
    """A green teapot with spout, handle and lid."""
    body = curve([(0.24, 0.0), (0.3, 0.02), (0.45, 0.2), (0.48, 0.36), (0.38, 0.56), (0.24, 0.64)], 8)
    lid = curve([(0.27, 0.62), (0.27, 0.65), (0.2, 0.7), (0.07, 0.74), (0.045, 0.77), (0.08, 0.83),
                 (0.06, 0.88), (0.0, 0.9)], 6)  # fmt: skip
    spout = curve([(0.38, 0, 0.18), (0.52, 0, 0.24), (0.6, 0, 0.42), (0.72, 0, 0.6), (0.78, 0, 0.63)], 6)
    handle = curve([(-0.4, 0, 0.54), (-0.56, 0, 0.58), (-0.7, 0, 0.48), (-0.7, 0, 0.3), (-0.58, 0, 0.18),
                    (-0.42, 0, 0.16)], 7)  # fmt: skip
    glaze = Surface("#2f6b45", roughness=0.07)
    pot = [lathe(body), tube(spout, np.linspace(0.13, 0.05, len(spout))), tube(handle, 0.05)]
    return [Part(join(pot), glaze), Part(lathe(lid), Surface("#3c8257", roughness=0.07))]


def bottle() -> list[Part]:
    """A dark wine bottle with a label and a foil."""
    glass = curve([(0.0, 0.0), (0.15, 0.0), (0.17, 0.04), (0.17, 0.62), (0.165, 0.68), (0.1, 0.8),
                   (0.062, 0.88), (0.06, 1.12), (0.06, 1.13), (0.0, 1.13)], 8)  # fmt: skip
    foil = [(0.068, 0.94), (0.07, 0.95), (0.07, 1.1), (0.078, 1.11), (0.078, 1.14), (0.07, 1.15), (0.0, 1.15)]
    label = [(0.16, 0.17), (0.177, 0.17), (0.177, 0.5), (0.16, 0.5)]
    return [
        Part(lathe(glass), Surface("#10291a", roughness=0.04)),
        Part(lathe(foil), Surface("#d8a23c", "metal", 0.2)),
        Part(lathe(label), Surface("#ffffff", "matte", pattern="label")),
    ]


def bowl() -> list[Part]:
    """A turquoise bowl, cream inside, with a rim."""
    outside = curve([(0.2, 0.0), (0.21, 0.05), (0.36, 0.14), (0.5, 0.32), (0.54, 0.48)], 8)
    inside = curve([(0.515, 0.485), (0.47, 0.32), (0.34, 0.17), (0.16, 0.1), (0.0, 0.09)], 8)
    lining = inside + np.array([-0.004, 0.006])
    lining[-1, 0] = 0.0
    return [
        Part(lathe(np.concatenate([outside, inside])), Surface("#12938f", roughness=0.08)),
        Part(lathe(np.concatenate([(inside - np.array([0.0, 0.01]))[::-1][1:], lining])),
             Surface("#f4e8cf", roughness=0.08)),
    ]  # fmt: skip


def lamp() -> list[Part]:
    """A table lamp: brass foot and stem, a cloth shade."""
    foot = curve([(0.24, 0.0), (0.25, 0.03), (0.14, 0.06), (0.05, 0.12), (0.035, 0.2), (0.07, 0.32),
                  (0.09, 0.4), (0.04, 0.5), (0.025, 0.56), (0.025, 0.72), (0.0, 0.73)], 6)  # fmt: skip
    shade = [(0.36, 0.58), (0.365, 0.585), (0.22, 1.03), (0.215, 1.03), (0.21, 1.025), (0.35, 0.585)]
    cloth = Surface("#ead6a6", "matte", pattern="linen", repeat=(10.0, 4.0))
    return [
        Part(lathe(foot), Surface("#d9a441", "metal", 0.12)),
        Part(closed_lathe(shade), cloth),
        Part(ball(0.09).moved((0, 0, 0.78)), Surface("#fff6dd", "matte")),
    ]


def chess_king() -> list[Part]:
    """A black chess king with a felt base."""
    body = curve([(0.3, 0.05), (0.31, 0.09), (0.26, 0.16), (0.27, 0.2), (0.18, 0.26), (0.12, 0.42),
                  (0.1, 0.62), (0.19, 0.66), (0.19, 0.69), (0.12, 0.71), (0.13, 0.74), (0.17, 0.9),
                  (0.18, 0.96), (0.1, 1.0), (0.04, 1.02), (0.0, 1.02)], 5)  # fmt: skip
    cross = [
        block(0.05, 0.05, 0.2, bevel=0.012).moved((0, 0, 0.99)),
        block(0.15, 0.05, 0.05, bevel=0.012).moved((0, 0, 1.08)),
    ]
    ebony = Surface("#201814", roughness=0.09)
    return [
        Part(join([lathe(body), *cross]), ebony),
        Part(lathe([(0.29, 0.0), (0.31, 0.02), (0.31, 0.06)]), Surface("#b08d57", "matte")),
    ]


def rocket() -> list[Part]:
    """A toy rocket: white body, red nose and fins, a blue window."""
    hull = curve([(0.12, 0.12), (0.17, 0.16), (0.22, 0.4), (0.21, 0.66), (0.17, 0.8)], 8)
    nose = curve([(0.172, 0.79), (0.16, 0.84), (0.09, 1.0), (0.0, 1.1)], 8)
    nozzle = [(0.09, 0.02), (0.13, 0.03), (0.1, 0.13), (0.0, 0.13)]
    fin = np.array([(0.14, 0.42), (0.17, 0.1), (0.36, 0.0), (0.38, 0.02), (0.36, 0.2), (0.24, 0.38)])
    upright = rotation("x", 90)
    fins = []
    for k in range(3):
        flat = extrude(fin, 0.04, bevel=0.01).moved((0, 0, -0.02))
        fins.append(flat.moved(turn=rotation("z", 120 * k + 30) @ upright))
    windows, frames = [], []
    for k in range(3):
        out = rotation("z", 120 * k - 30)
        at = out @ np.array([0.212, 0.0, 0.6])
        frames.append(ball(0.075, 24).moved(tuple(at), scale=(0.28, 1, 1), turn=out))
        windows.append(ball(0.055, 24).moved(tuple(at * (1.04, 1.04, 1)), scale=(0.35, 1, 1), turn=out))
    red = Surface("#d7261e", roughness=0.08)
    return [
        Part(lathe(hull), Surface("#f2f2ef", roughness=0.1)),
        Part(join([lathe(nose), *fins]), red),
        Part(join(windows), Surface("#1c6fb8", roughness=0.04)),
        Part(join([lathe(nozzle), *frames]), Surface("#b9bcc2", "metal", 0.2)),
    ]
