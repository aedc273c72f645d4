"""The errors personafast raises on purpose.

Every message is one line that names the argument or the file at fault and says how to mend it: the command line prints
it as it is and exits with 2.
"""


class PersonafastError(ValueError):
    """Base of every error a caller can mend."""


class UnsupportedModelError(PersonafastError):
    """The structure of a model was not understood, so nothing was patched."""


class FormatError(PersonafastError):
    """A file is missing, truncated, of another format, or made for another model."""


class BackendError(PersonafastError):
    """A backend was asked for by name and cannot run here."""


class KernelError(BackendError):
    """A kernel could not be compiled, loaded or launched."""
