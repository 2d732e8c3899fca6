"""Pairwise-covering lists of cases: every two values of two factors meet in a case, unless they must not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

Case = dict[str, object]


def holds(case: Mapping[str, object], part: Mapping[str, object]) -> bool:
    """Whether a case has all the values of another, smaller one."""
    return all(name in case and case[name] == value for name, value in part.items())


def pairs_of(case: Mapping[str, object]) -> set[tuple]:
    """The pairs of (factor, value) in a case, in the order of its factors."""
    return set(itertools.combinations(case.items(), 2))


def pairs(factors: Mapping[str, Sequence], excluded: Sequence[Case] = ()) -> list[tuple]:
    """All pairs of values of two factors, but those that must not meet."""
    found = []
    for one, other in itertools.combinations(factors, 2):
        for values in itertools.product(factors[one], factors[other]):
            case = dict(zip((one, other), values, strict=True))
            if not any(holds(case, part) for part in excluded):
                found.append(tuple(case.items()))
    return found


def covering(factors: Mapping[str, Sequence], excluded: Sequence[Case] = ()) -> list[Case]:
    """Cases that together have every pair of values that may meet; the same list every time.

    Greedy: a case begins with the first pair that none has yet; each further factor takes the value that adds most
    new pairs, and of equals the first. So the first value of a factor, its default, is in more cases than others.

    Args:
        factors: values by factor.
        excluded: combinations of values that no case may hold.

    Raises:
        ValueError: if a pair fits into no case.
    """
    missing = dict.fromkeys(pairs(factors, excluded))  # a set that keeps its order
    cases = []
    while missing:
        chosen = dict(next(iter(missing)))
        for name in sorted(factors, key=lambda name: -len(factors[name])):
            if name in chosen:
                continue
            options = [chosen | {name: value} for value in factors[name]]
            options = [option for option in options if not any(holds(option, part) for part in excluded)]
            if not options:
                raise ValueError(f"no value of {name!r} fits to {chosen}")
            chosen = max(options, key=lambda option: len(pairs_of(_ordered(option, factors)) & missing.keys()))
        case = _ordered(chosen, factors)
        cases.append(case)
        for pair in pairs_of(case):
            missing.pop(pair, None)
    return cases


def _ordered(case: Case, factors: Mapping[str, Sequence]) -> Case:
    return {name: case[name] for name in factors if name in case}


def by_new_pairs(cases: Sequence[Case]) -> list[Case]:
    """The cases in another order: each has most of the pairs that those before it have not."""
    left, seen, ordered = list(cases), set(), []
    while left:
        chosen = max(left, key=lambda case: len(pairs_of(case) - seen))
        left.remove(chosen)
        ordered.append(chosen)
        seen |= pairs_of(chosen)
    return ordered
