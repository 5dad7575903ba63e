"""The image files and videos that paths, folders and patterns name; reading and writing of videos.

Nothing here imports torch. Videos and cameras are read by PyAV, the extra `video`.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from detkit.utils.errors import DataError, MissingFileError, import_package
from detkit.utils.text import listed

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
"""Endings, in small letters, of files that are read as videos."""
CAMERA = "camera:"
"""What the name of a camera starts with; its number follows."""
_STREAMS = ("rtsp://", "rtmp://", "udp://", "rtp://")
# FFmpeg's name for the cameras of a system, and how its cameras are named.
_CAMERAS = {
    "linux": ("v4l2", "/dev/video{}"),
    "darwin": ("avfoundation", "{}"),
    "win32": ("vfwcap", "{}"),
}
_MAX_NAMED = 5
_DEFAULT_RATE = 25


class BadVideoError(DataError):
    """A video or a camera that cannot be read."""


def find_images(inputs: Iterable[str]) -> list[Path]:
    """Return the files that paths, folders and patterns stand for, in order, each once.

    A file that is named is returned whether it is an image or not, so that reading it can say what
    is wrong. Of a folder or pattern, only files with the suffix of an image or a video are returned
    that are not hidden, and of a folder not those in its folders; what is left out is counted and
    named.

    Raises:
        MissingFileError: A path is not there, or a folder or pattern holds no image.
    """
    found: dict[Path, None] = {}
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_file():
            found[path] = None
            continue
        suffixes = {*Image.registered_extensions(), ".npy", *VIDEO_SUFFIXES}
        images: list[Path] = []
        left_out: dict[str, list[str]] = {}
        for file in sorted(path.iterdir() if path.is_dir() else _glob(path)):
            # macOS's `._x.jpg` and Jupyter's folders, but not what the user names.
            if any(part.startswith(".") and part not in path.parts for part in file.parts):
                left_out.setdefault("hidden", []).append(file.name)
            elif file.is_dir():
                if path.is_dir():  # a pattern has gone into it where it was meant to
                    reason = "not looked into (`PATH/**/*` reads the folders, too)"
                    left_out.setdefault(reason, []).append(file.name)
            elif file.suffix.lower() in suffixes:
                images.append(file)
            else:
                left_out.setdefault("without the suffix of an image", []).append(file.name)
        for reason, names in left_out.items():
            shown = listed(names, _MAX_NAMED)
            logger.info("left out of %s: %d %s: %s", name, len(names), reason, shown)
        if not images:
            raise MissingFileError(
                f"{name}: {'no image in this folder' if path.is_dir() else 'no such file'}"
            )
        found.update(dict.fromkeys(images))
    return list(found)


def _glob(pattern: Path) -> Iterable[Path]:
    """Return the files that fit a pattern; none where the path holds no `*`, `?` or `[`."""
    # Path.glob takes relative patterns only: it starts at the last folder without wildcards.
    fixed = next((i for i, part in enumerate(pattern.parts) if any(c in part for c in "*?[")), None)
    if fixed is None:
        return []
    return Path(*pattern.parts[:fixed]).glob(str(Path(*pattern.parts[fixed:])))


def is_video(name: str) -> bool:
    """Return whether a path or an address names a video or a camera."""
    return name.startswith((CAMERA, *_STREAMS)) or name.lower().endswith(VIDEO_SUFFIXES)


class VideoFrame(NamedTuple):
    """One picture of a video."""

    index: int
    """Counted from 0."""
    seconds: float
    """Since the start of the video."""
    pixels: np.ndarray
    """(H, W, 3) uint8 RGB, upright."""


class Video:
    """The frames of a video or a camera, decoded one after the other as they are iterated over.

    Attributes:
        rate: Frames per second.
        num_frames: As the file says; None where it does not.
    """

    def __init__(self, name: str) -> None:
        """Open a video.

        Args:
            name: Path or address, or `camera:N`.

        Raises:
            MissingPackageError: PyAV is not installed.
            MissingFileError: There is no such file.
            BadVideoError: It cannot be opened, or holds no pictures.
        """
        self.name, self._av = name, _import_av(f"reading {name}")
        path, options = name, {}
        if name.startswith(CAMERA):
            kind, device = _CAMERAS.get(sys.platform, _CAMERAS["linux"])
            path, options = device.format(name.removeprefix(CAMERA)), {"format": kind}
        try:
            self._container: Any = self._av.open(path, **options)
        except FileNotFoundError as error:
            raise MissingFileError(f"{name}: there is no {path}") from error
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise BadVideoError(f"{name} cannot be read as a video: {error}") from error
        if not self._container.streams.video:
            self._container.close()
            raise BadVideoError(f"{name} holds no pictures")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        self.rate = Fraction(stream.average_rate or _DEFAULT_RATE)
        self.num_frames: int | None = stream.frames or None

    def __iter__(self) -> Iterator[VideoFrame]:
        with self._container as container:
            try:
                for index, frame in enumerate(container.decode(video=0)):
                    pixels = frame.to_ndarray(format="rgb24")
                    # Telephones turn their pictures by a number in the file, counter-clockwise.
                    turns = round(getattr(frame, "rotation", 0) / 90) % 4
                    upright = np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
                    time = float(index / self.rate) if frame.time is None else frame.time
                    yield VideoFrame(index, time, upright)
            except self._av.error.FFmpegError as error:
                raise BadVideoError(f"{self.name} is damaged: {error}") from error


class VideoWriter:
    """Writes pictures of one size as a video; a context manager, at whose end the file is whole."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        """Set the file, whose suffix selects the format, and the frames per second."""
        self._path, self._rate = path, rate
        self._temporary = path.with_name(f".{path.stem}.part{path.suffix}")
        self._av: Any = _import_av(f"writing {path}")
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> "VideoWriter":
        self._container = self._av.open(str(self._temporary), "w")
        return self

    def write(self, pixels: np.ndarray) -> None:
        """Append a picture, (H, W, 3) uint8 RGB."""
        if self._stream is None:
            codecs = self._av.codecs_available
            codec = "libx264" if "libx264" in codecs else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=self._rate)
            # Chroma of half the size needs even sides.
            self._stream.height, self._stream.width = (side + side % 2 for side in pixels.shape[:2])
            self._stream.pix_fmt = "yuv420p"
        odd = [
            (0, self._stream.height - pixels.shape[0]),
            (0, self._stream.width - pixels.shape[1]),
        ]
        even = np.pad(pixels, [*odd, (0, 0)], mode="edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self._stream is not None and kind is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        if self._stream is not None and kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def _import_av(purpose: str) -> Any:
    return import_package("av", f"{purpose} needs PyAV: pip install 'detkit-vision[video]'")
