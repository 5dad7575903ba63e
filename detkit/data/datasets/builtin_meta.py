"""Classes and keypoints of the public data sets, and metadata made of classes.

Legend: K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detkit.utils.errors import UnknownNameError

Color = tuple[int, int, int]

# The color of all things together, as Detectron2 shows them.
_THINGS_COLOR = (82, 18, 128)


@dataclass(frozen=True)
class Category:
    """A category with the id and the name that a data set's files give it, and an RGB color."""

    id: int
    name: str
    color: Color


def _categories(table: str) -> tuple[Category, ...]:
    """Read `id name r,g,b; ...`; names may have several words."""
    categories = []
    for entry in table.split(";"):
        number, *name, color = entry.split()
        red, green, blue = map(int, color.split(","))
        categories.append(Category(int(number), " ".join(name), (red, green, blue)))
    return tuple(categories)


# Source: the `categories` of COCO's annotation files (Lin et al. 2014, arXiv 1405.0312), colors of
# its panoptic files. The ids have gaps: 11 of the 91 categories that were planned never got boxes.
COCO_THINGS = _categories("""
1 person 220,20,60; 2 bicycle 119,11,32; 3 car 0,0,142; 4 motorcycle 0,0,230; 5 airplane 106,0,228;
6 bus 0,60,100; 7 train 0,80,100; 8 truck 0,0,70; 9 boat 0,0,192; 10 traffic light 250,170,30; 11
fire hydrant 100,170,30; 13 stop sign 220,220,0; 14 parking meter 175,116,175; 15 bench 250,0,30;
16 bird 165,42,42; 17 cat 255,77,255; 18 dog 0,226,252; 19 horse 182,182,255; 20 sheep 0,82,0; 21
cow 120,166,157; 22 elephant 110,76,0; 23 bear 174,57,255; 24 zebra 199,100,0; 25 giraffe 72,0,118;
27 backpack 255,179,240; 28 umbrella 0,125,92; 31 handbag 209,0,151; 32 tie 188,208,182; 33
suitcase 0,220,176; 34 frisbee 255,99,164; 35 skis 92,0,73; 36 snowboard 133,129,255; 37 sports
ball 78,180,255; 38 kite 0,228,0; 39 baseball bat 174,255,243; 40 baseball glove 45,89,255; 41
skateboard 134,134,103; 42 surfboard 145,148,174; 43 tennis racket 255,208,186; 44 bottle
197,226,255; 46 wine glass 171,134,1; 47 cup 109,63,54; 48 fork 207,138,255; 49 knife 151,0,95; 50
spoon 9,80,61; 51 bowl 84,105,51; 52 banana 74,65,105; 53 apple 166,196,102; 54 sandwich
208,195,210; 55 orange 255,109,65; 56 broccoli 0,143,149; 57 carrot 179,0,194; 58 hot dog
209,99,106; 59 pizza 5,121,0; 60 donut 227,255,205; 61 cake 147,186,208; 62 chair 153,69,1; 63
couch 3,95,161; 64 potted plant 163,255,0; 65 bed 119,0,170; 67 dining table 0,182,199; 70 toilet
0,165,120; 72 tv 183,130,88; 73 laptop 95,32,0; 74 mouse 130,114,135; 75 remote 110,129,133; 76
keyboard 166,74,118; 77 cell phone 219,142,185; 78 microwave 79,210,114; 79 oven 178,90,62; 80
toaster 65,70,15; 81 sink 127,167,115; 82 refrigerator 59,105,106; 84 book 142,108,45; 85 clock
196,172,0; 86 vase 95,54,80; 87 scissors 128,76,255; 88 teddy bear 201,57,1; 89 hair drier
246,0,122; 90 toothbrush 191,162,208
""")

