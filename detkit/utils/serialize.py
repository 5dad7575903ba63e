"""`PicklableWrapper`: hands lambdas and local functions to processes that are started anew."""

import importlib
import marshal
from types import CellType, FunctionType
from typing import Any


class PicklableWrapper:
    """An object that can be pickled, also if it is a lambda or a function within a function.

    cloudpickle does that where it is installed. Without it such a function travels as its code with
    the variables that it takes from the functions around it; what it takes from its module is that
    of the module where it arrives.
    """

    def __init__(self, obj: Any) -> None:
        while isinstance(obj, PicklableWrapper):
            obj = obj._obj
        self._obj = obj

    def __reduce__(self) -> Any:
        function = self._obj
        if not is_local_function(function):
            return PicklableWrapper, (function,)
        try:
            cloudpickle = importlib.import_module("cloudpickle")
        except ModuleNotFoundError:
            return _function_of_code, _code_and_variables(function)
        return cloudpickle.loads, (cloudpickle.dumps(function),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object."""
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_obj":  # not set yet: the object is being copied
            raise AttributeError(name)
        return getattr(self._obj, name)


def is_local_function(obj: Any) -> bool:
    """Return whether an object is a lambda or a function within a function."""
    return isinstance(obj, FunctionType) and "<" in obj.__qualname__


def _code_and_variables(function: FunctionType) -> tuple[Any, ...]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    variables = [PicklableWrapper(x) if is_local_function(x) else x for x in cells]
    code = marshal.dumps(function.__code__)
    return code, function.__module__, function.__defaults__, function.__kwdefaults__, variables


def _function_of_code(
    code: bytes, module: str, defaults: Any, keyword_defaults: Any, variables: list[Any]
) -> FunctionType:
    names = vars(importlib.import_module(module))
    cells = tuple(CellType(variable) for variable in variables)
    # Only this process's parent writes these bytes, as all that is pickled for it.
    function = FunctionType(marshal.loads(code), names, None, defaults, cells)
    function.__kwdefaults__ = keyword_defaults
    return function
