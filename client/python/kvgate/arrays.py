"""Memory of the daemon's as arrays, without a copy, for numpy, PyTorch and whatever else reads DLPack.

An `Array` names addresses that are the client's until `Client.close()`. It keeps the Client from being collected, but
a tensor made from it does not, and neither survives `close()`: reading one afterwards is a fault, not an exception.
"""

import ctypes
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch

_CPU, _CUDA = 1, 2  # DLDeviceType
_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4  # DLDataTypeCode


@dataclass(frozen=True)
class _Dtype:
    code: int
    bytes: int
    typestr: str  # of the nearest type that numpy has


_DTYPES = {
    "bf16": _Dtype(_BFLOAT, 2, "<u2"),
    "f16": _Dtype(_FLOAT, 2, "<f2"),
    "f32": _Dtype(_FLOAT, 4, "<f4"),
    "i32": _Dtype(_INT, 4, "<i4"),
    "u8": _Dtype(_UINT, 1, "|u1"),
}


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return _DTYPES[dtype].bytes


class _DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.restype = None
_libc.free.argtypes = [ctypes.c_void_p]
# The struct lies in one piece of malloc(), with nothing of Python's in it, so that free() is a whole deleter: it may be
# called by any thread, without the interpreter's lock, and after the interpreter has ended.
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value

_NAME = b"dltensor"
_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype = ctypes.py_object
_capsule_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.restype = ctypes.c_int
_capsule_is_valid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]


def _capsule_destroy(capsule: int) -> None:
    """Frees a capsule's struct that nobody has taken over (who does renames the capsule)."""
    if _capsule_is_valid(capsule, _NAME):
        _libc.free(_capsule_pointer(capsule, _NAME))


_destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_capsule_destroy)  # lives as long as the module
_DESTROY = ctypes.cast(_destructor, ctypes.c_void_p).value


