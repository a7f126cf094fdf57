"""Thirty-two varied prompts: 1 to 3,000 tokens; prose, code, other scripts, chat, repetition, raw ids."""

from __future__ import annotations

import inspect
import random
import textwrap
from pathlib import Path

from tandem.client import Client

REPOSITORY = Path(__file__).resolve().parents[2]

SHORT = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "Die Hauptstadt von Österreich heißt",
    "日本の首都は東京です。フランスの首都は",
    "Москва — столица",
    "عاصمة مصر هي",
    "Ελλάδα: πρωτεύουσα είναι η",
    "🙂🙃 emoji 👩‍👩‍👧‍👦 and flags 🇫🇷🇯🇵 mean",
    '{"name": "Ada", "born": 1815, "field":',
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: What is 17 * 23?\nA:",
    "<html>\n  <body>\n    <h1>",
    "a a a a a a a a a a a a a a a a a a a a",
    "\n\n\n\t  \n",
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer",
    "#include <stdio.h>\nint main(void) {\n  for (int i = 0; i < 10; ++i)",
]

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because air scatters blue light more than red."},
        {"role": "user", "content": "And why are sunsets red?"},
    ],
    [{"role": "user", "content": "Write a haiku about gRPC streams."}],
]


def build_prompts(client: Client) -> list[list[int]]:
    """The prompts as token ids, through the gateway's own tokenizer."""
    prompts = [client.tokenize(text) for text in SHORT]
    prompts += [client.tokenize(messages=messages) for messages in CHATS]
    license_ids = client.tokenize((REPOSITORY / "LICENSE").read_text())
    code_ids = client.tokenize(inspect.getsource(textwrap) + inspect.getsource(random))
    rng = random.Random(7)
    prompts += [
        license_ids[:1],
        license_ids[100:116],
        license_ids[200:263],
        license_ids[:513],
        license_ids[300:1100],
        code_ids[:129],
        code_ids[1000:1256],
        code_ids[:1800],
        code_ids[2000:5000],
        [rng.randrange(17, 49152) for _ in range(300)],
        (license_ids[:40] * 12)[:448],
    ]
    assert len(prompts) == 32
    assert max(map(len, prompts)) == 3000
    assert min(map(len, prompts)) == 1
    return prompts