# Source: the `categories` of panoptic_val2017.json (Kirillov et al. 2018, arXiv 1801.00868; Caesar
# et al. 2018, arXiv 1612.03716): the 91 classes of stuff, of which some were merged.
COCO_STUFF = _categories("""
92 banner 255,255,128; 93 blanket 147,211,203; 95 bridge 150,100,100; 100 cardboard 168,171,172;
107 counter 146,112,198; 109 curtain 210,170,100; 112 door-stuff 92,136,89; 118 floor-wood
218,88,184; 119 flower 241,129,0; 122 fruit 217,17,255; 125 gravel 124,74,181; 128 house 70,70,70;
130 light 255,228,255; 133 mirror-stuff 154,208,0; 138 net 193,0,92; 141 pillow 76,91,113; 144
platform 255,180,195; 145 playingfield 106,154,176; 147 railroad 230,150,140; 148 river 60,143,255;
149 road 128,64,128; 151 roof 92,82,55; 154 sand 254,212,124; 155 sea 73,77,174; 156 shelf
255,160,98; 159 snow 255,255,255; 161 stairs 104,84,109; 166 tent 169,164,131; 168 towel
225,199,255; 171 wall-brick 137,54,74; 175 wall-stone 135,158,223; 176 wall-tile 7,246,231; 177
wall-wood 107,255,200; 178 water-other 58,41,149; 180 window-blind 183,121,142; 181 window-other
255,73,97; 184 tree-merged 107,142,35; 185 fence-merged 190,153,153; 186 ceiling-merged
146,139,141; 187 sky-other-merged 70,130,180; 188 cabinet-merged 134,199,156; 189 table-merged
209,226,140; 190 floor-other-merged 96,36,108; 191 pavement-merged 96,96,96; 192 mountain-merged
64,170,64; 193 grass-merged 152,251,152; 194 dirt-merged 208,229,228; 195 paper-merged 206,186,171;
196 food-other-merged 152,161,64; 197 building-other-merged 116,112,0; 198 rock-merged 0,114,143;
199 wall-other-merged 102,102,156; 200 rug-merged 250,141,255
""")

# Source: the labels that Cityscapes evaluates (Cordts et al. 2016, arXiv 1604.01685); the order is
# that of its train ids. Things, from person on, have instances.
CITYSCAPES_LABELS = _categories("""
7 road 128,64,128; 8 sidewalk 244,35,232; 11 building 70,70,70; 12 wall 102,102,156; 13 fence
190,153,153; 17 pole 153,153,153; 19 traffic light 250,170,30; 20 traffic sign 220,220,0; 21
vegetation 107,142,35; 22 terrain 152,251,152; 23 sky 70,130,180; 24 person 220,20,60; 25 rider
255,0,0; 26 car 0,0,142; 27 truck 0,0,70; 28 bus 0,60,100; 31 train 0,80,100; 32 motorcycle
0,0,230; 33 bicycle 119,11,32
""")
CITYSCAPES_FIRST_THING = 24

# The same tables in Detectron2's form, for scripts that read them.
COCO_CATEGORIES: list[dict[str, Any]] = [
    {"color": list(c.color), "isthing": int(c in COCO_THINGS), "id": c.id, "name": c.name}
    for c in COCO_THINGS + COCO_STUFF
]
CITYSCAPES_CATEGORIES: list[dict[str, Any]] = [
    {
        "color": c.color,
        "isthing": int(c.id >= CITYSCAPES_FIRST_THING),
        "id": c.id,
        "trainId": train_id,
        "name": c.name,
    }
    for train_id, c in enumerate(CITYSCAPES_LABELS)
]

# Source: the category `person` of person_keypoints_val2017.json.
COCO_PERSON_KEYPOINTS: tuple[str, ...] = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
    "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip

# Lines between keypoints, and their colors in Detectron2: shades of blue for the face, of orange
# for the legs.
COCO_PERSON_CONNECTIONS: tuple[tuple[str, str, Color], ...] = (
    ("left_ear", "left_eye", (102, 204, 255)),
    ("right_ear", "right_eye", (51, 153, 255)),
    ("left_eye", "nose", (102, 0, 204)),
    ("nose", "right_eye", (51, 102, 255)),
    ("left_shoulder", "right_shoulder", (255, 128, 0)),
    ("left_shoulder", "left_elbow", (153, 255, 204)),
    ("right_shoulder", "right_elbow", (128, 229, 255)),
    ("left_elbow", "left_wrist", (153, 255, 153)),
    ("right_elbow", "right_wrist", (102, 255, 224)),
    ("left_hip", "right_hip", (255, 102, 0)),
    ("left_hip", "left_knee", (255, 255, 77)),
    ("right_hip", "right_knee", (153, 255, 204)),
    ("left_knee", "left_ankle", (191, 255, 128)),
    ("right_knee", "right_ankle", (255, 195, 77)),
)

# Source: the VOC2007 development kit (Everingham et al. 2010), in its order.
VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def thing_metadata(things: Sequence[Category]) -> dict[str, Any]:
    """Return the metadata of K things, whose contiguous ids follow their order."""
    return {
        "thing_classes": [thing.name for thing in things],
        "thing_colors": [thing.color for thing in things],
        "thing_dataset_id_to_contiguous_id": {thing.id: k for k, thing in enumerate(things)},
    }


def stuff_metadata(
    stuff: Sequence[Category], things_color: Color = _THINGS_COLOR
) -> dict[str, Any]:
    """Return the metadata of stuff for a head to which all things are one class, its class 0."""
    return {
        "stuff_classes": ["things", *(category.name for category in stuff)],
        "stuff_colors": [things_color, *(category.color for category in stuff)],
        "stuff_dataset_id_to_contiguous_id": {
            0: 0,
            **{category.id: k for k, category in enumerate(stuff, start=1)},
        },
    }


