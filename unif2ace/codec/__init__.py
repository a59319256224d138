"""Image codecs: images to discrete tokens and back."""

from unif2ace.codec.small import SmallCodec, SmallCodecConfig

__all__ = ["SmallCodec", "SmallCodecConfig"]
