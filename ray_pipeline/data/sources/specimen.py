"""Simulated specimens: DNA, cell borders, filaments and vesicles of cultured cells, drawn in micrometres.

Each painter `paint_*(rng, size, um_pixel)` returns the label in focus and out of focus, two (size, size)
images in arbitrary units, as it stands in the specimen: no objective, no camera.
"""

import numpy as np
from scipy.spatial import Voronoi

from ray_pipeline.data.optics import blur
from ray_pipeline.data.sources.specimen_geometry import (
    Cells,
    add_patch,
    broad_blur,
    draw_bodies,
    draw_cells,
    label_at,
    log_uniform,
    persistent_walks,
    rotate,
    smooth_noise,
    soft_step,
    splat,
    wavy_edges,
)


def paint_nuclei(rng: np.random.Generator, size: int, um_pixel: float):
    """DNA or nuclear envelope: ellipses with chromatin and nucleoli, a few cells in mitosis."""
    cells = draw_cells(rng, size, rng.uniform(15, 30) / um_pixel)
    focus, defocus = np.zeros((2, size, size), np.float32)
    texture = chromatin(rng, 256 + int(40 / um_pixel), um_pixel)
    rim = 2.2 if rng.random() < 0.12 else rng.uniform(0.0, 0.35)
    flatness, large, mitotic = rng.uniform(0.1, 0.5), rng.uniform(4.6, 8.0), rng.uniform(0.0, 0.1)
    arms, light = [np.zeros((0, 2))], [np.zeros(0)]
    for i in np.flatnonzero(cells.present):
        if rng.random() < mitotic:
            arms.append(chromosomes(rng, cells.centres[i], rng.uniform(0, np.pi), um_pixel))
            light.append(np.full(len(arms[-1]), 0.009 / um_pixel**2 * cells.brightness[i]))
            continue
        long_axis = large * rng.lognormal(0, 0.12)
        axes = np.array([long_axis, long_axis * rng.uniform(0.6, 0.95)]) / um_pixel
        patch = nucleus_patch(rng, axes, cells.angle[i], um_pixel, texture, rim, flatness)
        # G1 and G2 nuclei differ in their amount of DNA.
        add_patch(
            defocus if rng.random() < 0.1 else focus,
            patch * np.float32(cells.brightness[i] * rng.choice([0.75, 1.2])),
            cells.centres[i],
        )
    focus += splat(np.concatenate(arms), np.concatenate(light), size)
    focus += log_uniform(rng, 0.01, 0.15) * draw_bodies(rng, cells, size, um_pixel).haze
    return focus, defocus


def chromatin(rng: np.random.Generator, size: int, um_pixel: float) -> np.ndarray:
    """Texture of mean about 1: clumps of 0.2 to 1.2 micrometres, log-normal."""
    noise = sum(
        weight * smooth_noise(rng, size, max(um / um_pixel, 0.6))
        for um, weight in ((0.2, 0.5), (0.45, 0.6), (1.2, 0.5))
    )
    return np.exp(np.float32(rng.uniform(0.12, 0.4)) * noise)


def nucleus_patch(rng, axes_px, angle, um_pixel, texture, rim: float, flatness: float):
    """One nucleus (2h+1, 2h+1) of about unit brightness: soft edge, chromatin, nucleoli, bright rim."""
    half = int(np.ceil(1.35 * max(axes_px))) + 3
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    x, y = x + np.float32(rng.uniform(-0.5, 0.5)), y + np.float32(rng.uniform(-0.5, 0.5))
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (c * x + s * y) / np.float32(axes_px[0]), (c * y - s * x) / np.float32(axes_px[1])
    theta = np.arctan2(v, u)
    amplitude, phase = rng.normal(0, 0.05, 4), rng.uniform(0, 7, 4)
    lobes = sum(np.float32(amplitude[k] / (k + 1)) * np.cos((k + 2) * theta + np.float32(phase[k])) for k in range(4))
    rho = np.sqrt(u * u + v * v) / (1 + lobes)
    depth_um = (1 - rho) * np.float32(np.sqrt(axes_px[0] * axes_px[1]) * um_pixel)
    body = soft_step(depth_um / np.float32(0.18)) * np.clip(1 - rho * rho, 0.02, 1) ** np.float32(flatness)
    row, column = rng.integers(0, texture.shape[0] - 2 * half, 2)
    body *= texture[row : row + 2 * half + 1, column : column + 2 * half + 1]
    for _ in range(rng.integers(1, 5)):
        place, radius, oval = rng.normal(0, 0.33, 2).astype(np.float32), rng.uniform(0.1, 0.24), rng.uniform(0.8, 1.4)
        away = np.hypot((u - place[0]) / np.float32(oval), v - place[1]) - np.float32(radius)
        body *= 1 - np.float32(rng.uniform(0.35, 0.75)) * soft_step(-away / np.float32(0.03))
    patches = 0.5 + 0.5 * texture[column : column + 2 * half + 1, row : row + 2 * half + 1]
    return body + np.float32(rim) * np.exp(-((depth_um / np.float32(0.25)) ** 2)) * patches


