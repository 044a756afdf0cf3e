"""Counter-based randomness: uniform, independent, and the same under every compiler."""

import pytest
import torch

from bevfn import rng

N = 1 << 18


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)).double())[0, 1])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 7])
def test_uniform_has_the_moments_and_the_histogram_of_a_uniform(seed):
    u = rng.uniform(rng.key(seed), (N,)).double()
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / N) ** 0.5
    assert abs(float(u.var()) * 12 - 1) < 5 * (0.8 / N) ** 0.5
    counts = torch.histc(u, 256, 0, 1)
    chi_square = float(((counts - N / 256) ** 2 / (N / 256)).sum())
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_right_is_a_shift():
    x = torch.cat([torch.randint(1 << 32, (1 << 16,)), torch.tensor([0, 1, 0xFFFF, 0x10000, 0xFFFFFFFF])])
    for bits in range(8, 32):
        assert torch.equal(rng._right(x, bits), x >> bits), bits
        narrow = rng._right(as_int32(x), bits)
        assert narrow.dtype == torch.int32 and torch.equal(narrow.long(), x >> bits), bits


def as_int32(x: torch.Tensor) -> torch.Tensor:
    return ((x ^ 1 << 31) - (1 << 31)).to(torch.int32)


def lowbias32(x: int) -> int:
    """As published, in Python's integers."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_numbers_are_the_published_hash_of_row_and_column_whatever_integers_compute_it():
    for first, key in ((0, rng.key(0)), (2**31 - 8, torch.tensor(2**32 - 1)), (0, torch.tensor(2**31))):
        u = rng.uniform(key, (5, 6), first_row=first)
        for i, j in ((0, 0), (1, 5), (4, 3)):
            row = lowbias32(lowbias32(first + i) ^ int(key))
            expected = lowbias32(row ^ lowbias32(j ^ 0x2545F491)) >> 8
            assert int(u[i, j].double() * 2**24) == expected
    x = torch.randint(1 << 32, (1 << 10,))
    assert rng._mix(x).tolist() == [lowbias32(int(v)) for v in x]
    assert torch.equal(rng._mix(as_int32(x)), as_int32(rng._mix(x)))


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.1, 0.3, 0.5, 0.7, 1 - 2**-24])
def test_dropout_keeps_where_a_uniform_number_is_not_below_the_rate(rate):
    x = torch.ones(64, 65)
    kept = rng.uniform(rng.key(5), (64, 65)).double() >= rate
    assert torch.equal(rng.dropout(x, rate, rng.key(5)) != 0, kept)


@pytest.mark.parametrize("shape", [(512, 512), (4, 256, 256), (N, 1), (1, N)])
def test_rows_and_columns_are_uniform_and_independent(shape):
    u = rng.uniform(rng.key(4), shape).view(-1, shape[-1]).double()
    limit = 5 / N**0.5
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / N) ** 0.5
    for axis, size in enumerate(u.shape):
        means = u.mean(axis)  # of 12 / size variance
        assert float((means - 0.5).abs().max()) < 6 * (1 / 12 / size) ** 0.5
        for lag in (1, 2, 64):
            if size > lag:
                a, b = u.narrow(axis, 0, size - lag), u.narrow(axis, lag, size - lag)
                assert abs(correlation(a.reshape(-1), b.reshape(-1))) < limit * (size / (size - lag)) ** 0.5
    # Numbers of two rows and two columns: were the hash linear, the fourth would follow from the three.
    if min(u.shape) > 1:
        bits = (u * 2**24).long()
        joint = bits[:-1, :-1] ^ bits[1:, :-1] ^ bits[:-1, 1:] ^ bits[1:, 1:]
        for bit in range(24):
            assert abs(float((joint >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / joint.numel() ** 0.5, bit


def test_low_bits_are_as_random_as_high_ones():
    bits = (rng.uniform(rng.key(3), (N,)) * 2**24).long()
    for bit in range(24):
        assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / N**0.5, bit


def test_neighbouring_elements_sites_steps_and_seeds_are_uncorrelated():
    limit = 5 / N**0.5
    key = rng.key(0)
    u = rng.uniform(key, (N,))
    for lag in (1, 2, 3, 64, 1024):
        assert abs(correlation(u[:-lag], u[lag:])) < limit, lag
    for other in (rng.fold(key, 0), rng.fold(key, 1), rng.fold(rng.fold(key, 0), 0), rng.key(1), rng.key(1 << 32)):
        assert abs(correlation(u, rng.uniform(other, (N,)))) < limit


def test_keys_of_steps_and_sites_do_not_repeat():
    keys = {int(rng.fold(rng.fold(rng.key(0), step), site)) for step in range(200) for site in range(50)}
    assert len(keys) >= 200 * 50 - 1  # 32 bits: 10,000 keys collide once in 86 draws


def test_fold_takes_a_step_tensor_or_an_int():
    assert torch.equal(rng.fold(rng.key(5), 7), rng.fold(rng.key(5), torch.tensor(7)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_numbers_are_the_same_compiled(backend):
    def f(key, x):
        return rng.fold(key, 3), rng.uniform(rng.fold(key, 4), (5, 7)), rng.dropout(x, 0.3, rng.fold(key, 5))

    arguments = rng.key(11), torch.ones(64, 33)
    compiled = torch.compile(f, fullgraph=True, backend=backend)(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(compiled, f(*arguments)))


def test_numbers_are_pinned():
    # A change of the hash changes every run that is resumed.
    assert int(rng.key(0)) == 33350994
    assert (rng.uniform(rng.key(0), (3,)) * 2**24).long().tolist() == [16481555, 16613343, 12697668]


def test_dropout_keeps_the_mean_scales_what_is_left_and_drops_where_the_gradient_is_zero():
    x = torch.ones(N)
    y = rng.dropout(x, 0.1, rng.key(1))
    kept = y != 0
    assert abs(float(kept.double().mean()) - 0.9) < 5 * (0.09 / N) ** 0.5
    assert torch.equal(y[kept].unique(), torch.tensor([1 / 0.9]))
    gradient = torch.func.grad(lambda x: rng.dropout(x, 0.1, rng.key(1)).sum())(x)
    assert torch.equal(gradient, y)


def test_dropout_without_a_key_or_a_rate_is_the_identity():
    x = torch.ones(3)
    assert rng.dropout(x, 0.5, None) is x and rng.dropout(x, 0.0, rng.key(0)) is x


def test_dropout_of_everything_is_refused():
    with pytest.raises(ValueError, match=r"dropout rate 1\.0 is outside \[0, 1\)"):
        rng.dropout(torch.ones(3), 1.0, rng.key(0))
