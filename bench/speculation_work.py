"""What `bench.speculation` asks for: repetitive work, whose answers repeat their prompts, and open chat."""

from __future__ import annotations

from dataclasses import dataclass

CODE = '''\
class Account:
    """One customer's account."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        self.history.append(("withdraw", amount))
        return self.balance

    def transfer(self, other, amount):
        self.withdraw(amount)
        other.deposit(amount)
        return self.balance
'''
EXAMPLE = """\
Task: rename `count` to `total`.
Before:
```python
def add(items):
    count = 0
    for item in items:
        if item > 0:
            count += item
    return count
```
After:
```python
def add(items):
    total = 0
    for item in items:
        if item > 0:
            total += item
    return total
```

"""
TEXT = """\
The Severn is the longest river in Great Britain, at 220 miles. It rises at an altitude of 2,001 feet on
Plynlimon in the Ceredigion massif of mid Wales. The Thames, at 215 miles, is the longest river entirely in
England and the second-longest in the United Kingdom. The Trent flows for 185 miles through the Midlands to
the Humber. The Great Ouse is 143 miles long and reaches the sea at King's Lynn. The Wye rises only two miles
from the source of the Severn and runs 134 miles to its estuary. The Tay, at 117 miles, is the longest river
in Scotland and carries more water than any other in the country."""
CHAT = (
    "What should I cook tonight with rice, eggs and two tomatoes?",
    "Tell me about a day in the life of a lighthouse keeper.",
    "Why do people enjoy sad music?",
    "How would you explain the seasons to a child?",
    "Give me advice for my first week in a new job.",
    "What makes a good friend?",
    "Describe a city that is built on a lake.",
    "Is it better to read one book twice or two books once?",
)


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt. `seed` draws at `temperature`."""

    prompt: str
    chat: bool
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Tasks of one kind, `at_once` of them at a time."""

    name: str
    tasks: tuple[Task, ...]
    at_once: int
    max_tokens: int


def rewrite() -> list[Task]:
    """The code once more with another name for one thing, after an example."""
    return [
        Task(f"{EXAMPLE}Task: rename `Account` to `{name}`.\nBefore:\n```python\n{CODE}```\nAfter:\n```python\n", False)
        for name in ("Wallet", "Purse", "Ledger")
    ]


def extract() -> list[Task]:
    """Sentences of the text, word by word."""
    wanted = ("that has a length in miles", "about a river of England", "about a source or an estuary")
    return [Task(f"Copy every sentence of this text {what}, word by word:\n\n{TEXT}", True) for what in wanted]


def chat(count: int, temperature: float = 0.7) -> list[Task]:
    """Questions without a pattern, sampled."""
    return [Task(CHAT[i % len(CHAT)], True, temperature, seed=100 + i) for i in range(count)]


def workloads(batch: int) -> list[Workload]:
    """All of them; `batch` is how many the last ones run at once."""
    mixed = [*chat(batch - batch // 4), *(rewrite() * batch)[: batch // 4]]
    return [
        Workload("rewrite code", tuple(rewrite()), 1, 220),
        Workload("extract", tuple(extract()), 1, 220),
        Workload("open chat", tuple(chat(6)), 1, 160),
        Workload(f"open chat x {batch}", tuple(chat(batch)), batch, 128),
        Workload(f"three in four chat x {batch}", tuple(mixed), batch, 128),
    ]


def shifting() -> Workload:
    """Chat, then repetitive work, then chat again."""
    tasks = [*chat(4), *rewrite(), *extract(), *chat(4)]
    return Workload("shift", tuple(tasks), 1, 160)
