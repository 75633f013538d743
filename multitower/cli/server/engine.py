"""Continuous batching: one thread runs the model, and requests join and leave its batch between steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor

from ...generate.options import check_single, options_of, settle
from ...generate.rows import Turn
from ...generate.session import Session
from ...generate.simultaneous import check_stepwise
from ...pipeline.codec import Codec, leaves

COUNTED = (
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_eos_token_id",
    "max_time",
    "min_new_tokens",
)
"""Options relative to the start of a ``generate`` call, meaningless when output is split over calls."""


CLOSING = "the server is closing; ask again later"


@dataclass(frozen=True)
class Decoding:
    """A tower to decode, its maximum number of tokens, and sampling; temperature 0 is greedy."""

    tower: str
    most: int
    temperature: float = 0.0
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """Return the options of ``generate``."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@dataclass(frozen=True, eq=False)
class Piece:
    """Some tokens of a tower's output.

    Attributes:
        tower: The tower.
        tokens: int64, shape (length,); the first piece has the begin token, the last may have the end token.
        new: Number of decoded tokens: all but the begin token.
        finish: For the last piece, "stop" after an end token, "length" at the limit; else None.
    """

    tower: str
    tokens: Tensor
    new: int
    finish: str | None


Event = Piece | Session | Exception
"""The events of a job: pieces of output, then the updated session or an error."""


class Job:
    """Extends a session of one row by given segments and by decoded output.

    The given session is not modified; the last event is the extended one. Events are emitted in the engine's
    thread. If not ``lasting``, the extended session may contain more tokens of the last output than wanted.
    """

    def __init__(
        self,
        session: Session,
        given: Sequence[Turn],
        wanted: Sequence[Decoding],
        *,
        seconds: float,
        emit: Callable[[Event], object],
        lasting: bool = True,
    ) -> None:
        self.session, self.given, self.wanted = session, list(given), list(wanted)
        self.left, self.room = 0, 0.0
        self.begun, self.goes_on, self.over = False, False, False
        self.lasting = lasting
        self._deadline, self._seconds, self._emit = time.monotonic() + seconds, seconds, emit

    def cancel(self) -> None:
        """Make the engine drop the job before its next step."""
        self.over = True

    def tell(self, event: Event) -> None:
        """Emit an event; any event except a piece ends the job."""
        if self.over:
            return
        self.over = not isinstance(event, Piece)
        try:
            self._emit(event)
        except RuntimeError:  # the caller's event loop has ended
            self.over = True

    def check_time(self, latest: float) -> None:
        """Fail after the job's deadline, or after ``latest``, the end of the server's grace period."""
        now = time.monotonic()
        if now > self._deadline:
            self.tell(TimeoutError(f"the request took more than {self._seconds:g} s"))
        if now > latest:
            self.tell(ConnectionError(CLOSING))


