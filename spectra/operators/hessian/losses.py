"""The loss of a model on a batch: how the loss function is called, and what the default loss is."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from spectra.backend.errors import InputError, first_line
from spectra.operators.hessian.batches import moved, tensors_of
from spectra.operators.hessian.isolation import random_states_kept

Loss = Callable[..., Any]
NAMES_OF_MODELS = ("model", "module", "net", "network")
NAMES_OF_OUTPUTS = (
    "output",
    "outputs",
    "out",
    "logits",
    "input",
    "pred",
    "preds",
    "prediction",
    "predictions",
    "y_hat",
    "y_pred",
)
NAMES_OF_TARGETS = ("target", "targets", "label", "labels", "y", "y_true", "true", "truth", "ground_truth")
KEYS_OF_LOGITS = ("logits", "output", "outputs", "out", "prediction", "predictions")
SAME_VALUE = 1e-6  # relative difference of two forms' losses below which both compute the same
# What a model or a loss may raise when it is called in a form that it does not have. Memory errors pass.
CALL_ERRORS = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError, UserWarning)
NO_MEMORY = ("out of memory", "can't allocate memory")
LONGEST_REASON = 160  # characters of an error of another library in a message


@dataclass(frozen=True)
class _Form:
    """A way to call a loss function on a batch.

    Attributes:
        name: The call as users write it.
        first: What the first argument is: "model", "outputs" or "batch".
        call: A function batch -> what the loss function returns.
    """

    name: str
    first: str
    call: Callable[[Any], Any]


class BatchLoss:
    """The loss of one batch, as a scalar with its graph.

    A loss function or module is called in one of these forms, the first that its signature allows and that works:

    * `loss(outputs, targets)` for a pair (inputs, targets); outputs is what the model returned. Where that is a tuple,
      a mapping or a Hugging Face output and the loss does not take it as a whole, its logits, or its only tensor for
      which the loss can be computed.
    * `loss(outputs, batch)`, `loss(outputs, labels)` and `loss(logits, labels)` for a mapping.
    * for a tuple of three or more: `loss(outputs, targets)` with all but the last as the model's inputs, and
      `loss(outputs, second, third, ...)` with the first alone as its input.
    * `loss(targets, outputs)` where the names of its parameters say so, as (y_true, y_pred) do.
    * `loss(outputs, inputs)` for a tensor alone, as an autoencoder has it.
    * `loss(model, batch)`, and `loss(model, inputs, targets)` for a tuple.
    * with one argument, `loss(batch)` or `loss(outputs)`.

    Where several forms work with different values, a first parameter called `model` (module, net, network) or `outputs`
    (output, out, logits, input, prediction) decides; without it the loss is refused. A loss is a real number in a
    tensor. Of a tuple (loss, ...) the first member counts, of a mapping the member "loss".

    Without a loss function, a mapping is given to the model, which returns its loss, as Hugging Face models do: a
    scalar, the member `loss`, or the only scalar of a tuple. For a pair, and for a tuple whose members but the last are
    the model's inputs, the loss is `default_loss`.

    Args:
        model: The model.
        loss: The loss function or module.

    Attributes:
        notes: What a reader of the numbers should know.
    """

    def __init__(self, model: nn.Module, loss: Loss | None):
        self.model, self.loss = model, loss
        self.notes: list[str] = []
        parameters = _parameters_of(model.forward)
        self._accepted = {parameter.name for parameter in parameters}
        self._accepts_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._positions = sum(p.kind in kinds for p in parameters)
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            self._positions = 10**6
        self._form: _Form | None = None
        self._shapes_seen: set[Any] = set()

    def __call__(self, batch: Any, name: str = "a batch") -> torch.Tensor:
        """The loss of a batch.

        Args:
            batch: A mapping, a tuple such as inputs and targets, a tensor, or an object that the loss understands.
            name: What messages call it.

        Returns:
            The loss, a scalar with its graph.

        Raises:
            InputError: Where the model or the loss cannot be called on the batch, or the result is not one number.
        """
        if self._form is None:
            return self._find(batch, name)
        try:
            return _one_number(self._run(self._form, batch))
        except InputError:
            raise
        except Exception as error:  # whatever the caller's loss or model raises
            if _is_to_pass(error):
                raise
            raise InputError(
                f"the loss of {name} cannot be computed ({self._form.name}: {_reason(error)}): check that batch"
            ) from error

    # -- which form

    def _find(self, batch: Any, name: str) -> torch.Tensor:
        """The loss in the form that works. Other batches are then called in the same form."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        worked: list[tuple[_Form, torch.Tensor]] = []
        failures: list[tuple[_Form, Exception]] = []
        notes, notes_of = list(self.notes), {}
        for alternatives in self._forms(batch):
            for form in alternatives:
                self.notes[:] = notes
                try:
                    with random_states_kept(device):  # so that all forms draw the same numbers
                        value = _one_number(self._run(form, moved(batch, device, None)))
                except Exception as error:  # whatever the caller's loss or model raises
                    if _is_to_pass(error):
                        raise
                    failures.append((form, error))
                else:
                    worked.append((form, value))
                    notes_of[form] = list(self.notes)
                    break
        usable = [(form, value) for form, value in worked if value.requires_grad]
        if usable:
            self._form, value = self._chosen(usable)
            self.notes[:] = notes_of[self._form]
            return value
        self.notes[:] = notes
        if worked:
            return worked[0][1]  # without a graph, which is for the caller to refuse
        raise self._failed(batch, name, failures) from (failures[0][1] if failures else None)

    def _chosen(self, usable: list[tuple[_Form, torch.Tensor]]) -> tuple[_Form, torch.Tensor]:
        """The only form, or the one that the name of the loss function's first parameter speaks for."""
        kept = [(form, value) for form, value in usable if form.first == self._named_first()] or usable
        form, value = kept[0]
        others = [other.name for other, found in kept[1:] if not _same(found, value)]
        if others:
            raise InputError(
                f"the loss function can be computed as {form.name} and as {others[0]}, with different values: call its "
                "first parameter `model` or `outputs`, or give a function that takes one of them alone"
            )
        return form, value

    def _named_first(self) -> str:
        """What the name of the loss function's first parameter says that it is: "model", "outputs" or nothing."""
        first = next((parameter.name for parameter in _parameters_of(self.loss)), "")
        return "model" if first in NAMES_OF_MODELS else "outputs" if first in NAMES_OF_OUTPUTS else ""

    def _failed(self, batch: Any, name: str, failures: list[tuple[_Form, Exception]]) -> InputError:
        """The error that says in one line why no form worked."""
        if not failures:
            return InputError(
                f"a loss function of (outputs, targets) or (model, batch) is expected, got {_name_of(self.loss)} that "
                "takes another number of arguments"
            )
        named = [(form, error) for form, error in failures if form.first == self._named_first()]
        for error in (*(error for _, error in named), failures[0][1]):
            if isinstance(error, InputError):
                return error
        failures = named or failures  # why the forms failed that the loss function is not meant for tells nothing
        tried = "; ".join(f"{form.name}: {_reason(error)}" for form, error in failures)
        own = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return InputError(f"the loss of {name} cannot be computed ({tried}): {self._advice(batch, tried, own)}")

    def _advice(self, batch: Any, tried: str, own: torch.dtype) -> str:
        """What to do next, from what a batch holds and from the reasons why no form worked."""
        others = sorted({str(t.dtype) for t in tensors_of(batch) if t.is_floating_point() and t.dtype != own})
        if others:
            return f"bring its {others[0]} tensors to {own}"
        if "same dtype" in tried:
            first = next(tensors_of(batch), None)
            if first is not None and not first.is_floating_point():
                return f"bring its inputs from {first.dtype} to {own}"
            return f"bring what the loss function holds, such as another model, to {own}, or leave out precision="
        if isinstance(batch, Mapping):
            listed = [key for key, v in batch.items() if key in self._accepted and isinstance(v, list)]
            if listed and "not list" in tried:
                return (
                    f"'{listed[0]}' is a list, as torch's collate function makes of lists: give tensors, such as by "
                    "dataset.with_format('torch') or a collate_fn"
                )
            if self.loss is None and "labels" in self._accepted and batch.get("labels") is None:
                return "add 'labels' to the batch, or pass loss=..."
        return "check the batch, or compute the loss of it yourself, with loss=lambda model, batch: ..."

    def _forms(self, batch: Any) -> Iterator[Iterator[_Form]]:
        """The forms that the batch and the loss function's signature allow, in groups; one of a group is enough."""
        if self.loss is None:
            yield iter([self._without_loss(batch)])
            return
        for names, arguments, inputs in _after_outputs(batch):
            if self._takes(1 + len(names)):
                forms = self._with_outputs(names, arguments, inputs, batch)
                if isinstance(batch, tuple) and len(batch) == 1 and names:  # as a DataLoader of one tensor yields
                    forms = itertools.chain(forms, self._with_outputs(("inputs",), lambda b: b, inputs, batch))
                yield forms
        if self._takes(2):
            yield iter([_Form("loss(model, batch)", "model", lambda batch: self._given(self.model, batch))])
        if isinstance(batch, tuple) and len(batch) > 1 and self._takes(1 + len(batch)):
            yield iter([_Form("loss(model, *batch)", "model", lambda batch: self._given(self.model, *batch))])
        if self._takes(1):
            yield iter([_Form("loss(batch)", "batch", self._given)])

    def _with_outputs(self, names: tuple[str, ...], arguments: _Part, inputs: _Part, batch: Any) -> Iterator[_Form]:
        """loss(outputs, ...), then loss(outputs[i], ...) if the outputs are no tensor."""

        def form(member: Any) -> _Form:
            def call(batch: Any) -> Any:
                outputs = self._outputs(inputs(batch))
                ordered = [outputs if member is None else _member(outputs, member), *arguments(batch)]
                return self._given(*(reversed(ordered) if targets_first else ordered))

            shown = ["outputs" if member is None else f"outputs[{member!r}]", *names]
            return _Form(f"loss({', '.join(reversed(shown) if targets_first else shown)})", "outputs", call)

        targets_first = len(names) == 1 and self._names_targets_first()

        yield form(None)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        try:
            with random_states_kept(device):
                outputs = self._outputs(inputs(moved(batch, device, None)))
        except CALL_ERRORS:  # the form above has failed in the same way, and says why
            return
        members = _members(outputs)
        if len(members) > 1:
            yield self._only_member(members, form)
        elif members:
            yield form(members[0])

    def _only_member(self, members: list[Any], form: Callable[[Any], _Form]) -> _Form:
        """The form with the one member of the outputs for which the loss can be computed."""

        def call(batch: Any) -> Any:
            found: list[Any] = []
            errors: list[Exception] = []
            for member in members:
                try:
                    found.append((member, _one_number(form(member).call(batch))))
                except CALL_ERRORS as error:
                    errors.append(error)
            if not found:
                raise errors[0]
            if len(found) > 1:
                raise InputError(
                    f"the loss can be computed for members {found[0][0]!r} and {found[1][0]!r} of the model's outputs: "
                    "pass loss=lambda outputs, targets: ... that picks one"
                )
            return found[0][1]

        return _Form(form("i").name, "outputs", call)

    def _without_loss(self, batch: Any) -> _Form:
        if isinstance(batch, Mapping):
            return _Form("the model's own loss", "model", self._own_loss)
        if isinstance(batch, tuple) and (len(batch) == 2 or self._positions >= len(batch) - 1 > 0):
            return _Form("model(inputs)", "outputs", self._default)
        members = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise InputError(
            f"a batch must be a mapping of tensors or a pair (inputs, targets), got {type(batch).__name__}{members} "
            "that the model takes no such inputs of; for other batches pass loss=lambda model, batch: ..."
        )

    def _names_targets_first(self) -> bool:
        """Whether the names of the loss function's parameters say (y_true, y_pred), as Keras has it."""
        names = [parameter.name for parameter in _parameters_of(self.loss)][:2]
        return len(names) == 2 and names[0] in NAMES_OF_TARGETS and names[1] in NAMES_OF_OUTPUTS

    def _takes(self, count: int) -> bool:
        """Whether the loss function's signature allows so many arguments."""
        function = self.loss.forward if isinstance(self.loss, nn.Module) else self.loss
        try:
            inspect.signature(function).bind(*range(count))  # type: ignore[arg-type]
        except TypeError:
            return False
        except ValueError:  # a builtin function without a signature
            return True
        return True

    # -- calling the model and the loss

    def _run(self, form: _Form, batch: Any) -> Any:
        """What the loss returns. Raises where torch warns that outputs and targets would broadcast."""
        shapes = (form.name, tuple(tuple(t.shape[1:]) for t in tensors_of(batch) if not t.is_nested))
        if shapes in self._shapes_seen:
            return form.call(batch)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")
            try:
                value = form.call(batch)
            except UserWarning as warning:
                shapes_named = str(warning).split(". ")[0]
                raise InputError(
                    f"outputs and targets differ in shape, and the loss would broadcast them ({shapes_named}): "
                    "reshape one, such as targets[:, None]"
                ) from warning
        self._shapes_seen.add(shapes)
        return value

    def _given(self, *arguments: Any) -> Any:
        assert self.loss is not None
        return self.loss(*arguments)

    def _outputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return self.model(**self._arguments(inputs))
        several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
        return self.model(*inputs) if several else self.model(inputs)

    def _arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The members of the batch that the model takes. Others are left out, as the Trainer does, and noted."""
        taken = dict(batch)
        if not self._accepts_all:
            taken = {key: value for key, value in taken.items() if key in self._accepted}
        elif hasattr(self.model, "config"):
            taken = {key: value for key, value in taken.items() if key in self._accepted or not _is_text(value)}
        if batch and not taken:
            wanted = sorted(name for name in self._accepted if name not in ("self", "args", "kwargs"))
            raise InputError(
                f"the model takes no member of a batch with {', '.join(sorted(map(str, batch)))}: it takes "
                f"{', '.join(wanted) or 'nothing'}; name the members so, or pass loss=lambda model, batch: ..."
            )
        unknown = sorted(map(str, set(batch) - set(taken)))
        note = f"members of the batches that the model does not take were left out: {', '.join(unknown)}"
        if unknown and note not in self.notes:
            self.notes.append(note)
        for option, value in (("use_cache", False), ("return_dict", True)):
            if option in self._accepted and option not in taken:
                taken[option] = value
        return taken

    def _own_loss(self, batch: Mapping[str, Any]) -> Any:
        output = self._outputs(batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None and isinstance(output, torch.Tensor) and output.numel() == 1:
            value = output
        if value is None and isinstance(output, tuple):
            scalars = [member for member in output if isinstance(member, torch.Tensor) and member.ndim == 0]
            value = scalars[0] if len(scalars) == 1 else None
        if value is None:
            missing = "'return_loss': True" if "return_loss" in self._accepted else "'labels'"
            raise InputError(
                f"{type(self.model).__name__} returned no loss for a batch with {sorted(map(str, batch))}; "
                f"add {missing} to the batch or pass loss=..."
            )
        return value

    def _default(self, batch: tuple[Any, ...]) -> torch.Tensor:
        output = self._outputs(batch[0] if len(batch) == 2 else batch[:-1])
        members = _members(output)
        if len(members) < 2:
            logits = logits_of(output)
            if self._form is None:
                _refuse_probabilities(logits, batch[-1])
            # Hugging Face outputs of three axes are (rows, tokens, classes)
            classes_last = hasattr(output, "logits") and logits.ndim == 3
            return default_loss(logits, batch[-1], classes_last=classes_last)
        only = self._only_member(
            members, lambda i: _Form("model(inputs)", "outputs", lambda b: default_loss(_member(output, i), b[-1]))
        )
        return only.call(batch)


_Part = Callable[[Any], Any]


def _after_outputs(batch: Any) -> list[tuple[tuple[str, ...], _Part, _Part]]:
    """For each way to call loss(outputs, ...): the names of what follows, its values, and the model's inputs."""
    if isinstance(batch, Mapping):
        forms: list[tuple[tuple[str, ...], _Part, _Part]] = [(("batch",), lambda b: (b,), lambda b: b)]
        if "labels" in batch:
            forms.append((("labels",), lambda b: (b["labels"],), lambda b: b))
        return [*forms, ((), lambda b: (), lambda b: b)]
    if isinstance(batch, tuple) and len(batch) > 1:
        pair = len(batch) == 2
        inputs: _Part = (lambda b: b[0]) if pair else (lambda b: b[:-1])
        forms = [(("targets",), lambda b: (b[-1],), inputs)]
        if not pair:
            names = tuple(f"batch[{i}]" for i in range(1, len(batch)))
            forms.append((names, lambda b: b[1:], lambda b: b[0]))
        return [*forms, ((), lambda b: (), inputs)]
    name = "inputs" if isinstance(batch, torch.Tensor) else "batch"
    return [((name,), lambda b: (b,), lambda b: b), ((), lambda b: (), lambda b: b)]


