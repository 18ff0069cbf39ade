"""Drawing in SVG: elements, axes with round ticks, and a panel that lines and points are put in.

Every shape has a class and no colour of its own: the page's style says how it looks, by day and by night.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

LETTER = 6.4  # pixels that a letter of the labels takes, on average

Point = tuple[float, float]


def element(name: str, *inside: str, **attributes: object) -> str:
    """One element; ``inside`` is markup, attributes are escaped, and an underscore in their names is a hyphen.

    >>> element("rect", element("title", "a"), x=1.26, class_="bar")
    '<rect x="1.3" class="bar"><title>a</title></rect>'
    """
    told = "".join(f' {key.strip("_").replace("_", "-")}="{escape(_told(value))}"' for key, value in attributes.items())
    return f"<{name}{told}>{''.join(inside)}</{name}>"


def _told(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def words(x: float, y: float, told: str, class_: str = "label", anchor: str = "start") -> str:
    return element("text", escape(told), x=x, y=y, class_=class_, text_anchor=anchor)


def picture(width: float, height: float, told: str, *inside: str) -> str:
    """The whole drawing, ``width`` by ``height``, stretched to its place on the page; ``told`` says what it shows."""
    return element("svg", *inside, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=told)


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` on the pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, margin: float = 0.06) -> "Axis":
        """Holds the finite ones of ``values``, with room for ``margin`` of their range on both sides."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        room = margin * (high - low) or 0.05 * abs(high) or 0.5
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> dict[float, str]:
        """Round numbers within, about ``wanted`` of them, each with what to write there.

        >>> Axis(0, 1, 0, 100).ticks()
        {0.0: '0.0', 0.2: '0.2', 0.4: '0.4', 0.6: '0.6', 0.8: '0.8', 1.0: '1.0'}
        """
        rough = (self.high - self.low) / wanted
        power = math.floor(math.log10(rough))
        step = min((1, 2, 5, 10), key=lambda round_: abs(round_ * 10.0**power - rough)) * 10.0**power
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [round(number * step, decimals + 1) + 0.0 for number in range(first, last + 1)]
        readable = 1e-5 < step < 1e6
        return {value: f"{value:,.{decimals}f}" if readable else f"{value:.3g}" for value in values}


@dataclass(frozen=True)
class Panel:
    """A rectangle with an axis along its lower edge and one along its left."""

    x: Axis
    y: Axis

    def frame(self, below: str, above: str, unit: str = "", marks: bool = True) -> str:
        """Grid, ticks (those of x where ``marks``) and the axes' names; ``unit`` follows y's numbers."""
        left, right = sorted((self.x.start, self.x.end))
        top, bottom = sorted((self.y.start, self.y.end))
        parts = [words(left, top - 10, above, "name")]
        for value, told in self.y.ticks().items():
            parts.append(element("line", x1=left, x2=right, y1=self.y(value), y2=self.y(value), class_="grid"))
            parts.append(words(left - 8, self.y(value) + 4, told + unit, "tick", "end"))
        parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        for value, told in self.x.ticks(7).items() if marks else ():
            parts.append(words(self.x(value), bottom + 18, told, "tick", "middle"))
        return "".join([*parts, words(right, bottom + 38, below, "name", "end")])

    def curve(self, points: Sequence[Point], class_: str) -> str:
        """A line through ``points``, broken where one is not finite."""
        runs: list[list[Point]] = [[]]
        for point in points:
            if all(math.isfinite(number) for number in point):
                runs[-1].append(point)
            elif runs[-1]:
                runs.append([])
        return "".join(element("polyline", points=self._pixels(run), class_=class_) for run in runs if len(run) > 1)

    def _pixels(self, points: Iterable[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def dots(self, points: Iterable[Point], class_: str, radius: float = 3) -> str:
        """A dot at each of ``points`` that is finite, with its numbers for the pointer that rests on it."""
        return "".join(
            element(
                "circle", element("title", f"{x:.4g}: {y:.4g}"), cx=self.x(x), cy=self.y(y), r=radius, class_=class_
            )
            for x, y in points
            if math.isfinite(x) and math.isfinite(y)
        )

    def level(self, value: float, class_: str) -> str:
        """A line across at ``value``, none where it is not finite."""
        if not math.isfinite(value):
            return ""
        return element("line", x1=self.x.start, x2=self.x.end, y1=self.y(value), y2=self.y(value), class_=class_)

    def shade(self, first: float, last: float, class_: str, told: str) -> str:
        """The panel's part between two values of x, with ``told`` for the pointer that rests on it."""
        left, right = sorted((self.x(first), self.x(last)))
        top, bottom = sorted((self.y.start, self.y.end))
        title = element("title", escape(told))
        return element("rect", title, x=left, y=top, width=right - left, height=bottom - top, class_=class_)

    def below(self, first: float, last: float, told: str) -> str:
        """``told`` below the part between two values of x, if it fits there."""
        left, right = sorted((self.x(first), self.x(last)))
        if right - left < LETTER * len(told):
            return ""
        return words((left + right) / 2, max(self.y.start, self.y.end) + 17, told, "phase", "middle")
