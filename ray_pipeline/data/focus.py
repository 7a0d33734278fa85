"""Depth from focus: where in a z-stack each pixel is sharpest.

Nayar and Nakajima 1994, "Shape from Focus": sum-modified Laplacian, and a parabola through its three best slices.
"""

from __future__ import annotations

import cv2
import numpy as np

#: the sum of the Laplacian is taken over a Gaussian of this many pixels
WINDOW_PX = 3.0
#: pixels with less than this share of the stack's strongest focus take the depth of their surroundings
LEAST_FOCUS = 0.05


def focus_measure(stack: np.ndarray) -> np.ndarray:
    """Sum-modified Laplacian of each slice, (Z, H, W) of any real dtype -> float32, at least 0."""
    kernel = np.array([[-1.0, 2.0, -1.0]], np.float32)
    measures = []
    for plane in stack.astype(np.float32):
        across = np.abs(cv2.filter2D(plane, cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT_101))
        down = np.abs(cv2.filter2D(plane, cv2.CV_32F, kernel.T, borderType=cv2.BORDER_REFLECT_101))
        measures.append(_smooth(across + down, WINDOW_PX))
    return np.stack(measures)


def depth_from_focus(stack: np.ndarray) -> np.ndarray:
    """(Z, H, W), Z at least 2 -> (H, W) float32: the sharpest slice of each pixel, 0 the first and 1 the last.

    Where nothing is in focus in any slice, depth spreads from the surroundings, weighted by their focus; a stack
    without any structure lies half-way.
    """
    measure = focus_measure(stack)
    last = len(stack) - 1
    best = measure.argmax(axis=0)
    below, here, above = (
        np.take_along_axis(measure, np.clip(best + step, 0, last)[None], axis=0)[0] for step in (-1, 0, 1)
    )
    curvature = below - 2 * here + above
    inner = (best > 0) & (best < last) & (curvature < 0)
    step = np.where(inner, 0.5 * (below - above) / np.where(inner, curvature, 1), 0)
    depth = np.clip(best + step, 0, last).astype(np.float32) / last
    strength = here - measure.mean(axis=0)
    strongest = float(strength.max())
    if strongest <= 0:
        return np.full(depth.shape, 0.5, np.float32)
    sure = (strength > LEAST_FOCUS * strongest).astype(np.float32) * strength
    spread = max(stack.shape[1:]) / 8
    weight = _smooth(sure, spread)
    around = _smooth(sure * depth, spread) / np.maximum(weight, 1e-12 * strongest)
    return np.where(sure > 0, depth, np.clip(around, 0, 1)).astype(np.float32)


def extended_focus(stack: np.ndarray) -> np.ndarray:
    """(Z, H, W) -> (H, W) of the same dtype: each pixel from the slice in which it is sharpest."""
    best = focus_measure(stack).argmax(axis=0)
    return np.take_along_axis(stack, best[None], axis=0)[0]


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
