"""`Predictor`: run a trained model on images in any form, one, many, or the frames of a video.

Legend: H and W height and width of an image, C channels.
"""

import itertools
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image
from torch import Tensor

from detkit.checkpoint import load_checkpoint_file
from detkit.config import CfgNode, get_cfg, import_user_modules, score_threshold_keys
from detkit.engine.default_predictor import DefaultPredictor
from detkit.engine.tiling import TiledModel
from detkit.structures import Instances, ModelInput, ModelOutput
from detkit.utils.errors import ConfigError, DataError
from detkit.utils.image import convert_image_to_rgb, decode_image, read_image, upright_pixels
from detkit.utils.media_file import Video, find_images, is_video
from detkit.utils.text import printable
from detkit.utils.tiff_window import open_tiff_windows

logger = logging.getLogger(__name__)

_ORDERS = ("bgr", "rgb")


@dataclass(frozen=True)
class Prediction:
    """What a model finds in one image."""

    output: ModelOutput
    """In pixels of the image."""
    pixels: Any
    """(H, W, C) of the upright image, as the model takes it: an array, or the windows of a file."""
    format: str
    """The channels of `pixels`: INPUT.FORMAT."""
    source: str
    """File or address; of an image in memory, `image N`."""
    frame: int | None = None
    """Of a video: the number of the frame, from 0."""
    seconds: float | None = None
    """Of a video: the time of the frame since its start."""

    def __getitem__(self, key: str) -> Any:
        """Return an entry of the output, as of `DefaultPredictor`: `prediction["instances"]`."""
        return self.output[key]

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright."""
        return convert_image_to_rgb(self.pixels[:, :], self.format)

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def instances(self) -> Instances:
        """The objects: `pred_boxes`, `scores`, `pred_classes`, ..."""
        return self["instances"]


class ImageSource(NamedTuple):
    """An image that is not decoded yet."""

    name: str
    content: Any
    """Path, bytes, array, PIL image or tensor."""
    order: str | None
    frame: int | None = None
    seconds: float | None = None


class Predictor(DefaultPredictor):
    """Runs a trained model on images in any form. It may be used by several threads at once.

    Called with one image it returns its `Prediction`, with a list a list; with an iterator, a
    folder, a pattern (`photos/*.jpg`), a video or a camera (`camera:0`) an iterator, which decodes
    as it is read, in order. An image is a path, an address, the bytes of a file, a PIL image, or an
    array (H, W, C) or tensor (C, H, W) of uint8, of which `input` must tell the order of channels.

    Example:
        ```python
        predictor = Predictor("runs/first/model_best.pth")
        print(predictor("street.jpg").instances)
        for prediction in predictor.stream("photos/", batch_size=8):
            print(prediction.source, len(prediction.instances))
        ```
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | CfgNode,
        *,
        config_file: str | None = None,
        threshold: float | None = None,
        tile: int | None = None,
        overlap: float | None = None,
        device: str | None = None,
        allow_partial: bool = False,
    ) -> None:
        """Build the model and load its weights.

        Args:
            model: A checkpoint, which holds its config and class names; or a config whose
                MODEL.WEIGHTS names one.
            config_file: The config of a checkpoint that holds none and has no `config.yaml` beside.
            threshold: Lowest score of what is found; None leaves that of the config.
            tile: Side of the tiles to detect in, in pixels: TEST.TILES.SIZE.
            overlap: TEST.TILES.OVERLAP.
            device: In place of MODEL.DEVICE.
            allow_partial: Accept weights that leave a part of the model at random values.

        Raises:
            ConfigError: There is no config for the checkpoint.
            CheckpointError: The weights do not fill the model.
        """
        is_cfg = isinstance(model, CfgNode)
        cfg = model.clone() if is_cfg else config_of_checkpoint(os.fspath(model), config_file)
        cfg.defrost()
        if device is not None:
            cfg.MODEL.DEVICE = device
        for key, value in (("TEST.TILES.SIZE", tile), ("TEST.TILES.OVERLAP", overlap)):
            if value is not None:
                cfg.merge_from_list([key, value])
        if threshold is not None:
            set_score_threshold(cfg, threshold)
        super().__init__(cfg, allow_partial=allow_partial)

    def __call__(self, original_image: Any, *, input: str | None = None) -> Any:
        """Return what is found in one image, or in many; see the class.

        Args:
            original_image: An image, or many.
            input: Order of the channels of arrays and tensors: `bgr`, as OpenCV and `read_image`
                load them, or `rgb`, as PIL and torchvision do.

        Raises:
            TypeError: It is no image.
            ValueError: `input` is missing or another one.
            BadImageError: A file cannot be read.
        """
        if isinstance(original_image, list | tuple):
            return list(self.stream(original_image, input=input))
        found = image_sources(original_image, input)
        if not _is_one(original_image):
            return self._stream(found)
        return self._predict([self._load(next(found))])[0]

    def stream(
        self,
        inputs: Any,
        *,
        input: str | None = None,
        batch_size: int = 1,
        workers: int = 2,
        on_error: Callable[[ImageSource, Exception], None] | None = None,
    ) -> Iterator[Prediction]:
        """Yield the prediction of each image, in order; files are decoded ahead, in threads.

        Images that are padded to the same size go through the model together: what is found in an
        image does not depend on its neighbours. Of `2 * batch_size` images at a time, each is put
        into the first batch it fits.

        Args:
            inputs: An image or many, as in a call.
            input: As in a call.
            batch_size: Most images at a time. Faster on a GPU; a CPU gains nothing.
            workers: Threads that decode and resize.
            on_error: Called with each image that cannot be read, which is then left out; None lets
                the error end the stream.
        """
        if batch_size < 1 or workers < 1:
            raise ValueError(
                f"batch_size and workers must be at least 1, got {batch_size} and {workers}"
            )
        return self._stream(image_sources(inputs, input), batch_size, workers, on_error)

    def _stream(
        self,
        sources: Iterator[ImageSource],
        batch_size: int = 1,
        workers: int = 2,
        on_error: Callable[[ImageSource, Exception], None] | None = None,
    ) -> Iterator[Prediction]:
        # In chunks, not a window that slides: which images make a batch must follow from their
        # numbers alone, so that several processes, or a resumed one, form the same batches.
        is_tiled = isinstance(self.model, TiledModel)
        chunk = 1 if is_tiled else chunk_size(batch_size)
        ahead = chunk if is_tiled else chunk + workers  # huge images fill the memory
        waiting: deque[tuple[ImageSource, Future[_Loaded]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            while True:
                self._submit(pool, sources, waiting, ahead)
                loaded: list[_Loaded] = []
                for source, future in [waiting.popleft() for _ in range(min(chunk, len(waiting)))]:
                    try:
                        loaded.append(future.result())
                    except (DataError, OSError) as error:
                        if on_error is None:
                            raise
                        on_error(source, error)
                if not loaded and not waiting:
                    return
                if not is_tiled:
                    self._submit(pool, sources, waiting, ahead)
                done: dict[int, Prediction] = {}
                for batch in self._batches(loaded, batch_size):
                    predictions = self._predict([loaded[i] for i in batch])
                    done.update(zip(batch, predictions, strict=True))
                for i in range(len(loaded)):
                    yield done.pop(i)
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        sources: Iterator[ImageSource],
        waiting: "deque[tuple[ImageSource, Future[_Loaded]]]",
        most: int,
    ) -> None:
        try:
            for source in itertools.islice(sources, max(most - len(waiting), 0)):
                waiting.append((source, pool.submit(self._load, source)))
        except (DataError, OSError) as error:
            # A video that is damaged in its middle: what came before is still predicted.
            failed: Future[_Loaded] = Future()
            failed.set_exception(error)
            waiting.append((ImageSource("", None, None), failed))

    def _load(self, source: ImageSource) -> "_Loaded":
        """Decode and resize an image."""
        image: Any = None
        if isinstance(self.model, TiledModel) and isinstance(source.content, str):
            image = open_tiff_windows(source.content, self.input_format)
        if image is None:
            image = _pixels(source, self.input_format, self.cfg.INPUT.MAX_IMAGE_PIXELS)
            self._check(image)
        return _Loaded(source, image, self._model_input(image))

    def _batches(self, loaded: list["_Loaded"], batch_size: int) -> Iterator[list[int]]:
        """Yield the indices of images that are padded to the same size."""
        stride = max(1, getattr(getattr(self.model, "backbone", None), "size_divisibility", 1))
        if isinstance(self.model, TiledModel):  # it makes batches of tiles
            batch_size = 1
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(loaded):
            channels, *size = item.model_input["image"].shape
            key = (channels, *(-(-side // stride) for side in size))
            groups.setdefault(key, []).append(i)
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                yield group[start : start + batch_size]

    def _predict(self, batch: list["_Loaded"]) -> list[Prediction]:
        outputs = self._run([item.model_input for item in batch])
        return [
            Prediction(
                output,
                item.image,
                self.input_format,
                item.source.name,
                item.source.frame,
                item.source.seconds,
            )
            for item, output in zip(batch, outputs, strict=True)
        ]


class _Loaded(NamedTuple):
    source: ImageSource
    image: Any
    model_input: ModelInput


def chunk_size(batch_size: int) -> int:
    """Return the number of images that `Predictor.stream` sorts into batches at a time."""
    return 1 if batch_size == 1 else 2 * batch_size


def config_of_checkpoint(path: str, config_file: str | None = None) -> CfgNode:
    """Return the config of a checkpoint, with MODEL.WEIGHTS set to it.

    A file of weights may come from anywhere. It runs no code: modules of IMPORTS are taken only
    from a config that is named. Nor does it choose any folder to write to: OUTPUT_DIR is the
    checkpoint's own or one below the present folder, or else the default.

    Args:
        path: The checkpoint.
        config_file: A YAML file to take instead of the config in the checkpoint.

    Raises:
        ConfigError: The checkpoint holds none, and there is no `config.yaml` beside it.
        MissingFileError: There is no such file.
    """
    cfg = get_cfg()
    beside = Path(path).parent / "config.yaml"
    text = None if config_file else load_checkpoint_file(path).get("config")
    if isinstance(text, str) and text:
        cfg.merge_from_text(text, path)
    elif config_file or beside.is_file():
        cfg.merge_from_file(config_file or str(beside))
    else:
        raise ConfigError(
            f"{path} holds no config, and there is no {beside}: give config_file (--config-file),"
            " the YAML file that the model was trained with"
        )
    if not config_file:
        if left_out := [name for name in cfg.IMPORTS if name not in sys.modules]:
            logger.warning(
                "%s asks to run the modules %s (IMPORTS), which a checkpoint may not: import them"
                " before, set IMPORTS, or name the YAML file (config_file, --config-file)",
                printable(path),
                ", ".join(map(repr, left_out)),
            )
            cfg.IMPORTS = []
        if not cfg.MODEL.DEVICE.startswith("cpu"):
            # That of the machine that trained says nothing of this one.
            cfg.MODEL.DEVICE = get_cfg().MODEL.DEVICE
        folder = Path(os.path.abspath(cfg.OUTPUT_DIR))  # noqa: PTH100 - without `..`
        own = Path(os.path.abspath(Path(path).expanduser().parent))  # noqa: PTH100
        if folder != own and not folder.is_relative_to(Path.cwd()):
            cfg.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    cfg.MODEL.WEIGHTS = path
    return cfg


def set_score_threshold(cfg: CfgNode, threshold: float) -> None:
    """Set the keys that a model declares for its lowest score.

    Args:
        cfg: Changed. Modules of IMPORTS, which may declare keys of their own, are imported.
        threshold: 0 to 1.

    Raises:
        ConfigError: It is another number.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(
            f"the score threshold (--confidence-threshold) must lie between 0 and 1, got"
            f" {threshold}"
        )
    import_user_modules(cfg.IMPORTS)
    for key in score_threshold_keys(cfg.MODEL.META_ARCHITECTURE):
        cfg.merge_from_list([key, threshold])


def image_sources(inputs: Any, input: str | None = None) -> Iterator[ImageSource]:
    """Yield the images that an input stands for, without decoding files; videos are decoded.

    Raises:
        TypeError: The input is none of those that `Predictor` takes.
        ValueError: `input` is not `bgr` or `rgb`.
    """
    if input is not None and input not in _ORDERS:
        raise ValueError(f"input must be 'bgr' or 'rgb', got {input!r}")
    counter = itertools.count()

    def walk(item: Any) -> Iterator[ImageSource]:
        if isinstance(item, str | os.PathLike):
            name = os.fspath(item)
            if is_video(name):
                yield from walk(Video(name))
            elif _is_one(name):
                yield ImageSource(name, name, None)
            else:
                for path in find_images([name]):
                    yield from walk(str(path))
        elif isinstance(item, Video):
            for frame in item:
                yield ImageSource(item.name, frame.pixels, "rgb", frame.index, frame.seconds)
        elif isinstance(item, bytes | np.ndarray | Tensor | Image.Image):
            yield ImageSource(f"image {next(counter)}", item, input)
        elif isinstance(item, Iterable) and not isinstance(item, Mapping):
            for one in item:
                yield from walk(one)
        else:
            raise TypeError(
                "an image is a path, an address, bytes, an array, a PIL image or a tensor; got a"
                f" {type(item).__name__}"
            )

    # Not a generator itself: a wrong `input` is an error of the call, not of its first result.
    return walk(inputs)


def _is_one(item: Any) -> bool:
    """Return whether an input is one image; of text, whether it names one file or address."""
    if isinstance(item, str | os.PathLike):
        name = os.fspath(item)
        path = Path(name).expanduser()
        if is_video(name):
            return False
        return "://" in name or path.is_file() or not (path.is_dir() or set("*?[") & set(name))
    return isinstance(item, bytes | np.ndarray | Tensor | Image.Image)


def _pixels(source: ImageSource, format: str, max_pixels: int) -> np.ndarray:
    """Return the pixels of an image in the model's format."""
    name, content = source.name, source.content
    if isinstance(content, str):
        return read_image(content, format, max_pixels=max_pixels)
    if isinstance(content, bytes):
        return decode_image(content, name, format, max_pixels=max_pixels)
    if isinstance(content, Image.Image):
        if format == "RAW":
            pixels = upright_pixels(content)
            return pixels if pixels.ndim == 3 else pixels[:, :, None]
        pixels = upright_pixels(content, "RGB" if format == "BGR" else format)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return pixels[:, :, ::-1] if format == "BGR" else pixels
    if isinstance(content, Tensor):
        if content.dim() == 3:
            content = content.permute(1, 2, 0)
        content = content.detach().cpu().numpy()
    content = cast(np.ndarray, content)
    if format not in ("BGR", "RGB"):
        return content
    if source.order is None:
        raise ValueError(
            f"{name}: arrays and tensors do not tell the order of their channels: give input='bgr',"
            " as OpenCV loads them, or input='rgb', as PIL and torchvision do"
        )
    return content if source.order == format.lower() or content.ndim != 3 else content[:, :, ::-1]