class Engine:
    """A thread that repeatedly decodes a few tokens of all active jobs.

    Before each step, new jobs join, and finished, timed-out or cancelled ones leave. Requests of different
    lengths thus share batches, and the output of each equals that of the request alone, up to rounding.
    ``observe`` is called after each step with the tower, the number of rows and the seconds.
    """

    def __init__(
        self,
        codec: Codec,
        outputs: Iterable[str],
        *,
        chunk: int = 8,
        observe: Callable[[str, int, float], object] = lambda *_: None,
    ) -> None:
        self.model, self._codec, self._chunk, self._observe = codec.model, codec, chunk, observe
        self._ends = {name: self._ends_of(name) for name in outputs}
        self._changed, self._arrived, self._going = Condition(), list[Job](), list[Job]()
        self._closed, self._latest = False, math.inf
        self._thread = Thread(target=self._run, name="multitower-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine accepts jobs."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> None:
        """Queue a job; if the engine is closed, the job fails."""
        with self._changed:
            if not self._closed:
                self._arrived.append(job)
                self._changed.notify()
                return
        job.tell(ConnectionError(CLOSING))

    def end_within(self, seconds: float) -> None:
        """Set a grace period; jobs, also new ones, that are not done by its end fail."""
        self._latest = time.monotonic() + seconds

    def close(self) -> None:
        """End the thread after its current step; active jobs fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _ends_of(self, name: str) -> frozenset[int]:
        own = options_of(name, self._codec.with_edges({"do_sample": False}))
        settings = settle(name, self.model.tower(name), own)
        check_stepwise(own, {name: settings})
        check_single(settings, "a server returns one result for each request")
        if counted := [key for key in COUNTED if settings.get(key)]:
            raise ValueError(
                f"{', '.join(counted)}: a server decodes tower {name!r} in pieces, and this counts from "
                f"where each begins; change it in model.unimodal({name!r}).generation_config"
            )
        return frozenset(settings.ends)

    def _run(self) -> None:
        try:
            while self._step():
                pass
        finally:
            with self._changed:
                self._closed, left = True, [*self._going, *self._arrived]
            for job in left:
                job.tell(ConnectionError(CLOSING))

    def _step(self) -> bool:
        """Add new jobs, and decode some tokens of all active ones; return False once closed."""
        with self._changed:
            while not (self._going or self._arrived or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            fresh, self._arrived = self._arrived, []
            self._going += fresh
        self._each(fresh, lambda job: job.session.outputs, self._append)
        self._each(self._going, self._key, self._decode)
        self._going = [job for job in self._going if not job.over]
        return True

    def _each(
        self, jobs: Iterable[Job], key: Callable[[Job], Any], step: Callable[[list[Job]], None]
    ) -> None:
        """Run a step on each group of jobs with the same key; if a group fails, retry its jobs one by one."""
        alike: dict[Any, list[Job]] = {}
        for job in jobs:
            job.check_time(self._latest)
            if not job.over:
                alike.setdefault(key(job), []).append(job)
        for together in alike.values():
            try:
                step(together)
            except Exception as error:
                if len(together) == 1:
                    together[0].tell(error)
                else:
                    self._each(together, id, step)

    def _append(self, jobs: list[Job]) -> None:
        """Run the given segments of new jobs."""
        giving = [job for job in jobs if job.given]
        if giving:
            first, *others = (job.session for job in giving)
            both = first.join(*others)
            both.append([job.given for job in giving])
            for job, session in zip(giving, both.split(), strict=True):
                job.session, job.given = session, []
        for job in jobs:
            self._begin(job)

    def _begin(self, job: Job) -> None:
        """Prepare a job's next output, or finish the job."""
        if not job.wanted:
            job.tell(job.session)
            return
        name = job.wanted[0].tower
        limit, tokens = self.model.tower(name).hard_limit, _tokens(job, name)
        job.begun, job.goes_on = False, not tokens or tokens[-1] in self._ends[name]
        taken = 0 if self.model.forgets(name) else len(tokens)
        room: float = math.inf if limit is None else limit - taken - 1
        job.left = int(min(job.wanted[0].most, room))
        job.room = job.left if job.lasting or len(job.wanted) > 1 else room
        if job.left < 1:
            job.tell(
                ValueError(
                    f"tower {name!r} has positions for {limit} tokens, {taken} of which are taken: "
                    "nothing more can be decoded; send less"
                )
            )

    def _key(self, job: Job) -> tuple[Any, ...]:
        """Return the key of jobs that can be decoded in one batch."""
        wanted = job.wanted[0]
        return job.session.outputs, wanted.tower, wanted.temperature, wanted.top_p, job.goes_on

    def _decode(self, jobs: list[Job]) -> None:
        """Decode some tokens of jobs with the same key."""
        started = time.monotonic()
        name, longest = jobs[0].wanted[0].tower, max(job.left for job in jobs)
        most = int(min(self._chunk, longest, *(job.room for job in jobs)))
        options = self._codec.with_edges({**jobs[0].wanted[0].options(), "max_new_tokens": most})
        first, *others = (job.session for job in jobs)
        both = first.join(*others)
        rows = both.generate([name], continue_segment=jobs[0].goes_on, **options)
        for job, session, (segment,) in zip(jobs, both.split(), rows, strict=True):
            job.session = session
            self._hand_on(job, torch.as_tensor(leaves([[segment]])[0].tokens))
        self._observe(name, len(jobs), time.monotonic() - started)

    def _hand_on(self, job: Job, tokens: Tensor) -> None:
        """Emit new tokens; if they finish an output, prepare the next."""
        name, begin = job.wanted[0].tower, int(not job.begun)
        tokens = tokens[: begin + job.left]
        new = len(tokens) - begin
        job.left, job.room, job.begun, job.goes_on = job.left - new, job.room - new, True, True
        finish = "stop" if int(tokens[-1]) in self._ends[name] else "length" if job.left < 1 else None
        job.tell(Piece(name, tokens, new, finish))
        if finish:
            del job.wanted[0]
            self._begin(job)


def _tokens(job: Job, name: str) -> list[int]:
    """Return the tokens of a tower in a job's session."""
    (row,) = job.session.history
    own = (segment for segment in leaves([row]) if segment.tower == name)
    return [token for segment in own for token in torch.as_tensor(segment.tokens).tolist()]
