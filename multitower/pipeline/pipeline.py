"""The pipeline: a fused model with the modalities of its towers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..batch.collate import Segment
from ..checkpoint.load import load_fusion
from ..checkpoint.manifest import open_checkpoint
from ..checkpoint.modalities import check_modalities, load_modalities
from ..checkpoint.placement import DeviceMap
from ..generate.generate import Policy
from ..generate.options import check_named, options_of, settle
from ..hub.push import push_to_hub
from ..model import FusedModel
from ..plugins.entry_points import as_modality
from ..plugins.modality import Modality
from ..storage.find import find_checkpoint
from .codec import Codec, leaves
from .session import RawSession
from .streaming import in_a_thread, stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pipeline:
    """A fused model with modalities: raw data (text, sound files, images, ...) in, raw data out.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> class Letters(mt.Modality):
    ...     name, accepts, vocab_size, begin, end = "letters", (str,), 16, 0, 1
    ...     def encode(self, raw):
    ...         return torch.tensor([0, *(ord(letter) - 95 for letter in raw), 1])
    ...     def decode(self, tokens):
    ...         return "".join(chr(token + 95) for token in tokens.tolist() if token > 1)
    >>> pipe = mt.Pipeline(tiny_model(), {"text": Letters(), "speech": Letters()})
    >>> len(pipe([("speech", "ab")], output="text", do_sample=True, max_new_tokens=8, eos_token_id=None))
    8

    Args:
        model: The fused model.
        modalities: The modality of each tower, by name; a tokenizer of transformers becomes a modality
            "text". Towers without one accept only segments of tokens, and cannot be outputs.

    Attributes:
        model: The fused model.
        modalities: The modalities by tower.

    Raises:
        ValueError: A modality's tower is unknown or has a smaller vocabulary; or a tokenizer has no begin or
            end token.
        TypeError: Something is neither a modality nor a tokenizer.
        PluginError: A tokenizer is given, and the modality "text" is not installed.
    """

    def __init__(
        self, model: FusedModel, modalities: Mapping[str, Modality | PreTrainedTokenizerBase]
    ) -> None:
        self.model = model
        self.modalities: dict[str, Modality] = {name: as_modality(each) for name, each in modalities.items()}
        check_modalities(model, self.modalities)

    @property
    def _codec(self) -> Codec:
        return Codec(self.model, self.modalities)

    @property
    def device(self) -> torch.device:
        """The model's device; see ``FusedModel.device``."""
        return self.model.device

    def to(self, *where: Any, **options: Any) -> Pipeline:
        """Move or convert the model, as ``torch.nn.Module.to`` does; return the pipeline."""
        self.model.to(*where, **options)
        return self

    def __repr__(self) -> str:
        known = {name: self.modalities.get(name, "tokens only") for name in self.model.towers}
        return f"Pipeline({', '.join(f'{name}: {modality}' for name, modality in known.items())})"

    def __call__(
        self,
        inputs: list[Any],
        output: str | tuple[str, ...] | list[Any] | Policy,
        *,
        batch_size: int | None = None,
        return_segments: bool = False,
        **options: Any,
    ) -> Any:
        """Encode the inputs, generate the outputs, and decode them to raw data.

        If a modality's begin or end token is not among its tower's, it replaces the tower's, unless the
        options say otherwise.

        Args:
            inputs: An example, or a list of examples. An example is a list of prompts, in order: pairs
                ``(tower, raw)``, ``Segment`` of tokens, or tuples of these that start at the same time, as in
                ``[("text", "sing"), (("music", "a.wav"), ("dance", steps))]``.
            output: The tower to decode; or a tuple of towers, decoded at the same time; or a list of both,
                decoded one after the other; or a function that chooses, see ``FusedModel.generate``.
            batch_size: How many examples are decoded at once; all by default.
            return_segments: Whether to return segments of tokens instead of raw data. They can be passed to
                the next turn of a conversation as they are; encoding raw data again may give other tokens.
                ``decode`` converts them to raw data.
            options: Options of ``FusedModel.generate``.

        Returns:
            A result for each example; for a single example only its result. A result has the form of
            ``output``: the raw data of a tower, a tuple of them, or a list of both. If ``output`` is a
            function, it is a list of pairs ``(tower, raw)``, or tuples of pairs, which can be appended to the
            example. With ``num_return_sequences`` above one, each result is a list of that many.

        Raises:
            ValueError: A tower is unknown or has no modality; see also ``FusedModel.generate``. Errors that
                modalities raise for invalid data have a note that says which data.
            TypeError: Something is not an example, or the modality does not accept the type of raw data.
        """
        if isinstance(inputs, list) and not inputs:
            raise ValueError("there is nothing to decode from: give an example; [[]] is one that is empty")
        several = isinstance(inputs, list) and isinstance(inputs[0], list)
        wanted = output if callable(output) or isinstance(output, list) else [output]
        if not callable(wanted) and not return_segments:
            for name in leaves([wanted]):
                self._codec.modality(name, "output")
        examples = self._codec.encode(inputs if several else [inputs])
        size = len(examples) if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size={size} must be 1 or more")
        options = self._codec.with_edges(options)
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        rows = [row for batch in batches for row in self.model.generate(batch, wanted, **options)]
        decoded = rows if return_segments else self._codec.decode(rows, pairs=callable(output))
        results = decoded if wanted is output else [row[0] for row in decoded]
        copies = len(results) // len(examples)
        if copies > 1:
            results = [results[start : start + copies] for start in range(0, len(results), copies)]
        return results if several else results[0]

    def decode(self, segments: Any) -> Any:
        """Decode segments to raw data, keeping the structure of lists and tuples.

        >>> turns = [("text", "sing")]                                              # doctest: +SKIP
        >>> answer = pipe(turns, output="speech", return_segments=True)             # doctest: +SKIP
        >>> pipe.decode(answer)                                                     # doctest: +SKIP
        >>> turns += [answer, ("text", "louder")]                                   # doctest: +SKIP

        Args:
            segments: The result of a call with ``return_segments``: a segment, or tuples or lists of them, of
                one example or several.

        Raises:
            ValueError: A tower has no modality.
            TypeError: Something is not a segment.
        """
        if isinstance(segments, list):
            return [self.decode(entry) for entry in segments]
        wrong = [leaf for leaf in leaves([[segments]]) if not isinstance(leaf, Segment)]
        if wrong:
            raise TypeError(f"decode takes multitower.Segment, not {type(wrong[0]).__name__}")
        return self._codec.decode([[segments]], pairs=False)[0][0]

    def session(self, rows: int = 1, *, outputs: Collection[str] | None = None) -> RawSession:
        """Start a conversation on raw data, in which each turn runs only new tokens; see ``RawSession``.

        >>> session = pipe.session()                                                # doctest: +SKIP
        >>> session.append(("speech", "clip.wav"))                                  # doctest: +SKIP
        >>> answer = session.generate("text")                                       # doctest: +SKIP

        Args:
            rows: See ``FusedModel.session``.
            outputs: See there.
        """
        return RawSession(self._codec, self.model.session(rows, outputs=outputs))

    def stream(self, example: list[Any], output: str, **options: Any) -> Iterator[Any]:
        """Yield raw data piece by piece while they are generated.

        >>> for piece in pipe.stream([("speech", "clip.wav")], output="text"):     # doctest: +SKIP
        ...     print(piece, end="", flush=True)

        Text comes word by word; the pieces together equal the result of a call. For other raw data, the
        modality decides (``Modality.decode_stream``): speech comes as pieces of its waveform.

        Generation runs in a thread, under the caller's ``torch.autocast`` and device. It ends with the
        segment, or when the iterator is closed. Until then, do not use a model in training mode elsewhere,
        because generation puts it into eval mode.

        Args:
            example: A single example, as for a call.
            output: The tower to decode.
            options: Options of ``FusedModel.generate``, except a streamer.

        Raises:
            ValueError: As for a call; or the options contain a streamer.
            TypeError: As for a call; or the output is not a single tower, or its modality does not support
                streaming.
        """
        if not isinstance(output, str):
            raise TypeError(f"a stream is of one tower: give its name as output, not {output!r}")
        if options.get("streamer") is not None:
            raise ValueError("stream has a streamer of its own; give yours to a call, or to model.generate")
        modality = self._codec.modality(output, "output")
        nothing = modality.decode(torch.tensor([modality.begin, modality.end]))
        if not isinstance(nothing, str):
            modality.decode_stream(())
        check_named(options, list(self.model.towers))
        own = options_of(output, self._codec.with_edges(options))
        generate = partial(self.model.generate, self._codec.encode([example]), [output])
        begin = settle(output, self.model.tower(output), own).begin
        return stream(generate, modality, begin, own)

    def astream(self, example: list[Any], output: str, **options: Any) -> AsyncIterator[Any]:
        """Yield raw data piece by piece, as ``stream`` does, for ``async for``.

        >>> async for piece in pipe.astream([("speech", "clip.wav")], output="text"):  # doctest: +SKIP
        ...     await socket.send(piece)

        Encoding and decoding run in threads. A task that is cancelled stops decoding.

        Args:
            example: See ``stream``.
            output: See there.
            options: See there.

        Raises:
            Exception: What ``stream`` raises, when the first piece is asked for.
        """
        return in_a_thread(partial(self.stream, example, output, **options))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        embed_towers: bool = False,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write a checkpoint of the model and its modalities; see ``FusedModel.save_pretrained``."""
        self.model.save_pretrained(
            folder, embed_towers=embed_towers, modalities=self.modalities, max_shard_size=max_shard_size
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        towers: Mapping[str, str | os.PathLike[str] | nn.Module] | None = None,
        modalities: Mapping[str, Modality] | None = None,
        allow_changed_towers: bool | Collection[str] = False,
        dtype: torch.dtype | str | None = None,
        device_map: DeviceMap | None = None,
        verify: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Pipeline:
        """Load a checkpoint with its modalities.

        Args:
            folder: The checkpoint, or its Hub id, "owner/name"; an existing folder takes precedence.
            towers: Other sources for towers, as for ``FusedModel.from_pretrained``.
            modalities: Modalities by tower, which replace those of the checkpoint or add to them.
            allow_changed_towers: See ``checkpoint.load_fusion``.
            dtype: See there.
            device_map: See there.
            verify: Whether to compare every byte; see there.
            revision: A branch, tag or commit on the Hub.
            token: Access token for a private repository.
            cache_dir: Download folder.

        Raises:
            PluginError: A modality's plugin is not installed (the message names its package) or broken.
            CheckpointError: A file is missing or damaged; or see ``FusedModel.from_pretrained``.
            ValueError: See ``Pipeline``.
        """
        root = find_checkpoint(folder, revision=revision, token=token, cache_dir=cache_dir)
        checkpoint, instead = open_checkpoint(root), modalities or {}
        stored = load_modalities(checkpoint, but=instead, verify=verify)
        model = load_fusion(
            FusedModel,
            checkpoint,
            towers=towers,
            allow_changed_towers=allow_changed_towers,
            dtype=dtype,
            device_map=device_map,
            verify=verify,
        )
        return cls(model, {**stored, **instead})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        embed_towers: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a fused model",
        revision: str | None = None,
        create_pr: bool = False,
        license: str | None = None,  # noqa: A002  # what the Hub calls it
        max_shard_size: int | str = "5GB",
    ) -> str:
        """Upload a checkpoint of the model and its modalities; see ``FusedModel.push_to_hub``."""
        return push_to_hub(
            self.model,
            repo_id,
            modalities=self.modalities,
            embed_towers=embed_towers,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            license=license,
            max_shard_size=max_shard_size,
        )