def _one_number(value: Any) -> torch.Tensor:
    """The loss in what a loss function returned."""
    if isinstance(value, Mapping) and value.get("loss") is not None:
        value = value["loss"]
    elif isinstance(value, tuple | list) and value and isinstance(value[0], torch.Tensor) and value[0].numel() == 1:
        others = [v for v in value[1:] if isinstance(v, torch.Tensor) and v.ndim == 0 and v.requires_grad]
        value = value[0] if not others else value
    if not isinstance(value, torch.Tensor):
        what = f"{type(value).__name__} with {sorted(map(str, value))}" if isinstance(value, Mapping) else _kind(value)
        raise InputError(
            f"the loss must be one number in a tensor with its graph, got {what}; return that tensor alone"
        )
    if value.numel() != 1:
        raise InputError(f"the loss must be one number, got shape {tuple(value.shape)}; reduce it to a mean")
    if value.is_complex():
        raise InputError("the loss must be a real number, got a complex one; return its .real or .abs()")
    return value


def _kind(value: Any) -> str:
    what = "an" if type(value).__name__[0] in "aeiou" else "a"
    return f"{what} {type(value).__name__}"


def _members(output: Any) -> list[Any]:
    """The keys under which a model's outputs may hold the logits: none for a tensor."""
    if isinstance(output, torch.Tensor):
        return []
    if isinstance(getattr(output, "logits", None), torch.Tensor):
        return ["logits"]
    if isinstance(output, Mapping):
        named = [key for key in KEYS_OF_LOGITS if isinstance(output.get(key), torch.Tensor)]
        keys = named[:1] or [key for key, value in output.items() if isinstance(value, torch.Tensor)]
    elif isinstance(output, tuple | list):
        keys = [i for i, value in enumerate(output) if isinstance(value, torch.Tensor)]
    elif dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output)]
        keys = [name for name in names if isinstance(getattr(output, name), torch.Tensor)]
    else:
        return []
    return [key for key in keys if _member(output, key).requires_grad] or keys[:1]


