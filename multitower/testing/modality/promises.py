"""Checks of a modality; each raises an AssertionError that says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...plugins.modality import Modality
from ..report import call
from .case import ModalityCase, random_states, same, short, strange_rows
from .on_disk import check_damage, check_files


def _check_attributes(case: ModalityCase) -> None:
    """Check the modality's attributes."""
    modality = case.modality
    assert isinstance(modality, Modality), f"{type(modality).__name__} is no subclass of multitower.Modality"
    name = getattr(modality, "name", None)
    fine = isinstance(name, str) and name.isidentifier() and name == name.lower()
    assert fine, f"name must be an identifier in lower case, as 'text', not {name!r}"
    accepts = getattr(modality, "accepts", None)
    fine = isinstance(accepts, tuple) and bool(accepts) and all(isinstance(kind, type) for kind in accepts)
    assert fine, f"accepts must be a tuple of types, as (str,), not {accepts!r}"
    for place, raw in enumerate(case.samples):
        assert isinstance(raw, accepts), (  # type: ignore[arg-type]  # checked above
            f"sample {place} is of type {type(raw).__name__}, which is not among accepts, {accepts}"
        )
    size: Any = getattr(modality, "vocab_size", None)
    fine = _is_int(size) and size > 0
    assert fine, f"vocab_size must be a positive whole number, not {size!r}"
    for key in ("begin", "end", "pad"):
        token: Any = getattr(modality, key, None)
        assert _is_int(token), f"{key} must be a token id, not {token!r}"
        assert 0 <= token < size, f"{key}: token {token} is beyond the vocabulary of {size}"
    tower = modality.default_tower
    assert tower is None or isinstance(tower, str), f"default_tower must be a str or None, not {tower!r}"


def _check_tokens(case: ModalityCase) -> None:
    """Check that encode returns valid tokens."""
    modality = case.modality
    for place, tokens in enumerate(case.rows()):
        what = f"encode of sample {place}"
        assert isinstance(tokens, Tensor), f"{what} gives a {type(tokens).__name__}, expected a torch.Tensor"
        assert tokens.dtype == torch.int64, f"{what} gives {tokens.dtype}, expected torch.int64"
        assert tokens.ndim == 1, f"{what} gives tokens of shape {tuple(tokens.shape)}, expected (length,)"
        ids = tokens.tolist()
        assert len(ids) > 1, f"{what} gives {ids}, expected begin, any number of tokens, and end"
        wrong = [token for token in ids if not 0 <= token < modality.vocab_size]
        assert not wrong, f"{what} gives token {wrong[0]}, beyond the vocabulary of {modality.vocab_size}"
        assert ids[0] == modality.begin, f"{what} opens with token {ids[0]}, not with begin, {modality.begin}"
        assert ids[-1] == modality.end, f"{what} closes with token {ids[-1]}, not with end, {modality.end}"
        for key in ("begin", "end"):
            inside = getattr(modality, key) in ids[1:-1]
            assert case.edges_inside or not inside, (
                f"{what} gives {key} inside, at {ids.index(getattr(modality, key), 1)}; a tower that writes "
                "it stops there. Where that is meant, say so with edges_inside=True"
            )


def _check_round_trip(case: ModalityCase) -> None:
    """Check that decode(encode(raw)) preserves what the author declared."""
    for place, raw in enumerate(case.samples):
        tokens = case.encode(place)
        again = case.decode(tokens, f"the tokens of sample {place}")
        if case.round_trip == "data":
            assert same(raw, again), (
                f"sample {place} comes back as {short(again)}, not as {short(raw)}; where a loss is meant, "
                "declare it with round_trip="
            )
        elif case.round_trip == "tokens":
            second = call(f"encode of what sample {place} was decoded to", case.modality.encode, again)
            assert same(tokens, second), (
                f"sample {place} has other tokens after decode and encode: {short(second.tolist())}, "
                f"not {short(tokens.tolist())}"
            )
        else:
            loss = float(case.round_trip(raw, again))
            within = not math.isnan(loss) and case.bound is not None and loss <= case.bound
            assert within, f"sample {place} comes back with a loss of {loss:.4g}, more than {case.bound:.4g}"


