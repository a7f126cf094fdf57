"""Suffix trees over many texts, cut off at a depth, with counts: which token comes how often after which others.

One arena holds the trees of all scopes; a walk begins at the root of one scope and never leaves its tree. A node is a
number; its edge's label is a stretch of one text, and its count says at how many places of the texts the tokens from
the root to its end occur. `add` and `remove` take one place of a text each, in O(depth): so an owner spreads long texts
over steps, and forgets the oldest. Nodes are rows of arrays and one dictionary of integers: nothing for the garbage
collector to walk through, and `NODE_BYTES` a node.

`add` points the labels that it passes at the newest text (Fiala and Greene 1989), so that once the oldest text's places
are removed no label names it. Torch-free.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NODE_BYTES = 160
"""A node's rows and its entry in the dictionary, at most."""
_NONE = -1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a walk stands: `used` tokens into the edge of `node`."""

    node: int
    used: int


class SuffixTree:
    """Trees of depth `depth` tokens over `texts` (number -> tokens), which the owner keeps and never changes."""

    def __init__(self, depth: int, texts: Mapping[int, array[int]]) -> None:
        """Empty."""
        self.depth = depth
        self.nodes = 0
        """Nodes in use, roots included."""
        self._texts = texts
        self._children: dict[int, int] = {}
        self._free: list[int] = []
        self._text, self._start, self._length, self._count = (array("i") for _ in range(4))
        self._first, self._next, self._previous, self._best = (array("i") for _ in range(4))

    def root(self) -> int:
        """A new, empty tree."""
        return self._new(_NONE, 0, 0, 0)

    def drop_root(self, root: int) -> None:
        """Forget a tree that is empty again."""
        assert self.is_empty(root)
        self._release(root)

    def is_empty(self, root: int) -> bool:
        """True when nothing is in the tree."""
        return self._first[root] == _NONE

    def add(self, root: int, text: int, position: int) -> None:
        """Count what begins at `position` of a text; at most two nodes more. The text is the newest there is."""
        tokens = self._texts[text]
        node, end = root, min(position + self.depth, len(tokens))
        while position < end:
            child = self._child(node, tokens[position])
            if child == _NONE:
                self._attach(node, self._new(text, position, end - position, 1), tokens[position])
                return
            common = self._common(child, tokens, position, end)
            if common < self._length[child]:
                child = self._split(node, child, common)
            self._count[child] += 1
            self._text[child], self._start[child] = text, position
            best = self._best[node]
            if best != _NONE and self._count[child] >= self._count[best]:
                self._best[node] = child
            node, position = child, position + common

    def remove(self, root: int, text: int, position: int) -> None:
        """Take back what `add` counted. Texts are removed in the order in which they were added."""
        tokens = self._texts[text]
        path, end = [root], min(position + self.depth, len(tokens))
        while position < end:
            child = self._child(path[-1], tokens[position])
            self._count[child] -= 1
            if self._best[path[-1]] == child:
                self._best[path[-1]] = _NONE
            path.append(child)
            position += self._length[child]
        while len(path) > 1 and self._count[path[-1]] == 0:
            gone = path.pop()
            self._detach(path[-1], gone)
        if len(path) > 1:
            self._merge(path[-2], path[-1])

    def walk(self, root: int, tokens: array[int]) -> Place | None:
        """Where `tokens` end in a tree, if they occur there and something follows at one place at least."""
        node, used, at, end = root, 0, 0, len(tokens)
        while at < end:
            node = self._children.get(node << 32 | tokens[at], _NONE)
            if node == _NONE:
                return None
            used = min(self._length[node], end - at)
            if used > 1:
                start, label = self._start[node], self._texts[self._text[node]]
                if label[start : start + used] != tokens[at : at + used]:
                    return None
            at += used
        more = used < self._length[node] or self._first[node] != _NONE
        return Place(node, used) if more else None

    def likeliest(self, place: Place) -> tuple[int, float, Place] | None:
        """The token that follows most often (of equals the latest), its share of the places, and where it leads."""
        node, used = place.node, place.used
        if used < self._length[node]:
            return self._label(node, used), 1.0, Place(node, used + 1)
        child = self._most_frequent(node)
        if child == _NONE:
            return None
        return self._label(child, 0), self._count[child] / max(1, self._count[node]), Place(child, 1)

    def check(self) -> None:
        """Raises AssertionError when the books are wrong. For tests."""
        held = set(self._children.values())
        roots = self.nodes - len(held)
        assert len(self._text) - len(self._free) == self.nodes
        assert roots >= 0
        for key, child in self._children.items():
            node, token = key >> 32, key & 0xFFFFFFFF
            assert self._label(child, 0) == token
            assert child in self._siblings(node)
            below = sum(self._count[c] for c in self._siblings(child))
            assert 0 < self._count[child] >= below
            assert self._length[child] > 0
            only = self._first[child]
            assert only == _NONE or self._next[only] != _NONE or self._count[only] < self._count[child]

    # -- rows

    def _new(self, text: int, start: int, length: int, count: int) -> int:
        for column, value in (
            (self._text, text),
            (self._start, start),
            (self._length, length),
            (self._count, count),
            (self._first, _NONE),
            (self._next, _NONE),
            (self._previous, _NONE),
            (self._best, _NONE),
        ):
            if self._free:
                column[self._free[-1]] = value
            else:
                column.append(value)
        self.nodes += 1
        return self._free.pop() if self._free else len(self._text) - 1

    def _release(self, node: int) -> None:
        self._free.append(node)
        self.nodes -= 1

    def _label(self, node: int, offset: int) -> int:
        return self._texts[self._text[node]][self._start[node] + offset]

    def _common(self, node: int, tokens: array[int], position: int, end: int) -> int:
        """How many tokens the label of `node` and tokens[position:end] have in common; one at least."""
        label, start = self._texts[self._text[node]], self._start[node]
        most = min(self._length[node], end - position)
        if label[start : start + most] == tokens[position : position + most]:
            return most
        return next(i for i in range(most) if label[start + i] != tokens[position + i])

    # -- edges

    def _child(self, node: int, token: int) -> int:
        return self._children.get(node << 32 | token, _NONE)

    def _siblings(self, parent: int) -> Iterator[int]:
        child = self._first[parent]
        while child != _NONE:
            yield child
            child = self._next[child]

    def _most_frequent(self, node: int) -> int:
        if self._best[node] == _NONE:
            self._best[node] = max(self._siblings(node), key=self._rank, default=_NONE)
        return self._best[node]

    def _rank(self, child: int) -> tuple[int, int, int]:
        """Of equals the one that was passed last is first; texts are numbered in order."""
        return self._count[child], self._text[child], self._start[child]

    def _attach(self, parent: int, child: int, token: int) -> None:
        self._children[parent << 32 | token] = child
        first = self._first[parent]
        self._next[child], self._previous[child] = first, _NONE
        if first != _NONE:
            self._previous[first] = child
        self._first[parent] = child
        best = self._best[parent]
        if best != _NONE and self._count[child] >= self._count[best]:
            self._best[parent] = child

    def _detach(self, parent: int, child: int) -> None:
        del self._children[parent << 32 | self._label(child, 0)]
        before, after = self._previous[child], self._next[child]
        if before != _NONE:
            self._next[before] = after
        else:
            self._first[parent] = after
        if after != _NONE:
            self._previous[after] = before
        if self._best[parent] == child:
            self._best[parent] = _NONE
        self._release(child)

    def _replace(self, parent: int, child: int, new: int) -> None:
        """`new` takes the place of `child` under `parent`; both labels begin with the same token."""
        self._children[parent << 32 | self._label(new, 0)] = new
        before, after = self._previous[child], self._next[child]
        self._previous[new], self._next[new] = before, after
        if before != _NONE:
            self._next[before] = new
        else:
            self._first[parent] = new
        if after != _NONE:
            self._previous[after] = new
        if self._best[parent] == child:
            self._best[parent] = new

    def _split(self, parent: int, child: int, length: int) -> int:
        """A node for the first `length` tokens of the label of `child`, between it and `parent`."""
        upper = self._new(self._text[child], self._start[child], length, self._count[child])
        self._replace(parent, child, upper)
        self._start[child] += length
        self._length[child] -= length
        self._attach(upper, child, self._label(child, 0))
        return upper

    def _merge(self, parent: int, node: int) -> None:
        """Let the only child of `node` take its place, if everything that passes `node` goes on to it."""
        child = self._first[node]
        if child == _NONE or self._next[child] != _NONE or self._count[child] != self._count[node]:
            return
        del self._children[node << 32 | self._label(child, 0)]
        self._start[child] -= self._length[node]
        self._length[child] += self._length[node]
        self._replace(parent, node, child)
        self._release(node)