def _member(output: Any, key: Any) -> torch.Tensor:
    by_name = isinstance(key, str) and not (isinstance(output, Mapping) and key in output)
    return getattr(output, key) if by_name else output[key]


def logits_of(output: Any) -> torch.Tensor:
    """The logits of what a model returned: the tensor itself, the member `logits`, or the first tensor of a tuple.

    Args:
        output: What the model returned.

    Returns:
        The logits.

    Raises:
        InputError: If there are none.
    """
    if isinstance(output, torch.Tensor):
        return output
    members = _members(output)
    if members and (len(members) == 1 or isinstance(output, tuple | list)):
        return _member(output, members[0])
    named = f" with {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise InputError(
        f"a tensor of outputs is expected from the model, got {type(output).__name__}{named}; pass loss=lambda model, "
        "batch: ... that computes the loss"
    )


def outputs_of(output: Any) -> list[torch.Tensor]:
    """The tensors with a graph in what a model returned that a loss may be computed from.

    Args:
        output: What the model returned. A scalar in it is taken for a loss.

    Returns:
        The tensor itself, the member `logits`, or all tensors of a tuple, a mapping or a dataclass.
    """
    found = [output] if isinstance(output, torch.Tensor) else [_member(output, key) for key in _members(output)]
    return [tensor for tensor in found if tensor.requires_grad and tensor.ndim]


