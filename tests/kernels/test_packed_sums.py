"""What hosts send each other of a sum: nothing is lost, and small numbers take few bytes."""

import numpy as np
import pytest

from mpillama.kernels.shared_sum import SharedWindow, window_bytes
from tests.kernels.kernel_parts import libraries, same_bits

GRID = 2.0**-30


@pytest.fixture(scope="module", params=range(len(libraries())), ids=lambda i: libraries()[i].isa)
def packer(request: pytest.FixtureRequest) -> SharedWindow:
    team = libraries()[request.param].team(1)
    return SharedWindow(team, np.zeros(window_bytes(1, 64), np.uint8), 1, 0, 64)


def there_and_back(packer: SharedWindow, values: np.ndarray) -> tuple[np.ndarray, int]:
    message = np.full(packer.packed_limit(len(values)) + 8, 0xAB, np.uint8)
    size = packer.pack(values, message)
    assert (message[packer.packed_limit(len(values)) :] == 0xAB).all()
    found = np.full(len(values), np.nan)
    packer.unpack(message[:size], found, begin=True)
    return found, size


@pytest.mark.parametrize("count", [1, 4, 31, 32, 33, 576, 1000])
@pytest.mark.parametrize("bits", [1, 2, 7, 8, 9, 28, 31, 32, 33, 50, 51])
def test_multiples_of_the_grid_come_back_as_they_were(packer: SharedWindow, bits: int, count: int) -> None:
    random = np.random.default_rng(100 * bits + count)
    values = random.integers(-(2**bits), 2**bits, count) * GRID
    found, size = there_and_back(packer, values)
    assert same_bits(found, values)
    assert size <= -(-count * (bits + 1) // 8) + 3 * (-(-count // 32))


def test_the_ends_of_the_range(packer: SharedWindow) -> None:
    ends = np.array([2**51 - 1, -(2**51), 2**51, -(2**51) - 1, 2**52, -1, 1, 0]) * GRID
    found, _ = there_and_back(packer, ends)
    assert same_bits(found, ends)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-12, 3e6, -3e6, 1e300, 2.0**-31])
def test_what_is_not_on_the_grid_is_sent_as_it_is(packer: SharedWindow, bad: float) -> None:
    values = np.arange(96) * GRID
    values[40] = bad
    found, size = there_and_back(packer, values)
    assert same_bits(found, values)
    assert size < 32 * 8 + 2 * 32 + 6


def test_zeros_that_all_numbers_end_with_are_not_sent(packer: SharedWindow) -> None:
    values = np.random.default_rng(3).integers(-(2**7), 2**7, 320) * 2.0**-9
    found, size = there_and_back(packer, values)
    assert same_bits(found, values)
    assert size <= 10 * (32 + 2)
    assert there_and_back(packer, np.zeros(320))[1] == 20


def test_what_arrives_is_added(packer: SharedWindow) -> None:
    random = np.random.default_rng(4)
    first, second = random.integers(-(2**40), 2**40, (2, 100)) * GRID
    message = np.empty(packer.packed_limit(100), np.uint8)
    size = packer.pack(first, message)
    total = second.copy()
    packer.unpack(message[:size], total, begin=False)
    assert same_bits(total, first + second)


def test_a_message_of_another_length_is_refused(packer: SharedWindow) -> None:
    values = np.random.default_rng(5).integers(-(2**20), 2**20, 64) * GRID
    message = np.zeros(packer.packed_limit(64), np.uint8)
    size = packer.pack(values, message)
    for wrong in (0, 3, size - 1, size + 1):
        with pytest.raises(ValueError, match="does not hold the 64 numbers"):
            packer.unpack(message[:wrong], np.zeros(64), begin=True)
    message[0] = 60
    with pytest.raises(ValueError, match="does not hold"):
        packer.unpack(message[:size], np.zeros(64), begin=True)