def joined_metadata(things: Sequence[Category], stuff: Sequence[Category]) -> dict[str, Any]:
    """Return the metadata for models with one contiguous id for each thing and then each stuff."""
    names = [category.name for category in (*things, *stuff)]
    colors = [category.color for category in (*things, *stuff)]
    return {
        "thing_classes": names,
        "thing_colors": colors,
        "stuff_classes": names,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": {c.id: k for k, c in enumerate(things)},
        "stuff_dataset_id_to_contiguous_id": {c.id: k for k, c in enumerate(stuff, len(things))},
    }


def coco_metadata() -> dict[str, Any]:
    """Return names, colors and ids of COCO's 80 classes of things."""
    return thing_metadata(COCO_THINGS)


def coco_person_metadata() -> dict[str, Any]:
    """Return the one class, and the keypoints, of COCO's keypoint files."""
    return {
        "thing_classes": ["person"],
        "thing_colors": [COCO_THINGS[0].color],
        "keypoint_names": list(COCO_PERSON_KEYPOINTS),
        "keypoint_flip_map": left_right_pairs(COCO_PERSON_KEYPOINTS),
        "keypoint_connection_rules": list(COCO_PERSON_CONNECTIONS),
    }


def left_right_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of names that differ in `left` and `right` alone: a mirror exchanges them.

    Example:
        >>> left_right_pairs(["nose", "left_eye", "right_eye"])
        [('left_eye', 'right_eye')]
    """
    swapped = ((name, name.replace("left", "right")) for name in names)
    return [(left, right) for left, right in swapped if right != left and right in names]


def coco_panoptic_separated_metadata() -> dict[str, Any]:
    """Return COCO's classes for models with one head for things and another for stuff."""
    stuff = []
    for category in COCO_STUFF:
        name = category.name.replace("-other", "").replace("-merged", "")
        stuff.append(replace(category, name=name))
    return {**coco_metadata(), **stuff_metadata(stuff)}


def coco_panoptic_metadata() -> dict[str, Any]:
    """Return COCO's classes for models with one contiguous id for each of all 133."""
    return joined_metadata(COCO_THINGS, COCO_STUFF)


def cityscapes_metadata() -> dict[str, Any]:
    """Return Cityscapes' 8 classes of things, and the 19 of its semantic segmentation."""
    things = [label for label in CITYSCAPES_LABELS if label.id >= CITYSCAPES_FIRST_THING]
    return {
        **thing_metadata(things),
        "stuff_classes": [label.name for label in CITYSCAPES_LABELS],
        "stuff_colors": [label.color for label in CITYSCAPES_LABELS],
    }


def cityscapes_panoptic_metadata() -> dict[str, Any]:
    """Return Cityscapes' 19 classes for models with one contiguous id for things and stuff."""
    names = [label.name for label in CITYSCAPES_LABELS]
    colors = [label.color for label in CITYSCAPES_LABELS]
    # Stuff comes first: contiguous ids are those of the label maps of training.
    ids = {label.id: train_id for train_id, label in enumerate(CITYSCAPES_LABELS)}
    return {
        "thing_classes": names,
        "thing_colors": colors,
        "stuff_classes": names,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": {
            label: k for label, k in ids.items() if label >= CITYSCAPES_FIRST_THING
        },
        "stuff_dataset_id_to_contiguous_id": {
            label: k for label, k in ids.items() if label < CITYSCAPES_FIRST_THING
        },
    }


_PERSON = coco_person_metadata()
COCO_PERSON_KEYPOINT_NAMES: tuple[str, ...] = tuple(_PERSON["keypoint_names"])
COCO_PERSON_KEYPOINT_FLIP_MAP = tuple(_PERSON["keypoint_flip_map"])
KEYPOINT_CONNECTION_RULES = list(_PERSON["keypoint_connection_rules"])

_METADATA: dict[str, Callable[[], dict[str, Any]]] = {
    "coco": coco_metadata,
    "coco_person": coco_person_metadata,
    "coco_panoptic_standard": coco_panoptic_metadata,
    "coco_panoptic_separated": coco_panoptic_separated_metadata,
    "cityscapes": cityscapes_metadata,
}


def builtin_metadata(dataset_name: str) -> dict[str, Any]:
    """Return the metadata of a built-in family of data sets, such as `coco` or `cityscapes`.

    Raises:
        UnknownNameError: There is no such family.
    """
    if dataset_name not in _METADATA:
        raise UnknownNameError(
            f"no built-in metadata are called {dataset_name!r}: there are {', '.join(_METADATA)}"
        )
    return _METADATA[dataset_name]()