def default_loss(logits: torch.Tensor, targets: Any, *, classes_last: bool = False) -> torch.Tensor:
    """Cross-entropy for integer targets, mean squared error for floating-point targets of the same shape.

    Args:
        logits: (rows, ..., classes) or (rows, classes, ...).
        targets: The shape of the logits without the classes, or for floating-point targets the shape of the logits.
        classes_last: Whether the last axis is known to hold the classes, as in language models.

    Returns:
        The mean loss, a scalar.

    Raises:
        InputError: If the shapes do not fit, or fit both layouts, and if there is a single class.
    """
    if not isinstance(targets, torch.Tensor):
        raise InputError(f"targets must be a tensor, got {type(targets).__name__}; pass loss=... for others")
    shape, wanted = tuple(logits.shape), tuple(targets.shape)
    if targets.is_floating_point():
        if shape != wanted:
            raise InputError(
                f"outputs {shape} and floating-point targets {wanted} differ in shape, and a mean squared error would "
                "broadcast them: reshape one, or pass loss=..."
            )
        return functional.mse_loss(logits, targets)
    if targets.is_complex() or targets.dtype == torch.bool:
        raise InputError(
            f"integer or floating-point targets are expected, got {targets.dtype}; pass loss=... for others"
        )
    targets = targets.long()
    last = wanted == shape[:-1]
    second = len(shape) > 1 and wanted == shape[:1] + shape[2:]
    if last and second and len(shape) > 2 and not classes_last:
        raise InputError(
            f"outputs {shape} and targets {wanted} fit with the classes on the second axis and on the last: which is "
            "meant cannot be told, so pass loss=..., such as torch.nn.CrossEntropyLoss() for the second"
        )
    if (last and shape[-1:] == (1,)) or (second and not last and shape[1:2] == (1,)):
        raise InputError(
            f"outputs {shape} hold one class, whose cross-entropy is 0 everywhere: pass loss=..., such as "
            "torch.nn.BCEWithLogitsLoss() with floating-point targets of the same shape"
        )
    if last and shape:
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    if second:
        return functional.cross_entropy(logits, targets)
    raise InputError(
        f"outputs {shape} and integer targets {wanted} do not fit a cross-entropy, which expects targets of the "
        "shape of the outputs without the classes; pass loss=..., or give floating-point targets for a regression"
    )


