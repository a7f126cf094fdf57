"""Operations on tensors, one file each."""

__version__ = "0.0.0"
