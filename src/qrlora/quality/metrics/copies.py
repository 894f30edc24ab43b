"""Detection of copied training pictures, robust to shifts, crops, mirroring, recompression and changes of tone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

SIDE = 128
"""Short side in pixels at which pictures are compared; it resolves a subject's proportions."""
TOLERANCE = 1.0
"""Largest distance in pixels between matching edges."""
COPY_THRESHOLD = 0.9
"""Least score of a copy. In tests/quality/test_measures.py rotated, cropped, mirrored and recompressed copies score
above it, other scenes of the same subject below."""
SCALES = (0.7, 1.4)
"""Least and largest scale of a copy, on either axis."""
LEAST_OVERLAP = 0.6
LEAST_EDGE = 20  # pixels; a picture without edges would match every other one

Grey = UInt8[np.ndarray, "_ _"]
Warp = Float[np.ndarray, "2 3"]


def copy_score(picture: UInt8[np.ndarray, "h w 3"], other: UInt8[np.ndarray, "h2 w2 3"]) -> float:
    """Return the edge agreement of two pictures after registration, in [0, 1]; colours are ignored.

    The other picture and its mirror image are registered to the first by matched keypoints (SIFT, Lowe 2004, with
    RANSAC) and by maximising the correlation (ECC, Evangelidis and Psarakis 2008). The score is the F-measure of
    Canny's edges within TOLERANCE pixels where the pictures overlap; 0 if no registration is found.
    """
    ours, theirs = _grey(picture), _grey(other)
    best = 0.0
    for oriented in (theirs, np.ascontiguousarray(theirs[:, ::-1])):
        for warp in _registrations(ours, oriented):
            best = max(best, _agreement(ours, oriented, warp))
    return best


def _grey(pixels: UInt8[np.ndarray, "h0 w0 3"]) -> Grey:
    height, width = pixels.shape[:2]
    scale = SIDE / min(height, width)
    size = max(SIDE, round(width * scale)), max(SIDE, round(height * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)


def _registrations(ours: Grey, theirs: Grey) -> Iterator[Warp]:
    """Candidate registrations: maps from our coordinates to theirs."""
    middle = [(theirs.shape[1] - ours.shape[1]) / 2, (theirs.shape[0] - ours.shape[0]) / 2]
    starts = [np.array([[1, 0, middle[0]], [0, 1, middle[1]]], np.float32)]
    by_points = _by_keypoints(ours, theirs)
    starts += [] if by_points is None else [by_points]
    for start in starts:
        warp = start
        with contextlib.suppress(cv2.error):  # not converged: use the start
            steps = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 80, 1e-4)
            everywhere, blur = np.full_like(ours, 255), 5
            _, found = cv2.findTransformECC(ours, theirs, start.copy(), cv2.MOTION_AFFINE, steps, everywhere, blur)
            warp = np.asarray(found, np.float32)
        yield warp if _plausible(warp) else start


def _by_keypoints(ours: Grey, theirs: Grey) -> Warp | None:
    finder = cv2.SIFT_create(contrastThreshold=0.02)  # type: ignore[attr-defined]  # missing in its stubs
    (points, features), (others, other_features) = (finder.detectAndCompute(grey, None) for grey in (ours, theirs))
    if features is None or other_features is None:
        return None
    pairs = cv2.BFMatcher(crossCheck=True).match(features, other_features)
    if len(pairs) < 4:
        return None
    cv2.setRNGSeed(0)  # RANSAC is random
    here = np.array([points[pair.queryIdx].pt for pair in pairs], np.float32)
    there = np.array([others[pair.trainIdx].pt for pair in pairs], np.float32)
    warp, _ = cv2.estimateAffinePartial2D(here, there, ransacReprojThreshold=2)
    return warp.astype(np.float32) if warp is not None and _plausible(warp) else None


def _plausible(warp: Warp) -> bool:
    stretch = np.linalg.svd(warp[:, :2], compute_uv=False)
    return bool(SCALES[0] <= stretch.min() and stretch.max() <= SCALES[1])


def _agreement(ours: Grey, theirs: Grey, warp: Warp) -> float:
    size = ours.shape[::-1]
    laid = cv2.warpAffine(theirs, warp, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    inside = np.ones_like(theirs)
    there = cv2.warpAffine(inside, warp, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
    inner = cv2.erode(there, np.ones((7, 7), np.uint8), borderValue=1) > 0  # its border is not an edge
    if inner.mean() < LEAST_OVERLAP:
        return 0.0
    return edge_agreement(edges_of(ours) & inner, edges_of(laid) & inner, TOLERANCE)


def edges_of(grey: Grey) -> Bool[np.ndarray, "h w"]:
    """Return Canny's edges (1986) of a slightly blurred picture; its two thresholds are of 8-bit gradients."""
    return cv2.Canny(cv2.GaussianBlur(grey, (0, 0), 1.0), 40, 100) > 0


def edge_agreement(ours: Bool[np.ndarray, "h w"], theirs: Bool[np.ndarray, "h w"], tolerance: float) -> float:
    """Return the F-measure of edges within `tolerance` pixels of an edge of the other (Martin, Fowlkes and Malik 2004).

    0 if either has fewer than LEAST_EDGE pixels of edge.
    """
    if min(ours.sum(), theirs.sum()) < LEAST_EDGE:
        return 0.0
    to_ours, to_theirs = (cv2.distanceTransform((~e).astype(np.uint8), cv2.DIST_L2, 5) for e in (ours, theirs))
    precision, recall = (to_theirs[ours] <= tolerance).mean(), (to_ours[theirs] <= tolerance).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))
