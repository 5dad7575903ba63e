"""Augmentations of the package albumentations (`pip install 'detkit-vision[albumentations]'`)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from detkit.data import transforms as T
from detkit.data.mixing import Mixing, Scene, bitmap_of
from detkit.structures import AnnotationRecord, BoxMode
from detkit.utils.errors import ConfigError


@T.AUGMENTATION_REGISTRY.register()
class Albumentations(Mixing):
    """Applies transforms of albumentations, one after the other, to images of one or 3 channels.

    Transforms that move pixels turn masks into bitmaps. They are seeded anew for each sample, from
    NumPy's generator. albumentations' resize moves keypoints by half of (factor - 1) pixels too
    little: resize with detkit's classes.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Any]]) -> None:
        """Take a list of items with the `name` of a class of albumentations and its arguments.

        Raises:
            ConfigError: The package is not installed.
            ValueError: An item has no name, an unknown one, or wrong arguments.
        """
        # Importing it would ask the internet for its newest version.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        try:
            import albumentations as A  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(f"needs the package albumentations: {error}") from error
        built = []
        for item in transforms:
            arguments = dict(item)
            kind = getattr(A, str(arguments.pop("name", None)), None)
            if not (isinstance(kind, type) and issubclass(kind, A.BasicTransform)):
                raise ValueError(f"{item!r} needs the name of a transform of albumentations")
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # of arguments that it does not know
                try:
                    built.append(kind(**arguments))
                except UserWarning as error:
                    raise ValueError(str(error)) from error
        self.transforms = list(transforms)
        self.moves_pixels = not all(isinstance(one, A.ImageOnlyTransform) for one in built)
        parts = {}
        if self.moves_pixels:
            parts["bbox_params"] = A.BboxParams(format="pascal_voc", label_fields=["numbers"])
            parts["keypoint_params"] = A.KeypointParams(format="xy", remove_invisible=False)
        self.compose = A.Compose(built, **parts)

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        """Change a scene; or the pixels of any sample, by transforms that move none."""
        if self.moves_pixels:
            return super().__call__(aug_input)
        transform = T.ColorTransform(lambda image: self._apply(image, aug_input)["image"])
        aug_input.transform(transform)
        return T.NoOpTransform()

    def mix(self, scene: Scene) -> None:
        """Draw the transforms."""
        if scene.parts.rotated_boxes:
            raise ConfigError("Albumentations: it cannot move rotated boxes (MODEL.ROTATED_BOXES)")
        (height, width), num_keypoints = scene.size, scene.parts.num_keypoints
        # Three corners tell a mirror image.
        corners = [[0, 0, 0], [width, 0, 0], [0, height, 0]]
        points = np.array(corners, dtype=np.float64)
        if num_keypoints and scene.objects:
            own = np.array([cast(Any, a)["keypoints"] for a in scene.objects]).reshape(-1, 3)
            points = np.concatenate([points, own])
        arguments: dict[str, Any] = {}
        if scene.sem_seg is not None:
            arguments["mask"] = scene.sem_seg
        if scene.parts.masks and scene.objects:
            arguments["masks"] = np.stack(
                [bitmap_of(annotation, scene.size).astype(np.uint8) for annotation in scene.objects]
            )
        found = self._apply(
            scene.image,
            scene,
            bboxes=np.reshape([annotation["bbox"] for annotation in scene.objects], (-1, 4)),
            numbers=np.arange(len(scene.objects)),
            # Its keypoints are centers of pixels, its boxes are not.
            keypoints=points[:, :2] - 0.5,
            **arguments,
        )
        points[:, :2] = np.asarray(found["keypoints"]) + 0.5
        origin, right, down = points[:3, :2]
        is_mirrored = right[0] < origin[0] and np.linalg.det([right - origin, down - origin]) < 0
        keypoints = points[3:].reshape(len(scene.objects), num_keypoints, 3)
        if is_mirrored and num_keypoints:
            if scene.parts.keypoint_hflip_indices is None:
                raise ConfigError("Albumentations mirrors the image: add a RandomFlip of prob 0")
            keypoints = keypoints[:, np.asarray(scene.parts.keypoint_hflip_indices)]
        image, objects = found["image"], []
        is_outside = ((keypoints < 0) | (keypoints > [*image.shape[1::-1], 2])).any(axis=-1)
        keypoints[is_outside] = 0
        for number, box in zip(found["numbers"], found["bboxes"], strict=True):
            k = int(number)
            moved: dict[str, Any] = {**scene.objects[k], "bbox": [float(v) for v in box[:4]]}
            moved["bbox_mode"] = BoxMode.XYXY_ABS
            if "masks" in found:
                moved["segmentation"] = found["masks"][k]
            if num_keypoints:
                moved["keypoints"] = keypoints[k].reshape(-1).tolist()
            objects.append(cast(AnnotationRecord, moved))
        scene.replace(image, objects, found.get("mask"))

    def _apply(self, image: np.ndarray, sample: T.AugInput, **parts: Any) -> dict[str, Any]:
        step = -1 if sample.image_format == "BGR" and image.ndim == 3 else 1
        self.compose.set_random_seed(int(np.random.randint(2**31)))
        found = self.compose(image=np.ascontiguousarray(image[..., ::step]), **parts)
        return found | {"image": found["image"][..., ::step]}
