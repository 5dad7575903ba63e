"""The folder that the file names in an annotation file are relative to; a name that leads out of it
is refused.
"""

import os
from pathlib import PurePath


class DataFolder:
    """A folder, and the paths in it that an annotation file names.

    Where the annotations have absolute paths, the folder to give is one above them all: "/" allows
    any. Symbolic links are not followed here: who puts one into the folder wants it to lead out.
    """

    def __init__(self, root: str, named_in: str) -> None:
        """Take the folder, a path or an address such as s3://, and the annotation file, for
        messages.
        """
        self.root = root
        self.named_in = named_in
        self._normal_root = os.path.normpath(root)

    def path_of(self, name: str) -> str:
        """Return the path of a file.

        Raises:
            ValueError: It lies outside of the folder.
        """
        # Nearly all names are plain, and the careful look takes more than a second for a hundred
        # thousand of them.
        suspicious = (
            ".." in name or name.startswith("/") or "\\" in name or ":" in name or "\0" in name
        )
        if suspicious and not self._contains(name):
            raise ValueError(
                f"{self.named_in} names the image {name!r}, which lies outside of the image folder"
                f" {self.root!r}. Give a folder that holds all images ('/' where the names are"
                " absolute paths)."
            )
        return os.path.join(self.root, name)

    def _contains(self, name: str) -> bool:
        path = os.path.normpath(os.path.join(self._normal_root, name))
        leaves_current = self._normal_root == "." and PurePath(path).parts[:1] == ("..",)
        return (
            PurePath(path).is_relative_to(self._normal_root)
            and not leaves_current
            and "\0" not in path
        )
