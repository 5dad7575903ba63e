"""Check what the main job left behind: `check_ap.py LOG MIN_AP`. The log's last line is the folder
of the pictures, within the output folder.
"""

import json
import math
import sys
from pathlib import Path

log, min_ap = Path(sys.argv[1]), float(sys.argv[2])
output = Path(log.read_text(encoding="utf-8").strip().splitlines()[-1].strip()).parent
scores = [
    json.loads(line) for line in (output / "metrics.json").read_text(encoding="utf-8").splitlines()
]
ap = [line["bbox/AP"] for line in scores if "bbox/AP" in line][-1]
pictures = sorted(output.rglob("*.jpg")) + sorted(output.rglob("*.png"))
print(f"box AP {ap:.1f} (at least {min_ap:g} wanted), {len(pictures)} pictures in {output}")
if math.isnan(ap) or ap < min_ap:
    sys.exit(f"box AP {ap:.1f} is below {min_ap:g}")
if not pictures:
    sys.exit(f"no pictures in {output}")
