"""Values inside a model that its own code collects by hooks: transformers' backbones get their hidden states so.

The code puts the hooks on its modules the first time that it runs, and notes that they are there. They are no hooks of the
user. Copies that are run or traced forget them, and the note. So they are put there again, on the copy, and run in its trace.
"""

from __future__ import annotations

from torch import nn

# The note of transformers that its hooks are in place, on the module whose forward collects.
_NOTE = "_output_capturing_hooks_installed"


def is_capture(hook: object) -> bool:
    """Whether a forward hook is one of a library, which hands a value on to the code that runs the module."""
    return str(getattr(hook, "__module__", "")) == "transformers.utils.output_capturing"


def forget_captures(model: nn.Module) -> nn.Module:
    """Takes such hooks off the modules of `model`, and returns it. Its code puts them there again if it needs them."""
    for module in model.modules():
        vars(module).pop(_NOTE, None)
        for number, hook in list(module._forward_hooks.items()):
            if is_capture(hook):
                del module._forward_hooks[number]
    return model
