"""From scenes to pixels, with Mitsuba 3.

The variant is ``scalar_rgb``: it needs nothing but the package itself (the vectorised ones look for LLVM or
CUDA, and an LLVM that is too old ends the process), is multi-threaded, and gives the same image for the same
seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.stimuli.realistic.mesh import Floats, rotation
from vit_mechinterp.stimuli.realistic.objects import OBJECT_NAMES, object_parts
from vit_mechinterp.stimuli.realistic.parts import Part
from vit_mechinterp.stimuli.realistic.patterns import pattern
from vit_mechinterp.stimuli.realistic.rooms import TABLES, WALLS, room_light, to_bytes
from vit_mechinterp.stimuli.realistic.scenes import Camera, Scene
from vit_mechinterp.stimuli.realistic.solids import block
from vit_mechinterp.stimuli.realistic.surfaces import Surface, linear

__all__ = ["coverage", "mitsuba", "photograph"]

_BOUNCES = 4
_TABLE = 0.12


@contextmanager
def mitsuba() -> Iterator[Any]:
    """Give Mitsuba with the variant that is used here; the caller's own variant is set again afterwards.

    Raises:
        ExecutionError: Mitsuba is not installed.
    """
    try:
        import mitsuba as mi
    except ImportError as error:
        raise ExecutionError(
            "Rendering realistic images needs Mitsuba 3, which is not installed: pip install "
            "'vit-mechinterp[realistic]'. The shipped images need no renderer: source='packaged'."
        ) from error
    before = mi.variant()
    mi.set_variant("scalar_rgb")
    try:
        yield mi
    finally:
        if before is not None:
            mi.set_variant(before)


def photograph(scene: Scene, size: int, samples: int) -> NDArray[np.uint8]:
    """Render a scene by path tracing: sRGB ``[size, size, 3]``, with ``samples`` paths a pixel."""
    with mitsuba() as mi:
        described = {
            "type": "scene",
            # Random numbers belong to blocks, so their size must not depend on how many threads there are.
            "integrator": {"type": "path", "max_depth": _BOUNCES, "block_size": 32},
            "sensor": _sensor(mi, scene.camera, size, samples),
            **_room(mi, scene),
        }
        for number in (0, 1):
            described |= _object(mi, scene, number)
        image = np.array(mi.render(_loaded(mi, described), spp=samples, seed=scene.index))
    return _developed(image)


def coverage(scene: Scene, size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return what each point of the image shows, without the blur of the lens; four points to a pixel.

    Returns:
        The object that is seen, 0 for none, 1 or 2 ``[2 size, 2 size]``, and for each object where it would
        be seen if the other one were not there ``[2, 2 size, 2 size]``.
    """
    with mitsuba() as mi:
        meshes = []
        for number, placed in enumerate(scene.placed):
            parts = object_parts(OBJECT_NAMES[scene.objects[number]])
            corners = np.concatenate([part.mesh.corners() for part in parts]) @ placed.matrix.T + placed.shift
            meshes.append(_mesh(mi, f"object_{number + 1}", corners))
        both = _seen_index(mi, scene.camera, size, {"object_1": meshes[0], "object_2": meshes[1]})
        alone = [_seen_index(mi, scene.camera, size, {"object": mesh}) > 0 for mesh in meshes]
    return both, np.stack(alone)


def _seen_index(mi: Any, camera: Camera, size: int, meshes: dict[str, Any]) -> NDArray[np.int64]:
    """The number of the mesh that one ray through each point meets first, from 1 on; 0 where none does."""
    sensor = _sensor(mi, camera, 2 * size, 1) | {"type": "perspective"}
    for lens in ("aperture_radius", "focus_distance"):
        del sensor[lens]
    integrator = {"type": "aov", "aovs": "index:shape_index"}
    loaded = _loaded(mi, {"type": "scene", "integrator": integrator, "sensor": sensor, **meshes})
    index = np.array(mi.render(loaded, spp=1, seed=0))[..., -1].round().astype(np.int64)
    order = [list(meshes).index(shape.id()) + 1 for shape in loaded.shapes()]
    return np.array([0, *order])[index]


def _loaded(mi: Any, described: dict[str, Any]) -> Any:
    # Things that are described together are made in an order that differs from call to call, and with the
    # order of the lights differs the noise; what is made beforehand keeps its place.
    apart = [name for name, value in described.items() if isinstance(value, dict)]
    made = {name: mi.load_dict(described[name]) for name in apart if name not in ("sensor", "integrator")}
    made = described | made
    return mi.load_dict(made, parallel=False)


