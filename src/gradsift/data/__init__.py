"""Pool and target files: read, understood, encoded once, and kept in the run folder."""

from gradsift.data.conversations import Message, as_text, text_of, to_messages
from gradsift.data.encoded import EncodedSet, encode_set
from gradsift.data.encoding import Encoded, Encoder
from gradsift.data.sources import Source, log_what_is_left, resolve

__all__ = [
    "Encoded",
    "EncodedSet",
    "Encoder",
    "Message",
    "Source",
    "as_text",
    "encode_set",
    "log_what_is_left",
    "resolve",
    "text_of",
    "to_messages",
]
