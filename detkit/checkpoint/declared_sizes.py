"""What a file claims about sizes, looked at before memory is taken for it: a few bytes may claim
gigabytes.
"""

import os
import pickle
import pickletools
import zipfile
from typing import IO

import torch
from torch import Tensor

_MEMO_OPCODES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
# Saved buffers may repeat a few values many times (`Tensor.expand`); weights do not, beyond what
# fits in here.
_MAX_REPEATED_BYTES = 2**26


def require_stored_zip(file: IO[bytes]) -> None:
    """Refuse a zip archive whose members claim more bytes than the file has: torch stores them as they are.

    Source: Fifield 2019, A better zip bomb: members that overlap expand without nesting, and claim
        too much as well.

    Raises:
        ValueError: They do.
        zipfile.BadZipFile: It is no whole archive.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
    file.seek(0)
    if claimed > num_bytes:
        raise ValueError(
            f"it is a zip of {num_bytes} bytes whose members claim {claimed}: compressed, or a zip"
            " bomb; torch.save writes them uncompressed"
        )


def require_modest_memo(file: IO[bytes]) -> None:
    """Refuse a pickle that numbers its objects far beyond their count: Python takes memory for all numbers below.

    Raises:
        pickle.UnpicklingError: It does, or is no whole pickle.
    """
    start = file.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file), start=1):
            if opcode.name in _MEMO_OPCODES and argument is not None and argument > count:
                raise pickle.UnpicklingError(f"object {count} at the most is numbered {argument}")
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from error
    file.seek(start)


def tensor_problem(tensor: Tensor) -> str:
    """Say why a tensor of a file cannot be weights (nothing is stored for what it shows), or give
    an empty text.
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        return (
            f"a tensor of shape {tuple(tensor.shape)} that is"
            f" {'on meta' if tensor.is_meta else tensor.layout}"
        )
    shown, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if shown > max(stored, _MAX_REPEATED_BYTES):
        return (
            f"a tensor of shape {tuple(tensor.shape)}, {shown} bytes, of which {stored} are stored"
        )
    return ""