def _sensor(mi: Any, camera: Camera, size: int, samples: int) -> dict[str, Any]:
    look = mi.ScalarTransform4f().look_at(origin=camera.origin, target=camera.target, up=[0, 0, 1])
    return {
        "type": "thinlens",
        "fov": camera.field_of_view,
        "aperture_radius": camera.aperture,
        "focus_distance": float(np.linalg.norm(np.subtract(camera.target, camera.origin))),
        "to_world": look,
        # With a box filter no pixel takes part of another block, so the order of blocks changes nothing.
        "film": {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": "box"}},
        "sampler": {"type": "multijitter", "sample_count": samples},
    }


def _room(mi: Any, scene: Scene) -> dict[str, Any]:
    """Table, wall, floor and lights."""
    flat = mi.ScalarTransform4f()
    width, depth = scene.table_size
    top = block(2 * width, 2 * depth, _TABLE, bevel=0.03).moved((0, 0, -_TABLE))
    across = top.texture_coordinates("box") @ rotation("z", scene.table_degrees)[:2, :2] / scene.table_scale
    table = to_bytes(TABLES[scene.table](scene.stream("table")))
    wall = to_bytes(WALLS[scene.wall](scene.stream("wall")))
    below = -2.0
    half = (10.0, 4.0)
    repeat = [2 * side / scene.wall_scale for side in half]
    described: dict[str, Any] = {
        "table": _mesh(
            mi, "table", top.corners(), top.corner_normals(), across,
            {"type": "roughplastic", "alpha": scene.gloss, "nonlinear": True,
             "diffuse_reflectance": _bitmap(mi, table)},
        ),
        "wall": {
            "type": "rectangle",
            "to_world": flat.translate([0, scene.wall_distance, below + half[1]])
            .rotate([1, 0, 0], 90)
            .scale([half[0], half[1], 1]),
            "bsdf": {"type": "diffuse", "reflectance": _bitmap(mi, wall, repeat)},
        },
        "floor": {
            "type": "rectangle",
            "to_world": flat.translate([0, 0, below]).scale([half[0], half[0], 1]),
            "bsdf": {"type": "diffuse", "reflectance": {"type": "rgb", "value": 0.25}},
        },
        "room": {
            "type": "envmap",
            "bitmap": mi.Bitmap(room_light(scene.stream("room"))),
            "to_world": flat.rotate([1, 0, 0], 90),
        },
    }  # fmt: skip
    for number, light in enumerate(scene.lights):
        look = flat.look_at(origin=light.origin, target=[0, 0, 0.3], up=[0, 0, 1])
        described[f"light_{number}"] = {
            "type": "rectangle",
            "to_world": look.scale([light.side / 2, light.side / 2, 1]),
            "emitter": {"type": "area", "radiance": {"type": "rgb", "value": list(light.radiance)}},
        }
    return described


def _object(mi: Any, scene: Scene, number: int) -> dict[str, Any]:
    placed = scene.placed[number]
    turn = placed.matrix / np.cbrt(np.linalg.det(placed.matrix))
    meshes = {}
    for index, part in enumerate(object_parts(OBJECT_NAMES[scene.objects[number]])):
        name = f"object_{number + 1}_{index}"
        corners = part.mesh.corners() @ placed.matrix.T + placed.shift
        normals = part.mesh.corner_normals(part.crease) @ turn.T
        meshes[name] = _mesh(mi, name, corners, normals, _coordinates(part), _bsdf(mi, part.surface))
    return meshes


def _coordinates(part: Part) -> Floats | None:
    if part.surface.pattern is None:
        return None
    coordinates: Floats = part.mesh.texture_coordinates(part.surface.mapping) * part.surface.repeat
    return coordinates


def _bsdf(mi: Any, surface: Surface) -> dict[str, Any]:
    color: dict[str, Any] = {"type": "rgb", "value": list(linear(surface.color))}
    if surface.pattern is not None:
        color = _bitmap(mi, pattern(surface.pattern))
    if surface.material == "matte":
        return {"type": "diffuse", "reflectance": color}
    if surface.material == "plastic":
        return {
            "type": "roughplastic", "diffuse_reflectance": color, "alpha": surface.roughness,
            "nonlinear": True,
        }  # fmt: skip
    return {
        "type": "roughconductor", "material": "none", "specular_reflectance": color,
        "alpha": surface.roughness,
    }  # fmt: skip


def _bitmap(mi: Any, pixels: NDArray[np.uint8], repeat: list[float] | None = None) -> dict[str, Any]:
    texture: dict[str, Any] = {"type": "bitmap", "bitmap": mi.Bitmap(np.ascontiguousarray(pixels))}
    if repeat is not None:
        texture["to_uv"] = mi.ScalarTransform3f().scale(repeat)
    return texture


def _mesh(
    mi: Any,
    name: str,
    corners: Floats,
    normals: Floats | None = None,
    coordinates: Floats | None = None,
    bsdf: dict[str, Any] | None = None,
) -> Any:
    """Make a mesh of triangles that share no vertex ``[faces, 3, 3]``, so that every corner has its own
    normal.
    """
    properties = mi.Properties()
    properties.set_id(name)
    if bsdf is not None:
        properties["bsdf"] = mi.load_dict(bsdf)
    n = len(corners)
    mesh = mi.Mesh(
        name, 3 * n, n, props=properties,
        has_vertex_normals=normals is not None, has_vertex_texcoords=coordinates is not None,
    )  # fmt: skip
    values = mi.traverse(mesh)
    values["vertex_positions"] = np.ravel(corners).astype(np.float32)
    values["faces"] = np.arange(3 * n, dtype=np.uint32)
    if normals is not None:
        values["vertex_normals"] = np.ravel(normals).astype(np.float32)
    if coordinates is not None:
        values["vertex_texcoords"] = np.ravel(coordinates).astype(np.float32)
    values.update()
    return mesh


def _developed(radiance: Floats) -> NDArray[np.uint8]:
    """Turn radiance into a picture: exposure by its mean, highlights rolled off, sRGB."""
    light = np.maximum(np.asarray(radiance, dtype=np.float64), 0)
    luminance = light @ np.array([0.2126, 0.7152, 0.0722])
    light = light * 0.36 / max(float(np.minimum(luminance, np.quantile(luminance, 0.98)).mean()), 1e-6)
    mapped = light * (1 + light / 6.25) / (1 + light) * 1.15
    clipped = np.clip(mapped, 0, 1)
    encoded = np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)
    return (encoded * 255).round().astype(np.uint8)