def counted(loss: Loss | None, targets: Any, *, rows: int) -> float:
    """The number of terms in the mean of a loss over a batch, or the sum of their weights.

    Integer targets other than the loss's ignore_index count one each, or their class weight. Floating-point targets
    count one for each entry, and class probabilities one for each row.

    Args:
        loss: The loss module, or a functools.partial, whose ignore_index and class weights are read.
        targets: The targets.
        rows: Rows of the batch. They are counted if the targets are no tensor.

    Returns:
        The number of terms, or the sum of their weights.
    """
    if not isinstance(targets, torch.Tensor):
        return float(rows)
    if targets.is_floating_point():
        if isinstance(loss, nn.CrossEntropyLoss) and targets.ndim:
            return targets.numel() / targets.shape[min(1, targets.ndim - 1)]  # the classes are first without a batch
        return float(targets.numel())
    ignored = _option(loss, "ignore_index")
    kept = targets[targets != (-100 if ignored is None else ignored)]
    by_class = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or (
        isinstance(loss, functools.partial) and loss.func in (functional.cross_entropy, functional.nll_loss)
    )
    weight = _option(loss, "weight") if by_class else None
    if weight is not None and kept.numel():
        classes = kept[(kept >= 0) & (kept < len(weight))].long()  # the loss itself refuses others
        return float(weight.detach().double().cpu()[classes.cpu()].sum())
    return float(kept.numel())


