"""A fake GPU that enforces CUDA's rules: tensors report `cuda:0` but keep their values on the CPU.

    with fake_gpu() as captured:
        x = torch.ones(3, device="cuda:0")

As on a GPU, RuntimeError is raised for an operation on tensors of two devices, and for a host copy
or synchronisation during graph capture. Graphs record the launched operations and replay them in
the same memory. attention.varlen_attn is the one in common.py. There is no backward pass: without
CUDA, PyTorch has no stream to run it on.
"""

import operator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import attention
import generate
from tests.common import varlen_on_cpu

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
COPIES = (aten._to_copy.default, aten.copy_.default)  # allowed between devices
SYNCS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
ONLY_ON_GPUS = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten._fused_sdp_choice.default: lambda *args, **settings: 0}  # attention in plain PyTorch
capturing = []  # [the graph being captured], or empty


class CudaTensor(torch.Tensor):
    """Reports a GPU device; `held` has the values. Methods that bypass dispatch are overridden."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="cuda:0")

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return launch(func, args, kwargs or {})

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def copy_(self, source):
        return launch(aten.copy_.default, (self, source), {})

    def __getitem__(self, index):
        return launch(operator.getitem, (self, index), {})

    def __setitem__(self, index, value):
        launch(operator.setitem, (self, index, value), {})


class Launches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return launch(func, args, kwargs or {})


def launch(func, args, kwargs):
    """Run func after checking its tensors' devices, and record it in the graph being captured."""
    is_op = isinstance(func, torch._ops.OpOverload)
    if is_op and func.has_kernel_for_dispatch_key(COMPOSITE):  # made of ops that are checked
        with Launches():
            return func.decompose(*args, **kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = to_gpu = any(x.is_cuda for x in tensors)
    if kwargs.get("device") is not None:
        to_gpu = torch.device(kwargs["device"]).type == "cuda"
        kwargs = kwargs | {"device": "cpu"}
    crosses = tensors and on_gpu != to_gpu or any(x.dim() and x.is_cuda != on_gpu for x in tensors)
    if crosses and func not in COPIES:
        raise RuntimeError(f"{func}: tensors on two devices")
    if capturing and (crosses or on_gpu and func in SYNCS):
        raise RuntimeError(f"{func}: the host cannot synchronise while a graph is captured")

    args, kwargs = tree_map(lambda x: x.held if isinstance(x, CudaTensor) else x, (args, kwargs))
    recording = capturing and to_gpu
    if recording and (func._schema.is_mutable if is_op else func is operator.setitem):
        capturing[0].before.append((args[0], args[0].clone()))
    func = ONLY_ON_GPUS.get(func, func)
    out = func(*args, **kwargs)
    if recording:
        capturing[0].launches.append((func, args, kwargs, out))
    if not to_gpu:
        return out
    with torch.inference_mode(False):
        return tree_map(lambda x: CudaTensor(x) if isinstance(x, torch.Tensor) else x, out)


class Graph:
    def __init__(self):
        self.launches = []  # (function, arguments, keywords, output)
        self.before = []  # (tensor written to, its old value): capture must not change memory

    def pool(self):
        return self

    def replay(self):
        with _disable_current_modes():
            for func, args, kwargs, out in self.launches:
                for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(out)):
                    if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


@contextmanager
def fake_gpu(capability=(9, 0), float32=False):
    """A context with a fake GPU. Yields the list of captures: (graph, its pool, its stream).

    float32: let varlen_attn accept float32, so that the static engine samples the CPU's tokens.
    """
    captured = []

    @contextmanager
    def capture(graph, pool=None, stream=None):
        capturing.append(graph)
        yield
        capturing.clear()
        with _disable_current_modes():
            for tensor, old in reversed(graph.before):
                tensor.copy_(old)
        captured.append((graph, pool or graph, stream))

    def has_varlen(device, dtype):
        return real_has_varlen(device, torch.float16 if float32 else dtype)

    with varlen_on_cpu():
        varlen = attention.varlen_attn
    real_has_varlen, real_tensor = attention.has_varlen, torch.tensor
    changes = (
        (torch.cuda, {"is_available": lambda: True, "device_count": lambda: 1, "graph": capture,
                      "get_device_capability": lambda device: capability, "CUDAGraph": Graph,
                      "stream": nullcontext, "Stream": mock.Mock, "current_stream": mock.Mock,
                      "synchronize": lambda device: None, "_lazy_init": lambda: None}),
        (torch, {"tensor": lambda data, device="cpu", **settings:
                 real_tensor(data, **settings).to(device)}),
        (attention, {"varlen_attn": lambda *args, **settings: launch(varlen, args, settings),
                     "has_varlen": has_varlen}),
        (generate, {"has_varlen": has_varlen}))
    with ExitStack() as stack:
        for module, names in changes:
            stack.enter_context(mock.patch.multiple(module, **names))
        stack.enter_context(Launches())
        yield captured
