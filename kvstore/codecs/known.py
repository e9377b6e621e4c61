"""All codecs, by their numbers and their names."""

from collections.abc import Mapping
from typing import Literal

from kvstore.codecs.codec import Codec
from kvstore.codecs.lossless import Lossless
from kvstore.codecs.raw import Raw

CodecName = Literal["raw", "lossless"]

RAW, LOSSLESS = Raw(), Lossless()
CODECS: Mapping[int, Codec] = {codec.code: codec for codec in (RAW, LOSSLESS)}
BY_NAME: Mapping[str, Codec] = {codec.name: codec for codec in CODECS.values()}