def counts_for_certain(loss: Loss | None, model: nn.Module, batch: Any) -> bool:
    """Whether `counted` is known to give the number of terms of the loss, also for batches of several shapes.

    Args:
        loss: The loss function or module, None for the default.
        model: The model. The own loss of a transformers model averages over labels.
        batch: One of the batches. The model computes the loss of a mapping itself where `loss` is None.

    Returns:
        Whether it is known.
    """
    if loss is None:
        return not isinstance(batch, Mapping) or hasattr(model, "config")
    function = loss.func if isinstance(loss, functools.partial) else loss
    return any(getattr(f, "__module__", "").startswith("torch.nn") for f in (type(function), function))


def _option(loss: Loss | None, name: str) -> Any:
    """An option of a loss module, or of a function that functools.partial gave it."""
    return getattr(loss, name, None) if not isinstance(loss, functools.partial) else loss.keywords.get(name)


def _refuse_probabilities(outputs: torch.Tensor, targets: Any) -> None:
    """Refuse outputs that are probabilities, with integer targets: several losses are possible."""
    if not isinstance(targets, torch.Tensor) or targets.is_floating_point() or outputs.ndim < 2:
        return
    values = outputs.detach()
    if not values.is_floating_point() or not values.numel() or values.min() < 0:
        return
    for axis in {1, values.ndim - 1}:
        if values.size(axis) > 1 and bool((values.sum(axis) - 1).abs().max() < 1e-4):
            raise InputError(
                "the model's outputs are probabilities already, and whether it is trained with their logarithm or with "
                "a cross-entropy that applies softmax again cannot be told: pass loss=, such as lambda outputs, "
                "targets: torch.nn.functional.nll_loss(outputs.log(), targets)"
            )


def _parameters_of(function: Any) -> list[inspect.Parameter]:
    """The parameters of a function or of a module's forward, none where they are not known."""
    try:
        return list(inspect.signature(getattr(function, "forward", function)).parameters.values())
    except (TypeError, ValueError):
        return []


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _is_text(value: Any) -> bool:
    """Whether it is text or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list | tuple) and any(isinstance(item, str) for item in value))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    a, b = float(one.detach()), float(other.detach())
    return abs(a - b) <= SAME_VALUE * max(abs(a), abs(b)) or (a != a and b != b)


def _is_to_pass(error: Exception) -> bool:
    """Whether an error says nothing about the call: out of memory, and exceptions that control the measurement."""
    own = type(error).__module__.split(".")[0] in ("spectra", "torch")
    return _is_about_memory(error) or (own and not isinstance(error, CALL_ERRORS))


def _is_about_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)


def _reason(error: BaseException) -> str:
    """The first line of another library's error, shortened."""
    line = first_line(error)
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."
