"""The accuracy–size picture as inline SVG: trainable numbers (logarithmic) against accuracy with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 56
LETTER, LINE = 7.0, 16.0


@dataclass(frozen=True)
class Point:
    """One method: trainable numbers (> 0), accuracy with its 95 % interval (0 … 1), and whether it is a reference."""

    label: str
    trainable: int
    accuracy: float
    low: float
    high: float
    reference: bool = False


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


@dataclass(frozen=True)
class _Scale:
    """From figures to pixels."""

    first: int
    last: int
    floor: float
    ceiling: float

    def x(self, trainable: float) -> float:
        share = (math.log10(trainable) - self.first) / (self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, accuracy: float) -> float:
        share = (accuracy - self.floor) / (self.ceiling - self.floor)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def draw(points: Sequence[Point]) -> str:
    """Return the picture as one SVG element with a text alternative."""
    scale = _scale(points)
    pieces = [*_axes(scale), *_marks(points, scale), *_labels(points, scale)]
    summary = "; ".join(f"{p.label}: {p.trainable:,} trainable, accuracy {100 * p.accuracy:.1f} %" for p in points)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Accuracy against trainable numbers. '
        f'{escape(summary, quote=True)}">' + "".join(pieces) + "</svg>"
    )


def _scale(points: Sequence[Point]) -> _Scale:
    exponents = [math.log10(point.trainable) for point in points]
    floor = math.floor(20 * min(point.low for point in points) - 0.2) / 20
    ceiling = min(1.0, math.ceil(20 * max(point.high for point in points) + 0.2) / 20)
    return _Scale(math.floor(min(exponents) - 0.1), math.ceil(max(exponents) + 0.1), max(0.0, floor), ceiling)


def _axes(scale: _Scale) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    steps = round((scale.ceiling - scale.floor) / 0.05)
    for step in range(steps + 1):
        accuracy = scale.floor + 0.05 * step
        y = scale.y(accuracy)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{100 * accuracy:.0f} %</text>'
    for exponent in range(scale.first, scale.last + 1):
        x = scale.x(10.0**exponent)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{_short(10**exponent)}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="axis" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">trainable numbers</text>'
    yield f'<text class="axis" x="{LEFT}" y="{TOP - 6}" text-anchor="start">test accuracy, 95 % interval</text>'


def _short(count: int) -> str:
    return f"{count // 10**6} M" if count >= 10**6 else f"{count // 1000} k" if count >= 1000 else str(count)


def _marks(points: Sequence[Point], scale: _Scale) -> Iterator[str]:
    for point in points:
        x, y = scale.x(point.trainable), scale.y(point.accuracy)
        kind = "reference" if point.reference else "method"
        ends = f'y1="{scale.y(point.low):.1f}" y2="{scale.y(point.high):.1f}"'
        yield f'<line class="{kind} bar" x1="{x:.1f}" x2="{x:.1f}" {ends}/>'
        yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'


def _labels(points: Sequence[Point], scale: _Scale) -> Iterator[str]:
    """Put each name where it covers least: marks, intervals, and names already placed."""
    taken = []
    for point in points:
        x, y = scale.x(point.trainable), scale.y(point.accuracy)
        taken.append(_Box(x - 7, y - 7, x + 7, y + 7))
        taken.append(_Box(x - 2, scale.y(point.high), x + 2, scale.y(point.low)))
    for point in sorted(points, key=lambda p: p.accuracy):
        x, y = scale.x(point.trainable), scale.y(point.accuracy)
        best = min(_candidates(x, y, len(point.label) * LETTER), key=lambda box: _cost(box, taken, x, y))
        taken.append(best)
        yield f'<text class="name" x="{best.left:.1f}" y="{best.bottom - 4:.1f}">{escape(point.label)}</text>'


def _candidates(x: float, y: float, width: float) -> Iterator[_Box]:
    for dy in (0, -14, 14, -28, 28, -42, 42, -58, 58):
        for left in (x + 10, x - 12 - width, x - width / 2):
            yield _Box(left, y + dy - LINE / 2, left + width, y + dy + LINE / 2)


def _cost(box: _Box, taken: Sequence[_Box], x: float, y: float) -> float:
    inside = box.left >= LEFT and box.right <= WIDTH - 4 and box.top >= TOP and box.bottom <= HEIGHT - BOTTOM
    distance = abs((box.top + box.bottom) / 2 - y) + 0.1 * abs((box.left + box.right) / 2 - x)
    return (0.0 if inside else 1e6) + 10.0 * sum(box.overlap(other) for other in taken) + distance
