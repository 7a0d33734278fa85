"""What simulated specimens are drawn with: light at points, random fields and lines, cells and their bodies.

Positions are x, y in pixels of a square image of `size`; what lies outside it is left out.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from ray_pipeline.data.optics import blur

TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)


@dataclass(frozen=True)
class Cells:
    """Cells of one field: centres (N, 2) as x, y; present, radius, angle, stretch, brightness (N,); pixels."""

    centres: np.ndarray
    present: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    stretch: np.ndarray
    brightness: np.ndarray


@dataclass(frozen=True)
class Bodies:
    """Cell bodies (size, size): labels (0 empty, i + 1 cell i), nucleus mask and cytoplasmic haze; outlines."""

    labels: np.ndarray
    outlines: dict[int, np.ndarray]
    nucleus: np.ndarray
    haze: np.ndarray


def splat(xy: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    """Image (size, size) of point sources at `xy` (N, 2), each spread over its four pixels; light adds up."""
    corner = np.floor(xy).astype(np.int64)
    inside = ((corner >= 0) & (corner < size - 1)).all(axis=1)
    corner, weight = corner[inside], np.asarray(weight, np.float64)[inside]
    fx, fy = (xy[inside] - corner).T
    index = corner[:, 1] * size + corner[:, 0]
    image = np.zeros(size * size)
    for step, share in (
        (0, (1 - fx) * (1 - fy)),
        (1, fx * (1 - fy)),
        (size, (1 - fx) * fy),
        (size + 1, fx * fy),
    ):
        image += np.bincount(index + step, weight * share, minlength=size * size)
    return image.reshape(size, size).astype(np.float32)


def add_patch(image: np.ndarray, patch: np.ndarray, xy: np.ndarray) -> None:
    """Add a square patch to `image` around the pixel nearest to `xy`, cut at the border."""
    half = patch.shape[0] // 2
    x, y = np.rint(xy).astype(int) - half
    top, left = max(0, y), max(0, x)
    bottom, right = min(image.shape[0], y + 2 * half + 1), min(image.shape[1], x + 2 * half + 1)
    if top < bottom and left < right:
        image[top:bottom, left:right] += patch[top - y : bottom - y, left - x : right - x]


def smooth_noise(rng: np.random.Generator, size: int, sigma_px: float) -> np.ndarray:
    """Gaussian random field (size, size) of zero mean and unit variance, correlated over about `sigma_px`."""
    step = max(1.0, sigma_px / 2.0)
    sigma = sigma_px / step
    side = int(np.ceil(size / step)) + 6
    field = blur(rng.standard_normal((side, side), np.float32), sigma) * np.float32(2.0 * np.sqrt(np.pi) * sigma)
    if step > 1.0:
        whole = int(np.ceil(side * step))
        field = cv2.resize(field, (whole, whole), interpolation=cv2.INTER_CUBIC)
    margin = (field.shape[0] - size) // 2
    return field[margin : margin + size, margin : margin + size]


def broad_blur(image: np.ndarray, sigma_px: float) -> np.ndarray:
    """Gaussian blur of a large radius, worked out on a coarser grid."""
    step = max(1, int(sigma_px / 3.0))
    size = image.shape[0]
    side = max(8, size // step)
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.resize(blur(small, sigma_px * side / size), (size, size), interpolation=cv2.INTER_CUBIC)


def soft_step(x: np.ndarray) -> np.ndarray:
    """Logistic function."""
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One number from `low` to `high`, uniform in its logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def rotate(xy: np.ndarray, angle: float) -> np.ndarray:
    """Points (..., 2) turned by `angle` radians about the origin."""
    c, s = np.cos(angle), np.sin(angle)
    return xy @ np.array([[c, s], [-s, c]])


def persistent_walks(rng, start, heading, steps: int, step_px: float, persistence_px: float) -> np.ndarray:
    """Worm-like chains (N, steps, 2) from `start` (N, 2): the heading forgets itself over persistence_px."""
    turn = rng.standard_normal((len(start), steps), np.float32) * np.float32(np.sqrt(2.0 * step_px / persistence_px))
    theta = np.asarray(heading, np.float32)[:, None] + np.cumsum(turn, axis=1)
    return start[:, None] + step_px * np.cumsum(np.stack([np.cos(theta), np.sin(theta)], -1), axis=1)


def wavy_edges(rng: np.random.Generator, start: np.ndarray, end: np.ndarray, step_px: float):
    """Points on wavy lines from start to end (N, 2), about step_px apart, and the line of each point."""
    counts = np.maximum(2, np.ceil(np.linalg.norm(end - start, axis=1) / step_px)).astype(int)
    edge = np.repeat(np.arange(len(start)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    t = (np.arange(counts.sum()) - first) / counts[edge]
    along = (end - start)[edge]
    across = np.stack([-along[:, 1], along[:, 0]], -1)
    wave = sum(rng.normal(0, 0.08 / k**1.3, len(start))[edge] * np.sin(np.pi * k * t) for k in (1, 2, 3, 4))
    return start[edge] + along * t[:, None] + across * wave[:, None], edge


def draw_cells(rng: np.random.Generator, size: int, spacing: float, gaps: float = 0.6) -> Cells:
    """Cells on a jittered hexagonal grid that overlaps the border; all but up to `gaps` of them `present`."""
    count = int(np.ceil(size / spacing)) + 5
    column, row = np.meshgrid(np.arange(count), np.arange(int(count * 1.2) + 1))
    grid = np.stack([column + 0.5 * (row % 2), row * 0.866], -1).reshape(-1, 2) - 2.0
    grid = (grid + rng.uniform(-1, 0, 2)) * spacing + rng.normal(0, 0.2 * spacing, grid.shape)
    centres = grid[((grid > -1.5 * spacing) & (grid < size + 1.5 * spacing)).all(axis=1)]
    n = len(centres)
    # Cells grow in islands: on the high ground of a broad random landscape.
    landscape = smooth_noise(rng, size, max(1.5 * spacing, 8.0))
    at = np.clip(centres, 0, size - 1).astype(int)
    score = landscape[at[:, 1], at[:, 0]] + rng.normal(0, 0.5, n)
    present = score >= np.quantile(score, rng.uniform(0.0, gaps))
    present[np.argmin(np.abs(centres - size / 2).sum(axis=1))] = True
    return Cells(
        centres=centres,
        present=present,
        radius=spacing * rng.uniform(0.42, 0.62, n),
        angle=rng.normal(rng.uniform(0, np.pi), rng.uniform(0.2, 1.5), n),
        stretch=rng.uniform(1.0, 1.9, n),
        brightness=rng.lognormal(0.0, 0.4, n),
    )


def spread_outline(rng: np.random.Generator, cells: Cells, i: int, points: int = 96) -> np.ndarray:
    """Outline (points, 2) of a spread cell: an ellipse with lobes."""
    theta = np.linspace(0, 2 * np.pi, points, endpoint=False)
    order = np.arange(2, 8)
    lobes = rng.normal(0, 0.28, len(order)) / order
    radius = 1.0 + (lobes[:, None] * np.cos(order[:, None] * theta + rng.uniform(0, 7, (6, 1)))).sum(axis=0)
    radius *= cells.radius[i] * 1.15
    along, across = radius * np.cos(theta) * cells.stretch[i], radius * np.sin(theta) / cells.stretch[i] ** 0.5
    return cells.centres[i] + rotate(np.stack([along, across], -1), cells.angle[i])


def draw_bodies(rng: np.random.Generator, cells: Cells, size: int, um_pixel: float) -> Bodies:
    """Spread cell bodies, later cells over earlier ones, with the nucleus as an ellipse inside."""
    labels = np.zeros((size, size), np.int32)
    nuclei = np.zeros((size, size), np.uint8)
    outlines = {}
    for i in np.flatnonzero(cells.present):
        outlines[i] = spread_outline(rng, cells, i)
        cv2.fillPoly(labels, [np.rint(outlines[i]).astype(np.int32)], int(i) + 1)
        axes = cells.radius[i] * rng.uniform(0.3, 0.42) * np.array([1.25, 0.85])
        centre = cells.centres[i] + rng.normal(0, 0.05, 2) * cells.radius[i]
        rim = rotate(axes * np.stack([np.cos(TURN), np.sin(TURN)], -1), cells.angle[i]) + centre
        cv2.fillPoly(nuclei, [np.rint(rim * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    nucleus = blur(nuclei.astype(np.float32) / 255.0, 0.35 / um_pixel)
    level = np.concatenate([[0.0], cells.brightness]).astype(np.float32)[labels]
    # Dye follows the cell's thickness: it falls from the nucleus to a thin edge.
    thickness = broad_blur((labels > 0).astype(np.float32), 5.0 / um_pixel) ** 2
    texture = np.exp(0.25 * smooth_noise(rng, size, 0.4 / um_pixel) + 0.3 * smooth_noise(rng, size, 2.5 / um_pixel))
    haze = blur(level, 0.6 / um_pixel) * (0.15 + thickness + 0.7 * broad_blur(nucleus, 2.5 / um_pixel)) * texture
    return Bodies(labels, outlines, nucleus, haze / max(float(np.quantile(haze, 0.97)), 1e-6))


def label_at(labels: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Label under each point of `xy` (..., 2); 0 outside the image."""
    at = np.rint(xy).astype(int)
    inside = ((at >= 0) & (at < labels.shape[0])).all(axis=-1)
    at = np.clip(at, 0, labels.shape[0] - 1)
    return np.where(inside, labels[at[..., 1], at[..., 0]], 0)
