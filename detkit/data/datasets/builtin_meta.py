"""Class names of the public data sets: facts about them, and a colour for each class."""

import colorsys
from typing import Any

# Source: the `categories` of COCO's annotation files (Lin et al. 2014, arXiv 1405.0312). The ids have gaps: 11 of the
# 91 categories that were planned never got boxes.
_COCO_CLASSES = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat, 10 traffic light,
11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow,
22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee,
35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard,
43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple,
54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair, 63 couch,
64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard,
77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors,
88 teddy bear, 89 hair drier, 90 toothbrush
"""

COCO_CATEGORIES: dict[int, str] = {
    int(number): " ".join(name) for number, *name in (entry.split() for entry in _COCO_CLASSES.split(","))
}

# Source: the VOC2007 development kit (Everingham et al. 2010), in its order.
VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# The golden angle, as a share of a turn: the hues of neighbouring classes lie far apart, however many there are.
_HUE_STEP = 0.618034


def class_colors(num_classes: int) -> list[tuple[int, int, int]]:
    """Give a colour for each class, RGB in 0 to 255; the same ones every time."""
    shades = [
        (index * _HUE_STEP % 1.0, (0.75, 1.0, 0.5)[index % 3], (1.0, 0.75)[index % 2]) for index in range(num_classes)
    ]
    return [_rgb(*shade) for shade in shades]


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def coco_metadata() -> dict[str, Any]:
    """Give names, colours and ids of COCO's 80 classes of things."""
    return {
        "thing_classes": list(COCO_CATEGORIES.values()),
        "thing_colors": class_colors(len(COCO_CATEGORIES)),
        "thing_dataset_id_to_contiguous_id": {number: index for index, number in enumerate(COCO_CATEGORIES)},
    }
