"""The kernels that draw tokens: one program a draw, several passes over its row, nothing sorted.

The Gumbel-max winner over all tokens is the winner over the kept ones exactly if it is kept; otherwise every token at
or after it in the order (likeliest first, lower id first) is not kept either. So: draw, count what is ahead of the
winner, and if that is too much for top-k or top-p, draw again from those ahead of it. This ends early as a rule, and
always at the likeliest token. Source: the rejection sampling of FlashInfer (2024), with fixed noise in place of fresh.

Scores are float64, as the reference's, but only in blocks where a float32 estimate says that they may win. Shares for
top-p are summed in float64 from float32 weights: a token whose share lies within about 1e-6 of top-p may fall on either
side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launch, target


@triton.jit
def _noise_bits(key: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """The 52 bits of each token's noise: SplitMix64's finalizer, as kernels/sampling.py."""
    z = key + (ids.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) >> 12


@triton.jit
def _gumbel_estimate(bits: tl.tensor) -> tl.tensor:
    """float32, within 1e-4: near u = 1 the logarithm comes from 1 - u, which float32 holds."""
    share = 2.220446049250313e-16  # 2^-52
    u = (bits.to(tl.float32) + 0.5) * share
    e = ((0xFFFFFFFFFFFFF - bits).to(tl.float32) + 0.5) * share
    return -tl.log(tl.where(e < 0.01, e * (1.0 + e * (0.5 + e * 0.33333334)), -tl.log(u)))


@triton.jit
def _order_key(x: tl.tensor) -> tl.tensor:
    """int32 in the order of the float32; -0 and 0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load(row: tl.tensor, start: tl.tensor, vocabulary: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    ids = start + tl.arange(0, BLOCK)
    return ids, tl.load(row + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)


@triton.jit
def _survey(row: tl.tensor, vocabulary: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """(largest logit, its lowest id, sum of exp(logit - largest), how many are NaN or +inf)."""
    best, token, total, wrong = float("-inf"), 0, 0.0, 0
    for start in range(0, vocabulary, BLOCK):
        ids, x = _load(row, start, vocabulary, BLOCK)
        bad = (x != x) | (x == float("inf"))
        wrong += tl.sum(bad.to(tl.int32), 0)
        x = tl.where(bad, float("-inf"), x)
        higher = tl.max(x, 0)
        if higher > best:
            token = tl.min(tl.where(x == higher, ids, vocabulary), 0)
            total = total * tl.exp(best - higher)
            best = higher
        total += tl.sum(tl.exp(x - tl.where(best == float("-inf"), 0.0, best)), 0)
    return best, token, total, wrong


@triton.jit
def _ahead(
    row: tl.tensor,
    vocabulary: tl.tensor,
    best: tl.tensor,
    inverse: tl.tensor,
    key: tl.tensor,
    token: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """(count, weight in float64) of the tokens ahead of (key, token) in the order."""
    count, weight = 0, tl.zeros((), tl.float64)
    for start in range(0, vocabulary, BLOCK):
        ids, x = _load(row, start, vocabulary, BLOCK)
        keys = _order_key(x)
        ahead = ((keys > key) | ((keys == key) & (ids < token))) & (ids < vocabulary)
        weights = tl.exp(((x.to(tl.float64) - best) * inverse).to(tl.float32))
        count += tl.sum(ahead.to(tl.int32), 0)
        weight += tl.sum(tl.where(ahead, weights, 0.0).to(tl.float64), 0)
    return count, weight


@triton.jit
def _kept_weight(
    row: tl.tensor, vocabulary: tl.tensor, best: tl.tensor, inverse: tl.tensor, top_k: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The weight of the `top_k` likeliest tokens, by bisection of the logit that the last of them has."""
    low, high = tl.full((), -0x80000000, tl.int64), _order_key(best).to(tl.int64) + 1
    while high - low > 1:  # at least top_k tokens have keys of `low` or more, fewer have `high`
        middle = (low + high) >> 1
        count, _ = _ahead(row, vocabulary, best, inverse, middle.to(tl.int32), vocabulary, BLOCK)
        if count >= top_k:
            low = middle
            if count == top_k:
                high = middle + 1
        else:
            high = middle
    above, weight = _ahead(row, vocabulary, best, inverse, low.to(tl.int32), 0, BLOCK)
    bits = low.to(tl.int32)
    last = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    each = tl.exp(((last.to(tl.float64) - best) * inverse).to(tl.float32)).to(tl.float64)
    # With banned ids and no top-k the last key may be below that of -inf: no number at all, and none of it is needed.
    return weight + tl.where(top_k > above, each * (top_k - above), 0.0)


@triton.jit
def _winner(
    row: tl.tensor,
    vocabulary: tl.tensor,
    best: tl.tensor,
    likeliest: tl.tensor,
    inverse: tl.tensor,
    lowest: tl.tensor,
    noise: tl.tensor,
    key: tl.tensor,
    token: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """(order key, id) of the Gumbel-max winner among the tokens ahead of (key, token) that are not below `lowest`."""
    score, won_key, won = tl.full((), float("-inf"), tl.float64), key, token
    for start in range(0, vocabulary, BLOCK):
        ids, x = _load(row, start, vocabulary, BLOCK)
        keys = _order_key(x)
        relative = (x.to(tl.float64) - best) * inverse
        alive = ((keys > key) | ((keys == key) & (ids < token))) & ((relative >= lowest) | (ids == likeliest))
        bits = _noise_bits(noise, ids)
        estimate = tl.where(alive, relative.to(tl.float32) + _gumbel_estimate(bits), float("-inf"))
        if tl.max(estimate, 0).to(tl.float64) > score - 0.01:
            u = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
            scores = tl.where(alive, relative - tl.log(-tl.log(u)), float("-inf"))
            highest = tl.max(scores, 0)
            if highest > score:
                score = highest
                won = tl.min(tl.where(scores == highest, ids, vocabulary), 0)
                won_key = tl.max(tl.where(ids == won, keys, -0x80000000), 0)
    return won_key, won


@triton.jit
def _draw(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    lowest_ptr: tl.tensor,
    key_ptr: tl.tensor,
    token_ptr: tl.tensor,
    logprob_ptr: tl.tensor,
    normaliser_ptr: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """An inverse temperature of 0 means greedy. Tokens: an id, -1 for NaN or +inf in the row, -3 if all are banned."""
    draw = tl.program_id(0)
    row = logits_ptr + tl.load(rows_ptr + draw).to(tl.int64) * stride
    best, likeliest, total, wrong = _survey(row, vocabulary, BLOCK)
    token = likeliest
    inverse = tl.load(inverse_ptr + draw)
    if (inverse > 0) & (wrong == 0) & (best > float("-inf")):
        top_k, top_p = tl.load(top_k_ptr + draw), tl.load(top_p_ptr + draw)
        lowest, noise = tl.load(lowest_ptr + draw), tl.load(key_ptr + draw).to(tl.uint64, bitcast=True)
        if (top_k <= 0) | (top_k > vocabulary):
            top_k = vocabulary
        share = tl.full((), float("inf"), tl.float64)
        if top_p < 1.0:
            share = top_p * _kept_weight(row, vocabulary, best, inverse, top_k, BLOCK)
        limited = (top_k < vocabulary) | (top_p < 1.0)
        key, token = tl.full((), -0x80000000, tl.int32), 0
        searching = 1
        while searching > 0:
            key, token = _winner(row, vocabulary, best, likeliest, inverse, lowest, noise, key, token, BLOCK)
            searching = 0
            if limited & (token != likeliest):
                count, weight = _ahead(row, vocabulary, best, inverse, key, token, BLOCK)
                searching = ((count >= top_k) | (weight >= share)).to(tl.int32)
    normaliser = best + tl.log(total)
    chosen = tl.load(row + token).to(tl.float32)
    token = tl.where(best == float("-inf"), -3, token)
    tl.store(token_ptr + draw, tl.where(wrong > 0, -1, token))
    tl.store(logprob_ptr + draw, chosen - normaliser)
    tl.store(normaliser_ptr + draw, normaliser)


@triton.jit
def _top_logprobs(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    normaliser_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    values_ptr: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The `count` likeliest tokens of each draw's row, one pass each."""
    draw = tl.program_id(0)
    row = logits_ptr + tl.load(rows_ptr + draw).to(tl.int64) * stride
    normaliser = tl.load(normaliser_ptr + draw)
    last_key, last = tl.full((), 0x7FFFFFFF, tl.int32), vocabulary
    for place in range(count):
        key, token, value = tl.full((), -0x80000000, tl.int32), vocabulary, float("-inf")
        for start in range(0, vocabulary, BLOCK):
            ids, x = _load(row, start, vocabulary, BLOCK)
            keys = _order_key(x)
            behind = ((keys < last_key) | ((keys == last_key) & (ids > last))) & (ids < vocabulary)
            keys = tl.where(behind, keys, -0x80000000)
            highest = tl.max(keys, 0)
            if highest > key:
                key = highest
                token = tl.min(tl.where(keys == highest, ids, vocabulary), 0)
                value = tl.max(tl.where(ids == token, x, float("-inf")), 0)
        tl.store(ids_ptr + draw * count + place, token)
        tl.store(values_ptr + draw * count + place, value - normaliser)
        last_key, last = key, token


def _block(vocabulary: int) -> int:
    return min(4096, max(16, int(triton.next_power_of_2(vocabulary)))) if target().backend != "interpreter" else 512


def draw_launch(
    logits: torch.Tensor,
    rows: torch.Tensor,
    inverse: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    lowest: torch.Tensor,
    keys: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    normalisers: torch.Tensor,
) -> Launch:
    """The launch that draws len(rows) tokens."""
    args = {
        "logits_ptr": logits,
        "rows_ptr": rows,
        "inverse_ptr": inverse,
        "top_k_ptr": top_k,
        "top_p_ptr": top_p,
        "lowest_ptr": lowest,
        "key_ptr": keys,
        "token_ptr": tokens,
        "logprob_ptr": logprobs,
        "normaliser_ptr": normalisers,
        "stride": logits.stride(0),
        "vocabulary": logits.shape[1],
    }
    return Launch(_draw, (rows.shape[0],), args, {"BLOCK": _block(logits.shape[1])}, num_warps=8)


def top_launch(
    logits: torch.Tensor, rows: torch.Tensor, normalisers: torch.Tensor, ids: torch.Tensor, values: torch.Tensor
) -> Launch:
    """The launch that finds the likeliest ids [N, count] and their log probabilities."""
    args = {
        "logits_ptr": logits,
        "rows_ptr": rows,
        "normaliser_ptr": normalisers,
        "ids_ptr": ids,
        "values_ptr": values,
        "stride": logits.stride(0),
        "vocabulary": logits.shape[1],
        "count": ids.shape[1],
    }
    return Launch(_top_logprobs, (rows.shape[0],), args, {"BLOCK": _block(logits.shape[1])}, num_warps=8)
