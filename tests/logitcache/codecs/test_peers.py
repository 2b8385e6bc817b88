"""The formats we compare with hold what they say: round trips."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache.codecs.dense import log_softmax
from tools.bench.peers import MegatronTopK, Peer, TopTokens, compressed_bytes, peers, top_tokens

VOCAB = 3000
LOG_PROBS = log_softmax(np.random.default_rng(0).standard_normal((40, VOCAB)).astype(np.float32) * 2)


@pytest.mark.parametrize("peer", peers(VOCAB), ids=lambda peer: peer.name)
def test_ids_exactly_and_values_nearly(peer: Peer) -> None:
    top = top_tokens(LOG_PROBS, peer.k)
    data = peer.encode(top)
    back = peer.decode(data, len(LOG_PROBS))
    np.testing.assert_array_equal(back.ids, top.ids)
    assert np.abs(back.log_probs - top.log_probs).mean() < 0.06  # the budget configuration is that coarse
    assert compressed_bytes(data) < 1.01 * len(data)


@pytest.mark.parametrize("vocab", [49_152, 151_936])
def test_documented_sizes(vocab: int) -> None:
    rows = {peer.name: len(peer.encode(_any_rows(vocab, peer.k))) / 7 for peer in peers(vocab)[2:4]}
    assert list(rows.values()) == [312, 114] if vocab == 49_152 else [344, 127]


def test_megatron_refuses_a_large_vocabulary() -> None:
    assert len(MegatronTopK(k=128).encode(_any_rows(131_072, 128))) == 7 * 640
    with pytest.raises(ValueError, match="131,072"):
        MegatronTopK(k=4).encode(_any_rows(151_936, 4))


def _any_rows(vocab: int, k: int) -> TopTokens:
    ids = np.arange(vocab - k, vocab, dtype=np.int32)
    values = np.linspace(-1, -9, k, dtype=np.float32)
    return TopTokens(ids=np.tile(ids, (7, 1)), log_probs=np.tile(values, (7, 1)))
