from typing import Any

import numpy as np

_Array = np.ndarray[Any, np.dtype[Any]]
_Value = tuple[str, int, tuple[int, int, int]]

INT8_BINARY: int
INT8_STEM: int
INT8_FLOAT: int

class Model:
    def __init__(self, data: _Array) -> None: ...
    def packed_bytes(self, isa: str, int8: int) -> int: ...
    def pack(self, isa: str, int8: int) -> None: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def inputs(self) -> list[_Value]: ...
    @property
    def outputs(self) -> list[_Value]: ...
    @property
    def nodes(self) -> list[tuple[str, str, _Value, tuple[str, ...], int, int, int, int, int]]: ...
    @property
    def normalization(self) -> list[float] | None: ...
    @property
    def classes(self) -> bytes | None: ...
    @property
    def metadata(self) -> bytes | None: ...
    def run(
        self,
        inputs: list[_Array],
        outputs: list[_Array],
        batch: int,
        nhwc: bool,
        threads: int,
        traces: list[tuple[int, int, _Array]],
        times: _Array | None = None,
    ) -> None: ...

def isas() -> list[str]: ...