def chromosomes(rng: np.random.Generator, xy: np.ndarray, angle: float, um_pixel: float):
    """Points (N, 2) of a dividing cell: a metaphase plate, an anaphase pair or loose prometaphase arms."""
    gap, along, across = ((0, 4.2, 0.9), (3.2, 3.6, 0.8), (0, 3.0, 2.6))[rng.integers(3)]
    arms = 46
    centre = rng.normal(0, 1, (arms, 2)) * (across, along) * 0.6
    centre[:, 0] += gap * rng.choice([-1, 1], arms)
    points = persistent_walks(rng, centre, rng.uniform(0, 2 * np.pi, arms), 40, 0.05, 1.5)[:, :, None]
    points = points + rng.normal(0, 0.28, (arms, 40, 6, 2))
    return xy + rotate(points.reshape(-1, 2), angle) / um_pixel


def paint_membranes(rng: np.random.Generator, size: int, um_pixel: float):
    """Cell borders: the edges of a Voronoi tessellation, wavy, of uneven label and thickness."""
    cells = draw_cells(rng, size, log_uniform(rng, 8, 26) / um_pixel, gaps=0.35)
    voronoi = Voronoi(cells.centres)
    shared = cells.present[voronoi.ridge_points].sum(axis=1)
    ridges = np.array(voronoi.ridge_vertices)
    # An edge with a neighbour on both sides carries the full label; a free edge of an island less.
    drawn = (ridges >= 0).all(axis=1) & (shared > 0)
    start, end = voronoi.vertices[ridges[drawn, 0]], voronoi.vertices[ridges[drawn, 1]]
    near = np.linalg.norm(end - start, axis=1) < 4 * np.median(cells.radius)
    start, end, shared = start[near], end[near], shared[drawn][near]
    xy, edge = wavy_edges(rng, start, end, 0.3)
    level = (rng.lognormal(0, 0.35, len(start)) * np.where(shared == 2, 1.0, 0.35))[edge]
    light = level * rng.gamma(4, 0.25, len(xy))
    width = rng.uniform(0.08, 0.4) / um_pixel
    # Uneven thickness: part of the label sits on a blurred copy, by a landscape of its own.
    line = splat(xy, light, size)
    share = soft_step(2 * smooth_noise(rng, size, 3.0 / um_pixel))
    focus = blur(line, width) * share + blur(line, 2.0 * width) * (1 - share)
    focus *= np.exp(rng.uniform(0.1, 0.5) * smooth_noise(rng, size, 0.35 / um_pixel))
    focus *= np.exp(0.3 * smooth_noise(rng, size, 6.0 / um_pixel))
    tilt = rng.normal(0, 0.6 / um_pixel, 2)
    defocus = splat(xy + tilt, level * rng.uniform(0.1, 0.6), size)
    scale = 1.0 / max(float(np.quantile(focus, 0.98)), 1e-9)
    inside = np.where(cells.present, cells.brightness, 0.0)
    glow = broad_blur(splat(cells.centres, inside, size), 0.5 * float(np.median(cells.radius)))
    glow *= np.exp(0.35 * smooth_noise(rng, size, 0.8 / um_pixel))
    haze = glow / max(float(glow.max()), 1e-9) * log_uniform(rng, 0.05, 0.8)
    return focus * scale + haze, defocus * scale


def paint_filaments(rng: np.random.Generator, size: int, um_pixel: float):
    """Filaments in cells: microtubules, actin stress fibres or mitochondrial tubules."""
    cells = draw_cells(rng, size, rng.uniform(22, 45) / um_pixel)
    bodies = draw_bodies(rng, cells, size, um_pixel)
    kind = (microtubules, stress_fibres, tubules)[rng.choice(3, p=(0.4, 0.3, 0.3))]
    step, sharp_share = 0.75, rng.uniform(0.35, 0.8)
    points, light, sharp = [], [], []
    for i in np.flatnonzero(cells.present):
        start, heading, length, persistence = kind(rng, cells, i, um_pixel)
        xy = persistent_walks(rng, start, heading, max(2, int(length / step)), step, persistence / um_pixel)
        inside = np.minimum.accumulate(label_at(bodies.labels, xy) == i + 1, axis=1)
        weight = rng.lognormal(0, 0.8 if kind is stress_fibres else 0.4, len(xy))[:, None]
        weight = weight * rng.standard_gamma(3, xy.shape[:2], np.float32) * cells.brightness[i]
        points.append(xy[inside])
        light.append(weight[inside])
        sharp.append(np.broadcast_to((rng.random(len(xy)) < sharp_share)[:, None], inside.shape)[inside])
        if kind is stress_fibres:
            rim, edge = wavy_edges(rng, bodies.outlines[i], np.roll(bodies.outlines[i], -1, axis=0), step)
            points.append(rim + rng.normal(0, 0.1 / um_pixel, rim.shape))
            light.append(3 * rng.lognormal(0, 0.5, len(bodies.outlines[i]))[edge] * cells.brightness[i])
            sharp.append(np.ones(len(rim), bool))
    points, light, sharp = np.concatenate(points), np.concatenate(light), np.concatenate(sharp)
    focus = splat(points[sharp], light[sharp], size)
    defocus = splat(points[~sharp], light[~sharp], size)
    if kind is tubules:
        focus = blur(focus, 0.14 / um_pixel)
    scene = np.stack([focus, defocus]) * (1.0 - rng.uniform(0.2, 0.8) * bodies.nucleus)
    focus, defocus = scene / max(float(np.quantile(blur(scene[0], 0.1 / um_pixel), 0.98)), 1e-9)
    focus += bodies.haze * (1.0 - rng.uniform(0.0, 0.7) * bodies.nucleus) * log_uniform(rng, 0.12, 1.0)
    return focus, defocus


