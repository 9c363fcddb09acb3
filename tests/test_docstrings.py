"""Every public function, class and method of fused_inr says what it does."""

import importlib
import inspect
import pkgutil

import fused_inr

#: printed by `emit.py`, a function a line of the registry
GENERATED = "fused_inr.activations.generated"


def modules():
    for found in pkgutil.walk_packages(fused_inr.__path__, "fused_inr."):
        inside = found.name.split(".")[1]
        private = inside in ("kernels", "bench", "_csrc") or found.name.rpartition(".")[2].startswith("_")
        if not private and found.name != GENERATED:
            yield importlib.import_module(found.name)


def undocumented(owner, prefix: str):
    """The names below a module or class that have no docstring, of their own or of what they override."""
    for name, value in vars(owner).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            value = value.fget
        if callable(value) or isinstance(value, classmethod | staticmethod):
            value = inspect.unwrap(getattr(value, "__func__", value))
        if inspect.isclass(value) or inspect.isfunction(value):
            if inspect.isclass(owner):
                above = [vars(base).get(name) for base in inspect.getmro(owner)]
                if inspect.isfunction(value) and not any(getattr(other, "__doc__", None) for other in above):
                    yield f"{prefix}.{name}"
            elif value.__module__ == owner.__name__:
                if not value.__doc__:
                    yield f"{prefix}.{name}"
                if inspect.isclass(value):
                    yield from undocumented(value, f"{prefix}.{name}")


def test_public_names_are_documented():
    found = [name for module in modules() for name in undocumented(module, module.__name__)]
    assert not found, "\n".join(found)


def test_the_check_sees_what_is_missing():
    class Owner:
        """Documented."""

        def told(self):
            """Told."""

        def missing(self):
            pass

    class Below(Owner):
        def told(self):
            pass

    assert list(undocumented(Owner, "o")) == ["o.missing"]
    assert list(undocumented(Below, "b")) == []
