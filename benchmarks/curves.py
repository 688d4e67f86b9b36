"""Curves in panels with logarithmic axes, drawn by Pillow alone: figures of docs/ need no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 460, 340, 62, 18, 14, 48
COLOURS = ("#d62728", "#ff7f0e", "#2ca02c", "#1f77b4", "#9467bd", "#8c564b")


@dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[tuple[float, float]]  # x and y, above 0


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    begin: int  # pixels
    end: int

    @classmethod
    def over(cls, values: Sequence[float], begin: int, end: int) -> _Axis:
        return cls(min(values) / 1.15, max(values) * 1.15, begin, end)

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten within the axis."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        return [value for value in found if self.low <= value <= self.high]


def draw_panels(path: Path, panels: Sequence[tuple[str, Sequence[Curve]]], y_title: str) -> None:
    """Write a PNG of panels side by side, each (title of its x axis, curves), with one legend in the last."""
    picture = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=12)
    values = [y for _, curves in panels for curve in curves for _, y in curve.points]
    for number, (x_title, curves) in enumerate(panels):
        left = number * WIDTH
        x = _Axis.over([x for curve in curves for x, _ in curve.points], left + LEFT, left + WIDTH - RIGHT)
        y = _Axis.over(values, HEIGHT - BOTTOM, TOP)
        draw.rectangle((x.begin, y.end, x.end, y.begin), outline="#888888")
        for value in x.ticks():
            draw.line((x.at(value), y.begin, x.at(value), y.end), fill="#e4e4e4")
            draw.text((x.at(value), y.begin + 4), _short(value), "black", font, anchor="ma")
        for value in y.ticks():
            draw.line((x.begin, y.at(value), x.end, y.at(value)), fill="#e4e4e4")
            draw.text((x.begin - 5, y.at(value)), _short(value), "black", font, anchor="rm")
        draw.text(((x.begin + x.end) / 2, HEIGHT - 10), x_title, "black", font, anchor="ms")
        for at, curve in enumerate(curves):
            colour = COLOURS[at % len(COLOURS)]
            line = [(x.at(px), y.at(py)) for px, py in curve.points]
            draw.line(line, fill=colour, width=2)
            for px, py in line:
                draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)
            if number == len(panels) - 1:
                draw.text((x.end - 8, y.end + 8 + 16 * at), curve.name, colour, font, anchor="ra")
    draw.text((LEFT, 2), y_title, "black", font)
    picture.save(path, optimize=True)


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