def microtubules(rng, cells: Cells, i: int, um_pixel: float):
    """Starts (N, 2), headings (N,), length in pixels and persistence in micrometres of a radial array."""
    number = int(rng.integers(140, 380))
    start = cells.centres[i] + rng.normal(0, 0.22, (number, 2)) * cells.radius[i]
    return start, rng.uniform(0, 2 * np.pi, number), cells.radius[i] * rng.uniform(1.2, 2.6), 45.0


def stress_fibres(rng, cells: Cells, i: int, um_pixel: float):
    """As `microtubules`, for actin bundles along the cell."""
    number = int(rng.integers(120, 320))
    place = rng.uniform(-1.6, 1.6, (number, 2)) * cells.radius[i] * (1.0, 0.55)
    heading = cells.angle[i] + rng.normal(0, 0.1, number) + np.pi * rng.integers(0, 2, number)
    start = cells.centres[i] + rotate(place, cells.angle[i])
    return start, heading, cells.radius[i] * rng.uniform(0.8, 2.0), 300.0


def tubules(rng, cells: Cells, i: int, um_pixel: float):
    """As `microtubules`, for a mitochondrial network around the nucleus."""
    number = int(rng.integers(60, 200))
    angle, away = rng.uniform(0, 2 * np.pi, number), (0.35 + rng.gamma(2, 0.17, number)) * cells.radius[i]
    start = cells.centres[i] + (away * np.stack([np.cos(angle), np.sin(angle)])).T
    return start, angle + rng.normal(0, 0.8, number), rng.uniform(6, 20) / um_pixel, 6.0


def paint_puncta(rng: np.random.Generator, size: int, um_pixel: float):
    """Vesicles in cell bodies: clustered near the nucleus, unequal in size and label."""
    cells = draw_cells(rng, size, rng.uniform(18, 36) / um_pixel)
    bodies = draw_bodies(rng, cells, size, um_pixel)
    positive, density, grains_each = rng.uniform(0.3, 1.0), log_uniform(rng, 150, 900), 12
    points, light, sharp = [], [], []
    for i in np.flatnonzero(cells.present):
        clusters = int(rng.integers(2, 9))
        number = int(density * rng.uniform(0.5, 1.5) * (1.0 if rng.random() < positive else 0.3))
        angle, away = rng.uniform(0, 2 * np.pi, clusters), (0.3 + rng.gamma(3, 0.1, clusters)) * cells.radius[i]
        parents = cells.centres[i] + (away * np.stack([np.cos(angle), np.sin(angle)])).T
        xy = parents[rng.integers(clusters, size=number)]
        xy = xy + rng.normal(0, 1, (number, 2)) * rng.gamma(2, 1.6, (number, 1)) / um_pixel
        inside = label_at(bodies.labels, xy) == i + 1
        # A vesicle is a small ball of dye: several points within its radius.
        radius = rng.gamma(3, 0.07, (number, 1, 1)) / um_pixel
        grains = xy[:, None] + rng.normal(0, 0.5, (number, grains_each, 2)) * radius
        points.append(grains[inside].reshape(-1, 2))
        light.append(np.repeat((rng.lognormal(0, 0.7, number) * cells.brightness[i])[inside], grains_each))
        sharp.append(np.repeat((rng.random(number) < 0.65)[inside], grains_each))
    points, light, sharp = np.concatenate(points), np.concatenate(light), np.concatenate(sharp)
    scene = np.stack([splat(points[sharp], light[sharp], size), splat(points[~sharp], light[~sharp], size)])
    scene *= 1.0 - 0.85 * bodies.nucleus
    focus, defocus = scene / max(float(np.quantile(blur(scene[0], 0.13 / um_pixel), 0.99)), 1e-9)
    # The nucleus is a hole in the haze, or holds some of the free dye itself.
    nuclear = rng.uniform(-0.7, 0.5)
    focus += bodies.haze * (1.0 + nuclear * bodies.nucleus) * log_uniform(rng, 0.3, 2.0)
    return focus, defocus


# The order is part of a data set: field i shows stain i mod 4, and it gives channel_idx.
PAINTERS = {
    "nuclei": paint_nuclei,
    "membranes": paint_membranes,
    "filaments": paint_filaments,
    "puncta": paint_puncta,
}
