"""Triton's interpreter, in a third of its time: most of it goes into making the types of its small tensors anew.

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
        # What would be checked is computed, and then not looked at: there are no assertions without `debug`.
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _patch_the_language_once_a_launch() -> None:
    """It is patched in each call of a device function too, which changes nothing more."""
    # The first argument of a process imports Gluon, which asks `tl.core.static_print` for its signature. By then that would be
    # `print`, which has none in Python 3.10: both modules below are patched, where a kernel's own launch patches `tl` alone.
    jit.mangle_type(0)
    patch, both = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": interpreter.tl, "core": core})

    def once(function):
        return patch(both) if core.is_builtin(core.load) else interpreter._LangPatchScope()

    def patch_attr(obj, name, member, builder, scope):
        inner = getattr(member, "__wrapped__", member)  # without the check that there is `_semantic`

        def new_member(*args, **named):
            named["_semantic"] = interpreter.interpreter_semantic
            return inner(*args, **named)

        scope.set_attr(obj, name, new_member)

    interpreter._patch_lang, interpreter._patch_attr = once, patch_attr


def _keep_types() -> None:
    """What a type is made of, by its name, which tells all of it."""
    make_block, make_tensor, blocks, shapes = core.block_type.__init__, core.tensor.__init__, {}, {}

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

    core.block_type.__init__, core.tensor.__init__ = block, tensor
    core.block_type.to_ir = lambda self, builder: self  # of the interpreter's, all of whose types are the language's
    _keep(core.block_type, "with_element_ty", lambda self, scalar: (self.name, scalar.name))
    _keep(interpreter, "_get_np_dtype", lambda dtype: dtype.name)
    computed = "computation_type_impl"  # of two types, or of a type and a number's
    _keep(TritonSemantic, computed, lambda self, a, number, b, other, division: (a.name, number, b.name, other, division))


def _keep(owner, name: str, key) -> None:
    """What the function of that name returned, by the key of its arguments."""
    function, found = getattr(owner, name), {}

    def kept(*args):
        k = key(*args)
        if k not in found:
            found[k] = function(*args)
        return found[k]

    setattr(owner, name, kept)


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