@dataclass(frozen=True)
class Array:
    """`shape` elements of `dtype` ("bf16", "f16", "f32", "i32", "u8") from `address` on.

    `strides` are in elements. `device` is "cpu" or "cuda:N". `writable` False: the memory is mapped read-only, and
    writing to it is a fault.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    address: int
    device: str
    writable: bool = True
    owner: object = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without gaps."""
        return math.prod(self.shape) * dtype_bytes(self.dtype)

    def _check(self) -> None:
        if getattr(self.owner, "closed", False):
            raise BufferError(f"array of {self.owner!r}: its memory is gone")

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.device == "cpu":
            return (_CPU, 0)
        return (_CUDA, int(self.device.partition(":")[2]))

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule "dltensor" over the same memory; BufferError where a copy would be needed.

        Nothing waits for `stream`: the memory is in the order of the stream of `Client.set_stream()`.
        """
        self._check()
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"array on {self.device} cannot be had on device {dl_device} without a copy")
        if copy:
            raise BufferError("array: copies are not made")
        return _capsule_new(self._managed(), _NAME, _DESTROY)

    def _managed(self) -> int:
        """A DLManagedTensor in memory of malloc(), which its deleter frees."""
        ndim = len(self.shape)
        head = ctypes.sizeof(_DLManagedTensor)
        block = _libc.malloc(head + 2 * ndim * 8)
        if not block:
            raise MemoryError
        sizes = (ctypes.c_int64 * (2 * ndim)).from_address(block + head)
        sizes[:] = [*self.shape, *self.strides]
        dtype = _DTYPES[self.dtype]
        managed = _DLManagedTensor.from_address(block)
        managed.dl_tensor = _DLTensor(
            self.address,
            _DLDevice(*self.__dlpack_device__()),
            ndim,
            _DLDataType(dtype.code, 8 * dtype.bytes, 1),
            block + head,
            block + head + 8 * ndim,
            0,
        )
        managed.manager_ctx = None
        managed.deleter = _FREE
        return int(block)

    def _interface(self) -> dict[str, Any]:
        self._check()
        dtype = _DTYPES[self.dtype]
        return {
            "shape": self.shape,
            "typestr": dtype.typestr,
            "data": (self.address, not self.writable),
            "strides": tuple(stride * dtype.bytes for stride in self.strides),
            "version": 3,
        }

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self.device != "cpu":
            raise AttributeError(f"array on {self.device} has no __array_interface__")
        return self._interface()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device == "cpu" or self.dtype == "bf16":
            raise AttributeError(f"array of {self.dtype} on {self.device} has no __cuda_array_interface__")
        return self._interface()

    def numpy(self) -> "numpy.ndarray[Any, Any]":
        """The same memory as a numpy array, bf16 as its bits in uint16. BufferError when it is not on the CPU."""
        import numpy

        if self.device != "cpu":
            raise BufferError(f"array on {self.device}: numpy reads memory of the CPU only")
        return numpy.asarray(self)

    def torch(self) -> "torch.Tensor":
        """The same memory as a torch tensor."""
        from torch.utils.dlpack import from_dlpack

        return from_dlpack(self)


# ---- arguments: rows in host memory ----

_TORCH_NAMES = {"bf16": "torch.bfloat16", "f16": "torch.float16", "f32": "torch.float32", "i32": "torch.int32"}
HostRows = tuple[int, tuple[int, ...], tuple[int, ...]]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _tensor_rows(name: str, value: Any, dtype: str) -> HostRows:
    if str(value.dtype) != _TORCH_NAMES[dtype]:
        raise ValueError(f"{name} is a tensor of {value.dtype}, not {_TORCH_NAMES[dtype]}")
    if value.device.type != "cpu":
        raise ValueError(f"{name} is a tensor on {value.device}, not on the CPU")
    return int(value.data_ptr()), tuple(value.shape), tuple(value.stride())


def _interface_rows(name: str, interface: dict[str, Any], dtype: str) -> HostRows:
    wanted = _DTYPES[dtype]
    if interface["typestr"] != wanted.typestr:
        raise ValueError(f"{name} is an array of {interface['typestr']}, not {wanted.typestr} ({dtype})")
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        return int(interface["data"][0]), shape, _contiguous(shape)
    if any(stride % wanted.bytes for stride in strides):
        raise ValueError(f"{name} has strides of {strides} bytes, not whole elements of {wanted.bytes}")
    return int(interface["data"][0]), shape, tuple(stride // wanted.bytes for stride in strides)


def host_rows(name: str, value: Any, dtype: str) -> HostRows:
    """Address, shape and strides (elements) of a torch tensor on the CPU or a numpy array of that dtype.

    bf16 is torch.bfloat16 or numpy.uint16. ValueError or TypeError names the argument.
    """
    if hasattr(value, "data_ptr"):
        return _tensor_rows(name, value, dtype)
    interface = getattr(value, "__array_interface__", None)
    if interface is None:
        raise TypeError(f"{name} is a {type(value).__name__}, neither a torch tensor nor a numpy array")
    return _interface_rows(name, interface, dtype)


def _packed_from(name: str, shape: tuple[int, ...], strides: tuple[int, ...], first: int) -> None:
    """ValueError unless the dimensions from `first` on follow each other without gaps."""
    for at, wanted in zip(range(first, len(shape)), _contiguous(shape[first:]), strict=True):
        if shape[at] > 1 and strides[at] != wanted:
            raise ValueError(f"{name} of shape {shape} has strides {strides}: dimension {at} must be {wanted}")


def packed_rows(name: str, value: Any, dtype: str, columns: int) -> tuple[int, int]:
    """Address and number of rows of a contiguous [rows][columns]."""
    address, shape, strides = host_rows(name, value, dtype)
    if len(shape) != 2 or shape[1] != columns:
        raise ValueError(f"{name} has shape {shape}, not [rows][{columns}]")
    _packed_from(name, shape, strides, 0)
    return address, shape[0]


def strided_rows(name: str, value: Any, dtype: str, inner: tuple[int, ...]) -> tuple[int, int, int]:
    """Address, number of rows and row stride (elements) of a [rows][*inner] whose rows are contiguous."""
    address, shape, strides = host_rows(name, value, dtype)
    if len(shape) != 1 + len(inner) or shape[1:] != inner:
        raise ValueError(f"{name} has shape {shape}, not [rows]{''.join(f'[{n}]' for n in inner)}")
    _packed_from(name, shape, strides, 1)
    if shape[0] > 1 and strides[0] < 0:
        raise ValueError(f"{name} of shape {shape} has strides {strides}: rows must not run backwards")
    return address, shape[0], strides[0] if shape[0] > 1 else math.prod(inner)
