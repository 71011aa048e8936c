"""Schedules that follow from the length of a search, and warnings of a search that has not learned or decided."""

import math

import pytest

from models.describe import mean_entropy


def test_entropy_by_hand():
    assert mean_entropy([[0.25] * 4, [0.25] * 4]) == pytest.approx(1)
    assert mean_entropy([[0.0, 1.0], [0.5, 0.5]]) == pytest.approx(0.5)
    one = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(3)
    assert mean_entropy([[0.9, 0.1, 0.0]]) == pytest.approx(one)
    assert mean_entropy([[1.0], [1.0]]) == 0