def _check_edges(case: ModalityCase) -> None:
    """Check that decode ignores whether there are begin, end and padding at the edges."""
    pads = torch.full((3,), case.modality.pad)
    for place, tokens in enumerate(case.rows()):
        expected = case.decode(tokens, f"the tokens of sample {place}")
        for what, variant in {
            "without begin": tokens[1:],
            "without end": tokens[:-1],
            "without begin and end": tokens[1:-1],
            "with padding behind": torch.cat([tokens, pads]),
            "with padding before": torch.cat([pads, tokens]),
        }.items():
            found = case.decode(variant, f"the tokens of sample {place} {what}")
            assert same(expected, found), (
                f"decode gives something else for the tokens of sample {place} {what}: {short(found)}, "
                f"not {short(expected)}"
            )


def _check_repetition(case: ModalityCase) -> None:
    """Check that results depend neither on randomness nor on earlier calls.

    Global random generators must not be used either.
    """
    rows = case.rows()
    data = [case.decode(tokens, f"the tokens of sample {place}") for place, tokens in enumerate(rows)]
    places = list(range(len(rows)))
    for seed, order in ((1, places), (2, places[::-1])):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random_states()
        for place in order:
            assert same(case.encode(place), rows[place]), (
                f"encode gives other tokens for sample {place} the second time: does it use a random number, "
                "or what it kept from the call before?"
            )
            assert same(case.decode(rows[place], f"the tokens of sample {place}"), data[place]), (
                f"decode gives something else for the tokens of sample {place} the second time: does it use "
                "a random number, or what it kept from the call before?"
            )
        used = [name for name, state in random_states().items() if not same(state, before[name])]
        assert not used, (
            f"encode and decode change the global random state of {', '.join(used)}; use a generator "
            "of your own"
        )


def _check_batches(case: ModalityCase) -> None:
    """Check that batches give the same results as single calls."""
    modality, rows = case.modality, case.rows()
    batch = call("encode_batch", modality.encode_batch, copy.deepcopy(list(case.samples)))
    _check_list("encode_batch", batch, rows)
    data = [case.decode(tokens, f"the tokens of sample {place}") for place, tokens in enumerate(rows)]
    for tokens in strange_rows(modality):
        with contextlib.suppress(ValueError):
            data.append(modality.decode(tokens.clone()))
            rows.append(tokens)
    batch = call("decode_batch", modality.decode_batch, [tokens.clone() for tokens in rows])
    _check_list("decode_batch", batch, data)
    for function in (modality.encode_batch, modality.decode_batch):
        _check_list(function.__name__, call(f"{function.__name__} of nothing", function, []), [])


def _check_inputs(case: ModalityCase) -> None:
    """Check that inputs are not changed in place, and that outputs share no memory with them."""
    modality = case.modality
    for place in range(len(case.samples)):
        raw = case.raw(place)
        expected = call(f"encode of sample {place}", modality.encode, raw).clone()
        assert same(raw, case.samples[place]), f"encode changes sample {place} in place; work on a copy of it"
        tokens = expected.clone()
        call(f"decode of the tokens of sample {place}", modality.decode, tokens)
        assert same(tokens, expected), "decode changes the tokens in place; work on a copy of them"
        given = modality.encode(raw)
        given.zero_()
        shared, again = not same(raw, case.samples[place]), modality.encode(raw).clone()
        given.copy_(expected)
        assert not shared, f"the tokens of sample {place} share its memory; give a copy"
        assert same(again, expected), (
            f"encode gives other tokens for sample {place} when those it gave before are changed; give a copy"
        )
    raws = copy.deepcopy(list(case.samples))
    rows = [tokens.clone() for tokens in modality.encode_batch(raws)]
    assert same(raws, list(case.samples)), "encode_batch changes the samples in place; work on a copy of them"
    kept = [tokens.clone() for tokens in rows]
    modality.decode_batch(rows)
    assert same(rows, kept), "decode_batch changes the tokens in place; work on a copy of them"


