"""A cache read as docs/format.md and docs/codecs.md say, with zarr and the standard library alone.

Nothing of `logitcache` is imported: what these documents leave out would be missing here.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.typing import NDArray

CACHE = Path(__file__).parents[2] / "golden" / "v1-codecs"
UNITS = ("00000000", "00000001")
V = 97
Floats = NDArray[np.float64]

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs")


@pytest.fixture(scope="module")
def kept() -> dict[str, NDArray[Any]]:
    """What reading returned when the cache was made."""
    with np.load(CACHE.with_suffix(".npz"), allow_pickle=False) as file:
        return dict(file)


def envelope(name: str) -> Any:
    data = (CACHE / name).read_bytes()
    head, body, tail = data[:84], data[84:-2], data[-2:]
    assert head == b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'","body":'
    assert tail == b"}\n"
    return json.loads(body)


def stored(tier: str, name: str) -> NDArray[Any]:
    """An array of a tier's parts, one after another."""
    parts = [zarr.open_array(CACHE / "targets" / tier / unit / name, mode="r")[...] for unit in UNITS]
    return np.concatenate([np.asarray(part) for part in parts])


def shared(tier: str, name: str) -> NDArray[Any]:
    return np.asarray(zarr.open_array(CACHE / "targets" / tier / "shared" / name, mode="r")[...])


def config(tier: str) -> Any:
    return envelope(f"targets/{tier}/tier.json")["config"]


def close(have: Any, want: NDArray[Any]) -> None:
    np.testing.assert_allclose(np.asarray(have), want, rtol=1e-5, atol=1e-5)


def entries_of(tier: str, counts: list[int]) -> list[tuple[list[int], list[int]]]:
    """Token ids and the lower eight bits of each row's entries, in stored order."""
    entries, tokens = stored(tier, "entries").tolist(), shared(tier, "token_of_rank").tolist()
    rows, at = [], 0
    for count in counts:
        rank, ids, codes = -1, [], []
        for entry in entries[at : at + count]:
            rank += (entry >> 8) + 1
            ids.append(tokens[rank])
            codes.append(entry & 255)
        rows.append((ids, codes))
        at += count
    assert at == len(entries)
    return rows


def test_a_topk_tier(kept):
    rows, settings = stored("topk", "rows").tolist(), config("topk")
    levels, shapes, evidence = (shared("topk", name).astype(float) for name in ("levels", "log_shapes", "evidence"))
    found: dict[str, list[Any]] = {name: [] for name in ("ids", "log_probs", "tail", "token", "entropy", "all")}
    for (_, tail, token, entropy), (ids, codes) in zip(rows, entries_of("topk", [r[0] for r in rows]), strict=True):
        t = 0.0 if tail == -32768 else 1 / (1 + math.exp(-(3 - tail / 16)))
        p = np.array([levels[code] for code in codes])
        likeliest = codes.index(0)
        others = np.delete(p, likeliest)
        p[likeliest] = max(1 - t - others.sum(), others.max(initial=0))
        p *= (1 - t) / p.sum()
        expected = -(p * np.log(p)).sum() + (t * (settings["tail_nats"] - math.log(t)) if t else 0)
        zigzag = (entropy >> 1) ^ -(entropy & 1)
        shape = int(np.argmax(evidence[:, ids].sum(axis=1)))
        unkept = np.exp(shapes[shape])
        unkept[ids] = 0
        with np.errstate(divide="ignore"):
            everything = np.log(t * unkept / unkept.sum())
        everything[ids] = np.log(p)
        order = np.argsort(ids)
        found["ids"] += np.array(ids)[order].tolist()
        found["log_probs"] += np.log(p)[order].tolist()
        found["tail"].append(math.log(t) if t else -math.inf)
        found["token"].append(math.log(p[likeliest]) if token == 0 else -(((token - 1) / 64) ** 2))
        found["entropy"].append(((round(64 * math.sqrt(expected)) + zigzag) / 64) ** 2)
        found["all"].append(everything)
    assert found["ids"] == kept["topk/ids"].tolist()
    assert [row[0] for row in rows] == kept["topk/counts_of_rows"].tolist()
    close(found["log_probs"], kept["topk/log_probs"])
    close(found["tail"], kept["topk/tail_log_mass"])
    close(found["token"], kept["topk/token_log_prob"])
    close(found["entropy"], kept["topk/entropy"])
    close(found["all"], kept["topk/distributions"])


