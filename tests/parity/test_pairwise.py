"""Pairwise-covering lists of cases, and the matrix that is made of one."""

import pytest

from .matrix import EXCLUDED, FACTORS, cases
from .pairwise import by_new_pairs, covering, holds, pairs, pairs_of

SMALL = {"a": (1, 2, 3), "b": (1, 2, 3), "c": ("x", "y"), "d": ("x", "y")}


def met(found: list[dict]) -> set[tuple]:
    return set().union(*map(pairs_of, found))


def test_every_pair_is_in_a_case():
    found = covering(SMALL)
    assert met(found) == set(pairs(SMALL)) and len(pairs(SMALL)) == 9 + 4 * 6 + 4
    assert 9 <= len(found) <= 10  # the pairs of a and b alone take nine


def test_excluded_values_never_meet():
    excluded = [{"a": 1, "b": 1}, {"c": "y"}, {"a": 2, "b": 2, "d": "x"}]
    found = covering(SMALL, excluded)
    assert met(found) == set(pairs(SMALL, excluded))
    assert not any(holds(case, part) for case in found for part in excluded)


def test_a_pair_that_fits_into_no_case_is_named():
    with pytest.raises(ValueError, match="no value of 'c' fits to"):
        covering(SMALL, [{"a": 1, "c": "x"}, {"b": 1, "c": "y"}])


def test_first_cases_have_most_pairs():
    found = by_new_pairs([{"a": 1, "b": 1}, {"a": 1, "b": 1, "c": "x"}, {"a": 2, "b": 1}])
    assert found == [{"a": 1, "b": 1, "c": "x"}, {"a": 2, "b": 1}, {"a": 1, "b": 1}]


def test_matrix():
    found = cases()
    assert found == cases(), "another list every time"
    assert met(found) == set(pairs(FACTORS, EXCLUDED))
    assert len(found) == len(FACTORS["architecture"]) * len(FACTORS["bits"])
