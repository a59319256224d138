"""The noise specification: Philox words, Gumbel accuracy, and bits that every back end has to reproduce."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unif2ace.ops import _noise


def words(counter: list[int], key: list[int]) -> list[int]:
    inputs = [torch.tensor(value) for value in (*counter, *key)]
    return [int(word) for word in _noise.philox_4x32(*inputs)]


def philox_with_python_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 on unbounded integers, straight from the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: str):
    """Vectors published with the generator (Random123, kat_vectors)."""
    assert " ".join(f"{word:08x}" for word in words(counter, key)) == expected


def test_counter_layout():
    """counter = (code >> 2, position, step, stream), key = seed (low, high), word = code & 3."""
    seeds = torch.tensor([0, -1, 2**63 - 1, 12345678901234567])
    positions = torch.tensor([0, 5, 2**31 - 1, 255], dtype=torch.int32)
    steps = torch.tensor([3, 0, 17, 2**31 - 1], dtype=torch.int32)
    found = _noise.random_words(seeds, positions, steps, 2, 11)
    assert found.shape == (4, 11)
    for row in range(4):
        seed = int(seeds[row]) % 2**64
        for code in range(11):
            counter = [code >> 2, int(positions[row]), int(steps[row]), 2]
            expected = philox_with_python_integers(counter, [seed % 2**32, seed >> 32])
            assert int(found[row, code]) == expected[code & 3]


EDGES = torch.cat(
    [
        torch.arange(1 << 12),
        2**32 - 1 - torch.arange(1 << 12),
        _noise.SERIES_LIMIT + torch.arange(-(1 << 12), 1 << 12),
        2**23 + torch.arange(-64, 64),
        2**24 + torch.arange(-64, 64),
        2**32 - 2**24 + torch.arange(-64, 64),
    ]
)


def test_gumbel_is_accurate_in_both_tails():
    x = torch.cat([EDGES, torch.randint(0, 2**32, (1 << 20,))])
    found = _noise.gumbel_from_words(x).double().numpy()
    v = (x.numpy().astype(np.float64) + 0.5) * 2.0**-32
    truth = -np.log(-np.log1p(-v))
    unit = np.spacing(np.maximum(np.abs(truth), 1.0).astype(np.float32)).astype(np.float64)
    assert np.abs((found - truth) / unit).max() < 4.0
    assert found.max() == pytest.approx(33 * math.log(2), abs=2e-6)
    assert found.min() == pytest.approx(-math.log(33 * math.log(2)), abs=1e-6)


def test_gumbel_falls_as_the_word_rises():
    x = EDGES.unique()  # sorted
    assert (_noise.gumbel_from_words(x).diff() <= 0).all()


def gumbel_one_operation_at_a_time(x: int) -> np.float32:
    """The specification with numpy scalars: what a kernel writes, one rounded float32 operation per line."""
    one, half, scale = np.float32(1), np.float32(0.5), np.float32(2.0**-32)

    def split(y: np.float32) -> tuple[np.float32, np.float32]:
        t = int(y.view(np.int32)) - 0x3F3504F3
        m = np.int32((t & 0x7FFFFF) + 0x3F3504F3).view(np.float32)
        return np.float32(m - one), np.float32(t >> 23)

    def log1p_core(f: np.float32, n: np.float32) -> np.float32:
        q = np.float32(_noise.LOG_COEFFICIENTS[0])
        for coefficient in _noise.LOG_COEFFICIENTS[1:]:
            q = np.float32(q * f)
            q = np.float32(q + np.float32(coefficient))
        q = np.float32(q * f)
        q = np.float32(q - half)
        r = np.float32(q * np.float32(f * f))
        r = np.float32(r + f)
        return np.float32(r + np.float32(n * np.float32(_noise.LN2)))

    if x < 1 << 30:
        f, n = np.float32(-(np.float32(np.float32(np.uint32(x)) + half) * scale)), np.float32(0)
    else:
        f, n = split(np.float32(np.float32(np.float32(np.uint32(2**32 - 1 - x)) + half) * scale))
    return -log1p_core(*split(-log1p_core(f, n)))


def test_gumbel_bits_follow_the_specification():
    x = torch.cat([EDGES[::37], torch.randint(0, 2**32, (2000,))])
    found = _noise.gumbel_from_words(x).numpy()
    expected = np.array([gumbel_one_operation_at_a_time(int(word)) for word in x])
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))


def test_coefficients_are_float32_numbers():
    for value in (*_noise.LOG_COEFFICIENTS, _noise.LN2):
        assert float(np.float32(value)) == value


def test_gumbel_moments():
    seeds = torch.arange(64)
    noise = _noise.gumbel_noise(seeds, seeds, seeds, _noise.TOKEN_STREAM, 4096).double()
    count = noise.numel()
    assert abs(noise.mean() - 0.5772156649) < 4 * math.pi / math.sqrt(6 * count)
    assert abs(noise.var() - math.pi**2 / 6) < 4 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / count)  # kurtosis 5.4


@pytest.mark.parametrize("changed", ["seeds", "positions", "steps", "stream"])
def test_every_coordinate_changes_the_noise(changed: str):
    arguments = {"seeds": torch.tensor([7]), "positions": torch.tensor([3]), "steps": torch.tensor([2]), "stream": 0}
    other = {**arguments, changed: arguments[changed] + 1}
    first, second = (_noise.gumbel_noise(**a, num_codes=64) for a in (arguments, other))
    assert (first != second).all()


def test_noise_of_a_row_ignores_the_batch():
    rows = torch.randint(0, 2**40, (50,))
    whole = _noise.gumbel_noise(rows, rows % 256, rows % 18, 0, 1001)
    part = _noise.gumbel_noise(rows[7:8], rows[7:8] % 256, rows[7:8] % 18, 0, 997)
    assert torch.equal(part, whole[7:8, :997])
