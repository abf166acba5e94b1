"""`patch` and `unpatch`: everything that mmkernels replaces in a model of someone else's, and back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmkernels.integrations.patching import classes, interface
from mmkernels.integrations.patching.changes import Change, Left
from mmkernels.integrations.patching.interface import Setting
from mmkernels.integrations.patching.kinds import kinds
from mmkernels.integrations.patching.report import PatchReport, kept_rows, replaced_rows
from mmkernels.transformers_version import VersionError, import_transformers

_lock = threading.RLock()


@dataclass(eq=False)
class Found:
    """What all kinds of patch find in a model.

    Args:
        settings: configurations that name the attention.
        changes: modules that get methods.
        left: modules that stay as they are.
    """

    settings: list[Setting] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)


def patch(model: nn.Module, *, verbose: bool = True) -> PatchReport:
    """Lets a model of someone else's run on mmkernels, wherever mmkernels has what one of its parts computes.

    The results are the same, and so are its weights, names, configuration and checkpoints. Whatever a part is asked for
    that mmkernels does not compute, such as attention weights, is computed as before. What can't be replaced is left;
    the report says why. Nothing is stored in the model but other classes of some modules and, in the configurations of
    its parts, the name of the attention; `unpatch` takes both back.

    A patched model may be moved, cast, compiled, copied, trained and wrapped (DDP, FSDP2, PEFT); copies are patched
    too. A pickled or saved one is as if it had never been patched, so that it loads without mmkernels: patch again
    after loading, and in each process. A second call finds what is new. A forward pass that runs in another thread goes
    on, with the earlier methods or the new ones.

    Args:
        model: a model of transformers, or any module that contains one, such as one of PEFT. It is changed in place.
        verbose: print the report.

    Returns:
        what runs on mmkernels now, and what was left and why.

    Raises:
        TypeError: `model` is no module, such as a name of the hub: load it first; or one of TorchScript.
        ValueError: it has no part that mmkernels can replace.
        VersionError: (an ImportError) a class of transformers is not the one that mmkernels is written for. The model
            stays as it was.
        RuntimeError: a part was patched, then sharded by a ``fully_shard`` of its own, and is to be patched further.

    Example:
        >>> import mmkernels, transformers
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100))
        >>> report = mmkernels.patch(model, verbose=False)
        >>> report.ops["cross_attention"]
        2
        >>> mmkernels.unpatch(model, verbose=False).ops["cross_attention"]
        2
    """
    _check(model)
    with _lock:
        found = _look(model)
        if not found.settings and not found.changes:
            raise ValueError(_nothing(model, found.left))
        _apply(found)
    report = PatchReport(_name(model), _replaced(found.settings, found.changes), _kept(found.left))
    if verbose:
        print(report)
    return report


def unpatch(model: nn.Module, *, verbose: bool = True) -> PatchReport:
    """Undoes `patch`: every module has its class again, and every configuration the attention that it named before.

    An attention that was set in the meantime stays as it is set. A model that is not patched stays as it is.

    Args:
        model: as there.
        verbose: print the report.

    Returns:
        what ran on mmkernels until now.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: a patched part was sharded by a ``fully_shard`` of its own since; nothing is changed.

    Example:
        >>> import mmkernels, transformers
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100))
        >>> mmkernels.unpatch(model, verbose=False).replaced
        ()
    """
    _check(model)
    with _lock:
        patched = [module for module in model.modules() if classes.is_patched(module)]
        for module in patched:
            classes.check_restorable(module)
        configs = [config for config in interface.configs_of(model) if interface.is_set(config)]
        rows = _rows_of(model, patched, configs)
        for module in patched:
            classes.restore(module)
        for config in configs:
            interface.reset_name(config)
    report = PatchReport(_name(model), rows, restored=True)
    if verbose:
        print(report)
    return report


def _check(model: Any) -> None:
    if isinstance(model, str):
        how = f"load it first, as by AutoModel.from_pretrained({model!r})"
        raise TypeError(f"model must be a torch.nn.Module, got the name {model!r}: {how}")
    if not isinstance(model, nn.Module):
        inner = isinstance(getattr(model, "model", None), nn.Module)
        hint = "; its model is its attribute `model`" if inner else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    if "transformers" in sys.modules:
        import_transformers("mmkernels.patch")


def _look(model: nn.Module) -> Found:
    """Returns what all kinds find, each method of a module once, changing nothing."""
    found = Found()
    for thing in interface.look(model):
        found.settings.append(thing) if isinstance(thing, Setting) else found.left.append(thing)
    taken = set[tuple[int, str]]()
    for kind in kinds():
        for each in kind(model):
            if isinstance(each, Left):
                found.left.append(each)
            elif not taken & {(id(each.module), name) for name in each.methods}:
                taken |= {(id(each.module), name) for name in each.methods}
                found.changes.append(each)
    said = {id(x.module) for x in found.left if x.why != interface.NO_SLOT}  # a better reason
    found.left = [x for x in found.left if x.why != interface.NO_SLOT or id(x.module) not in said]
    found.left = [x for x in found.left if not _is_changed(x, found.changes)]
    return found


def _is_changed(left: Left, changes: Sequence[Change]) -> bool:
    """Returns whether what one kind leaves is changed by another; of an attention, any part of it."""
    parts = left.module.modules() if left.what == interface.WHAT else (left.module,)
    inside = {id(part) for part in parts}
    return any(id(change.module) in inside and change.what.startswith(left.what) for change in changes)


def _apply(found: Found) -> None:
    """Applies all of it, or nothing."""
    for change in found.changes:
        if not change.methods.items() <= classes.methods_of(change.module).items():
            classes.check_restorable(change.module)
    modules = [(change.module, type(change.module)) for change in found.changes]
    fresh = [setting for setting in found.settings if not interface.is_set(setting.config)]
    try:
        for setting in fresh:
            interface.set_name(setting)
        for change in found.changes:
            classes.swap(change.module, change.methods)
    except BaseException:
        for module, before in modules:
            module.__class__ = before
        for setting in fresh:
            interface.reset_name(setting.config)
        raise


def _replaced(settings: Sequence[Setting], changes: Sequence[Change]) -> Any:
    attention = [
        (interface.WHAT, _name(caller), interface.OP, interface.EFFECT) for x in settings for caller in x.callers
    ]
    return replaced_rows([*attention, *((x.what, _name(x.module), x.op, x.effect) for x in changes)])


def _kept(left: Sequence[Left]) -> Any:
    return kept_rows((x.what, _name(x.module), x.why) for x in left)


def _rows_of(model: nn.Module, patched: Sequence[nn.Module], configs: Sequence[Any]) -> Any:
    """Returns the rows of what is patched: the names of our methods where the kinds no longer know the model."""
    there, named = {id(module) for module in patched}, {id(config) for config in configs}
    if not there and not named:
        return ()
    try:
        found = _look(model)
    except VersionError:
        return replaced_rows((", ".join(classes.methods_of(module)), _name(module), "-", "-") for module in patched)
    return _replaced(
        [setting for setting in found.settings if id(setting.config) in named],
        [change for change in found.changes if id(change.module) in there],
    )


def _nothing(model: nn.Module, left: Sequence[Left]) -> str:
    reasons = "; ".join(f"{row.count} x {row.module}: {row.why}" for row in _kept(left))
    return f"model must have a part that mmkernels can replace, got a {_name(model)} that has none" + (
        f" ({reasons})" if reasons else ""
    )


def _name(module: nn.Module) -> str:
    return classes.original_class(module).__name__
