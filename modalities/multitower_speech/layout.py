"""Interleave the units of several codebooks into one stream of tokens, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from multitower.plugins import check_tokens

PATTERNS = ("flattened", "delayed")


@dataclass(frozen=True)
class Layout:
    """How the units of several codebooks are interleaved into one stream of tokens.

    >>> codes = torch.tensor([[0, 1, 2], [3, 4, 5]])        # two frames, three codebooks of ten units
    >>> Layout(3, 10).weave(codes).tolist()
    [30, 0, 11, 22, 3, 14, 25, 31]
    >>> Layout(3, 10, "delayed").weave(codes).tolist()      # four steps; 32 is the blank
    [30, 0, 32, 32, 3, 11, 32, 32, 14, 22, 32, 32, 25, 31]

    Unit u of codebook c is token c * units + u. In the flattened pattern, each frame is a token from every
    codebook, in order. In the delayed pattern (MusicGen, arXiv 2306.05284, read row by row), each step has
    the unit of codebook c from c frames earlier: coarse units of later frames come before fine ones of
    earlier frames. At both ends, missing units are blanks.

    Args:
        codebooks: Number of codebooks.
        units: Number of units per codebook.
        pattern: "flattened" or "delayed".

    Raises:
        ValueError: There is no such pattern, or a number is less than 1.
    """

    codebooks: int
    units: int
    pattern: str = "flattened"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r}: give one of {', '.join(PATTERNS)}")
        if min(self.codebooks, self.units) < 1:
            raise ValueError(f"{self.codebooks} codebooks of {self.units} units: give at least one of each")

    @property
    def begin(self) -> int:
        """Id of the token before the first unit."""
        return self.codebooks * self.units

    @property
    def end(self) -> int:
        """Id of the token after the last unit."""
        return self.begin + 1

    @property
    def blank(self) -> int | None:
        """Id of the token that stands for no unit, in the delayed pattern."""
        return self.end + 1 if self.pattern == "delayed" else None

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.end + 1 + (self.pattern == "delayed")

    @property
    def _delays(self) -> list[int]:
        return list(range(self.codebooks)) if self.pattern == "delayed" else [0] * self.codebooks

    def weave(self, codes: Tensor) -> Tensor:
        """Return the tokens of units of shape (frames, codebooks), including begin and end."""
        return torch.cat(list(self.weave_stream([codes])))

    def weave_stream(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the tokens of units that arrive in parts, each of shape (frames, codebooks)."""
        longest = max(self._delays)
        held = torch.full((longest, self.codebooks), -1)
        opening = torch.tensor([self.begin])
        for codes in parts:
            held = torch.cat([held, codes])
            yield torch.cat([opening, self._steps(held)])
            held, opening = held[len(held) - longest :], opening[:0]
        rest = self._steps(torch.cat([held, torch.full((longest, self.codebooks), -1)]))
        yield torch.cat([opening, rest, torch.tensor([self.end])])

    def _steps(self, held: Tensor) -> Tensor:
        longest, numbers = max(self._delays), torch.arange(self.codebooks)
        columns = [held[longest - d : len(held) - d, c] for c, d in enumerate(self._delays)]
        steps = torch.stack(columns, dim=1)
        blank = -1 if self.blank is None else self.blank
        return torch.where(steps < 0, blank, steps + numbers * self.units).flatten()

    def unweave_stream(self, pieces: Iterable[Tensor], every: int = 1) -> Iterator[Tensor]:
        """Yield the units of tokens that arrive in pieces, as soon as later tokens cannot change them.

        >>> pieces = torch.tensor([1, 12, 2, 13, 3]).split(2)
        >>> [codes.tolist() for codes in Layout(2, 10).unweave_stream(pieces)]
        [[[1, 2]], [[2, 3]], [[3, -1]]]

        Args:
            pieces: Integers, each of shape (length,).
            every: Minimum number of new tokens before units are computed.

        Yields:
            int64, shape (frames, codebooks), at least one frame; concatenated, the result of ``unweave``.
        """
        open_frames = max(self._delays) + (self.codebooks > 1)
        tokens, seen, given = torch.empty(0, dtype=torch.int64), 0, 0
        for piece in pieces:
            tokens = torch.cat([tokens, piece])
            if len(tokens) - seen >= every:
                seen, codes = len(tokens), self.unweave(tokens)
                if len(codes) - open_frames > given:
                    yield codes[given : len(codes) - open_frames]
                    given = len(codes) - open_frames
        rest = self.unweave(tokens)[given:]
        if len(rest):
            yield rest

    def unweave(self, tokens: Tensor) -> Tensor:
        """Return the units of tokens, for any sequence.

        >>> Layout(2, 10).unweave(torch.tensor([14, 1, 12, 2, 3, 15, 15, 20, 99]))
        tensor([[ 1,  2],
                [ 2, -1],
                [ 3,  5]])

        A unit of the first codebook begins a frame (in the delayed pattern, a step); those of the others
        follow in order. All other tokens are dropped: begin, end, ids beyond the vocabulary, units out of
        order. Frames without a unit of the first codebook are dropped, too.

        Args:
            tokens: Integers, shape (length,).

        Returns:
            int64, shape (frames, codebooks): -1 for a missing unit, and for the codebooks after it.

        Raises:
            ValueError: The tokens have another shape or dtype, or are negative.
        """
        steps: list[list[int]] = []
        due = self.codebooks
        for token in check_tokens(tokens):
            level, unit = divmod(token, self.units)
            if token == self.blank:
                level, unit = due % self.codebooks, -1
            if level == 0:
                steps.append([unit] + [-1] * (self.codebooks - 1))
                due = 1
            elif level == due < self.codebooks:
                steps[-1][level] = unit
                due += 1
        longest = max(self._delays)
        padded = torch.tensor(steps + [[-1] * self.codebooks] * longest, dtype=torch.int64).reshape(
            -1, self.codebooks
        )
        columns = [padded[d : d + len(steps), c] for c, d in enumerate(self._delays)]
        codes = torch.stack(columns, dim=1)
        known = (codes >= 0).long().cumprod(1).bool()
        return codes.masked_fill(~known, -1)[known[:, 0]]
