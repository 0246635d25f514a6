"""Triton's interpreter, in half of its time, most of which goes into making the types of its small tensors anew.

What is kept here follows from types alone, and is what the interpreter itself made of them the first time. Numbers, and what is
checked of them, are its own.
"""

from types import SimpleNamespace

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter, jit


def quicken() -> None:
    """For versions from 3.6 on; an older one stays as it is."""
    if hasattr(interpreter, "_LangPatchScope"):
        _patch_the_language_once_a_launch()
        _keep_types()
        _leave_what_agrees()


def _patch_the_language_once_a_launch() -> None:
    """It is patched in each call of a device function too, which changes nothing more."""
    # The first argument of a process imports Gluon, which asks `tl.core.static_print` for its signature. By then that would be
    # `print`, which has none in Python 3.10: both modules below are patched, where a kernel's own launch patches `tl` alone.
    jit.mangle_type(0)
    patch, both = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": interpreter.tl, "core": core})

    def once(function):
        return patch(both) if core.is_builtin(core.load) else interpreter._LangPatchScope()

    interpreter._patch_lang = once


def _keep_types() -> None:
    """What a type is made of, by its name, which tells all of it."""
    make_block, make_tensor, numpy_of = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    blocks, shapes, numpy_types = {}, {}, {}

    def block(self, element_ty, shape):
        key = element_ty.name, *[s.value if isinstance(s, core.constexpr) else s for s in shape]
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.name not in shapes:
            make_tensor(self, handle, type)
            shapes[type.name] = shapes.setdefault(str(self.shape), (self.shape, self.numel))  # one object for equal shapes
        self.shape, self.numel = shapes[type.name]

    def numpy_type(dtype):
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = numpy_of(dtype)
        return numpy_types[dtype.name]

    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = block, tensor, numpy_type


def _leave_what_agrees() -> None:
    """Operands of one type are neither cast nor broadcast."""
    check, broadcast, cast = (
        getattr(TritonSemantic, name) for name in ("binary_op_type_checking_impl", "broadcast_impl_value", "cast")
    )
    unwrap = core._unwrap_if_constexpr

    def checked(self, lhs, rhs, lhs_ptr=False, rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        tensors = type(lhs) is type(rhs) is core.tensor
        if tensors and lhs.type.name == rhs.type.name and not div_or_mod and not lhs.dtype.is_ptr():
            return lhs, rhs
        return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic_check, div_or_mod)

    def broadcasted(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def casted(self, input, dst_ty, fp_downcast_rounding=None):
        return input if input.dtype is dst_ty else cast(self, input, dst_ty, fp_downcast_rounding)

    TritonSemantic.binary_op_type_checking_impl = checked
    TritonSemantic.broadcast_impl_value, TritonSemantic.cast = broadcasted, casted
    core._unwrap_if_constexpr = lambda o: o if type(o) is core.tensor else unwrap(o)