def _check_raw_data(case: ModalityCase) -> None:
    """Check that encode raises a TypeError for other types, and handles empty data."""
    modality = case.modality
    strangers: list[Any] = [None, 3, 2.5, "text", b"bytes", [1, 2], (1, 2), {"a": 1}, {1}, object()]
    strangers += [torch.zeros(2), np.zeros(2), [case.raw(0)], type(case.samples[0])]
    for raw in strangers:
        if not isinstance(raw, modality.accepts):
            _check_refused(modality, raw)
    for kind in modality.accepts:
        try:
            empty = kind()
        except Exception:  # a type that is never empty
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # only errors matter here
                modality.encode(empty)
        except (ValueError, TypeError, OSError):
            continue
        except Exception as error:
            raise AssertionError(
                f"encode of {short(empty)} fails with {type(error).__name__}: {error}; expected tokens or a "
                "ValueError that says what is wrong"
            ) from error


def _check_any_tokens(case: ModalityCase) -> None:
    """Check that decode returns a result or raises a ValueError for any tokens."""
    size, begin, end = case.modality.vocab_size, case.modality.begin, case.modality.end
    rows, tokens = strange_rows(case.modality), case.encode(0)
    rows += [torch.tensor([begin, 0, token, end]) for token in (size, size + 1000, 2**40, -1, -100)]
    rows += [torch.cat([tokens, tokens]), tokens.flip(0), tokens.int(), tokens.float(), tokens.bool()]
    rows += [tokens[None], tokens[None].repeat(2, 1), torch.tensor(begin), torch.zeros(2, 3)]
    for row in rows:
        try:
            with warnings.catch_warnings(action="ignore"):  # only errors matter here
                case.modality.decode(row)
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(
                f"decode of {short(row.tolist())}, shape {tuple(row.shape)} and {row.dtype}, fails with "
                f"{type(error).__name__}: {error}; towers write any tokens: drop what means nothing, or "
                "raise a ValueError"
            ) from error


MODALITY_PROMISES: dict[str, Callable[[ModalityCase], None]] = {
    "attributes": _check_attributes,
    "tokens": _check_tokens,
    "round trip": _check_round_trip,
    "edges": _check_edges,
    "repetition": _check_repetition,
    "batches": _check_batches,
    "inputs": _check_inputs,
    "raw data": _check_raw_data,
    "any tokens": _check_any_tokens,
    "saved": check_files,
    "damage": check_damage,
}
"""The checks by name; each raises an AssertionError that explains what is wrong."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_list(what: str, found: Any, expected: list[Any]) -> None:
    assert isinstance(found, list), f"{what} gives a {type(found).__name__}, expected a list"
    assert len(found) == len(expected), f"{what} gives {len(found)} for {len(expected)}"
    for place, (each, single) in enumerate(zip(found, expected, strict=True)):
        assert same(each, single), (
            f"{what} gives {short(each)} at place {place}, where one by one there is {short(single)}"
        )


def _check_refused(modality: Modality, raw: Any) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):  # only errors matter here
            tokens = modality.encode(raw)
    except TypeError:
        return
    except Exception as error:
        raise AssertionError(
            f"encode of {short(raw)}, a {type(raw).__name__}, fails with {type(error).__name__}: {error}; "
            "expected a TypeError, for it is not among accepts"
        ) from error
    raise AssertionError(
        f"encode of {short(raw)}, a {type(raw).__name__}, gives {short(tokens)}; expected a TypeError, for "
        "it is not among accepts"
    )