def test_a_sampled_tier(kept):
    rows = stored("sampled", "rows")
    drawn = [sorted(zip(*row, strict=True)) for row in entries_of("sampled", rows[:, 0].tolist())]
    assert [token for row in drawn for token, _ in row] == kept["sampled/ids"].tolist()
    assert [count for row in drawn for _, count in row] == kept["sampled/counts"].tolist()
    assert {sum(count for _, count in row) for row in drawn} == {config("sampled")["samples"]}
    close(-((rows[:, 1] / 64) ** 2), kept["sampled/token_log_prob"])
    close((rows[:, 2] / 64) ** 2, kept["sampled/entropy"])


def log_softmax(logits: Floats) -> Floats:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_a_full_tier(kept):
    settings = config("full")
    assert settings["vocab_size"] == V
    close(log_softmax(-settings["step"] * stored("full", "log_probs").astype(float)), kept["full/log_probs"])


def widened(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype("<u4") << 16).view("<f4").astype(float)


@pytest.mark.parametrize(("tier", "form"), [("hidden", "bfloat16"), ("hidden-transform", "transform")])
def test_hidden_tiers(kept, tier, form):
    settings = config(tier)
    assert settings["form"] == form
    states = widened(stored(tier, "states")) if form == "bfloat16" else stored(tier, "codes").astype(float)
    if form == "transform":
        assert np.array_equal(states, kept[f"{tier}/hidden"])
    head, weight, bias = settings["head"], shared(tier, "head_weight"), shared(tier, "head_bias")
    logits = head["scale"] * (states @ widened(weight).T + bias)
    logits = head["soft_cap"] * np.tanh(logits / head["soft_cap"])
    close(log_softmax(logits), kept[f"{tier}/distributions"])
    text = f"uint16(97, 8){json.dumps(head['soft_cap'])}{json.dumps(head['scale'])}"
    digest = hashlib.sha256(text.encode() + weight.astype("<u2").tobytes() + bias.astype("<f4").tobytes())
    assert head["fingerprint"] == digest.hexdigest()[:32]


def test_what_a_part_says_of_its_tier():
    for tier in ("topk", "sampled", "full", "hidden", "hidden-transform"):
        body = (CACHE / "targets" / tier / "tier.json").read_bytes()[84:-2]
        for unit in UNITS:
            assert envelope(f"targets/{tier}/{unit}/record.json")["tier"] == hashlib.sha256(body).hexdigest()


def test_content_hashes_and_fingerprints():
    identity = envelope("identity.json")["identity"]
    tokenizer = identity["tokenizer"]["fingerprint"]
    vocabulary = [[n, f"word {n}"] for n in range(V - 1)] + [[V - 1, "Größe \N{GRINNING FACE}"]]
    assert tokenizer == hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:32]
    problems = "".join(json.dumps([f"p{n}", f"What is {n}·{n}?"]) for n in range(4))
    assert identity["problems"]["sha256"] == hashlib.sha256(problems.encode()).hexdigest()
    for unit in UNITS:
        group = CACHE / "sequences" / unit
        table = pq.read_table(group / "samples.parquet").to_pylist()
        tokens = np.asarray(zarr.open_array(group / "token_ids", mode="r")[...])
        offsets = np.asarray(zarr.open_array(group / "offsets", mode="r")[...])
        for row, ids in zip(table, np.split(tokens, offsets[1:-1]), strict=True):
            text = f"{tokenizer}\n{row['prompt_tokens']}\n".encode() + ids.astype("<i4").tobytes()
            assert row["sample_id"] == hashlib.sha256(text).hexdigest()[:32]
