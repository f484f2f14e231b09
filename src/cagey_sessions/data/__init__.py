"""A user's data and its bytes. What lives here: the encoding of data as JSON and back, codecs for typed data, and what
``debug=True`` looks for in data. What must not: when data is saved or where, because the same bytes go to a store, to a
snapshot and to a spill.
"""

from .codecs import Codec, dataclass_codec, msgspec_codec
from .encoding import LAST_SCHEMA, MAX_BYTES, Encoding
from .sanitizer import Sanitizer, UserDataWarning

__all__ = [
    "LAST_SCHEMA",
    "MAX_BYTES",
    "Codec",
    "Encoding",
    "Sanitizer",
    "UserDataWarning",
    "dataclass_codec",
    "msgspec_codec",
]
