"""The codec between bytes and tokens."""

import torch

import multitower as mt
from multitower.plugins import check_tokens


class OctetsModality(mt.Modality):
    """One token per byte.

    >>> octets = OctetsModality()
    >>> octets.encode(b"hi")
    tensor([256, 104, 105, 257])
    >>> octets.decode(octets.encode(b"hi"))
    b'hi'
    """

    name = "octets"
    accepts = (bytes,)
    vocab_size = 258
    begin = 256
    end = 257

    def encode(self, raw: bytes) -> torch.Tensor:
        """Return the tokens of bytes: int64, shape (length,), including begin and end."""
        if not isinstance(raw, bytes):
            raise TypeError(f"octets is encoded from bytes, not from {type(raw).__name__}")
        return torch.tensor([self.begin, *raw, self.end])

    def decode(self, tokens: torch.Tensor) -> bytes:
        """Return the bytes of tokens of shape (length,); other ids are dropped."""
        return bytes(token for token in check_tokens(tokens) if token < 256)
