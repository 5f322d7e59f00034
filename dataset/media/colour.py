"""What the numbers of a picture or frame mean, and sRGB made of them. Codes are those of ITU-T H.273.

HDR (HLG and PQ) becomes SDR as ITU-R BT.2408 places the two: diffuse white of 203 cd/m2 is the white of SDR, and what is brighter
is compressed by the curve of BT.2390.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

BT709, BT2020, P3 = 1, 9, 12  # primaries
BT601 = 6  # a matrix; its primaries hardly differ from those of BT.709 and are taken for them
PQ, HLG = 16, 18  # transfers
MATRICES = {
    BT709: (0.2126, 0.0722),
    4: (0.3, 0.11),
    5: (0.299, 0.114),
    BT601: (0.299, 0.114),
    7: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}
UNREAD_MATRICES = frozenset({8, 11, 12, 13, 14, 15, 16, 17})  # YCgCo, ICtCp and others that cameras do not write
HD_HEIGHT = 720  # from here on, an untagged video is BT.709

WHITE = 203.0  # cd/m2
PEAK = 1000.0  # cd/m2, the brightest that is expected
BRIGHTEST = 10000 / WHITE  # that a PQ signal can hold, in units of white

Point = tuple[float, float]
D65 = (0.3127, 0.3290)
BT709_POINTS = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # of ICC profiles


@dataclass(frozen=True)
class Colour:
    """How to read the numbers of one file.

    Attributes:
        primaries, transfer: H.273 codes; what is not named above is taken for that of SDR video.
        matrix: of YCbCr, one of ``MATRICES``.
        full_range: whether luma uses all numbers and not only 16 to 235 (of 255).
        assumed: whether the file does not name its matrix.
    """

    primaries: int = BT709
    transfer: int = BT709
    matrix: int = BT709
    full_range: bool = False
    assumed: bool = False

    @property
    def is_hdr(self) -> bool:
        return self.transfer in (PQ, HLG)

    @property
    def is_converted(self) -> bool:
        """Whether RGB values change, beyond the matrix of YCbCr."""
        return self.is_hdr or self.primaries in TO_BT709

    def __str__(self) -> str:
        name = {PQ: "PQ", HLG: "HLG"}.get(self.transfer, {BT2020: "BT.2020", P3: "P3"}.get(self.primaries, ""))
        return f"{name} to SDR" if self.is_hdr else f"{name} to BT.709" if name else ""


def rgb_of_ycbcr(y: np.ndarray, cb: np.ndarray, cr: np.ndarray, colour: Colour) -> np.ndarray:
    """(H, W) uint16 each, of 16 bits -> (H, W, 3) float32 RGB, 0 to 1 in the transfer of the file."""
    y, cb, cr = (plane.astype(np.float32) for plane in (y, cb, cr))
    if colour.full_range:
        y, cb, cr = y / 65535, (cb - 32768) / 65535, (cr - 32768) / 65535
    else:
        y, cb, cr = (y - 4096) / 56064, (cb - 32768) / 57344, (cr - 32768) / 57344
    red, blue = MATRICES[colour.matrix]
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=-1)


def to_srgb(rgb: np.ndarray, colour: Colour) -> np.ndarray:
    """(..., 3) float32 RGB of 0 to 1 in the transfer and primaries of ``colour`` -> uint8 sRGB."""
    return srgb_of_light(_linear(colour.transfer)[_steps(rgb)], TO_BT709.get(colour.primaries), colour.is_hdr)


def srgb_of_light(light: np.ndarray, to_bt709: np.ndarray | None = None, hdr: bool = False) -> np.ndarray:
    """(..., 3) float32 linear RGB, 1 is white -> uint8 sRGB; light beyond that is cut, or compressed where it is ``hdr``."""
    if to_bt709 is not None:
        light = light @ to_bt709.T
    if hdr:
        light = np.maximum(light, 0)
        brightest = np.minimum(light.max(axis=-1, keepdims=True), BRIGHTEST)
        light *= _compression()[(brightest * (65535 / BRIGHTEST)).astype(np.uint16)]
    return _encoded()[_steps(light)]


def _steps(values: np.ndarray) -> np.ndarray:
    """0 to 1 -> 0 to 65535."""
    return (np.clip(values, 0, 1) * 65535 + 0.5).astype(np.uint16)


def primaries_to_bt709(red: Point, green: Point, blue: Point, white: Point) -> np.ndarray:
    """The matrix between linear RGB of these chromaticities (x, y) and that of BT.709; whites become white."""

    def to_xyz(points: tuple[Point, ...], white: Point) -> np.ndarray:
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in points]).T
        return columns * np.linalg.solve(columns, [white[0] / white[1], 1, (1 - sum(white)) / white[1]])

    own, target = to_xyz((red, green, blue), white), to_xyz(BT709_POINTS, D65)
    adapt = BRADFORD
    ratio = (adapt @ target.sum(axis=1)) / (adapt @ own.sum(axis=1))
    return (np.linalg.inv(target) @ np.linalg.inv(adapt) @ np.diag(ratio) @ adapt @ own).astype(np.float32)


TO_BT709 = {
    BT2020: primaries_to_bt709((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    P3: primaries_to_bt709((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
}


@functools.cache
def _linear(transfer: int) -> np.ndarray:
    """Linear light of each of 65536 signals; 1 is white. float32."""
    signal = np.linspace(0, 1, 65536)
    if transfer == PQ:
        light = pq_to_light(signal) / WHITE
    elif transfer == HLG:
        light = PEAK / WHITE * hlg_to_light(signal)
    else:
        light = srgb_to_light(signal)
    return light.astype(np.float32)


@functools.cache
def _encoded() -> np.ndarray:
    """uint8 sRGB of each of 65536 steps of linear light."""
    light = np.linspace(0, 1, 65536)
    return np.rint(255 * light_to_srgb(light)).astype(np.uint8)


def srgb_to_light(signal: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def light_to_srgb(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def hlg_to_light(signal: np.ndarray) -> np.ndarray:
    """Signal -> light of a display of 1000 cd/m2, both 0 to 1 (BT.2100), with the display's gamma of 1.2 on each channel alone."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12) ** 1.2


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """Signal of 0 to 1 -> cd/m2 (BT.2100)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """cd/m2 -> signal of 0 to 1 (BT.2100)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = (light / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


@functools.cache
def _compression() -> np.ndarray:
    """By what to multiply linear light (1 is white) so that ``PEAK`` becomes white: the curve of BT.2390, which works on PQ
    signals. float32, for 65536 steps of light from 0 to the brightest of PQ."""
    light = np.linspace(0, BRIGHTEST, 65536)
    light[0] = light[1]
    peak, white = light_to_pq(np.array(PEAK)), light_to_pq(np.array(WHITE))
    signal, highest = np.minimum(light_to_pq(light * WHITE) / peak, 1), white / peak
    knee = 1.5 * highest - 0.5
    t = np.clip((signal - knee) / (1 - knee), 0, None)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * highest
    return (pq_to_light(np.where(signal < knee, signal, curve) * peak) / WHITE / light).astype(np.float32)
