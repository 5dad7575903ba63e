"""`PicklableWrapper`: hands lambdas and local functions to processes that are started anew."""

from typing import Any

from detkit.utils.errors import MissingPackageError


class PicklableWrapper:
    """An object that is pickled by cloudpickle, which takes lambdas and local classes."""

    def __init__(self, obj: Any) -> None:
        while isinstance(obj, PicklableWrapper):
            obj = obj._obj
        self._obj = obj

    def __reduce__(self) -> Any:
        try:
            import cloudpickle  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingPackageError(
                "a lambda or local function is sent to another process: pip install cloudpickle"
            ) from error
        return cloudpickle.loads, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object."""
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_obj":  # not set yet: the object is being copied
            raise AttributeError(name)
        return getattr(self._obj, name)
