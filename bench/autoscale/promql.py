"""As much of PromQL as the chart's scaling queries use, so that they themselves are what is simulated.

Selectors with `=`, `!=`, `=~`, `!~` and a range; `rate`, `histogram_quantile`, `vector`, `clamp_min`, `clamp_max`;
`sum`, `avg`, `count`, `max`, `min`, with `by`; `+ - * /` and the filters `>` and `<` between scalars, between a vector
and a scalar, and between vectors with equal labels; `or`. Semantics are Prometheus's, the extrapolation of `rate`
included. Anything else raises ConfigError.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.autoscale.scrapes import Labels, Scrapes
from tandem.errors import ConfigError

Vector = dict[Labels, float]
Value = float | Vector
Node = Callable[[Scrapes], Value]
NO_LABELS: Labels = frozenset()
Matchers = tuple[tuple[str, str, str], ...]

_TOKEN = re.compile(
    r'\s*(?:(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)|([A-Za-z_:][\w:]*)|("(?:[^"\\]|\\.)*")|(=~|!~|!=|[-+*/()<>{},=\[\]]))'
)
_AGGREGATES: Mapping[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "count": len,
    "max": max,
    "min": min,
    "avg": lambda values: sum(values) / len(values),
}
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Range:
    """A range selector: only `rate` takes it."""

    name: str
    matchers: Matchers
    seconds: float


def compile_query(text: str) -> Callable[[Scrapes], float]:
    """The query as a function of what was scraped: the one value that a scaler reads, NaN without any.

    Raises ConfigError for what this can't read.
    """
    parser = _Parser(text)
    node = parser.expression()
    parser.end()

    def value(scrapes: Scrapes) -> float:
        found = node(scrapes)
        if isinstance(found, float):
            return found
        return next(iter(found.values())) if len(found) == 1 else math.nan

    return value


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, at = text, 0
        self._tokens: list[str] = []
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise ConfigError(f"query: can't read {text[at : at + 30]!r}")
            self._tokens.append(match.group().strip())
            at = match.end()
        self._at = 0

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, wanted: str = "") -> str:
        token = self._peek()
        if not token or (wanted and token != wanted):
            raise ConfigError(f"query: expected {wanted or 'more'!r}, not {token!r}, in {self._text!r}")
        self._at += 1
        return token

    def end(self) -> None:
        if self._peek():
            raise ConfigError(f"query: {self._peek()!r} is not understood in {self._text!r}")

    def expression(self) -> Node:
        node = self._comparison()
        while self._peek() == "or":
            self._take()
            node = _or(node, self._comparison())
        return node

    def _comparison(self) -> Node:
        node = self._sum()
        while self._peek() in (">", "<"):
            node = _filtered(self._take(), node, self._sum())
        return node

    def _sum(self) -> Node:
        node = self._product()
        while self._peek() in ("+", "-"):
            node = _computed(self._take(), node, self._product())
        return node

    def _product(self) -> Node:
        node = self._unary()
        while self._peek() in ("*", "/"):
            node = _computed(self._take(), node, self._unary())
        return node

    def _unary(self) -> Node:
        token = self._take()
        if token == "(":
            node = self.expression()
            self._take(")")
            return node
        if token[0].isdigit() or token[0] == ".":
            number = float(token)
            return lambda _: number
        if token in _AGGREGATES:
            return self._aggregate(_AGGREGATES[token])
        if self._peek() == "(":
            return self._call(token)
        selector = self._selector(token)
        if isinstance(selector, Range):
            raise ConfigError(f"query: a range is for rate() alone, in {self._text!r}")
        name, matchers = selector
        return lambda scrapes: scrapes.now(name, matchers)

    def _aggregate(self, reduce: Callable[[list[float]], float]) -> Node:
        kept: tuple[str, ...] = ()
        if self._peek() == "by":
            self._take()
            kept = self._names()
        self._take("(")
        inner = self.expression()
        self._take(")")
        kept = self._names_after(kept)
        return lambda scrapes: _aggregated(reduce, kept, _vector(inner(scrapes)))

    def _names_after(self, kept: tuple[str, ...]) -> tuple[str, ...]:
        if self._peek() != "by":
            return kept
        self._take()
        return self._names()

    def _names(self) -> tuple[str, ...]:
        names = []
        self._take("(")
        while self._peek() != ")":
            names.append(self._take())
            if self._peek() == ",":
                self._take()
        self._take(")")
        return tuple(names)

    def _call(self, name: str) -> Node:
        self._take("(")
        if name == "rate":
            selector = self._selector(self._take())
            self._take(")")
            if not isinstance(selector, Range):
                raise ConfigError(f"query: rate() wants a range, in {self._text!r}")
            return lambda scrapes: scrapes.rates(selector.name, selector.matchers, selector.seconds)
        arguments = [self.expression()]
        while self._peek() == ",":
            self._take()
            arguments.append(self.expression())
        self._take(")")
        return _function(name, arguments)

    def _selector(self, name: str) -> tuple[str, Matchers] | Range:
        matchers = []
        if self._peek() == "{":
            self._take()
            while self._peek() != "}":
                label, sign, text = self._take(), self._take(), self._take()
                matchers.append((label, sign, text[1:-1]))
                if self._peek() == ",":
                    self._take()
            self._take("}")
        if self._peek() != "[":
            return name, tuple(matchers)
        self._take()
        number, unit = self._take(), self._take()
        self._take("]")
        if unit not in _SECONDS:
            raise ConfigError(f"query: {number}{unit} is no duration, in {self._text!r}")
        return Range(name, tuple(matchers), float(number) * _SECONDS[unit])


def _vector(value: Value) -> Vector:
    if isinstance(value, float):
        raise ConfigError("query: a vector is needed where a scalar is")
    return value


def _aggregated(reduce: Callable[[list[float]], float], kept: tuple[str, ...], vector: Vector) -> Vector:
    groups: dict[Labels, list[float]] = {}
    for labels, value in vector.items():
        groups.setdefault(frozenset(item for item in labels if item[0] in kept), []).append(value)
    return {labels: float(reduce(values)) for labels, values in groups.items()}


def _or(left: Node, right: Node) -> Node:
    def both(scrapes: Scrapes) -> Value:
        first = _vector(left(scrapes))
        return {**{key: value for key, value in _vector(right(scrapes)).items() if key not in first}, **first}

    return both


def _divide(left: float, right: float) -> float:
    if right:
        return left / right
    return math.nan if left == 0 or math.isnan(left) else math.copysign(math.inf, left)


def _computed(sign: str, left: Node, right: Node) -> Node:
    compute = _ARITHMETIC.get(sign, _divide)
    return lambda scrapes: _joined(left(scrapes), right(scrapes), compute)


def _joined(left: Value, right: Value, compute: Callable[[float, float], float]) -> Value:
    if isinstance(left, float):
        if isinstance(right, float):
            return compute(left, right)
        return {labels: compute(left, value) for labels, value in right.items()}
    if isinstance(right, float):
        return {labels: compute(value, right) for labels, value in left.items()}
    return {labels: compute(value, right[labels]) for labels, value in left.items() if labels in right}


def _filtered(sign: str, left: Node, right: Node) -> Node:
    keeps = operator.gt if sign == ">" else operator.lt

    def kept(scrapes: Scrapes) -> Value:
        vector, limit = _vector(left(scrapes)), right(scrapes)
        if isinstance(limit, float):
            return {labels: value for labels, value in vector.items() if keeps(value, limit)}
        return {k: v for k, v in vector.items() if k in limit and keeps(v, limit[k])}

    return kept


def _function(name: str, arguments: list[Node]) -> Node:
    if name == "vector" and len(arguments) == 1:
        return lambda scrapes: {NO_LABELS: float(_scalar(arguments[0](scrapes)))}
    if name in ("clamp_min", "clamp_max") and len(arguments) == 2:
        bound: Callable[[float, float], float] = max if name == "clamp_min" else min
        return lambda scrapes: _joined(_vector(arguments[0](scrapes)), _scalar(arguments[1](scrapes)), bound)
    if name == "histogram_quantile" and len(arguments) == 2:
        return lambda scrapes: _quantiles(_scalar(arguments[0](scrapes)), _vector(arguments[1](scrapes)))
    raise ConfigError(f"query: no function {name} with {len(arguments)} arguments here")


def _scalar(value: Value) -> float:
    if not isinstance(value, float):
        raise ConfigError("query: a scalar is needed where a vector is")
    return value


def _quantiles(share: float, vector: Vector) -> Vector:
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, value in vector.items():
        bound = dict(labels).get("le")
        if bound is not None:
            groups.setdefault(frozenset(item for item in labels if item[0] != "le"), []).append((float(bound), value))
    return {labels: _quantile(share, sorted(buckets)) for labels, buckets in groups.items()}


def _quantile(share: float, buckets: list[tuple[float, float]]) -> float:
    """Linear within a bucket, from 0 in the first; the last finite bound for what lies above it."""
    total = buckets[-1][1]
    if len(buckets) < 2 or not math.isinf(buckets[-1][0]) or not total > 0:
        return math.nan
    rank, low, below = share * total, 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if math.isinf(bound):
                return low
            return low + (bound - low) * ((rank - below) / (count - below) if count > below else 1.0)
        low, below = bound, count
    return low
